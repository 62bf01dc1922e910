"""Checkpoints that other tools load as they are, or a refusal: `targets` says which tool runs which plan right.

Most tools that do not know a plan run full attention without a word. So nothing is written unless the table of the
tool has an entry for the architecture and the plan, the positions of every layer stay those of the training, and the
masks of the installed transformers agree with the plan, layer by layer (`stock`); config.json is written last.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from masformer.errors import MasformerError
from masformer.export import llama_cpp
from masformer.export.choose import check_export, chosen_entry, form_for, quality_warning, write_config
from masformer.export.forms import form_weights
from masformer.export.llama_cpp import export_gguf, gguf_config
from masformer.export.readme import folder_readme
from masformer.export.stock import SAMPLE, check_stock
from masformer.export.targets import TARGETS
from masformer.files import write_whole
from masformer.models.card import origin_of, write_card
from masformer.models.saving import check_folder, model_folder, whole_weights
from masformer.models.sealing import CODE_FILE, is_sealed, unseal
from masformer.models.wrappers import bare_model

__all__ = [
    "QUANTISED",
    "TARGETS",
    "check_export",
    "check_output",
    "check_quantised",
    "export_gguf",
    "export_model",
    "gguf_config",
    "quality_warning",
    "support_tables",
]

QUANTISED = {"q8_0": GGMLQuantizationType.Q8_0}
"""Name -> how llama.cpp's files store matrices in fewer bits than a dtype has, and the package gguf writes them."""


def export_model(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    target: str,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    source: str | os.PathLike[str] | None = None,
    quantised: str | None = None,
) -> None:
    """Writes what another tool loads, whole or not at all: the same logits there, or an error here.

    Args:
        model: a model with a plan.
        path: the folder to write; for llama.cpp the .gguf file, see `export_gguf` for the tensors of such a file.
        target: the tool, a key of `TARGETS`.
        tokenizer: carried over with its chat template, if given.
        overwrite: replace a model folder that is already there; a card that somebody wrote is kept.
        source: what the model was made of, for the card; see `save_model`.
        quantised: for llama.cpp, a key of `QUANTISED`: matrices are stored so, in place of the model's dtype.

    Raises:
        MasformerError: the model has no plan, the tool cannot run the plan on it (with the nearest plan that it can),
            the folder or file exists (unless `overwrite`), or it cannot be written.
    """
    model = bare_model(model)
    if not is_sealed(model.config):
        raise MasformerError("the model has no plan; call apply_plan first")
    config, plan = unseal(json.loads(model.config.to_json_string()))
    tool, plan, entry = chosen_entry(config, plan, target)
    config.dtype = model.dtype
    weights = whole_weights(model) or model.state_dict()
    origin = origin_of(source or model.config.name_or_path)
    check_quantised(quantised, target)
    if target == llama_cpp.NAME:
        llama_cpp.check_file(path, overwrite=overwrite)
        kind = None if quantised is None else QUANTISED[quantised]
        return llama_cpp.write_model(config, plan, tool, dict(weights), tokenizer, path, origin, kind)
    with model_folder(path, overwrite=overwrite) as folder:
        model.save_pretrained(folder, state_dict=form_weights(config, plan, form_for(config, plan, entry), weights))
        data = write_config(config, plan, tool, entry)
        for file in ("config.json", CODE_FILE):
            (folder / file).unlink()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        config_file = json.dumps(data, indent=2, sort_keys=True) + "\n"
        stock = _stock_config(folder, config_file)
        check_stock(stock, plan, cache=target == "transformers")
        if tokenizer is not None:
            _check_tokenizer(folder, tokenizer, stock)
        text = folder_readme(
            *(folder, Path(path).name, origin, stock, plan, tool),
            tokenizer=tokenizer is not None,
            warning=quality_warning(config, plan),
        )
        write_card(folder, path, text)
        write_whole(folder / "config.json", config_file)


def check_output(
    path: str | os.PathLike[str], target: str, source: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Before long work: whether an export of the source could be written there; raises MasformerError where not."""
    if target == llama_cpp.NAME:
        llama_cpp.check_file(path, overwrite=overwrite, source=source)
    else:
        check_folder(path, overwrite=overwrite)


def check_quantised(quantised: str | None, target: str) -> None:
    """Raises MasformerError for what is not in `QUANTISED`, or for a tool that takes none of it."""
    if quantised is None:
        return
    if target != llama_cpp.NAME:
        raise MasformerError(f"quantised weights are for {llama_cpp.NAME} alone, not for {target}")
    if quantised not in QUANTISED:
        raise MasformerError(f"unknown quantisation {quantised!r}; allowed: {', '.join(QUANTISED)}")


def support_tables() -> Iterator[Table]:
    """For people to read, a table for each tool: what it runs on which architecture, why no more, and the source."""
    for target in TARGETS.values():
        table = Table(
            title=f"{target.name}: checked with {target.tested}", title_justify="left", caption_justify="left"
        )
        for column in ("architecture", "runs", "why no more; source"):
            table.add_column(column, overflow="fold")
        for name, entry in target.entries.items():
            table.add_row(name, ", ".join(entry.plans) or "-", "; ".join(filter(None, (entry.why, entry.source))))
        lines = [f"No {kind}: {why}." for kind, why in target.why.items()]
        table.caption = "\n".join([*lines, f"Other architectures: {target.other}."])
        yield table


def _stock_config(folder: Path, content: str) -> Any:
    """The config as stock transformers will read it."""
    trial = folder / "trial"
    trial.mkdir()
    write_whole(trial / "config.json", content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of rope_scaling, which mlx-lm reads
            return AutoConfig.from_pretrained(trial)
    finally:
        (trial / "config.json").unlink()
        trial.rmdir()


def _check_tokenizer(folder: Path, tokenizer: Any, config: Any) -> None:
    """Whether the folder's tokenizer, under the new model type, still splits text as the model's own did."""
    if not hasattr(tokenizer, "encode"):
        return
    again = AutoTokenizer.from_pretrained(folder, config=config)
    if again.encode(SAMPLE) != tokenizer.encode(SAMPLE):
        raise MasformerError(
            f"the tokenizer would split text in another way under model type {config.model_type}; "
            "save it again with the installed transformers first"
        )
