"""The backend that `auto` takes: what is fastest where it runs, among those that can do the call."""

from __future__ import annotations

from torch import Tensor
from torch.utils._triton import has_triton

from masformer.attention import flash
from masformer.attention.flex import DTYPES, flex_span_attention
from masformer.attention.layout import Layout
from masformer.attention.tiled import tiled_attention
from masformer.spans import Span


def auto_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    scale: float,
    layout: Layout | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """See `masformer.attention.attend` for the shapes."""
    chosen = choose(query, key, value, span, layout, dropout, softcap)
    attention = {"tiled": tiled_attention, "flex": flex_span_attention, "flash": flash.flash_span_attention}[chosen]
    return attention(query, key, value, span, scale, layout, dropout, softcap)


def choose(
    query: Tensor, key: Tensor, value: Tensor, span: Span, layout: Layout | None, dropout: float, softcap: float | None
) -> str:
    """`tiled`, `flex` or `flash`: on CUDA FlexAttention, unless torch or flash-attn has a kernel for just this call."""
    if not query.is_cuda or query.shape[2] == 1:
        return "tiled"
    if flash.is_able(query, key, value, span, layout, dropout, softcap):
        return "flash"
    if dropout or query.dtype not in DTYPES or not has_triton():
        return "tiled"
    everything = span.max_visible is None or key.shape[2] <= span.max_visible
    plain = layout is None and softcap is None and query.shape[2] == key.shape[2]
    if everything and plain and flash.fits(query, key, value):
        return "tiled"  # causal attention, which torch has a kernel for
    return "flex"
