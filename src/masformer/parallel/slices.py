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


def goes_by_heads(span: Span, query_heads: int, kv_heads: int, devices: int, length: int) -> bool:
    """Whether heads are exchanged for positions: each device has the whole sequence of some heads (Ulysses,
    arXiv 2309.14509); else the keys that are needed are fetched.

    It takes query heads that the devices share evenly. Then full heads go by heads: all devices do the same work, where
    the last one that fetched keys would do twice the mean. Local heads go the way that sends fewer bytes.

    Args:
        span: of the heads.
        query_heads: so many have that span in the layer.
        kv_heads: so many keys they have.
        devices: that share the sequence.
        length: of a slice.
    """
    many = copies(query_heads, kv_heads, devices)
    if many is None or devices == 1:
        return False
    by_heads = (devices - 1) * (query_heads + kv_heads * many) * length
    return span.max_visible is None or by_heads < kv_heads * sum(map(sum, tokens_sent(span, devices, length)))


def traffic(
    span: Span, query_heads: int, kv_heads: int, devices: int, length: int
) -> tuple[Sequence[int], Sequence[int]]:
    """What each device sends, and what it receives, in a forward pass; the backward pass returns as much.

    Counted in heads of one token, a key and a value wide. A query and an output are as wide together.

    Args:
        span: see `goes_by_heads`, also for the others.
        query_heads: that have the span.
        kv_heads: of them.
        devices: that share the sequence.
        length: of a slice.
    """
    if goes_by_heads(span, query_heads, kv_heads, devices, length):
        heads = query_heads + kv_heads * (copies(query_heads, kv_heads, devices) or 1)
        each = [heads // devices * length * (devices - 1)] * devices
        return each, each
    table = tokens_sent(span, devices, length)
    return [kv_heads * sum(row) for row in table], [kv_heads * sum(column) for column in zip(*table, strict=True)]


def fetched(span: Span, query_heads: int, kv_heads: int, devices: int, length: int) -> int:
    """The most tokens whose keys a device holds beside its own, those made into one piece with them; 0 by heads.

    Arguments as in `traffic`.
    """
    if goes_by_heads(span, query_heads, kv_heads, devices, length):
        return 0
    most = max(map(sum, zip(*tokens_sent(span, devices, length), strict=True)))
    return most + length if most else 0
