"""A layer whose units differ, above all backends: one call for each group of units, whose outputs are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from masformer.attention.constant import ConstantSinks
from masformer.errors import MasformerError
from masformer.spans import UnitSpans


def check_units(spans: UnitSpans, kv_heads: int) -> None:
    """Raises MasformerError where the layer has another number of KV heads."""
    if len(spans) != kv_heads:
        raise MasformerError(f"spans for {len(spans)} KV heads, but the keys have {kv_heads}")


def split(x: Tensor, spans: UnitSpans) -> list[Tensor]:
    """The heads of each group.

    Args:
        x: [batch, heads, length, dim], where `heads` is a multiple of the KV heads.
        spans: the layer's.

    Returns:
        For each of `spans.groups` [batch, its heads, length, dim]: views where the heads are neighbours, else copies
        that lie in memory as [batch, length, heads, dim].
    """
    per = x.shape[1] // len(spans)
    return [_taken(x, group.heads, per) for group in spans.groups]


def attend_units(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: UnitSpans,
    attend: Callable[..., Tensor],
    sinks: ConstantSinks | None = None,
) -> Tensor:
    """Attention of a layer whose units differ.

    Args:
        query: [batch, query_heads, query_len, head_dim].
        key: [batch, kv_heads, key_len, head_dim].
        value: [batch, kv_heads, key_len, value_dim].
        spans: of its units.
        attend: attention of some of the heads under one span, with the constant sinks that join there as `sinks`.
        sinks: of the layer.

    Returns:
        [batch, query_heads, query_len, value_dim].
    """
    check_units(spans, key.shape[1])
    parts = zip(*(split(x, spans) for x in (query, key, value)), spans.groups, split_sinks(sinks, spans), strict=True)
    return join([attend(q, k, v, group.span, sinks=own) for q, k, v, group, own in parts], spans)


def split_sinks(sinks: ConstantSinks | None, spans: UnitSpans) -> list[ConstantSinks | None]:
    """Those of each group that join under its span."""
    found = [sinks and sinks.under(group.span) for group in spans.groups]
    return [own and own.of_heads(group.heads, len(spans)) for own, group in zip(found, spans.groups, strict=True)]


def join(parts: Sequence[Tensor], spans: UnitSpans) -> Tensor:
    """The inverse of `split`; lies in memory as [batch, length, heads, dim], as transformers goes on with it."""
    first = parts[0]
    batch, _, length, dim = first.shape
    per = sum(part.shape[1] for part in parts) // len(spans)
    whole = first.new_empty(batch, length, per * len(spans), dim)
    for part, group in zip(parts, spans.groups, strict=True):
        whole = whole.index_copy_(2, _index(group.heads, per, first.device), part.transpose(1, 2))
    return whole.transpose(1, 2)


def _taken(x: Tensor, heads: tuple[int, ...], per: int) -> Tensor:
    if heads[-1] - heads[0] == len(heads) - 1:
        return x[:, heads[0] * per : (heads[-1] + 1) * per]
    return x.transpose(1, 2).index_select(2, _index(heads, per, x.device)).transpose(1, 2)


def _index(heads: tuple[int, ...], per: int, device: torch.device) -> Tensor:
    """The query heads of KV heads."""
    if torch.compiler.is_compiling():  # a graph keeps it as a constant
        return torch.tensor([head * per + number for head in heads for number in range(per)], device=device)
    return _known_index(heads, per, device)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _known_index(heads: tuple[int, ...], per: int, device: torch.device) -> Tensor:
    return torch.tensor([head * per + number for head in heads for number in range(per)], device=device)
