"""The oracle: a dense mask and a softmax, in any dtype up to float64. Memory grows as N x N."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from masformer.attention.call import Backend, Call
from masformer.attention.constant import ConstantSinks
from masformer.attention.layout import Layout
from masformer.spans import Span


def visible_mask(span: Span, query_len: int, layout: Layout) -> Tensor:
    """Bool mask [batch, query_len, key_len], True where the query may see the key.

    Args:
        span: the span.
        query_len: the queries are the last `query_len` positions.
        layout: the documents. A token's position counts from the first token of its document; padding sees nothing and
            is seen by nobody.
    """
    documents = layout.documents
    key_len = documents.shape[1]
    index = torch.arange(key_len, device=documents.device)
    same = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, None, :]
    first = torch.where(same, index, key_len).amin(-1)
    query_position, key_position = (index - first)[:, :, None], index[None, None, :] - first[:, :, None]
    if layout.skipped is not None:
        skipped = torch.tensor(layout.skipped, device=documents.device)[:, None, None]
        query_position, key_position = (
            position + skipped * (position >= span.sinks) for position in (query_position, key_position)
        )
    visible = same & span.visible(query_position, key_position)
    return visible[:, key_len - query_len :]


class Reference(Backend):
    """The oracle as a backend: it does every call."""

    name = "reference"

    def objection(self, call: Call) -> str | None:
        return None

    def run(self, call: Call) -> Tensor:
        key, layout = call.key, call.layout
        if layout is None:
            layout = Layout(torch.zeros(key.shape[0], key.shape[2], dtype=torch.long, device=key.device), ())
        visible = visible_mask(call.span, call.query.shape[2], layout)[:, None].to(key.device)
        return dense_attention(*call.tensors, visible, call.scale, call.dropout, call.softcap, call.sinks)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: ConstantSinks | None = None,
) -> Tensor:
    """Softmax over the visible keys and a constant sink, at least in float32; zero where a query sees no key.

    `visible` is a bool tensor that broadcasts to [batch, query_heads, query_len, key_len].
    """
    group = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values = (x.to(dtype).repeat_interleave(group, dim=1) for x in (key, value))
    scores = (query.to(dtype) @ keys.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    if sinks is None:
        weights = F.dropout(scores.softmax(-1).masked_fill(~visible, 0), dropout)
        return (weights @ values).to(query.dtype)
    logit, constant = sinks.by_head()
    column = logit.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
    shares = torch.cat([scores, column], -1).softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0)
    out = F.dropout(shares[..., :-1].masked_fill(~visible, 0), dropout) @ values
    if constant is not None:
        out = out + shares[..., -1:] * constant.to(dtype)[:, None]
    return out.to(query.dtype)
