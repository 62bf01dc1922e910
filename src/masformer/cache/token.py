"""One token more in a cache, with tensors that say where everything lies: a pass that a CUDA graph can do again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from masformer.attention.stored import Slots
from masformer.attention.units import split
from masformer.cache.layer import SpanLayer, View
from masformer.cache.span_cache import SpanCache
from masformer.cache.units import UnitsLayer, stores


class TokenCache(SpanCache):
    """What a model is given in place of a `SpanCache` while a pass over one token of each row is captured.

    It shares the storage. The pass changes no lengths, so that it can be done again: `place` says for which token, and
    `SpanCache.count` that its keys stay.

    Args:
        whole: the cache, which holds tokens and has room for one more.
        rows: of the batch.
    """

    def __init__(self, whole: SpanCache, rows: int) -> None:
        Cache.__init__(self, layers=whole.layers)
        self.plan, self.text, self.prompt = whole.plan, whole.text, whole.prompt
        self.stores = {(store.span, store.past): store for store in stores(self.layers)}
        self.kinds = list(self.stores)
        device = next(iter(self.stores.values())).keys.device  # type: ignore[union-attr]
        with torch.inference_mode(False):
            self.places = torch.zeros(len(self.kinds), 3, rows, dtype=torch.int64, device=device)

    def place(self, starts: tuple[int, ...]) -> None:
        """Takes the next token of each row, whose document starts there, as the one that the pass adds."""
        seen = self.get_seq_length()
        self.places.copy_(torch.tensor([store.next_place(seen, starts) for store in self.stores.values()]))

    def begin(self, batch: int, new: int, real: Tensor | None = None, documents: Tensor | None = None) -> None:
        """Nothing: the pass is announced by `place`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values where `place` says."""
        for store, key, value in self._parts(layer_idx, key_states, value_states):
            assert store.keys is not None
            assert store.values is not None
            slot = self._places(store)[2][:, None, None, None]
            for storage, new in ((store.keys, key), (store.values, value)):
                storage.scatter_(2, slot.expand(new.shape), new)
        return key_states, value_states

    def seen(self, layer_idx: int, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, View]]:
        """The storage of each group of the layer's units, and where the query finds its keys there."""
        found = []
        for store, _, _ in self._parts(layer_idx, key, value):
            assert store.keys is not None
            assert store.values is not None
            newest, low, _ = self._places(store)
            slots = Slots(newest, low, store.span.sinks if store.ring is not None else 0, store.ring)
            found.append((store.keys, store.values, View(stored=True, slots=slots)))
        return found

    def _parts(self, layer_idx: int, key: Tensor, value: Tensor) -> list[tuple[SpanLayer, Tensor, Tensor]]:
        layer = self.layers[layer_idx]
        if isinstance(layer, UnitsLayer):
            return list(zip(layer.parts, split(key, layer.spans), split(value, layer.spans), strict=True))
        return [(layer, key, value)]

    def _places(self, store: SpanLayer) -> Tensor:
        return self.places[self.kinds.index((store.span, store.past))]
