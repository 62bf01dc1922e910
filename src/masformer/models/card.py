"""Model cards: the README.md beside a checkpoint, with the header that a hub reads."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._validators import validate_repo_id
from transformers import PretrainedConfig

from masformer.cost import bytes_text
from masformer.files import write_whole
from masformer.models.gguf_files import general_metadata
from masformer.models.positions import position_limit
from masformer.plan import AttentionPlan

CARD = "README.md"
OWN = "<!-- masformer writes this card anew with the model; without this line it is kept as it is. -->"
_TERMS = ("license", "license_name", "license_link", "language")
_TIMEOUT = 10.0


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, as far as that is known.

    Attributes:
        base_model: hub id or ids.
        terms: license, license_name, license_link and language, those that its own card has.
    """

    base_model: str | list[str] | None = None
    terms: dict[str, Any] = field(default_factory=dict)


def origin_of(source: str | os.PathLike[str] | None) -> Origin:
    """What the source's own card or, in a .gguf file, its metadata says; what they do not say is left out.

    Args:
        source: hub id, folder or .gguf file; None: the model is new.
    """
    if source is None or not os.fspath(source):
        return Origin()
    name, path = os.fspath(source), Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return _of_gguf(general_metadata(path))
    if path.exists():
        return _of_card(path / CARD)
    if not _is_on_hub(name):
        return Origin()
    try:
        card = _of_card(Path(hf_hub_download(name, CARD, etag_timeout=_TIMEOUT)))
    except Exception:  # it has none, or cannot be asked now
        card = Origin()
    return Origin(name, card.terms)


def _is_on_hub(name: str) -> bool:
    """Whether something of that name was loaded from a hub: a folder that is gone now has the form of one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir()


def _of_card(file: Path) -> Origin:
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data
    except Exception:  # no card, or one with a header that nobody can read
        return Origin()
    return Origin(data.get("base_model"), {name: data.get(name) for name in _TERMS if data.get(name)})


def _of_gguf(general: dict[str, Any]) -> Origin:
    renamed = {"license": "license", "license.name": "license_name", "license.link": "license_link"}
    terms = {name: general[f"general.{key}"] for key, name in renamed.items() if general.get(f"general.{key}")}
    if languages := general.get("general.languages"):
        terms["language"] = list(languages)
    for key in ("general.source.repo_url", "general.base_model.0.repo_url"):
        if found := re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?", str(general.get(key))):
            return Origin(found[1], terms)
    return Origin(None, terms)


def header(origin: Origin, plan: AttentionPlan, library: str, tags: Sequence[str] = ()) -> str:
    """The YAML header.

    Args:
        origin: of the model.
        plan: one span per layer.
        library: what loads the checkpoint, by the hub's name for it.
        tags: beside those that every card has.
    """
    data = ModelCardData(
        base_model=origin.base_model,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["masformer", "mixed-attention-spans", *tags],
        attention_plan=str(plan),
        **origin.terms,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{OWN}\n"


def checkpoint_card(
    name: str, origin: Origin, config: PretrainedConfig, plan: AttentionPlan, rows: Sequence[tuple[str, str]] = ()
) -> str:
    """The card of a checkpoint that carries its plan.

    Args:
        name: its title.
        origin: of the model.
        config: of the model.
        plan: one span per layer.
        rows: more lines of its table.
    """
    facts = [("plan", f"`{plan}`"), ("positions", str(position_limit(config) or "no limit")), *rows]
    lines = [
        header(origin, plan, "masformer"),
        f"# {name}",
        "",
        f"A {config.model_type} model with mixed attention spans (MASFormer, arXiv 2310.12442). Load it with",
        "`masformer.load_model(folder)`, or transformers' `AutoModelForCausalLM` after `import masformer`. Without",
        "masformer transformers refuses it, for it would run full attention everywhere.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts),
        "",
    ]
    return "\n".join(lines)


def weights_text(model: Any) -> str:
    """How many weights a model has, of what dtype and size."""
    weights = list(model.parameters())
    count, size = sum(each.numel() for each in weights), sum(each.nbytes for each in weights)
    return f"{count:,} weights in {str(model.dtype).removeprefix('torch.')}, {bytes_text(size)}"


def write_card(folder: Path, target: str | os.PathLike[str], text: str) -> None:
    """Writes a card into a new folder, unless one that was not written here is to be replaced with the folder: that is
    kept.

    Args:
        folder: the new folder.
        target: the folder that it takes the place of, if there is one.
        text: the card.
    """
    old = Path(target) / CARD
    own = not old.is_file() or OWN.encode() in old.read_bytes()
    write_whole(folder / CARD, text if own else old.read_bytes())
