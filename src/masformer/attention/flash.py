"""Windows by the package flash-attn (Dao, arXiv 2307.08691), where it is installed and can do the call."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from masformer.attention.layout import Layout
from masformer.spans import Span, WindowSpan

WIDEST = 256
"""The widest head that the kernels take."""


@cache
def _function() -> Any:
    """`flash_attn_func`, or None where there is no such package, none for this torch, or one before 2.6 (soft caps)."""
    try:
        from flash_attn import flash_attn_func
    except (ImportError, OSError):
        return None
    return flash_attn_func if "softcap" in inspect.signature(flash_attn_func).parameters else None


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention's kernels, flash-attn's and torch's alike, take such heads."""
    dtypes = {query.dtype, key.dtype, value.dtype}
    width = query.shape[-1]
    return dtypes in ({torch.bfloat16}, {torch.float16}) and value.shape[-1] == width <= WIDEST and width % 8 == 0


def window(span: Span) -> tuple[int, int] | None:
    """A span as flash-attn's `window_size`; None where it cannot say it.

    The query at i sees the keys from i - left to i + right, and a window's size counts the query's own key.
    """
    if isinstance(span, WindowSpan) and not span.sinks:
        return span.size - 1, 0
    return None


def is_able(
    query: Tensor, key: Tensor, value: Tensor, span: Span, layout: Layout | None, dropout: float, softcap: float | None
) -> bool:
    """Whether flash-attn is here and can do it: windows without sinks, half precision, no padding, no packing."""
    plain = layout is None and not (dropout and softcap is not None)
    return plain and query.is_cuda and window(span) is not None and fits(query, key, value) and _function() is not None


def flash_span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    scale: float,
    layout: Layout | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """See `masformer.attention.attend` for the shapes; only where `is_able` says so."""
    out = _function()(
        *(x.transpose(1, 2) for x in (query, key, value)),  # to [batch, length, heads, head_dim]
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=window(span),
        softcap=softcap or 0.0,
    )
    return out.transpose(1, 2)  # type: ignore[no-any-return]
