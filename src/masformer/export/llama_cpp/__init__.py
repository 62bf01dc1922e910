"""Files for llama.cpp, and a README beside each: written from a model, or from a .gguf file whose tensors stay as they
are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType
from transformers import AutoConfig, PretrainedConfig

from masformer.attention import ConstantSinks
from masformer.cost import bytes_text
from masformer.errors import MasformerError
from masformer.export.choose import chosen_entry, quality_warning
from masformer.export.llama_cpp.files import Content, read_gguf, write_gguf
from masformer.export.llama_cpp.forms import FORMS, check, head_dim_of, kv_heads_of, sliding, with_plan
from masformer.export.llama_cpp.weights import KINDS, content_of
from masformer.export.targets import Target
from masformer.files import write_whole
from masformer.models.card import OWN, Origin, header, origin_of
from masformer.models.checkpoint import load_config
from masformer.models.saving import check_place
from masformer.models.sinks import by_layer, check_there, read_sinks, sink_layers, without_sink_weights
from masformer.plan import AttentionPlan, PlanSource
from masformer.spans import WindowSpan

NAME = "llama.cpp"
"""The target."""
UBATCH, PADDING = 512, 256
"""Tokens that llama.cpp computes at a time, by default, and what it rounds the cells of a cache up to."""
_KEPT_BYTES = 2
"""Of a value in its cache, by default."""


def check_file(
    path: str | os.PathLike[str], *, overwrite: bool = False, source: str | os.PathLike[str] | None = None
) -> None:
    """Before long work: whether a file can be written there.

    Args:
        path: the file.
        overwrite: it may be there already.
        source: what it is made of, which it must not be.

    Raises:
        MasformerError: its name is of another kind, it exists (unless `overwrite`), or it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise MasformerError(f"{NAME} reads one file, so OUT must end in .gguf: {path}")
    if path.exists() and not overwrite:
        raise MasformerError(f"{path} exists already; choose another file, or --overwrite (overwrite=True) it")
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise MasformerError(f"{path} is the source itself; choose another file")
    if path.is_dir():
        raise MasformerError(f"{path} is a folder, so it is not overwritten")
    check_place(path)


def gguf_config(path: str | os.PathLike[str]) -> PretrainedConfig:
    """The config of the model in a .gguf file, as far as a plan depends on it. transformers is not asked: it reads
    fewer architectures than are written here, and the vocabulary each time.

    Raises:
        MasformerError: the file cannot be read, is of an architecture that takes no windows, lacks tensors, or has
            what the architecture that runs windows for it would read in another way.
    """
    return _config_of(read_gguf(path), path)


def _config_of(content: Content, path: str | os.PathLike[str]) -> PretrainedConfig:
    name = content.architecture
    if name not in FORMS:
        raise MasformerError(
            f"{os.fspath(path)} is of llama.cpp's architecture {name}, which takes no plan; allowed: {', '.join(FORMS)}"
        )
    try:
        numbers = {
            "num_hidden_layers": int(content.get("block_count")),
            "hidden_size": int(content.get("embedding_length")),
            "num_attention_heads": int(content.get("attention.head_count")),
            "num_key_value_heads": kv_heads_of(content),
            "max_position_embeddings": int(content.get("context_length")),
        }
    except TypeError:
        raise MasformerError(f"{os.fspath(path)} lacks numbers of its layers, or has others in each layer") from None
    check(content)
    wide = {} if name == "olmo2" else {"head_dim": head_dim_of(content)}
    return AutoConfig.for_model(name, **numbers, **wide)


