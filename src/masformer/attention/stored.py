"""Attention of one query per row over keys in any order: decoding out of a cache that stores them as a ring."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from masformer.attention.auto import Auto
from masformer.attention.call import Call
from masformer.attention.constant import ConstantSinks
from masformer.attention.reference import dense_attention
from masformer.attention.tiled import Kernel
from masformer.spans import FullSpan


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
