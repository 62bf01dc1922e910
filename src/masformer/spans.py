"""What a span is: which keys the queries of one layer may see.

A span answers one question, `visible(query_positions, key_positions)`. That predicate is the definition. The
oracle's mask, the masks of the fast backends, the size of the KV cache and the cost formulas are derived from it,
through the four geometric facts below it (`sinks`, `period`, `first_visible`, `max_visible`), which state
consequences of the predicate and are tested against it pair by pair.

Positions count from the first real token of a document, so left padding moves nothing and every packed document
starts at 0 again. A window of `w` means `w` keys *including the query's own*, as in Hugging Face transformers
(FlashAttention's `left` is `w - 1`).

>>> import torch
>>> WindowSpan(2, sinks=1).visible(torch.arange(4)[:, None], torch.arange(4)[None, :]).int()
tensor([[1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 1, 1]], dtype=torch.int32)
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from masformer.errors import MasformerError, check_int, read_int, shown

LARGEST_SIZE = 2**31 - 1
"""Of a window or a block, in tokens: kernels count positions in 32 bits."""
SPAN_FORMS = (
    "full, window:SIZE, window:SIZE+SINKS, block:SIZE or block:SIZExBLOCKS (own block included), and a local span with "
    "a constant sink: window:SIZE+sink"
)


class Span(ABC):
    """Which keys a query may see. Positions are integers from 0 (the first real token of the document)."""

    sinks: int = 0
    """Number of first keys that every later query sees, whatever its distance."""
    constant_sink: bool = False
    """Whether a weight of the layer joins the softmax, in place of first keys. It is no key: nothing else says so."""

    @abstractmethod
    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """The definition: a bool tensor, True where the query may see the key.

        Args:
            query_positions: integer tensor of any shape.
            key_positions: integer tensor that broadcasts with it.

        Returns:
            Bool tensor of the broadcast shape.
        """

    @property
    @abstractmethod
    def period(self) -> int | None:
        """The pattern of non-sink keys repeats when query and key both move by this many positions.

        None where every key before the query is visible. Queries within a period, counted from position 0, see the same
        oldest key; so does no query of another one, past `max_visible`, which is a number of whole periods.
        """

    @property
    @abstractmethod
    def max_visible(self) -> int | None:
        """The most keys any query sees; None where that grows with the length.

        Equally: queries at positions below it see every key up to their own, and a cache never has to hold more.
        """

    @abstractmethod
    def first_visible(self, query_positions: Tensor) -> Tensor:
        """Position of the oldest key, other than a sink, that each query sees: same shape and dtype."""

    @property
    def bare(self) -> Span:
        """The same without sinks of either kind."""
        return self

    def visible_counts(self, query_positions: Tensor) -> Tensor:
        """How many keys each query sees, at positions [n] (int64)."""
        recent = query_positions - self.first_visible(query_positions) + 1
        return torch.minimum(recent + self.sinks, query_positions + 1)

    def visible_pairs(self, length: int, start: int = 0) -> int:
        """Number of visible (query, key) pairs for the queries at positions start..length-1."""
        return max(0, self._pairs(length) - self._pairs(start))

    def _pairs(self, length: int) -> int:
        """Of the queries below a position; in whole numbers of any size."""
        if self.max_visible is None or self.period is None or length <= self.max_visible:
            return length * (length + 1) // 2
        first = int(self.visible_counts(torch.tensor([self.max_visible])))  # each period starts with so many
        periods, rest = divmod(length - self.max_visible, self.period)
        whole, part = (count * first + count * (count - 1) // 2 for count in (self.period, rest))
        return self._pairs(self.max_visible) + periods * whole + part

    def cached_keys(self, length: int) -> int:
        """Keys a cache has to have room for after `length` tokens."""
        return length if self.max_visible is None else min(length, self.max_visible)

    @staticmethod
    def parse(text: Span | str) -> Span:
        """Reads the text form, for example `full`, `window:512+4` or `block:1024x2`; a span stays as it is.

        Raises:
            MasformerError: the text is none of the forms, or a number is out of range.
        """
        if isinstance(text, Span):
            return text
        if not isinstance(text, str):
            raise MasformerError(f"{shown(text)} is no span; allowed: {SPAN_FORMS}")
        text = text.strip()
        if text == "full":
            return FullSpan()
        if match := re.fullmatch(r"window:(-?\d+)(?:\+(-?\d+))?(\+sink)?", text):
            size = read_int("window size", match[1], 1, LARGEST_SIZE)
            sinks = read_int("number of sinks", match[2] or "0", 0, LARGEST_SIZE)
            return WindowSpan(size, sinks, constant_sink=bool(match[3]))
        if match := re.fullmatch(r"block:(-?\d+)(?:x(-?\d+))?(\+sink)?", text):
            size = read_int("block size", match[1], 1, LARGEST_SIZE)
            blocks = read_int("number of blocks in a block span", match[2] or "1", 1, LARGEST_SIZE)
            return BlockSpan(size, blocks - 1, constant_sink=bool(match[3]))
        raise MasformerError(f"unknown span {shown(text)}; allowed: {SPAN_FORMS}")


@dataclass(frozen=True)
class FullSpan(Span):
    """Full causal attention: key j is visible to query i if and only if j <= i."""

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return key_positions <= query_positions

    @property
    def period(self) -> None:
        return None

    @property
    def max_visible(self) -> None:
        return None

    def first_visible(self, query_positions: Tensor) -> Tensor:
        return torch.zeros_like(query_positions)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class WindowSpan(Span):
    """Sliding window with attention sinks: j <= i and (j > i - size or j < sinks).

    Args:
        size: number of newest keys, the query's own included; at least 1.
        sinks: number of first keys that stay visible (Xiao et al., arXiv 2309.17453); at least 0.
        constant_sink: see `Span`.
    """

    size: int
    sinks: int = 0
    constant_sink: bool = False

    def __post_init__(self) -> None:
        check_int("window size", self.size, 1, LARGEST_SIZE)
        check_int("number of sinks", self.sinks, 0, LARGEST_SIZE)

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        recent = key_positions > query_positions - self.size
        return (key_positions <= query_positions) & (recent | (key_positions < self.sinks))

    @property
    def period(self) -> int:
        return 1

    @property
    def max_visible(self) -> int:
        return self.size + self.sinks

    @property
    def bare(self) -> WindowSpan:
        return WindowSpan(self.size)

    def first_visible(self, query_positions: Tensor) -> Tensor:
        return (query_positions - self.size + 1).clamp(min=0)

    def __str__(self) -> str:
        return f"window:{self.size}" + (f"+{self.sinks}" if self.sinks else "") + _constant(self)


@dataclass(frozen=True)
class BlockSpan(Span):
    """Attention within blocks: j <= i and j // size >= i // size - lookback.

    Args:
        size: block length; at least 1.
        lookback: number of earlier blocks that stay visible; 0 for the query's own block only.
        constant_sink: see `Span`.
    """

    size: int
    lookback: int = 0
    constant_sink: bool = False

    def __post_init__(self) -> None:
        check_int("block size", self.size, 1, LARGEST_SIZE)
        check_int("block lookback", self.lookback, 0, LARGEST_SIZE)
        check_int("keys that a block span shows", self.max_visible, 1, LARGEST_SIZE)

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        near = key_positions // self.size >= query_positions // self.size - self.lookback
        return (key_positions <= query_positions) & near

    @property
    def period(self) -> int:
        return self.size

    @property
    def max_visible(self) -> int:
        return self.size * (self.lookback + 1)

    @property
    def bare(self) -> BlockSpan:
        return BlockSpan(self.size, self.lookback)

    def first_visible(self, query_positions: Tensor) -> Tensor:
        return (query_positions // self.size - self.lookback).clamp(min=0) * self.size

    def __str__(self) -> str:
        return f"block:{self.size}" + (f"x{self.lookback + 1}" if self.lookback else "") + _constant(self)


def _constant(span: Span) -> str:
    return "+sink" if span.constant_sink else ""


@dataclass(frozen=True)
class UnitSpans:
    """The spans of a layer in which they differ, one for each unit: a KV head together with its query heads.

    It is no `Span`: what knows one span per layer cannot take it for one.

    Args:
        spans: the span of each KV head, in order; at least two different ones.
    """

    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(self.spans))
        for head, span in enumerate(self.spans):
            if not isinstance(span, Span):
                raise MasformerError(f"KV head {head} has {shown(span)}; allowed: FullSpan, WindowSpan, BlockSpan")
        if len(set(self.spans)) < 2:
            raise MasformerError("spans by unit must differ; a layer of one span is that span")

    def __len__(self) -> int:
        return len(self.spans)

    @cached_property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The units of each span together, in the order of their first."""
        heads: dict[Span, list[int]] = {}
        for head, span in enumerate(self.spans):
            heads.setdefault(span, []).append(head)
        return tuple(UnitGroup(span, tuple(each)) for span, each in heads.items())


@dataclass(frozen=True)
class UnitGroup:
    """Units of one layer with the same span.

    Attributes:
        span: which keys they see.
        heads: their KV heads, ascending.
    """

    span: Span
    heads: tuple[int, ...]


LayerSpan: TypeAlias = Span | UnitSpans
"""What a plan says of one layer."""


def layer_span(spans: LayerSpan | Sequence[Span]) -> LayerSpan:
    """One span where all units have the same; else the spans by unit."""
    if isinstance(spans, Span | UnitSpans):
        return spans
    return spans[0] if spans and len(set(spans)) == 1 else UnitSpans(tuple(spans))


def spans_of(layer: LayerSpan) -> tuple[Span, ...]:
    """The span of each unit; of a layer in which all have the same, that one."""
    return layer.spans if isinstance(layer, UnitSpans) else (layer,)
