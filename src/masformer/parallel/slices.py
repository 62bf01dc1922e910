"""Which keys the devices must send each other, as numbers alone: no tensor of a model, no process.

A sequence is cut into contiguous slices of one length, slice i on device i. The queries of a slice see its own keys and
some before it, and what they see before it is what they see from its first query on: the oldest key of later ones is no
older. So a local span needs the keys just before the slice, from as many devices as hold them, and the sinks; a full
span needs all.

Keys that are fetched lie before the slice's own without a gap. What attention then sees is the same document without
its middle: a window, and blocks that begin with a whole one, do not ask how far the beginning is away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from masformer.spans import Span

Sent = tuple[tuple[int, ...], ...]
"""[from device][to device] -> so many."""


def needed(span: Span, first: int, start: int) -> tuple[range, ...]:
    """The tokens before a slice whose keys its queries see, ascending.

    Args:
        span: of the layer.
        first: index of the first token of the document that the slice begins in.
        start: index of the first token of the slice.
    """
    if first >= start:
        return ()
    low = first + int(span.first_visible(torch.tensor(start - first)))
    apart = first + span.sinks
    if low <= apart:
        return (range(first, start),)
    return tuple(part for part in (range(first, apart), range(low, start)) if part)


def on_device(part: range, device: int, length: int) -> range:
    """Those of some tokens that lie on a device, whose slices have this length."""
    start = max(part.start, device * length)
    return range(start, max(start, min(part.stop, (device + 1) * length)))


@lru_cache(maxsize=1024)
def tokens_sent(span: Span, devices: int, length: int) -> Sent:
    """The tokens whose keys each device sends to each other one, for a sequence that is one document.

    Args:
        span: of the heads.
        devices: that share the sequence.
        length: of a slice.
    """
    parts = [needed(span, 0, device * length) for device in range(devices)]
    return sent(lambda source, to: sum(len(on_device(part, source, length)) for part in parts[to]), devices)


def sent(count: Callable[[int, int], int], devices: int) -> Sent:
    """What a function of (from, to) says of all pairs; a device sends to later ones alone."""
    return tuple(tuple(count(source, to) if source < to else 0 for to in range(devices)) for source in range(devices))


def copies(query_heads: int, kv_heads: int, devices: int) -> int | None:
    """How often each KV head is sent, so that devices share query heads evenly; None: they cannot.

    1 where the devices share the KV heads evenly too.
    """
    found = devices // math.gcd(kv_heads, devices)
    return None if query_heads % (kv_heads * found) else found


@dataclass(frozen=True)
class Traffic:
    """What the devices send each other for some heads of one span, in one layer.

    Counted in heads of one token, a key and a value wide. A query and an output are as wide together, and each gradient
    is as wide as what it is the gradient of.

    Attributes:
        way: how: `edge`, the keys before the slice that are needed; `by heads`, each device has the whole sequence of
            some heads (Ulysses, arXiv 2309.14509); `ring`, the keys of one slice at a time pass by (arXiv 2310.01889).
        forward: what each device sends, and what it receives, in a forward pass.
        backward: the same in the backward pass.
    """

    way: str
    forward: tuple[Sequence[int], Sequence[int]]
    backward: tuple[Sequence[int], Sequence[int]]

    @property
    def total(self) -> int:
        """What all devices send, forward and backward."""
        return sum(self.forward[0]) + sum(self.backward[0])


@lru_cache(maxsize=1024)
def traffic(span: Span, query_heads: int, kv_heads: int, devices: int, length: int) -> Traffic:
    """The way that some heads go, the one that sends less, and what it sends.

    Local heads fetch the edge, heads that see all keys before them go by ring; where devices share the query heads
    evenly, either may go by heads instead. If both ways send as much, the latter go by heads.

    Args:
        span: of the heads.
        query_heads: so many have that span in the layer.
        kv_heads: so many keys they have.
        devices: that share the sequence.
        length: of a slice.
    """
    rings = devices > 1 and sees_all(span, devices * length)
    usual = _ring(query_heads, kv_heads, devices, length) if rings else _edge(span, kv_heads, devices, length)
    many = copies(query_heads, kv_heads, devices)
    if many is None or devices == 1:
        return usual
    each = [(query_heads + kv_heads * many) // devices * length * (devices - 1)] * devices
    other = Traffic("by heads", (each, each), (each, each))
    return other if other.total < usual.total or (rings and other.total == usual.total) else usual


def sees_all(span: Span, tokens: int) -> bool:
    """Whether every query of a document of so many tokens sees all keys before it."""
    return int(span.first_visible(torch.tensor(tokens - 1))) <= span.sinks


def fetched(span: Span, query_heads: int, kv_heads: int, devices: int, length: int) -> int:
    """The most tokens whose keys a device holds beside its own.

    Of an edge those made into one piece with its own; of a ring the slice at work and the next one; 0 by heads.

    Arguments as in `traffic`.
    """
    way = traffic(span, query_heads, kv_heads, devices, length).way
    if way == "by heads":
        return 0
    if way == "ring":
        return min(2, devices - 1) * length
    most = max(map(sum, zip(*tokens_sent(span, devices, length), strict=True)))
    return most + length if most else 0


def _edge(span: Span, kv_heads: int, devices: int, length: int) -> Traffic:
    table = tokens_sent(span, devices, length)
    leaves, comes = ([kv_heads * sum(each) for each in way] for way in (table, zip(*table, strict=True)))
    return Traffic("edge", (leaves, comes), (comes, leaves))


def _ring(query_heads: int, kv_heads: int, devices: int, length: int) -> Traffic:
    """Forward the keys, and swapped queries and their outputs; backward the keys again and their gradients,
    and the gradients of outputs and queries.
    """
    seen = [[range(part.stop) for part in ring_queries(device, devices, length)] for device in range(devices)]
    wanted = ring_sent(seen, length)
    swapped = [query_heads * (length - kept(device, devices, length)) for device in range(devices)]
    leaves, comes = ([kv_heads * sum(each) for each in way] for way in (wanted, zip(*wanted, strict=True)))
    forward = [[a + b for a, b in zip(each, swapped, strict=True)] for each in (leaves, comes)]
    backward = [a + b + c for a, b, c in zip(leaves, comes, swapped, strict=True)]
    return Traffic("ring", (forward[0], forward[1]), (backward, backward))


def partner(device: int, devices: int) -> int:
    """The device that one swaps queries with in a ring, so that all do the same work; the middle one with itself.

    Queries see the more keys the later they are: of two slices that are as far from the middle, each device takes the
    first half of its own queries and the second half of the other's.
    """
    return devices - 1 - device


def kept(device: int, devices: int, length: int) -> int:
    """How many of its queries, the first ones, a device computes itself in a ring."""
    return length if partner(device, devices) == device else length - length // 2


def ring_queries(device: int, devices: int, length: int) -> tuple[range, ...]:
    """The tokens whose queries a device computes in a ring, of its own slice and of its partner's."""
    other, stays = partner(device, devices), kept(device, devices, length)
    own = range(device * length, device * length + stays)
    swapped = range(other * length + stays, (other + 1) * length)
    return (own, swapped) if stays < length else (own,)


def ring_sent(seen: Sequence[Sequence[range]], length: int) -> Sent:
    """How many tokens, the last ones of its slice, each device sends to each other one in a ring.

    Args:
        seen: for each device, for each of its `ring_queries`, the tokens from the oldest whose keys they see to their
            last.
        length: of a slice.
    """

    def wanted(source: int, to: int) -> int:
        start, stop = source * length, (source + 1) * length
        counts = [stop - max(part.start, start) for part in seen[to] if part.stop > start]
        return 0 if source == to else max([0, *counts])

    return tuple(tuple(wanted(source, to) for to in range(len(seen))) for source in range(len(seen)))
