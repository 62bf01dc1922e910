"""The oracle: a dense mask and a softmax, in any dtype up to float64. Memory grows as N x N."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from masformer.attention.layout import Layout
from masformer.spans import Span


def visible_mask(span: Span, query_len: int, documents: Tensor) -> Tensor:
    """Bool mask [batch, query_len, key_len], True where the query may see the key.

    Args:
        span: the span.
        query_len: the queries are the last `query_len` positions.
        documents: [batch, key_len] document of each token, -1 for padding. A token's position counts from the
            first token of its document; padding sees nothing and is seen by nobody.
    """
    key_len = documents.shape[1]
    index = torch.arange(key_len, device=documents.device)
    same = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, None, :]
    first = torch.where(same, index, key_len).amin(-1)
    position = index - first
    visible = same & span.visible(position[:, :, None], index[None, None, :] - first[:, :, None])
    return visible[:, key_len - query_len :]


def reference_attention(
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
    if layout is None:
        documents = torch.zeros(key.shape[0], key.shape[2], dtype=torch.long, device=key.device)
    else:
        documents = layout.documents.to(key.device)
    visible = visible_mask(span, query.shape[2], documents)[:, None]
    group = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values = (x.to(dtype).repeat_interleave(group, dim=1) for x in (key, value))
    scores = (query.to(dtype) @ keys.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    weights = F.dropout(scores.softmax(-1).masked_fill(~visible, 0), dropout)
    return (weights @ values).to(query.dtype)
