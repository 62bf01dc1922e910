"""A span as FlashAttention's kernels see it: calls over sequences of queries, each with its sequence of keys.

A span is cut into parts, each of them one call of the kernel: windows, whole documents and blocks are one part; every
earlier block that a query still sees is one more. Sinks outside the window are no part (`masformer.attention.sinks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from masformer.attention.call import Call
from masformer.attention.layout import Layout
from masformer.attention.sinks import Sinks
from masformer.spans import Span

PADDING = 128
"""Padding attends within pieces of at most so many tokens; its output is dropped."""


@dataclass(frozen=True, eq=False)
class Part:
    """One call of the kernel: sequences of queries, each with its sequence of keys, both end to end.

    Attributes:
        queries: which of the tokens of all rows, end to end, are its queries.
        keys: which are its keys.
        alike: (sequences, queries of each, keys of each) where all are alike; else None.
        ends: where they are not: [sequences + 1] int32, the cumulative lengths of queries and of keys.
        longest: the longest sequence of queries, and of keys.
        causal: whether a query sees the keys up to its own, both counted from the ends of their sequences; else all.
        left: how many keys before its own it sees; None: all.
        alive: [queries] bool, those whose output counts; None: all.
    """

    queries: slice
    keys: slice
    alike: tuple[int, int, int] | None
    ends: tuple[Tensor, Tensor] | None
    longest: tuple[int, int]
    causal: bool = True
    left: int | None = None
    alive: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Parts:
    """A span over given rows: its parts, the sinks beside them, and the queries that are padding.

    Attributes:
        parts: the first holds every query.
        sinks: what queries see beyond that; None: nothing.
        dead: [tokens, 1, 1] bool, True for queries that are padding; None: there are none.
    """

    parts: tuple[Part, ...]
    sinks: Sinks | None
    dead: Tensor | None


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The documents of a layout -> (span, query length, keys that are missing, device) -> parts."""


def parts_of(call: Call) -> Parts:
    """The parts of a call, made once for all layers of a pass; without a layout, for all passes."""
    batch, _, query_len, _ = call.query.shape
    shape = call.span, batch, query_len, call.key.shape[2]
    if call.layout is None:
        return _plain_parts(*shape, call.query.device)
    known = _known.setdefault(call.layout.documents, {})
    name = call.span, query_len, call.layout.skipped, call.query.device
    if name not in known:
        known[name] = _made(*shape, call.layout, call.query.device)
    return known[name]  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _plain_parts(span: Span, batch: int, query_len: int, key_len: int, device: torch.device) -> Parts:
    return _made(span, batch, query_len, key_len, None, device)


@dataclass(frozen=True)
class _Stretch:
    """A stretch of one row that attends within itself: one document, or padding.

    Attributes:
        row: which row.
        start: index of its first key in the row.
        stop: index after its last.
        skipped: positions that are missing among its keys, after the sinks.
        real: whether it is a document.
    """

    row: int
    start: int
    stop: int
    skipped: int = 0
    real: bool = True


def _stretches(batch: int, key_len: int, layout: Layout | None) -> list[_Stretch]:
    """All keys of all rows, in order."""
    if layout is None:
        return [_Stretch(row, 0, key_len) for row in range(batch)]
    found: list[_Stretch] = []

    def pad(row: int, start: int, stop: int) -> None:
        for first in range(start, stop, PADDING):
            found.append(_Stretch(row, first, min(first + PADDING, stop), real=False))

    for row, segments in enumerate(layout.rows):
        at = 0
        for segment in segments:
            pad(row, at, segment.start)
            skipped = 0 if layout.skipped is None else layout.skipped[row]
            found.append(_Stretch(row, segment.start, segment.stop, skipped))
            at = segment.stop
        pad(row, at, key_len)
    return found


@dataclass(frozen=True)
class _Piece:
    """Keys that follow each other, and the queries among them; `number` counts the blocks of a document."""

    queries: int
    keys: int
    number: int = 0


