"""Attention under a span: one call, several backends."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from masformer.attention import operator
from masformer.attention.call import Call, in_autocast
from masformer.attention.constant import ConstantSinks, check_sinks
from masformer.attention.layout import Layout
from masformer.attention.named import BACKENDS
from masformer.attention.units import attend_units
from masformer.errors import MasformerError
from masformer.spans import Span, UnitSpans

__all__ = ["BACKENDS", "ConstantSinks", "Layout", "attend"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span | UnitSpans | str,
    *,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    layout: Layout | None = None,
    sinks: ConstantSinks | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in which each query sees the keys its span allows.

    Args:
        query: [batch, query_heads, query_len, head_dim]; the queries are the last `query_len` positions.
        key: [batch, kv_heads, key_len, head_dim]; `query_heads` is a multiple of `kv_heads`.
        value: [batch, kv_heads, key_len, value_dim].
        span: which keys are visible: a span, or its text (window:512+4); or spans by unit, one for each KV head, whose
            query heads see what it says.
        scale: factor on the scores; head_dim ** -0.5 by default.
        padding_mask: [batch, key_len], 1 = real. Padding sees nothing, is seen by nobody, and its output is zero.
        document_ids: [batch, key_len] integers; each document sees only itself, and positions start again in it.
            The tokens of a document lie together in their row.
        dropout: probability that an attention weight is dropped; the caller passes 0 outside training.
        softcap: bound c on the scores, c * tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2); None for no bound.
        layout: padding and documents worked out beforehand, in place of `padding_mask` and `document_ids`, for models
            that attend once per layer.
        sinks: the weights of constant sinks, for spans that have one (window:512+sink).
        backend: `reference` (dense oracle), `tiled` (any device), `flash` (torch's FlashAttention: NVIDIA GPUs, half
            precision), `flex` (FlexAttention: CUDA, no dropout), or `auto`: on CUDA the first of flash, flex and tiled
            that can do the call; else tiled.

    Returns:
        [batch, query_heads, query_len, value_dim], in the dtype of `query`; under autocast in its dtype.

    Raises:
        MasformerError: shapes that do not fit, a value out of range, a backend that is unknown or cannot do the call.
    """
    if backend not in BACKENDS:
        raise MasformerError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    span = span if isinstance(span, UnitSpans) else Span.parse(span)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise MasformerError(f"{name} must be [batch, heads, length, head_dim], got {list(tensor.shape)}")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise MasformerError(
            f"shapes do not fit: query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        )
    if query.shape[1] % key.shape[1]:
        raise MasformerError(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads")
    if query.shape[2] > key.shape[2]:
        raise MasformerError(f"{query.shape[2]} queries, but only {key.shape[2]} keys; queries are the last positions")
    if not 0 <= dropout < 1:
        raise MasformerError(f"dropout must be at least 0 and below 1, got {dropout}")
    if softcap is not None and softcap <= 0:
        raise MasformerError(f"softcap must be above 0, got {softcap}")
    if layout is not None and not (padding_mask is None and document_ids is None):
        raise MasformerError("layout takes the place of padding_mask and document_ids; pass one or the other")
    documents = None if layout is None else layout.documents
    for name, given in (("padding_mask", padding_mask), ("document_ids", document_ids), ("layout", documents)):
        if given is not None and given.shape != (key.shape[0], key.shape[2]):
            allowed = [key.shape[0], key.shape[2]]
            raise MasformerError(f"{name} must be [batch, key_len] = {allowed}, got {list(given.shape)}")
    check_sinks(sinks, span, query, value)
    compiling = torch.compiler.is_compiling()
    if layout is None and not compiling:
        layout = Layout.of(padding_mask, document_ids)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = in_autocast(query, key, value)  # not every kernel below is one that autocast knows
    if isinstance(span, UnitSpans):
        masks = {"padding_mask": padding_mask, "document_ids": document_ids} if layout is None else {"layout": layout}
        options = {"scale": scale, "dropout": dropout, "softcap": softcap, "backend": backend}
        return attend_units(query, key, value, span, partial(attend, **masks, **options), sinks)  # type: ignore[arg-type]
    sinks = None if sinks is None else sinks.like(query, value)
    call = Call(query, key, value, span, scale, layout, dropout, softcap, sinks)
    if compiling:
        documents = Layout.numbered(padding_mask, document_ids) if layout is None else layout.documents
        if call.is_causal and documents is None and backend != "reference":
            return call.causal()  # which torch compiles as it is
        return operator.attend(call, documents, backend)
    chosen = BACKENDS[backend]
    if (reason := chosen.objection(call)) is not None:
        raise MasformerError(reason)
    return call.run(chosen)
