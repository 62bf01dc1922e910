"""`masformer.attention.sinks` as kernels for CUDA, in Triton: what is as large as the queries is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from masformer.attention.launching import NARROWEST, on
from masformer.attention.sinks import CHUNK, Sinks

STEP = 32
"""Chunks of a document whose gradients are read at once."""


@triton.jit
def _join(
    Q, K, V, OUT, SUMS, CHUNKS, scale, length,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    SIZE: tl.constexpr, SINKS: tl.constexpr, PLACES: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(CHUNKS + chunk * 4)
    count = tl.load(CHUNKS + chunk * 4 + 1)
    position = tl.load(CHUNKS + chunk * 4 + 2)
    start = tl.load(CHUNKS + chunk * 4 + 3).to(tl.int64)
    row, column, sink = tl.arange(0, ROWS), tl.arange(0, WIDE)[None, :], tl.arange(0, PLACES)
    there = (row < count)[:, None] & (column < WIDTH)
    near = (sink < tl.minimum(position + count - SIZE, SINKS))[:, None] & (column < WIDTH)
    seen = sink[None, :] < tl.minimum(position + row - SIZE + 1, SINKS)[:, None]
    sequence, token, kv_head = first // length, first.to(tl.int64), head // GROUP
    place = OUT + token * out_token + head * out_head + (row[:, None] * out_token + column)
    sums = SUMS + (sequence * tl.num_programs(1) + head) * length + first % length + row
    q = tl.load(Q + token * q_token + head * q_head + (row[:, None] * q_token + column), there, 0.0)
    k = tl.load(K + start * k_token + kv_head * k_head + (sink[:, None] * k_token + column), near, 0.0)
    v = tl.load(V + start * v_token + kv_head * v_head + (sink[:, None] * v_token + column), near, 0.0)
    out = tl.load(place, there, 0.0).to(tl.float32)
    before = tl.load(sums, row < count, 0.0)
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    most = tl.maximum(before, tl.max(scores, 1))
    after = most + tl.log(tl.exp(before - most) + tl.sum(tl.exp(scores - most[:, None]), 1))
    weights = tl.exp(scores - after[:, None])
    out = out * tl.exp(before - after)[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    tl.store(place, out.to(OUT.dtype.element_ty), there)
    tl.store(sums, after, row < count)


@triton.jit
def _gradients(
    G, Q, K, V, OUT, SUMS, CHUNKS, DQ, PARTS, scale, length,
    g_token, g_head, q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, dq_token, dq_head,
    SIZE: tl.constexpr, SINKS: tl.constexpr, PLACES: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(CHUNKS + chunk * 4)
    count = tl.load(CHUNKS + chunk * 4 + 1)
    position = tl.load(CHUNKS + chunk * 4 + 2)
    start = tl.load(CHUNKS + chunk * 4 + 3).to(tl.int64)
    row, column, sink = tl.arange(0, ROWS), tl.arange(0, WIDE)[None, :], tl.arange(0, PLACES)
    there = (row < count)[:, None] & (column < WIDTH)
    near = (sink < tl.minimum(position + count - SIZE, SINKS))[:, None] & (column < WIDTH)
    seen = sink[None, :] < tl.minimum(position + row - SIZE + 1, SINKS)[:, None]
    seen = seen & (row < count)[:, None]
    sequence, token, heads = first // length, first.to(tl.int64), tl.num_programs(1) * GROUP
    k = tl.load(K + start * k_token + kv_head * k_head + (sink[:, None] * k_token + column), near, 0.0)
    v = tl.load(V + start * v_token + kv_head * v_head + (sink[:, None] * v_token + column), near, 0.0)
    dk = tl.zeros([PLACES, WIDE], tl.float32)
    dv = tl.zeros([PLACES, WIDE], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        place = DQ + token * dq_token + head * dq_head + (row[:, None] * dq_token + column)
        sums = SUMS + (sequence * heads + head) * length + first % length + row
        q = tl.load(Q + token * q_token + head * q_head + (row[:, None] * q_token + column), there, 0.0)
        g = tl.load(G + token * g_token + head * g_head + (row[:, None] * g_token + column), there, 0.0)
        out = tl.load(OUT + token * out_token + head * out_head + (row[:, None] * out_token + column), there, 0.0)
        dq = tl.load(place, there, 0.0)
        total = tl.load(sums, row < count, 0.0)
        delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weights = tl.where(seen, tl.exp(scores - total[:, None]), 0.0)
        slopes = weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None]) * scale
        dq = dq.to(tl.float32) + tl.dot(slopes.to(k.dtype), k, input_precision="ieee")
        tl.store(place, dq.to(DQ.dtype.element_ty), there)
        dk += tl.dot(tl.trans(slopes.to(q.dtype)), q, input_precision="ieee")
        dv += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    part = chunk * tl.num_programs(1) + kv_head
    inside = (sink < SINKS)[:, None] & (column < WIDTH)
    at = sink[:, None] * WIDTH + column
    tl.store(PARTS + part * SINKS * WIDTH + at, dk, inside)
    tl.store(PARTS + (programs + part) * SINKS * WIDTH + at, dv, inside)


@triton.jit(do_not_specialize=["chunks"])
def _sum_parts(
    PARTS, CHUNKS, ENDS, DK, DV, chunks, dk_token, dk_head, dv_token, dv_head,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    document, kv_head, sink = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    kv_heads, sinks = tl.num_programs(1), tl.num_programs(2)
    at, end = tl.load(ENDS + document), tl.load(ENDS + document + 1)
    count = tl.load(CHUNKS + (end - 1) * 4 + 1)
    position = tl.load(CHUNKS + (end - 1) * 4 + 2)
    start = tl.load(CHUNKS + (end - 1) * 4 + 3).to(tl.int64)
    column = tl.arange(0, WIDE)
    dk = tl.zeros([WIDE], tl.float32)
    dv = tl.zeros([WIDE], tl.float32)
    while at < end:  # Triton's interpreter counts to no number that it loaded
        chunk = at + tl.arange(0, STEP)
        part = PARTS + (((chunk.to(tl.int64) * kv_heads + kv_head) * sinks + sink) * WIDTH)[:, None] + column[None, :]
        there = (chunk < end)[:, None] & (column < WIDTH)[None, :]
        dk += tl.sum(tl.load(part, there, 0.0), 0)
        dv += tl.sum(tl.load(part + chunks.to(tl.int64) * kv_heads * sinks * WIDTH, there, 0.0), 0)
        at += STEP
    inside = (column < WIDTH) & (sink < position + count - SIZE)  # a document may be shorter than its sinks
    for_keys = DK + (start + sink) * dk_token + kv_head * dk_head + column
    for_values = DV + (start + sink) * dv_token + kv_head * dv_head + column
    tl.store(for_keys, (tl.load(for_keys, inside, 0.0).to(tl.float32) + dk).to(DK.dtype.element_ty), inside)
    tl.store(for_values, (tl.load(for_values, inside, 0.0).to(tl.float32) + dv).to(DV.dtype.element_ty), inside)


def join(sinks: Sinks, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float) -> None:
    """See `masformer.attention.sinks.join`."""
    strides = [x.stride(i) for x in (q, k, v, out) for i in (1, 2)]
    grid = sinks.chunks.shape[0], q.shape[2]
    with on(q.device):
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
    (kv_heads, dim), chunks, documents = k.shape[2:], len(sinks.chunks), len(sinks.ends) - 1
    parts = torch.empty(2, chunks, kv_heads, sinks.count, dim, device=q.device)  # of keys, and of values
    strides = [x.stride(i) for x in (g, q, k, v, out, q_grad) for i in (1, 2)]
    made = g, q, k, v, out, sums, sinks.chunks, q_grad, parts
    shape = _shape(sinks, q, k)
    others = [x.stride(i) for x in (k_grad, v_grad) for i in (1, 2)]
    summed = parts, sinks.chunks, sinks.ends, k_grad, v_grad
    rest = {name: shape[name] for name in ("SIZE", "WIDTH", "WIDE")}
    with on(q.device):
        _gradients[chunks, kv_heads](*made, scale, sums.shape[2], *strides, **shape, num_stages=1)
        _sum_parts[documents, kv_heads, sinks.count](*summed, chunks, *others, **rest, STEP=STEP)


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
