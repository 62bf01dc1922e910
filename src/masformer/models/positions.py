"""Positions beyond the trained length: longer position tables, and rotary positions by transformers' rope settings.

| positions | method | position p of the extended model |
|---|---|---|
| table | `repeat` | row p mod T of the T trained rows, as Longformer does (arXiv 2004.05150, section 5) |
| | `interpolate` | the trained rows, linearly interpolated to the new length |
| rotary | `yarn` | NTK-by-parts (YaRN, arXiv 2309.00071): slow frequencies interpolated, fast ones kept |
| | `linear` | p / factor (position interpolation, arXiv 2306.15595) |
| | `dynamic` | dynamic NTK: unchanged up to the trained length, then a base that grows with the sequence |
| | `none` | unchanged; the config allows the length, and nothing else |

The factor is new length / trained length. The first method of each kind is the default: `repeat` leaves everything
below the trained length as it was and keeps neighbours apart, and `yarn` needs the least training.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from masformer.errors import MasformerError, check_int, read_int, shown
from masformer.models.wrappers import bare_model

TABLES = {"gpt2": "wpe", "gpt_neo": "wpe", "opt": "decoder.embed_positions"}
"""Model type -> where its base model keeps the table of learned positions."""

ROTARY_METHODS = ("yarn", "linear", "dynamic", "none")
LOCAL_ROTARY = {"afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe"}
"""Model types whose full layers have no positions at all where they have a `sliding_window`: nothing to scale."""
_GLOBAL = "full_attention"
_LENGTH_FREE = {"default", "linear", "llama3"}


def _repeat(rows: Tensor, length: int) -> Tensor:
    return rows[torch.arange(length, device=rows.device) % len(rows)]


def _interpolate(rows: Tensor, length: int) -> Tensor:
    """The first and the last row stay exact: row 0 is special in trained models, and no edge rows become equal."""
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    longer = nn.functional.interpolate(exact.T[None], size=length, mode="linear", align_corners=True)
    return longer[0].T.to(rows.dtype).contiguous()


TABLE_METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {"repeat": _repeat, "interpolate": _interpolate}
"""Method -> (trained rows [T, hidden], new length N) -> rows [N, hidden], of the same dtype and device."""


def parse_max_positions(text: str) -> tuple[int, str | None]:
    """Reads `N` or `N:METHOD`, for example `8192` or `8192:yarn`; the method is None where none is given.

    Raises:
        MasformerError: the text has another form, N is less than 1, or there is no such method.
    """
    match = re.fullmatch(r"\s*(-?\d+)\s*(?::\s*(\w+)\s*)?", text)
    if not match:
        raise MasformerError(
            f"cannot read {shown(text)} as a number of positions; allowed: N or N:METHOD, like 8192:yarn"
        )
    positions = read_int("max_positions", match[1], 1)
    if match[2] not in (None, *TABLE_METHODS, *ROTARY_METHODS):
        raise MasformerError(
            f"unknown position method {match[2]!r}; allowed: {', '.join(TABLE_METHODS)} (learned positions), "
            f"{', '.join(ROTARY_METHODS)} (rotary positions)"
        )
    return positions, match[2]


def position_limit(config: PretrainedConfig) -> int | None:
    """The longest sequence, in tokens, that a config allows; None where it names none (alibi).

    It is `max_position_embeddings`, except under rotary positions whose settings name a trained length and a factor
    beside it: `yarn` and `longrope`, where recipes (Qwen's among them) leave `max_position_embeddings` as it was, and
    `dynamic`, whose formula in transformers reads the trained length from there. Then it is the trained length times
    the factor, if that is more. Under `linear` no trained length is named, and `llama3` uses its own otherwise.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = _ropes(config, getattr(config, "rope_parameters", None) or {}).get(_GLOBAL, {})
    if limit is None or rope.get("rope_type") not in ("yarn", "longrope", "dynamic") or not rope.get("factor"):
        return limit
    trained = limit if rope["rope_type"] == "dynamic" else rope.get("original_max_position_embeddings") or limit
    scaled: int = round(trained * rope["factor"])
    return max(limit, scaled)


def extend_positions(model: PreTrainedModel, max_positions: int, method: str | None = None) -> PreTrainedModel:
    """Lets a model take longer sequences, in place: changes its position table or rotary modules, and its config.

    `repeat`, `none` and `dynamic` leave the logits of sequences within the trained length as they were. `dynamic`
    depends on the longest sequence so far, so logits with a filled cache differ from those without, and its config
    keeps the trained length in `max_position_embeddings`: ask `position_limit`.

    Where layer types have rotary positions of their own (Gemma 3, OLMo 3), those of the `full_attention` layers are
    scaled; those of sliding layers stay, since within a window no key is farther away than before. The types are those
    the model was trained with, whatever its plan. Models without positions in their full layers take only `none`.

    Args:
        model: a causal language model; GPT-Neo needs its plan first.
        max_positions: longest sequence, in tokens; more than the model allows so far.
        method: see the head of this module; by default `repeat` or `yarn`.

    Returns:
        The same model.

    Raises:
        MasformerError: the model has no positions that can be extended, or allows that many already, or the method is
            not one for its kind of positions, or would come on top of another scaling.
    """
    outer, model = model, bare_model(model)
    config, kind = model.config, model.config.model_type
    table = model.base_model.get_submodule(TABLES[kind]) if kind in TABLES else None
    rotary = _rotary_modules(model)
    if table is None and not rotary:
        raise MasformerError(
            f"positions of {kind} models cannot be extended: no known table, and no rotary positions by rope_parameters"
        )
    if any(isinstance(module, GPTNeoSelfAttention) for module in model.modules()):
        raise MasformerError("this gpt_neo model holds masks of the trained length; call apply_plan first")
    methods = ROTARY_METHODS if table is None else tuple(TABLE_METHODS)
    method = methods[0] if method is None else method
    if method not in methods:
        positions = "rotary" if table is None else "learned"
        raise MasformerError(
            f"{kind} models have {positions} positions, which {method!r} cannot extend; allowed: {', '.join(methods)}"
        )
    check_int("max_positions", max_positions, 1)
    if max_positions <= (limit := position_limit(config) or 0):
        raise MasformerError(f"max_positions {max_positions} does nothing: the model has {limit} already; give more")
    if table is None:
        _extend_rotary(model, rotary, max_positions, method)
    else:
        _extend_table(table, max_positions, method)
        config.max_position_embeddings = max_positions
    return outer


def _extend_table(table: Any, length: int, method: str) -> None:
    """Replaces the weight, and keeps the rows before position 0 (`offset` of them, in OPT)."""
    old, offset = table.weight, getattr(table, "offset", 0)
    rows = torch.cat([old.detach()[:offset], TABLE_METHODS[method](old.detach()[offset:], length)])
    table.weight = nn.Parameter(rows, requires_grad=old.requires_grad)
    table.num_embeddings = len(rows)


def _ropes(config: PretrainedConfig, parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Layer type -> its part of the rope settings; `full_attention` -> all of them where the layers share them."""
    nested = {kind: rope for kind, rope in parameters.items() if isinstance(rope, dict)}
    return {kind: rope for kind, rope in nested.items() if kind in config.layer_types} or {_GLOBAL: parameters}


def _rotary_modules(model: PreTrainedModel) -> dict[str, Any]:
    """Name -> module of the rotary positions; empty where the model's rope settings do not rule them all."""
    config = model.config
    found = {name: module for name, module in model.named_modules() if hasattr(module, "rope_type")}
    ruled = getattr(config, "rope_parameters", None) and all(module.config is config for module in found.values())
    return found if ruled and not getattr(config, "alibi", False) else {}


def _extend_rotary(model: PreTrainedModel, rotary: dict[str, Any], length: int, method: str) -> None:
    config = model.config
    longer = _longer(config, rotary, length, method)
    if longer is None:
        allowed = [other for other in ROTARY_METHODS if _longer(config, rotary, length, other)]
        types = ", ".join(
            f"{rope['rope_type']} ({kind})" for kind, rope in _ropes(config, config.rope_parameters).items()
        )
        raise MasformerError(
            f"{config.model_type} models whose rope type is {types} "
            + (f"cannot take {method!r}; allowed: {', '.join(allowed)}" if allowed else "cannot be extended")
        )
    changed, modules = longer
    config.rope_parameters = changed.rope_parameters
    config.max_position_embeddings = changed.max_position_embeddings
    for name, module in modules.items():
        module.config = config
        model.set_submodule(name, module.to(next(rotary[name].buffers()).device).train(rotary[name].training))


def _is_length_free(rope: dict[str, Any]) -> bool:
    """Whether the frequencies do not read max_position_embeddings; those of `yarn` do where it has no factor."""
    return rope["rope_type"] in _LENGTH_FREE or (rope["rope_type"] == "yarn" and bool(rope.get("factor")))


def _longer(
    config: PretrainedConfig, rotary: dict[str, Any], length: int, method: str
) -> tuple[PretrainedConfig, dict[str, Any]] | None:
    """The changed config and its rotary modules; None where the model cannot take the method."""
    parameters, trained = copy.deepcopy(config.rope_parameters), config.max_position_embeddings
    ropes = _ropes(config, parameters)
    if not all(_is_length_free(rope) for rope in ropes.values()):
        return None
    if method != "none":
        local = config.model_type in LOCAL_ROTARY and config.sliding_window
        if local or _GLOBAL not in ropes or ropes[_GLOBAL]["rope_type"] != "default":
            return None
        ropes[_GLOBAL].update(rope_type=method, factor=length / trained)
        if method == "yarn":
            ropes[_GLOBAL]["original_max_position_embeddings"] = trained
    asked = {"rope_parameters": parameters, "max_position_embeddings": trained if method == "dynamic" else length}
    try:
        changed = type(config).from_dict(config.to_dict() | copy.deepcopy(asked))
        modules = {name: type(module)(changed) for name, module in rotary.items()}
    except Exception:  # each architecture refuses settings that it does not know in its own way
        return None
    return (changed, modules) if changed.rope_parameters == parameters else None
