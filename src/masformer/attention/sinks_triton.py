"""`masformer.attention.sinks` as two kernels for CUDA, in Triton: memory is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from masformer.attention.sinks import CHUNK, Sinks

NARROWEST = 16
"""Triton multiplies matrices at least so wide: few sinks, or few queries of a key head, are filled up to it."""


@triton.jit
def _join(
    Q, K, V, OUT, SUMS, CHUNKS, scale, length,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    SIZE: tl.constexpr, SINKS: tl.constexpr, PLACES: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(CHUNKS + chunk * 4).to(tl.int64)
    count = tl.load(CHUNKS + chunk * 4 + 1)
    position = tl.load(CHUNKS + chunk * 4 + 2)
    start = tl.load(CHUNKS + chunk * 4 + 3).to(tl.int64)
    row, column, sink = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, PLACES)
    there = (row < count)[:, None] & (column < WIDTH)[None, :]
    near = (sink < tl.minimum(position + count - SIZE, SINKS))[:, None] & (column < WIDTH)[None, :]
    token, key = (first + row)[:, None], (start + sink)[:, None]
    place = OUT + token * out_token + head * out_head + column[None, :]
    total_place = SUMS + ((first // length) * tl.num_programs(1) + head) * length + first % length + row
    q = tl.load(Q + token * q_token + head * q_head + column[None, :], there, 0.0)
    k = tl.load(K + key * k_token + (head // GROUP) * k_head + column[None, :], near, 0.0)
    v = tl.load(V + key * v_token + (head // GROUP) * v_head + column[None, :], near, 0.0)
    out = tl.load(place, there, 0.0).to(tl.float32)
    total = tl.load(total_place, row < count, 0.0)
    seen = sink[None, :] < tl.minimum(position + row - SIZE + 1, SINKS)[:, None]
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    most = tl.maximum(total, tl.max(scores, 1))
    weights = tl.exp(scores - most[:, None])
    rest = tl.exp(total - most)
    whole = rest + tl.sum(weights, 1)
    out = out * rest[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    tl.store(place, (out / whole[:, None]).to(OUT.dtype.element_ty), there)
    tl.store(total_place, most + tl.log(whole), row < count)


@triton.jit
def _gradients(
    G, Q, K, V, OUT, SUMS, CHUNKS, DQ, PARTS, scale, length,
    g_token, g_head, q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, dq_token, dq_head,
    SIZE: tl.constexpr, SINKS: tl.constexpr, PLACES: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(CHUNKS + chunk * 4).to(tl.int64)
    count = tl.load(CHUNKS + chunk * 4 + 1)
    position = tl.load(CHUNKS + chunk * 4 + 2)
    start = tl.load(CHUNKS + chunk * 4 + 3).to(tl.int64)
    row, column, sink = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, PLACES)
    there = (row < count)[:, None] & (column < WIDTH)[None, :]
    near = (sink < tl.minimum(position + count - SIZE, SINKS))[:, None] & (column < WIDTH)[None, :]
    token, key = (first + row)[:, None], (start + sink)[:, None]
    q = tl.load(Q + token * q_token + head * q_head + column[None, :], there, 0.0)
    g = tl.load(G + token * g_token + head * g_head + column[None, :], there, 0.0)
    out = tl.load(OUT + token * out_token + head * out_head + column[None, :], there, 0.0)
    k = tl.load(K + key * k_token + (head // GROUP) * k_head + column[None, :], near, 0.0)
    v = tl.load(V + key * v_token + (head // GROUP) * v_head + column[None, :], near, 0.0)
    total_place = SUMS + ((first // length) * tl.num_programs(1) + head) * length + first % length + row
    total = tl.load(total_place, row < count, 0.0)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    seen = sink[None, :] < tl.minimum(position + row - SIZE + 1, SINKS)[:, None]
    seen = seen & (row < count)[:, None]
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    weights = tl.where(seen, tl.exp(scores - total[:, None]), 0.0)
    slopes = weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None]) * scale
    place = DQ + token * dq_token + head * dq_head + column[None, :]
    dq = tl.load(place, there, 0.0).to(tl.float32) + tl.dot(slopes.to(k.dtype), k, input_precision="ieee")
    tl.store(place, dq.to(DQ.dtype.element_ty), there)
    dk = tl.dot(tl.trans(slopes.to(q.dtype)), q, input_precision="ieee")
    dv = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    part = (chunk * tl.num_programs(1) + head).to(tl.int64)
    inside = (sink < SINKS)[:, None] & (column < WIDTH)[None, :]
    at = sink[:, None] * WIDTH + column[None, :]
    tl.store(PARTS + part * SINKS * WIDTH + at, dk, inside)
    tl.store(PARTS + (programs + part) * SINKS * WIDTH + at, dv, inside)


def join(sinks: Sinks, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float) -> None:
    """See `masformer.attention.sinks.join`."""
    strides = [x.stride(i) for x in (q, k, v, out) for i in (1, 2)]
    grid = sinks.chunks.shape[0], q.shape[2]
    _join[grid](q, k, v, out, sums, sinks.chunks, scale, sums.shape[2], *strides, **_shape(sinks, q, k))


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
    """See `masformer.attention.sinks.add_gradients`."""
    (rows, length, kv_heads, dim), heads, chunks = k.shape, q.shape[2], sinks.chunks.shape[0]
    parts = torch.empty(2, chunks, heads, sinks.count, dim, device=q.device)  # of keys, and of values
    strides = [x.stride(i) for x in (g, q, k, v, out, q_grad) for i in (1, 2)]
    made = g, q, k, v, out, sums, sinks.chunks, q_grad, parts
    _gradients[chunks, heads](*made, scale, sums.shape[2], *strides, **_shape(sinks, q, k))
    documents = sinks.keys.shape[0]
    if sinks.row == length >= sinks.count and documents == rows:
        by_document = parts.view(2, documents, -1, kv_heads, heads // kv_heads, sinks.count, dim).sum((2, 4))
        for grad, more in zip((k_grad, v_grad), by_document.transpose(2, 3), strict=True):
            grad[:, : sinks.count].add_(more)
        return
    by_chunk = parts.view(2, chunks, kv_heads, -1, sinks.count, dim).sum(3)
    by_document = by_chunk.new_zeros(2, documents, *by_chunk.shape[2:])
    by_document.index_add_(1, sinks.documents, by_chunk)
    columns = sinks.keys[:, None] + torch.arange(sinks.count, device=q.device)
    columns = columns.clamp(max=rows * length - 1).flatten()  # a document shorter than its sinks adds zeros there
    for grad, more in zip((k_grad, v_grad), by_document.transpose(2, 3).flatten(1, 2).to(k_grad.dtype), strict=True):
        grad.view(-1, kv_heads, dim).index_add_(0, columns, more)


def _shape(sinks: Sinks, q: Tensor, k: Tensor) -> dict[str, int]:
    width = q.shape[3]
    wide = triton.next_power_of_2(max(NARROWEST, width))
    return {
        "SIZE": sinks.size,
        "SINKS": sinks.count,
        "PLACES": max(NARROWEST, triton.next_power_of_2(sinks.count)),
        "GROUP": q.shape[2] // k.shape[2],
        "WIDTH": width,
        "WIDE": wide,
        "ROWS": CHUNK,
        "num_warps": 4 if wide <= 128 else 8,
    }
