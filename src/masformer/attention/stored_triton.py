"""`masformer.attention.stored.attend_slots` as two kernels for CUDA, in Triton.

There are fewer pairs of rows and heads than a GPU has processors, so that the keys of each are shared among several
programs, whose results are joined by the log-sum-exps of their scores (flash-decoding, arXiv 2311.01282). How many keys
there are is read from the device's memory: a captured graph goes on as the text grows.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from masformer.attention.constant import ConstantSinks
from masformer.attention.launching import NARROWEST, on
from masformer.attention.stored import Slots

TILE, MOST_KEYS = 16384, 128
"""Bytes of the keys that a program takes at once, and their number at most."""
MOST = 64
"""Programs that share the keys of one row and head."""
EACH = 4
"""Programs for each processor of the GPU, where there are keys enough."""


@triton.jit(do_not_specialize=["sinks", "ring", "group"])
def _part(
    Q, K, V, NEWEST, LOW, PARTS, SUMS, scale, softcap,
    q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot, sinks, ring, group,
    IS_RING: tl.constexpr, CAPPED: tl.constexpr, PLACES: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, V_WIDTH: tl.constexpr, V_WIDE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    newest = tl.load(NEWEST + row).to(tl.int32)
    low = tl.load(LOW + row).to(tl.int32)
    if IS_RING:
        first = low * 0
        stop = tl.minimum(newest + 1, sinks + ring)
    else:
        first = low
        stop = newest + 1
    pieces = tl.num_programs(2)
    length = tl.cdiv(tl.cdiv(stop - first, pieces), KEYS) * KEYS
    begin = first + piece * length
    end = tl.minimum(begin + length, stop)
    member, place = tl.arange(0, PLACES), tl.arange(0, KEYS)
    column, v_column = tl.arange(0, WIDE), tl.arange(0, V_WIDE)
    mine = member < group
    own = head * group + member
    q = tl.load(
        Q + row * q_row + own[:, None] * q_head + column[None, :], mine[:, None] & (column < WIDTH)[None, :], 0.0
    )
    top = tl.full([PLACES], float("-inf"), tl.float32)
    whole = tl.zeros([PLACES], tl.float32)
    out = tl.zeros([PLACES, V_WIDE], tl.float32)
    for at in range(begin, end, KEYS):
        slot = (at + place).to(tl.int64)
        there = slot < end
        seen = there
        if IS_RING:
            position = newest - (newest - slot) % ring
            seen = there & ((position >= low) | (slot < sinks))
        k = tl.load(
            K + row * k_row + head * k_head + slot[:, None] * k_slot + column[None, :],
            there[:, None] & (column < WIDTH)[None, :],
            0.0,
        )
        v = tl.load(
            V + row * v_row + head * v_head + slot[:, None] * v_slot + v_column[None, :],
            there[:, None] & (v_column < V_WIDTH)[None, :],
            0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing is seen so far
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(top - base)
        whole = whole * kept + tl.sum(weights, 1)
        out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    part = ((row * tl.num_programs(1) + head) * group + member) * pieces + piece
    tl.store(PARTS + part[:, None] * V_WIDTH + v_column[None, :], out, mine[:, None] & (v_column < V_WIDTH)[None, :])
    tl.store(SUMS + part * 2, top, mine)
    tl.store(SUMS + part * 2 + 1, whole, mine)


@triton.jit
def _join(
    PARTS, SUMS, OUT, LOGIT, VALUE,
    PIECES: tl.constexpr, GROUP: tl.constexpr, V_WIDTH: tl.constexpr, V_WIDE: tl.constexpr,
    SINK: tl.constexpr, SINK_VALUE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    which = row * tl.num_programs(1) + head
    piece, column = tl.arange(0, PIECES), tl.arange(0, V_WIDE)
    inside = column < V_WIDTH
    part = which * PIECES + piece
    tops = tl.load(SUMS + part * 2)
    sums = tl.load(SUMS + part * 2 + 1)
    outs = tl.load(PARTS + part[:, None] * V_WIDTH + column[None, :], inside[None, :], 0.0)
    top = tl.max(tops, 0)
    if SINK:
        logit = tl.load(LOGIT + head).to(tl.float32)
        top = tl.maximum(top, logit)
    share = tl.exp(tops - top)
    whole = tl.sum(sums * share, 0)
    out = tl.sum(outs * share[:, None], 0)
    if SINK:
        weight = tl.exp(logit - top)
        whole += weight
        if SINK_VALUE:
            out += weight * tl.load(VALUE + (head // GROUP) * V_WIDTH + column, inside, 0.0).to(tl.float32)
    tl.store(OUT + which * V_WIDTH + column, (out / whole).to(OUT.dtype.element_ty), inside)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    scale: float,
    softcap: float | None,
    sinks: ConstantSinks | None,
) -> Tensor:
    """See `masformer.attention.stored.attend_slots`."""
    rows, heads, _, width = query.shape
    kv_heads, count, v_width = key.shape[1], key.shape[2], value.shape[3]
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    group = heads // kv_heads
    wide, v_wide = (triton.next_power_of_2(max(NARROWEST, x)) for x in (width, v_width))
    keys = max(NARROWEST, min(MOST_KEYS, TILE // (max(wide, v_wide) * key.element_size())))
    pieces = _pieces(rows * kv_heads, count, keys, query.device)
    parts = query.new_empty(rows * heads * pieces, v_width, dtype=torch.float32)
    sums = query.new_empty(rows * heads * pieces, 2, dtype=torch.float32)
    out = query.new_empty(rows, heads, 1, v_width)
    strides = query.stride()[:2], key.stride()[:3], value.stride()[:3]
    newest, low = slots.newest.contiguous(), slots.low.contiguous()
    logit = sums if sinks is None else sinks.logit.contiguous()
    sink_value = sums if sinks is None or sinks.value is None else sinks.value.contiguous()
    with on(query.device):
        _part[rows, kv_heads, pieces](
            *(query, key, value, newest, low, parts, sums, scale, softcap or 1.0),
            *(stride for each in strides for stride in each),
            *(slots.sinks, slots.ring or 0, group),
            IS_RING=slots.ring is not None,
            CAPPED=softcap is not None,
            PLACES=max(NARROWEST, triton.next_power_of_2(group)),
            WIDTH=width,
            WIDE=wide,
            V_WIDTH=v_width,
            V_WIDE=v_wide,
            KEYS=keys,
            num_warps=4,
        )
        _join[rows, heads](
            *(parts, sums, out, logit, sink_value),
            PIECES=pieces,
            GROUP=group,
            V_WIDTH=v_width,
            V_WIDE=v_wide,
            SINK=sinks is not None,
            SINK_VALUE=sinks is not None and sinks.value is not None,
            num_warps=4,
        )
    return out


def _pieces(pairs: int, slots: int, keys: int, device: torch.device) -> int:
    """Programs that share the keys of one of so many pairs of rows and heads: a power of two."""
    wanted = min(max(1, EACH * _processors(device) // pairs), max(1, slots // keys), MOST)
    return 1 << (wanted.bit_length() - 1)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
