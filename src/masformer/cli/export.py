"""`masformer export`: checkpoints that other tools load."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from masformer.cli.options import Figures, StoredModelOptions, console, say
from masformer.cli.parser import INSTEAD
from masformer.defaults import TargetName
from masformer.errors import MasformerError


def export(
    model: str,
    out: str,
    options: StoredModelOptions,
    *,
    target: TargetName,
    quantised: Literal["q8_0"] | None = None,
    sinks: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
    python: str | None = None,
) -> Figures:
    """Writes a checkpoint that another tool loads as it is, or says why it cannot and what it could.

    For llama.cpp OUT is a .gguf file, and MODEL may be one, quantised in any way: its tensors stay as they are.

    Args:
        out: folder to write; for llama.cpp the .gguf file, with a README beside it.
        target: the tool; --list shows what each can run.
        quantised: for llama.cpp, store the matrices so, in place of in the dtype.
        sinks: for a .gguf file and a plan with constant sinks (window:512+sink), the folder that `masformer convert
            --sinks fit` made of that file: its constants are added to the file.
        dtype: dtype of the weights; auto is what they are stored as, and bfloat16 for those of a quantised .gguf file.
        overwrite: replace a model folder or file that is already there; a README that somebody wrote is kept.
        verify: load the result in the tool and compare logits and a greedy continuation past the window.
        python: for --verify, the Python of an environment that has the tool (default: this one).

    Example:
        masformer export HuggingFaceTB/SmolLM2-135M OUT --target transformers --plan 'full@11-18; window:512' --verify
    """
    from masformer.export import (
        check_export,
        check_output,
        check_quantised,
        export_gguf,
        export_model,
        gguf_config,
        llama_cpp,
        quality_warning,
    )
    from masformer.export.verify import check_installed, verify_export
    from masformer.models.bridge import give_sinks
    from masformer.models.card import weights_text
    from masformer.models.checkpoint import load_config
    from masformer.models.native import native_plan

    if python is not None and not verify:
        raise MasformerError("--python does nothing without --verify")
    check_output(out, target, model, overwrite=overwrite)
    check_quantised(quantised, target)
    as_it_is = target == llama_cpp.NAME and Path(model).suffix == ".gguf" and Path(model).is_file()
    if as_it_is:
        if quantised or options.dtype != "auto" or options.max_positions is not None:
            raise MasformerError(
                "the tensors of a .gguf file stay as they are for llama.cpp, so --quantised, --dtype and "
                "--max-positions do nothing"
            )
        config = gguf_config(model)
        own = native_plan(config)
    else:
        if sinks is not None:
            raise MasformerError(
                "--sinks is for .gguf files that go to llama.cpp; other models bring their own constants"
            )
        config, own = load_config(model)
    chosen = options.one(own)
    check_export(config, chosen, target)
    given = llama_cpp.sinks_for(chosen, sinks) if as_it_is else {}
    if verify:
        check_installed(target, python)
    loaded, tokenizer = None, None
    if not as_it_is:
        loaded, tokenizer = options.to_write(model).load(model, chosen)
    elif verify:
        loaded, tokenizer = options.load(model, own if given else chosen)
        if given:
            give_sinks(loaded, chosen, given)
    if loaded is not None and tokenizer is None and target != "transformers":
        raise MasformerError(
            f"{model} has no tokenizer, and {target} runs no text without one; put one beside the model"
        )
    if (warning := quality_warning(config, chosen)) is not None:
        print(f"masformer: warning: {warning}", file=sys.stderr)
    if as_it_is:
        say(
            f"{out}: {chosen}, for {target}; the tensors of {model}{'' if sinks is None else f', the sinks of {sinks}'}"
        )
        export_gguf(model, out, chosen, overwrite=overwrite, sinks=sinks)
    else:
        say(f"{out}: {chosen}, for {target}; {weights_text(loaded)}{f', stored in {quantised}' if quantised else ''}")
        export_model(loaded, out, target, tokenizer, overwrite=overwrite, source=model, quantised=quantised)
    readme = llama_cpp.readme_path(out) if target == llama_cpp.NAME else f"{out}/README.md"
    say(f"{readme} says how to run it")
    figures: Figures = {"model": model, "target": target, "plan": str(chosen)}
    if verify:
        found = verify_export(loaded, out, target, python, tokenizer=tokenizer)
        console.print(
            f"verified in {target} {found.version}: {found.tokens} tokens, window {found.window}; logits differ by "
            f"{found.difference:.2g} (full attention: {found.full_difference:.2g}), the same {len(found.continuation)} "
            "tokens follow",
            markup=False,
        )
        figures["verification"] = found.to_dict()
    return figures


def show_targets() -> None:
    """Prints what each tool can run, with reasons and sources."""
    from masformer.export import support_tables

    for table in support_tables():
        console.print(table)


INSTEAD[export] = {"list": (show_targets, "show what each tool can run on which architecture, and why, and stop.")}