@torch.inference_mode(False)
@torch.no_grad()
def _made(span: Span, batch: int, query_len: int, key_len: int, layout: Layout | None, device: torch.device) -> Parts:
    stretches = _stretches(batch, key_len, layout)
    past = key_len - query_len
    pieces = [piece for stretch in stretches for piece in _pieces(span, stretch, past)]
    left = span.max_visible - span.sinks - 1 if span.period == 1 and span.max_visible is not None else None
    parts = [_part(pieces, pieces, device, left=left)]
    if span.period is not None and span.period > 1:
        assert span.max_visible is not None
        for back in range(1, span.max_visible // span.period):
            late, early = pieces[back:], pieces[: len(pieces) - back]
            alive = torch.tensor([piece.number >= back for piece in late for _ in range(piece.queries)])
            if bool(alive.any()):
                first = sum(piece.queries for piece in pieces[:back])
                parts.append(_part(late, early, device, causal=False, queries=first, alive=alive.to(device)))
    dead = None
    if layout is not None and bool((layout.documents[:, past:] < 0).any()):
        dead = (layout.documents[:, past:] < 0).reshape(-1, 1, 1).to(device)
    return Parts(tuple(parts), _sinks(span, stretches, query_len, key_len, device), dead)


def _pieces(span: Span, stretch: _Stretch, past: int) -> list[_Piece]:
    """A stretch in one piece, or in the blocks of a block span."""

    def piece(start: int, stop: int, number: int = 0) -> _Piece:
        return _Piece(max(0, stop - max(start, past)), stop - start, number)

    start, stop, skipped = stretch.start, stretch.stop, stretch.skipped
    if span.period is None or span.period == 1:
        if not skipped or not span.sinks:
            return [piece(start, stop)]
        apart = start + span.sinks  # the window begins after the missing keys
        return [_Piece(0, span.sinks), piece(apart, stop)]
    found, at = [], start
    while at < stop:
        block = (at - start + skipped) // span.period
        end = min(stop, start + (block + 1) * span.period - skipped)
        found.append(piece(at, end, block - skipped // span.period if stretch.real else 0))
        at = end
    return found


def _part(
    queries_of: list[_Piece],
    keys_of: list[_Piece],
    device: torch.device,
    *,
    causal: bool = True,
    left: int | None = None,
    queries: int = 0,
    alive: Tensor | None = None,
) -> Part:
    """The queries of some pieces, from number `queries` on, with the keys of as many others, from the first on."""
    lengths = [[piece.queries for piece in queries_of], [piece.keys for piece in keys_of]]
    totals = [sum(each) for each in lengths]
    longest = max(lengths[0]), max(lengths[1])
    alike, ends = None, None
    if all(len(set(each)) == 1 for each in lengths):
        alike = (len(queries_of), *longest)
    else:
        cumulative = (F.pad(torch.tensor(each).cumsum(0), (1, 0)).to(device, torch.int32) for each in lengths)
        ends = next(cumulative), next(cumulative)
    if alive is not None and bool(alive.all()):
        alive = None
    return Part(slice(queries, queries + totals[0]), slice(0, totals[1]), alike, ends, longest, causal, left, alive)


def _sinks(span: Span, stretches: list[_Stretch], query_len: int, key_len: int, device: torch.device) -> Sinks | None:
    """The queries from which sinks lie outside the window."""
    if not span.sinks:
        return None
    assert span.max_visible is not None
    size, past = span.max_visible - span.sinks, key_len - query_len
    documents = []
    for stretch in stretches:
        nearest = size - stretch.skipped  # index in its document of the first query that the window parts from a sink
        first = max(stretch.start + nearest, stretch.start, past)
        if stretch.real and first < stretch.stop:
            position = first - stretch.start + stretch.skipped
            query, key = stretch.row * query_len + first - past, stretch.row * key_len + stretch.start
            documents.append((query, stretch.stop - first, position, key))
    return Sinks.of(documents, size, span.sinks, device) if documents else None
