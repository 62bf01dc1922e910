"""`masformer export`: checkpoints that other tools load."""

from __future__ import annotations

import sys
from typing import Literal

from masformer.cli.options import Figures, StoredModelOptions, console, say
from masformer.cli.parser import INSTEAD
from masformer.errors import MasformerError
from masformer.export import check_export, export_model, quality_warning, support_tables
from masformer.export.verify import check_installed, verify_export
from masformer.models.card import weights_text
from masformer.models.checkpoint import check_folder, load_config


def export(
    model: str,
    out: str,
    options: StoredModelOptions,
    *,
    target: Literal["transformers", "vllm", "mlx-lm", "gguf"],
    overwrite: bool = False,
    verify: bool = False,
    python: str | None = None,
) -> Figures:
    """Writes a checkpoint that another tool loads as it is, or says why it cannot and what it could.

    Args:
        out: folder to write.
        target: the tool; --list shows what each can run.
        dtype: dtype of the weights; auto is what they are stored as, and bfloat16 for those of a quantised .gguf file.
        overwrite: replace a model folder that is already there; a README.md that somebody wrote is kept.
        verify: load the result in the tool and compare logits and a greedy continuation past the window.
        python: for --verify, the Python of an environment that has the tool (default: this one).

    Example:
        masformer export HuggingFaceTB/SmolLM2-135M OUT --target transformers --plan 'full@11-18; window:512' --verify
    """
    if python is not None and not verify:
        raise MasformerError("--python does nothing without --verify")
    check_folder(out, overwrite=overwrite)
    config, own = load_config(model)
    chosen = options.one(own)
    check_export(config, chosen, target)
    if verify:
        check_installed(target, python)
    loaded, tokenizer = options.to_write(model).load(model, chosen)
    if tokenizer is None and target != "transformers":
        raise MasformerError(
            f"{model} has no tokenizer, and {target} runs no text without one; put one beside the model"
        )
    if (warning := quality_warning(config, chosen)) is not None:
        print(f"masformer: warning: {warning}", file=sys.stderr)
    say(f"{out}: {chosen}, for {target}; {weights_text(loaded)}")
    export_model(loaded, out, target, tokenizer, overwrite=overwrite, source=model)
    say(f"{out}/README.md says how to run it")
    figures: Figures = {"model": model, "target": target, "plan": str(chosen)}
    if verify:
        found = verify_export(loaded, out, target, python)
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
    for table in support_tables():
        console.print(table)


INSTEAD[export] = {"list": (show_targets, "show what each tool can run on which architecture, and why, and stop.")}
