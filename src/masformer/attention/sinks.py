"""The sinks that lie outside a query's window, joined to what the window gave.

There are only a few of them, so that no matrix product pays: on CUDA a kernel of our own reads the queries and the
output once, and writes the output once; elsewhere it is a few lines of torch, which that kernel is held against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64
"""Queries that the kernel takes at once."""


@dataclass(frozen=True, eq=False)
class Sinks:
    """Which queries see which sinks beside their window. Tokens are counted through all rows, end to end.

    Attributes:
        size: keys of the window; a query at position p sees the sinks up to p - size beside it.
        count: the most sinks that a query sees.
        chunks: [chunks, 4] int32: of up to `CHUNK` queries of one document the first query, how many there are, the
            position of the first in its document, and the document's first key.
        ends: [documents + 1] int32, the cumulative numbers of chunks of the documents.
    """

    size: int
    count: int
    chunks: Tensor
    ends: Tensor

    @classmethod
    def of(cls, documents: list[tuple[int, int, int, int]], size: int, count: int, device: torch.device) -> Sinks:
        """Makes the chunks.

        Args:
            documents: of each its first query, the number of queries, the first one's position, and its first key.
            size: keys of the window.
            count: the most sinks that a query sees.
            device: where the tensors shall lie.
        """
        chunks = []
        for query, queries, position, key in documents:
            done = torch.arange(0, queries, CHUNK)
            columns = query + done, (queries - done).clamp(max=CHUNK), position + done, torch.full_like(done, key)
            chunks.append(torch.stack(columns, 1))
        ends = torch.tensor([0, *map(len, chunks)]).cumsum(0)
        return cls(size, count, *(x.to(device, torch.int32) for x in (torch.cat(chunks), ends)))


def join(sinks: Sinks, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float) -> None:
    """Adds the sinks to `out` and `sums`, in place.

    Args:
        sinks: which.
        q: [batch, length, heads, dim], rows end to end in memory.
        k: [batch, key_len, kv_heads, dim].
        v: the same shape.
        out: the shape of `q`, the attention to the window alone.
        sums: [sequences, heads, length], the log-sum-exps of its scores, whose tokens lie end to end.
        scale: factor on the scores.
    """
    if q.is_cuda:
        from masformer.attention import sinks_triton

        sinks_triton.join(sinks, q, k, v, out, sums, scale)
        return
    q, k, v, out = (x.flatten(0, 1) for x in (q, k, v, out))
    rows, scores, _, values, _ = _scores(sinks, q, k, v, scale)
    before = _at(sums, rows)[..., None]
    after = torch.logsumexp(torch.cat([before, scores], -1), -1, keepdim=True)
    out[rows] = out[rows] * (before - after).exp() + ((scores - after).exp()[..., None] * values).sum(-2)
    sums[rows // sums.shape[2], :, rows % sums.shape[2]] = after[..., 0]


def add_gradients(
    sinks: Sinks,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    scale: float,
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
) -> None:
    """Adds what the sinks contribute to the gradients, in place.

    Args:
        sinks: which.
        g: the shape of `q`, the gradient of the joined output.
        q: see `join`.
        k: see `join`.
        v: see `join`.
        out: the joined output.
        sums: the joined log-sum-exps.
        scale: see `join`.
        q_grad: the shape of `q`.
        k_grad: the shape of `k`.
        v_grad: the same.
    """
    if q.is_cuda:
        from masformer.attention import sinks_triton

        sinks_triton.add_gradients(sinks, g, q, k, v, out, sums, scale, q_grad, k_grad, v_grad)
        return
    g, q, k, v, out, q_grad, k_grad, v_grad = (x.flatten(0, 1) for x in (g, q, k, v, out, q_grad, k_grad, v_grad))
    rows, scores, keys, values, columns = _scores(sinks, q, k, v, scale)
    here = g[rows]
    weights = (scores - _at(sums, rows)[..., None]).exp()
    delta = (here * out[rows]).sum(-1, keepdim=True)
    slopes = weights * ((here[:, :, None] * values).sum(-1) - delta) * scale
    q_grad[rows] += (slopes[..., None] * keys).sum(-2).to(q_grad.dtype)
    shape = len(rows), k.shape[1], -1, sinks.count, k.shape[2]  # queries, key heads, their group, sinks, dim
    for grad, factor, other in ((k_grad, slopes, q[rows]), (v_grad, weights, here)):
        part = (factor[..., None] * other[:, :, None]).reshape(shape).sum(2).transpose(1, 2)
        grad.index_add_(0, columns.flatten(), part.flatten(0, 1).to(grad.dtype))


def _at(sums: Tensor, rows: Tensor) -> Tensor:
    """[rows, heads], the sums of these tokens."""
    return sums[rows // sums.shape[2], :, rows % sums.shape[2]]


def _scores(
    sinks: Sinks, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The queries [n], their scores [n, heads, count], and keys and values [n, heads, count, dim] at [n, count]."""
    first, count, position, key = (column[:, None].long() for column in sinks.chunks.T)
    step = torch.arange(CHUNK, device=q.device)
    there = step < count
    rows, positions = ((x + step)[there] for x in (first, position))
    number = torch.arange(sinks.count, device=q.device)
    columns = (key.expand(-1, CHUNK)[there][:, None] + number).clamp(max=len(k) - 1)
    group = q.shape[1] // k.shape[1]
    keys, values = (x[columns].transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = (q[rows][:, :, None] * keys).sum(-1) * scale
    hidden = number > positions[:, None] - sinks.size
    return rows, scores.masked_fill(hidden[:, None], -torch.inf), keys, values, columns
