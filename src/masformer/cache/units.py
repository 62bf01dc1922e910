"""The cache of a layer whose units differ: a store for each group of units with the same span."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from masformer.attention.units import check_units, split
from masformer.cache.layer import SpanLayer, Step
from masformer.errors import MasformerError
from masformer.spans import LayerSpan, UnitSpans


class UnitsLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer in which the spans of the KV heads differ; see `SpanCache`.

    Attributes:
        spans: of its units.
        parts: the store of each of `spans.groups`.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, spans: UnitSpans, reserve: int = 0) -> None:
        super().__init__()
        self.spans = spans
        self.parts = [SpanLayer(group.span, reserve) for group in spans.groups]
        self._given: tuple[Tensor, Tensor] | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """Tokens of each row so far, padding included."""
        return self.parts[0].length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes storage without a slot in each part."""
        for part, keys, values in zip(self.parts, *self._split(key_states, value_states), strict=True):
            part.lazy_initialization(keys, values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, step: Step) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Stores new keys and values [batch, kv_heads, new, dim] and hands them out again: `take` has what is seen."""
        check_units(self.spans, key_states.shape[1])
        each = zip(self.parts, *self._split(key_states, value_states), strict=True)
        self._kept = [part.update(keys, values, step) for part, keys, values in each]
        self._given = key_states, value_states
        return key_states, value_states

    def take(self, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that each part hands out, once, to whom `update` gave these.

        Raises:
            MasformerError: the layer has made other keys of them.
        """
        given, kept = self._given, self._kept
        self._given, self._kept = None, []
        if given is None or key is not given[0] or value is not given[1]:
            raise MasformerError(
                "the layer changes its keys after the cache took them, which a plan by heads does not allow; "
                "pass use_cache=False"
            )
        return kept

    def _split(self, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return split(key, self.spans), split(value, self.spans)

    # What transformers and SpanCache ask of a cache layer

    def get_seq_length(self) -> int:
        """Tokens of each row so far, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is made for the whole row, whatever is stored."""
        return self.parts[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        """See `SpanLayer.activate_past_recording`."""
        for part in self.parts:
            part.activate_past_recording()

    def check_crop(self, length: int, starts: tuple[int, ...]) -> None:
        """Raises MasformerError where keys that a span would see again are overwritten."""
        for part in self.parts:
            part.check_crop(length, starts)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back tokens; see `SpanCache.crop`."""
        for part in self.parts:
            part.crop(tokens_to_remove)

    def reset(self) -> None:
        """Empties the layer; its storage stays."""
        self._given, self._kept = None, []
        for part in self.parts:
            part.reset()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows of the batch, in their order."""
        for part in self.parts:
            part.batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same, under the name that beam search uses."""
        self.batch_select_indices(beam_idx)


def cache_layer(span: LayerSpan, reserve: int) -> SpanLayer | UnitsLayer:
    """The cache of a layer of a plan."""
    return UnitsLayer(span, reserve) if isinstance(span, UnitSpans) else SpanLayer(span, reserve)


def stores(layers: list[Any]) -> Iterator[SpanLayer]:
    """The stores of all layers."""
    for layer in layers:
        yield from layer.parts if isinstance(layer, UnitsLayer) else [layer]