def export_gguf(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    plan: PlanSource,
    *,
    overwrite: bool = False,
    sinks: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a .gguf file that runs a plan in llama.cpp, of one that does not: other metadata, the same tensors.

    Args:
        source: the file, quantised in any way.
        path: the file to write.
        plan: one span per layer.
        overwrite: replace a file that is already there.
        sinks: folder of a checkpoint whose constant sinks are added, for a plan that has such (`fit_sinks`).

    Raises:
        MasformerError: llama.cpp cannot run the plan on it (with the nearest plan that it can), a file cannot be read
            or written, or constant sinks are missing, do not fit or have no place in the plan.
    """
    check_file(path, overwrite=overwrite, source=source)
    content = read_gguf(source)
    config = _config_of(content, source)
    tool, plan, _ = chosen_entry(config, plan, NAME)
    found = sinks_for(plan, sinks)
    _write(with_plan(content, plan, found, sinks), path, origin_of(source), config, plan, tool)


def sinks_for(plan: AttentionPlan, sinks: str | os.PathLike[str] | None) -> dict[int, ConstantSinks]:
    """The constant sinks in a folder, by layer; none where no folder is named.

    Raises:
        MasformerError: constant sinks are named that the plan has not, or the other way round, or the folder has not
            all that the plan needs.
    """
    if sinks is None and sink_layers(plan):
        raise MasformerError(
            f"the plan {plan} has constant sinks, and a .gguf file has no weights for them: name the folder that "
            "masformer convert --sinks fit made of it as --sinks (sinks=)"
        )
    if sinks is not None and not sink_layers(plan):
        raise MasformerError(f"the plan {plan} has no constant sink, so sinks do nothing; allowed: window:512+sink")
    if sinks is None:
        return {}
    found = read_sinks(sinks)
    check_there(os.fspath(sinks), load_config(sinks)[1], plan)
    return found


def write_model(
    config: PretrainedConfig,
    plan: AttentionPlan,
    tool: Target,
    weights: dict[str, Any],
    tokenizer: Any,
    path: str | os.PathLike[str],
    origin: Origin,
    kind: GGMLQuantizationType | None = None,
) -> None:
    """The file of a model of transformers; errors as of `export_model`.

    Args:
        config: its stock config.
        plan: one that the tool takes.
        tool: llama.cpp.
        weights: by the names that transformers has.
        tokenizer: of the model.
        path: the file to write; it may be there already.
        origin: of the model.
        kind: how matrices are stored; by default as the config's dtype says.
    """
    if tokenizer is None:
        raise MasformerError(f"{NAME} reads no file without a tokenizer")
    general = {"license": str(origin.terms["license"])} if "license" in origin.terms else {}
    rest = without_sink_weights(weights)
    content = content_of(config, rest, tokenizer, kind or KINDS[config.dtype], Path(path).stem, general)
    check(content)
    _write(with_plan(content, plan, by_layer(weights)), path, origin, config, plan, tool)


def _write(
    content: Content,
    path: str | os.PathLike[str],
    origin: Origin,
    config: PretrainedConfig,
    plan: AttentionPlan,
    tool: Target,
) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MasformerError(f"cannot write {path}: {error.strerror}") from None
    write_gguf(content, path)
    card = readme_path(path)
    if not card.is_file() or OWN.encode() in card.read_bytes():
        write_whole(card, _readme(content, path.name, origin, config, plan, tool))


def readme_path(path: str | os.PathLike[str]) -> Path:
    """Where the README of a file lies: beside it, under its name."""
    return Path(path).with_suffix(".README.md")


def cache_bytes(content: Content, plan: AttentionPlan, length: int, ubatch: int = UBATCH) -> int:
    """Bytes of llama.cpp's cache for one sequence, in float16.

    A full layer has a cell for each position of the context; one that slides for its window and the tokens that are
    computed at a time (`llama_kv_cache_iswa`).
    """
    whole = _padded(length)
    cells = [min(whole, _padded(span.size + ubatch)) if isinstance(span, WindowSpan) else whole for span in plan.spans]
    return sum(cells) * kv_heads_of(content) * 2 * head_dim_of(content) * _KEPT_BYTES


def _padded(cells: int) -> int:
    return -(-cells // PADDING) * PADDING


_RUN = """\
```
llama-server -m {file} -c {limit} -np 1
```

(`-np 1`: one sequence, which has the whole context; each further one has a cache of its own.)"""
_WINDOWS = """\
The architecture in the file is `{architecture}`, which computes what the model's own does and has windows; its own has
none, and would run full attention. {old}

- `--swa-full` keeps the whole cache for layers that slide as well: it undoes what the plan saves.
- Prompts that begin alike: a prompt that goes on where the last one ended is not read again. One that branches off
  earlier is, from the last checkpoint on, for the layers that slide have forgotten what lies before their window.
  llama-server keeps checkpoints of those layers by itself (`--ctx-checkpoints N` for more or fewer).
- A file that is converted from the model's own folder again, by llama.cpp's `convert_hf_to_gguf.py`, has no windows:
  it reads no `layer_types` of these models."""
_SINKS = """\
Layers that slide have constants in place of the first tokens of a text: a logit for each head, and their values as
biases. They take no cell of the cache."""
_OLD = {
    "granite_swa": "Older versions refuse it: they do not know the architecture.",
    "step35": "Older versions refuse it: they do not know the architecture.",
    "olmo2": "**Older versions run another plan, silently**: full attention in every fourth layer.",
}


def _readme(
    content: Content, name: str, origin: Origin, config: PretrainedConfig, plan: AttentionPlan, tool: Target
) -> str:
    since = {form.windows: form.since for form in FORMS.values()}.get(content.architecture)
    limit = int(content.get("context_length"))
    lengths = sorted({length for length in (2048, 8192, 32768) if length < limit} | {limit})
    full = AttentionPlan.parse("full", len(plan))
    sizes = [[bytes_text(cache_bytes(content, each, length)) for each in (plan, full)] for length in lengths]
    rows = [f"| {length} | {ours} | {whole} |" for length, (ours, whole) in zip(lengths, sizes, strict=True)]
    lines = [
        header(origin, plan, "gguf", [NAME, "gguf"]).strip(),
        f"# {name}: mixed attention spans, for {NAME}",
        f"Plan: `{plan}`. Written by masformer for {NAME}"
        + ("" if plan.is_full else f" from {since} on")
        + f", checked with {tool.tested}.",
        "## Run",
        _RUN.format(file=name, limit=limit),
    ]
    if any(sliding(plan)):
        lines.append(_WINDOWS.format(architecture=content.architecture, old=_OLD[content.architecture]))
    if sink_layers(plan):
        lines.append(_SINKS)
    if (warning := quality_warning(config, plan)) is not None:
        lines.append(f"{warning[0].upper()}{warning[1:]}.")
    lines += [
        "## Memory",
        "\n".join(
            [
                f"Weights: {bytes_text(content.nbytes)}. KV cache of one sequence in float16, {UBATCH} tokens computed "
                "at a time (`-ub`):",
                "",
                "| context | this plan | full attention |",
                "|---|---|---|",
                *rows,
            ]
        ),
    ]
    return "\n\n".join(lines) + "\n"
