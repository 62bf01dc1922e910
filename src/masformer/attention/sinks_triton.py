"""`masformer.attention.sinks` as two kernels for CUDA, in Triton: memory is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from masformer.attention.sinks import CHUNK, Sinks


@triton.jit
def _join(
    Q, K, V, OUT, SUMS, CHUNKS, scale, size, sinks, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(CHUNKS + chunk * 4).to(tl.int64)
    count = tl.load(CHUNKS + chunk * 4 + 1)
    position = tl.load(CHUNKS + chunk * 4 + 2)
    start = tl.load(CHUNKS + chunk * 4 + 3).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDE)
    wide = column < WIDTH
    there = (row < count)[:, None] & wide[None, :]
    place = OUT + (first + row)[:, None] * out_token + head * out_head + column[None, :]
    q = tl.load(Q + (first + row)[:, None] * q_token + head * q_head + column[None, :], there, 0.0).to(tl.float32)
    out = tl.load(place, there, 0.0).to(tl.float32)
    total = tl.load(SUMS + head * tokens + first + row, row < count, 0.0)
    seen = tl.minimum(position + row - size + 1, sinks)
    for sink in range(0, tl.minimum(position + count - size, sinks)):
        k = tl.load(K + (start + sink) * k_token + (head // GROUP) * k_head + column, wide, 0.0).to(tl.float32)
        v = tl.load(V + (start + sink) * v_token + (head // GROUP) * v_head + column, wide, 0.0).to(tl.float32)
        score = tl.where(sink < seen, tl.sum(q * k[None, :], 1) * scale, float("-inf"))
        most = tl.maximum(total, score)
        joined = most + tl.log(tl.exp(total - most) + tl.exp(score - most))
        out = out * tl.exp(total - joined)[:, None] + tl.exp(score - joined)[:, None] * v[None, :]
        total = joined
    tl.store(place, out.to(OUT.dtype.element_ty), there)
    tl.store(SUMS + head * tokens + first + row, total, row < count)


@triton.jit
def _gradients(
    G, Q, K, V, OUT, SUMS, CHUNKS, DQ, DK, DV, scale, size, sinks, tokens,
    g_token, g_head, q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, dq_token, dq_head,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(CHUNKS + chunk * 4).to(tl.int64)
    count = tl.load(CHUNKS + chunk * 4 + 1)
    position = tl.load(CHUNKS + chunk * 4 + 2)
    start = tl.load(CHUNKS + chunk * 4 + 3).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDE)
    wide = column < WIDTH
    there = (row < count)[:, None] & wide[None, :]
    token = (first + row)[:, None]
    q = tl.load(Q + token * q_token + head * q_head + column[None, :], there, 0.0).to(tl.float32)
    g = tl.load(G + token * g_token + head * g_head + column[None, :], there, 0.0).to(tl.float32)
    out = tl.load(OUT + token * out_token + head * out_head + column[None, :], there, 0.0).to(tl.float32)
    total = tl.load(SUMS + head * tokens + first + row, row < count, 0.0)
    delta = tl.sum(g * out, 1)
    place = DQ + token * dq_token + head * dq_head + column[None, :]
    dq = tl.load(place, there, 0.0).to(tl.float32)
    seen = tl.where(row < count, tl.minimum(position + row - size + 1, sinks), 0)
    most = tl.minimum(position + count - size, sinks)
    part = (chunk * tl.num_programs(1) + head).to(tl.int64) * sinks * WIDTH + column
    for sink in range(0, sinks):
        near = wide & (sink < most)
        k = tl.load(K + (start + sink) * k_token + (head // GROUP) * k_head + column, near, 0.0).to(tl.float32)
        v = tl.load(V + (start + sink) * v_token + (head // GROUP) * v_head + column, near, 0.0).to(tl.float32)
        weight = tl.where(sink < seen, tl.exp(tl.sum(q * k[None, :], 1) * scale - total), 0.0)
        slope = weight * (tl.sum(g * v[None, :], 1) - delta) * scale
        dq += slope[:, None] * k[None, :]
        tl.store(DK + part + sink * WIDTH, tl.sum(slope[:, None] * q, 0), wide)
        tl.store(DV + part + sink * WIDTH, tl.sum(weight[:, None] * g, 0), wide)
    tl.store(place, dq.to(DQ.dtype.element_ty), there)


def join(sinks: Sinks, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float) -> None:
    """See `masformer.attention.sinks.join`."""
    strides = [x.stride(i) for x in (q, k, v, out) for i in (0, 1)]
    numbers = scale, sinks.size, sinks.count, q.shape[0]
    _join[_grid(sinks, q)](q, k, v, out, sums, sinks.chunks, *numbers, *strides, **_shape(q, k))


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
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    of_keys, of_values = torch.empty(2, len(sinks.chunks), heads, sinks.count, dim, device=q.device)
    strides = [x.stride(i) for x in (g, q, k, v, out, q_grad) for i in (0, 1)]
    numbers = scale, sinks.size, sinks.count, q.shape[0]
    made = g, q, k, v, out, sums, sinks.chunks, q_grad, of_keys, of_values
    _gradients[_grid(sinks, q)](*made, *numbers, *strides, **_shape(q, k))
    columns = sinks.keys[:, None] + torch.arange(sinks.count, device=q.device)
    columns = columns.clamp(max=len(k) - 1).flatten()  # a document shorter than its sinks adds zeros there
    for grad, parts in ((k_grad, of_keys), (v_grad, of_values)):
        by_chunk = parts.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2)  # [chunks, sinks, kv_heads, dim]
        by_document = by_chunk.new_zeros(len(sinks.keys), *by_chunk.shape[1:])
        by_document.index_add_(0, sinks.documents, by_chunk)
        grad.index_add_(0, columns, by_document.flatten(0, 1).to(grad.dtype))


def _grid(sinks: Sinks, q: Tensor) -> tuple[int, int]:
    return len(sinks.chunks), q.shape[1]


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    wide = triton.next_power_of_2(q.shape[2])
    shape = {"GROUP": q.shape[1] // k.shape[1], "WIDTH": q.shape[2], "WIDE": wide, "ROWS": CHUNK}
    return shape | {"num_warps": 4 if wide <= 64 else 8}
