"""Attention of one query per row over keys in any order: decoding out of a cache that stores them as a ring."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from masformer.attention.auto import Auto
from masformer.attention.call import Call
from masformer.attention.constant import ConstantSinks
from masformer.attention.reference import dense_attention
from masformer.attention.tiled import Kernel
from masformer.spans import FullSpan


@dataclass(frozen=True, eq=False)
class Slots:
    """Where one query of each row finds its keys, said by tensors, so that a CUDA graph finds other keys each time.

    Slot s < `sinks` holds position s, any other the newest position p that is stored there: s = p modulo `ring`.

    Attributes:
        newest: [rows] int64, the position of the query, whose own key is stored.
        low: [rows] int64, the oldest position, other than a sink, that the query sees.
        sinks: first positions that stay where they are.
        ring: slots after them; None: there is a slot for each position.
    """

    newest: Tensor
    low: Tensor
    sinks: int
    ring: int | None

    def visible(self, slots: int) -> Tensor:
        """[rows, 1, 1, slots] bool: which of so many slots the query sees."""
        newest, low = self.newest[:, None], self.low[:, None]
        slot = torch.arange(slots, device=newest.device)[None]
        position = slot if self.ring is None else newest - (newest - slot) % self.ring
        seen = (slot <= newest) & ((position >= low) | (slot < self.sinks))
        return seen[:, None, None]


def attend_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: ConstantSinks | None = None,
) -> Tensor:
    """Softmax attention over the keys that `slots` say; on CUDA without a look at them by the host.

    Args:
        query: [batch, query_heads, 1, head_dim].
        key: [batch, kv_heads, slots, head_dim], the storage of a cache.
        value: [batch, kv_heads, slots, value_dim].
        slots: which of them hold what.
        scale: factor on the scores.
        softcap: see `masformer.attend`.
        sinks: those that join; None: there are none.

    Returns:
        [batch, query_heads, 1, value_dim].
    """
    if sinks is not None:
        sinks = sinks.like(query, value)
    if query.is_cuda and query.dtype != torch.float64:  # the kernels sum up in float32
        from masformer.attention import stored_triton

        return stored_triton.attend(query, key, value, slots, scale, softcap, sinks)
    return dense_attention(query, key, value, slots.visible(key.shape[2]), scale, 0.0, softcap, sinks)


def attend_stored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: ConstantSinks | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over the visible keys, wherever they lie: softmax does not ask for their order.

    Args:
        query: [batch, query_heads, 1, head_dim].
        key: [batch, kv_heads, key_len, head_dim].
        value: [batch, kv_heads, key_len, value_dim].
        visible: bool [batch or 1, 1, 1, key_len], at least one key visible in each row; None: all are.
        scale: factor on the scores.
        dropout: see `masformer.attend`.
        softcap: see `masformer.attend`.
        sinks: those that join; None: there are none.
        backend: `reference` for dense scores in at least float32, any other for torch's fused kernels.

    Returns:
        [batch, query_heads, 1, value_dim].
    """
    if sinks is not None:
        sinks = sinks.like(query, value)
    if backend == "reference":
        everything = torch.ones(1, dtype=torch.bool, device=key.device) if visible is None else visible
        return dense_attention(query, key, value, everything, scale, dropout, softcap, sinks)
    if query.is_cuda and visible is None:
        return Auto().run(Call(query, key, value, FullSpan(), scale, None, dropout, softcap, sinks))
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    folded = query.reshape(batch, kv_heads, heads // kv_heads, dim)  # the queries of a group share their keys
    with _without_cudnn() if query.is_cuda else nullcontext():
        out = Kernel(scale, dropout, softcap, sinks).masked(folded, key, value, visible)
    return out.reshape(batch, heads, 1, -1)


def _without_cudnn() -> AbstractContextManager[None]:
    """cuDNN plans anew for every length, which takes longer than a token."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels)  # type: ignore[no-any-return]
