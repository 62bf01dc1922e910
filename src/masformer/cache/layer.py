"""The cache of one layer: storage that grows, or a ring, and what of it a forward pass sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from masformer.attention import Layout
from masformer.attention.layout import Segment
from masformer.attention.stored import Slots
from masformer.cost import stored_keys
from masformer.errors import MasformerError
from masformer.spans import Span

PAST = 256
"""Tokens that a cache which records its past can take back: assisted decoding proposes a few dozen at most."""


@dataclass(frozen=True)
class View:
    """What the keys are that a layer hands out.

    Attributes:
        stored: there is one query in each row, and the keys lie in storage order (`masformer.attention.stored`).
            Otherwise they end with the new ones, in order, and `layout` goes with them.
        layout: see `masformer.attention.Layout`; None: one document a row, without padding.
        visible: [batch or 1, 1, 1, key_len] bool, the stored keys that the query sees; None: all of them.
        dead: [batch, 1, 1, 1] bool, the queries that are padding themselves; None: there are none.
        slots: which stored keys the query sees, in place of `visible`.
    """

    stored: bool = False
    layout: Layout | None = None
    visible: Tensor | None = None
    dead: Tensor | None = None
    slots: Slots | None = None


@dataclass(frozen=True)
class Step:
    """One forward pass, as `SpanCache.begin` announces it.

    Attributes:
        seen: tokens of each row in the cache before it.
        new: tokens of each row that it adds.
        starts: index in each row of the first token of its document; seen + new where there is none yet.
        real: [batch, seen + new] bool, False for what nothing sees: padding, and packed documents before the last one
            of the row; None: all tokens are of one document a row.
        holes: there is padding within the documents.
        layout: of the first pass, which may be packed; None later.
        views: span, keys to take back and device -> the view of such layers.
    """

    seen: int
    new: int
    starts: tuple[int, ...]
    real: Tensor | None
    holes: bool
    layout: Layout | None
    views: dict[tuple[Span, int, torch.device], View] = field(default_factory=dict)

    @property
    def even(self) -> bool:
        """Every row's document is equally long, without padding in it, and begun before this pass."""
        return len(set(self.starts)) == 1 and not self.holes and self.starts[0] <= self.seen


class SpanLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer; see `SpanCache`.

    Attributes:
        span: the layer's span.
        length: tokens of each row so far, padding included.
        keys: [batch, kv_heads, slots, head_dim], of which the first `filled` hold a token; None before the first one.
        values: the same, with value_dim.
        record_past: whether `activate_past_recording` was called.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, span: Span, reserve: int = 0) -> None:
        super().__init__()
        self.span, self.reserve = span, reserve
        self.length = self.high = 0  # `high`: the greatest length since the last reset; later tokens were taken back
        self.start = 0  # of the longest document
        self.past = 0
        self.record_past = False
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def ring(self) -> int | None:
        """Slots after those of the sinks; None where the span is full."""
        return None if self.span.max_visible is None else self.span.max_visible - self.span.sinks + self.past

    @property
    def filled(self) -> int:
        """Slots that hold a token."""
        if self.ring is None:
            return self.length
        return min(max(0, self.length - self.start), self.span.sinks + self.ring)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes storage without a slot, on the device and in the dtype of the keys."""
        with torch.inference_mode(False):  # a cache filled in inference mode may go on outside of it
            self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, step: Step) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Stores new keys and values [batch, kv_heads, new, dim]; returns those that the step's view is about."""
        if self.length != step.seen:
            raise MasformerError(
                "a layer of the model runs twice in one pass, and its keys have one place; pass use_cache=False"
            )
        if step.seen == 0 and not _alike(self.keys, key_states):
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if not _alike(self.keys, key_states):
            raise MasformerError("the cache holds keys of another batch size, dtype or device; call its reset() first")
        self.start = min(step.starts)
        self.make_room(step.seen + step.new)
        if step.seen == 0:
            out = key_states, value_states
        elif self.ring is not None and step.new > 1:
            out = self._before(self.keys, key_states, step), self._before(self.values, value_states, step)
        else:
            out = None
        for storage, new in ((self.keys, key_states), (self.values, value_states)):
            self._store(storage, new.detach(), step)
        self.count(step)
        if out is not None:
            return out
        first, stop = self._slice(step)
        return self.keys[:, :, first:stop], self.values[:, :, first:stop]

    def count(self, step: Step) -> None:
        """The keys and values of this pass are in their places."""
        self.start = min(step.starts)
        self.length += step.new
        self.high = max(self.high, self.length)

    def view(self, step: Step) -> View:
        """What `update` returned in this step."""
        if step.seen == 0:
            return View(layout=step.layout)
        if step.new == 1:
            return self._stored_view(step)
        if self.ring is not None:
            return View(layout=self._recent_layout(step))
        return View(layout=None if step.real is None else Layout.of(step.real, None))

    # Where things lie

    def _slot(self, position: int) -> int:
        sinks = self.span.sinks
        if self.ring is None or position < sinks:
            return position
        return sinks + (position - sinks) % self.ring

    def _runs(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The positions first..stop-1 in runs of neighbouring slots: (position, slot, how many)."""
        while first < stop:
            slot = self._slot(first)
            room = stop - first
            if self.ring is not None:
                end = self.span.sinks if first < self.span.sinks else self.span.sinks + self.ring
                room = min(room, end - slot)
            yield first, slot, room
            first += room

    def _seen_by(self, position: int) -> tuple[int, int]:
        """What a query at this position sees: so many sinks, and the positions from the second number on."""
        low = _first_visible(self.span, position)
        return min(self.span.sinks, low), low

    def make_room(self, length: int) -> None:
        """Grows the storage, which has begun, to hold so many tokens of each row."""
        assert self.keys is not None
        assert self.values is not None
        slots = stored_keys(self.span, length, self.reserve, self.past)
        if slots > self.keys.shape[2]:
            self.keys = self._grown(self.keys, slots)
            self.values = self._grown(self.values, slots)

    @property
    def room(self) -> float:
        """Tokens of each row that storage, which has begun, holds as it is: any number where it is a whole ring."""
        assert self.keys is not None
        slots = self.keys.shape[2]
        return slots if self.ring is None or slots < self.span.sinks + self.ring else math.inf

    def _grown(self, storage: Tensor, slots: int) -> Tensor:
        """Storage grows only before the ring is full: until then, slots are positions.

        Slots that a shorter row leaves empty are hidden, but must be finite: a weight of 0 does not hide a NaN.
        """
        with torch.inference_mode(False):
            grown = storage.new_zeros(*storage.shape[:2], slots, storage.shape[3])
        grown[:, :, : storage.shape[2]] = storage
        return grown

    def next_place(self, seen: int, starts: tuple[int, ...]) -> list[list[int]]:
        """Of the token after `seen` others of each row: `Slots.newest`, `Slots.low`, and the slot that it takes."""
        if self.ring is None:
            return [[seen] * len(starts), list(starts), [seen] * len(starts)]
        newest = [seen - start for start in starts]
        return [newest, [_first_visible(self.span, p) for p in newest], [self._slot(p) for p in newest]]

    def _store(self, storage: Tensor, new: Tensor, step: Step) -> None:
        if self.ring is None:
            storage[:, :, step.seen : step.seen + step.new] = new
        elif step.even:
            self._store_rows(storage, new, step, step.starts[0])
        else:
            for row, start in enumerate(step.starts):
                self._store_rows(storage[row : row + 1], new[row : row + 1], step, start)

    def _store_rows(self, storage: Tensor, new: Tensor, step: Step, start: int) -> None:
        """The sinks among the new positions, and the newest that fit into the ring."""
        assert self.ring is not None
        first, stop = max(0, step.seen - start), step.seen + step.new - start
        kept = max(first, self.span.sinks, stop - self.ring)
        for begin, end in ((first, min(stop, self.span.sinks)), (kept, stop)):
            for position, slot, count in self._runs(begin, end):
                at = position + start - step.seen
                storage[:, :, slot : slot + count] = new[:, :, at : at + count]

    # Several queries: what they see of the past, in order, and the new keys

    def _past_runs(self, start: int, step: Step) -> list[tuple[int, int, int]]:
        """The runs of the past that the first new query of a row sees."""
        position = max(0, step.seen - start)
        sinks, low = self._seen_by(position)
        return [*self._runs(0, sinks), *self._runs(low, position)]

    def _before(self, storage: Tensor, new: Tensor, step: Step) -> Tensor:
        """The visible past and then the new keys; where rows have pasts of different lengths, they end together."""
        if step.even:
            pieces = [storage[:, :, slot : slot + count] for _, slot, count in self._past_runs(step.starts[0], step)]
            return torch.cat([*pieces, new], 2)
        runs = [self._past_runs(start, step) for start in step.starts]
        lengths = [sum(count for _, _, count in row) for row in runs]
        out = new.new_zeros(*new.shape[:2], max(lengths) + step.new, new.shape[3])
        out[:, :, max(lengths) :] = new
        for row, (length, row_runs) in enumerate(zip(lengths, runs, strict=True)):
            at = max(lengths) - length
            for _, slot, count in row_runs:
                out[row, :, at : at + count] = storage[row, :, slot : slot + count]
                at += count
        return out

    def _recent_layout(self, step: Step) -> Layout | None:
        """The layout of what `_before` returns."""
        total = step.seen + step.new
        runs = [self._past_runs(start, step) for start in step.starts]
        lengths = [sum(count for _, _, count in row) for row in runs]
        past = max(lengths)
        skipped = tuple(max(0, step.seen - start) - length for start, length in zip(step.starts, lengths, strict=True))
        if step.even and not any(skipped):
            return None
        assert self.keys is not None
        documents = torch.full((len(runs), past + step.new), -1, dtype=torch.long, device=self.keys.device)
        rows: list[tuple[Segment, ...]] = []
        for row, (start, length) in enumerate(zip(step.starts, lengths, strict=True)):
            if start == total:
                rows.append(())
                continue
            first = past - length if start <= step.seen else past + start - step.seen
            documents[row, first:] = 0
            keep = None
            if step.holes and step.real is not None:
                known = [step.real[row, at + start : at + start + count] for at, _, count in runs[row]]
                keep = torch.cat([*known, step.real[row, max(start, step.seen) :]])
                documents[row, first:].masked_fill_(~keep.to(documents.device), -1)
                keep = None if bool(keep.all()) else keep
            rows.append((Segment(first, past + step.new, keep),))
        return Layout(documents, tuple(rows), skipped)

    # One query: the keys stay where they are

    def _slice(self, step: Step) -> tuple[int, int]:
        """The slots handed out: those that the query sees where they are neighbours, else all that are filled."""
        if self.ring is not None and step.even and step.new == 1:
            position = self.length - 1 - step.starts[0]
            sinks, low = self._seen_by(position)
            first, last = self._slot(low), self._slot(position)
            if first <= last and (not sinks or first == sinks):
                return (0 if sinks else first), last + 1
        return 0, self.filled

    def _stored_view(self, step: Step) -> View:
        assert self.keys is not None
        device, dead = self.keys.device, None
        real = None if step.real is None else step.real.to(device)
        if real is not None and not bool((new := real[:, -1]).all()):
            dead = ~new[:, None, None, None]
        if self.ring is None:
            visible = None if real is None else real[:, None, None, :]
            return View(stored=True, visible=_alive(visible, dead), dead=dead)
        first, stop = self._slice(step)
        positions = [self.length - 1 - start for start in (step.starts[:1] if step.even else step.starts)]
        if not step.holes and all(self._count(position) == stop - first for position in positions):
            return View(stored=True, dead=dead)
        query = torch.tensor(positions, device=device)[:, None]
        slot = torch.arange(stop, device=device)[None]
        sinks = self.span.sinks
        stored = torch.where(slot < sinks, slot, query - (query - slot) % self.ring)  # the newest position of the slot
        visible = self.span.visible(query, stored) & (stored >= slot.clamp(max=sinks))
        if step.holes and real is not None:
            column = stored + torch.tensor(step.starts, device=device)[:, None]
            visible &= real.gather(1, column.clamp(0, self.length - 1))
        return View(stored=True, visible=_alive(visible[:, None, None, :], dead), dead=dead)

    def _count(self, position: int) -> int:
        """How many keys a query at this position sees."""
        sinks, low = self._seen_by(position)
        return sinks + position - low + 1

    # What transformers asks of a cache layer

    def get_seq_length(self) -> int:
        """Tokens of each row so far, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is made for the whole row, whatever is stored."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x

    def activate_past_recording(self) -> None:
        """From now on, `crop` can take back the last `PAST` tokens. Only an empty cache can begin to record.

        Raises:
            MasformerError: there are tokens in the cache.
        """
        if self.ring is not None and not self.past:
            if self.high:
                raise MasformerError("a SpanCache records its past from the first token on; call its reset() first")
            self.past = PAST
            self.keys = self.values = None
        self.record_past = True

    def check_crop(self, length: int, starts: tuple[int, ...]) -> None:
        """Raises MasformerError where keys that the span would see again are overwritten."""
        if self.ring is None:
            return
        for start in starts:
            position = max(0, length - start)
            oldest = max(self._seen_by(position)[1], self.span.sinks)
            if oldest < position and oldest < self.high - start - self.ring:
                kept = "records its past, but not so far" if self.past else "does not record its past"
                raise MasformerError(
                    f"cannot take back {self.length - length} of {self.length} tokens: {self.span} has overwritten "
                    f"keys that it would see again, and the cache {kept}; call activate_past_recording() on an empty "
                    f"cache to take back up to {PAST} tokens, or reset() to start again"
                )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back tokens; see `SpanCache.crop`."""
        self.length -= tokens_to_remove

    def reset(self) -> None:
        """Empties the layer; its storage stays."""
        self.length = self.high = self.start = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows of the batch, in their order."""
        if self.keys is not None and self.values is not None:
            with torch.inference_mode(False):
                self.keys, self.values = (x.index_select(0, indices.to(x.device)) for x in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same, under the name that beam search uses."""
        self.batch_select_indices(beam_idx)


@lru_cache(maxsize=4096)
def _first_visible(span: Span, position: int) -> int:
    return int(span.first_visible(torch.tensor(position)))


def _alike(storage: Tensor | None, new: Tensor) -> bool:
    return storage is not None and (storage.shape[0], storage.dtype, storage.device) == (
        new.shape[0],
        new.dtype,
        new.device,
    )


def _alive(visible: Tensor | None, dead: Tensor | None) -> Tensor | None:
    """A query that is padding sees everything, so that no softmax is empty; its output is dropped."""
    return visible if visible is None or dead is None else visible | dead
