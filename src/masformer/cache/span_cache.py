"""The cache of all layers: what a model with a plan is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from masformer.attention import Layout
from masformer.cache.layer import SpanLayer, Step, View
from masformer.cache.units import UnitsLayer, cache_layer, stores
from masformer.errors import MasformerError, check_int
from masformer.plan import AttentionPlan, PlanSource


class SpanCache(Cache):  # type: ignore[misc]
    """A KV cache for a model with a plan: each layer holds what its span can still see, and no more.

    In a plan by heads each KV head holds what its own span can still see.

    `model.generate()` and calls with `use_cache` make one by themselves; make one yourself to keep it between calls.
    What it holds are constants: no gradient flows through it into earlier forward passes.

    Args:
        plan: the model's plan, its text or its file.
        num_layers: layers of the model. Needed where `plan` is a text that does not name each layer.
        kv_heads: KV heads of each layer. Needed where `plan` is a text that names some.
        reserve: tokens of each row that full layers make room for at once; room for more is made by doubling.
        prompt: positions of the text that is to be read in several passes. Only models whose rotary positions depend on
            the length of the whole text (LongRoPE, dynamic NTK) need to know it before the first pass; `generate` says
            it by itself. `reset` forgets it.

    Raises:
        MasformerError: `reserve` or `prompt` is below 0, or the plan cannot be read.
    """

    def __init__(
        self,
        plan: PlanSource,
        *,
        num_layers: int | None = None,
        kv_heads: int | None = None,
        reserve: int = 0,
        prompt: int = 0,
    ) -> None:
        check_int("reserve", reserve, 0)
        check_int("prompt", prompt, 0)
        plan = AttentionPlan.load(plan, num_layers, kv_heads)
        self.plan, self.text = plan, str(plan)
        self.prompt = prompt
        self._empty()
        super().__init__(layers=[cache_layer(span, reserve) for span in plan.layers])

    def _empty(self) -> None:
        self._starts: tuple[int, ...] | None = None
        self._real: Tensor | None = None
        self._packed = False
        self._step: Step | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held: what `masformer.cost` predicts as `kv_cache_bytes`, for each row."""
        return sum(store.filled * _bytes_per_slot(store) for store in stores(self.layers))

    @property
    def storage_nbytes(self) -> int:
        """Bytes of storage, room to grow included: `kv_storage_bytes` of `masformer.cost`, for each row."""
        each = stores(self.layers)
        return sum(0 if store.keys is None else store.keys.shape[2] * _bytes_per_slot(store) for store in each)

    def begin(self, batch: int, new: int, real: Tensor | None = None, documents: Tensor | None = None) -> None:
        """Announces a forward pass; the bridge does so before each one.

        Args:
            batch: rows.
            new: tokens of each row that are to be added.
            real: [batch, tokens so far + new], 1 = real; None: none of the new tokens is padding.
            documents: [batch, new], packed documents; allowed in an empty cache. The cache goes on with the last one of
                each row.

        Raises:
            MasformerError: a shape that does not fit, packed documents in a filled cache, or a mask that hides tokens
                which the cache took as real, or shows padding.
        """
        seen = self.get_seq_length()
        total = seen + new
        if any(layer.length != seen for layer in self.layers):
            raise MasformerError("a forward pass did not end, and left the cache half filled; call its reset()")
        if real is not None:
            if real.shape[0] != batch or real.shape[1] < total:
                raise MasformerError(f"attention_mask must be [batch, {total}] with this cache, got {list(real.shape)}")
            real = real[:, :total].bool()
        layout = None
        if seen == 0:
            self._empty()
            layout = Layout.of(real, documents)
            self._packed = documents is not None
            if layout is not None:
                last = layout.documents.amax(-1, keepdim=True)
                self._real = (layout.documents == last) & (last >= 0)
        elif documents is not None:
            raise MasformerError("packed position_ids together with a filled cache are not supported")
        else:
            self._extend(real, seen, new)
        starts = self._find_starts(batch, seen, total)
        holes = False
        if self._real is not None:
            index = torch.arange(total, device=self._real.device)
            holes = not bool((self._real | (index < torch.tensor(starts, device=index.device)[:, None])).all())
        self._starts = starts
        self._step = Step(seen, new, starts, self._real, holes, layout)

    def count(self) -> None:
        """Ends the announced pass over one token: others have put its keys and values where `TokenCache` says."""
        assert self._step is not None
        for store in stores(self.layers):
            store.count(self._step)

    def row_starts(self, rows: int) -> tuple[int, ...]:
        """Index in each row of the first token of its document."""
        return self._starts or (0,) * rows

    @property
    def rows(self) -> int:
        """Of the batch whose tokens are in the cache; 0 while it is empty."""
        return 0 if self._starts is None else len(self._starts)

    @property
    def is_even(self) -> bool:
        """Whether the documents that are in the cache, in each of its layers, have begun and hold no padding."""
        known, length = self._starts, self.get_seq_length()
        if known is None or self._step.holes or any(layer.length != length for layer in self.layers):  # type: ignore[union-attr]
            return False
        return all(start < length for start in known)

    def _extend(self, real: Tensor | None, seen: int, new: int) -> None:
        """Adds the new tokens to what is known of padding."""
        if real is not None and self._real is None:
            if bool(real.all()):
                return
            if not bool(real[:, :seen].all()):
                raise MasformerError("attention_mask hides tokens that were real when the cache took them")
            self._real = real
        elif self._real is not None:
            known = self._real[:, :seen]  # a pass that was announced may not have come
            fresh = known.new_ones(len(known), new) if real is None else real[:, seen:].to(known.device)
            if real is not None and not self._packed and not torch.equal(real[:, :seen].to(known.device), known):
                raise MasformerError("attention_mask differs from the one with which the cache took its tokens")
            self._real = torch.cat([known, fresh], 1)

    def _find_starts(self, batch: int, seen: int, total: int) -> tuple[int, ...]:
        if self._real is None:
            return (0,) * batch
        known = self._starts or (seen,) * batch
        if all(start < seen for start in known):
            return known
        first = self._real.int().argmax(-1).tolist()
        empty = (~self._real.any(-1)).tolist()
        return tuple(total if none else start for start, none in zip(first, empty, strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values; returns what its attention is given, which `seen` takes.

        Raises:
            MasformerError: the model has no plan, so that nobody announced the pass, or an earlier pass did not end.
        """
        if self._step is None or key_states.shape[2] != self._step.new:
            raise MasformerError("a SpanCache serves models with a plan alone; call apply_plan first")
        out: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states, self._step)
        return out

    def seen(self, layer_idx: int, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, View]]:
        """What the queries of this pass see in a layer: keys, values and what they are, for each group of its units.

        Args:
            layer_idx: the layer.
            key: as the last `update` of this layer returned it.
            value: likewise.

        Raises:
            MasformerError: there was no `update` in this pass, so that the layer attends to the keys of another; or, in
                a layer whose units differ, the layer has made other keys of them.
        """
        step, layer = self._step, self.layers[layer_idx]
        assert step is not None
        if layer.length != step.seen + step.new:
            raise MasformerError(f"layer {layer_idx} keeps no keys of its own in the cache; pass use_cache=False")
        if isinstance(layer, UnitsLayer):
            kept = zip(layer.take(key, value), layer.parts, strict=True)
            return [(*tensors, self._view(part, step)) for tensors, part in kept]
        return [(key, value, self._view(layer, step))]

    def _view(self, layer: SpanLayer, step: Step) -> View:
        """What the last `update` of this store returned. Stores with the same span share it."""
        assert layer.keys is not None
        key = layer.span, layer.past, layer.keys.device
        if key not in step.views:
            step.views[key] = layer.view(step)
        return step.views[key]

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest tokens: exact, also past the window, or refused.

        A window that has moved on has overwritten what it would see again. `activate_past_recording`, which assisted
        decoding calls, makes room for the last 256 tokens.

        Args:
            tokens_to_remove: how many, as a negative number; a positive one is the length to keep.

        Raises:
            MasformerError: keys are needed that were overwritten. Nothing is changed then.
        """
        seen, change = self.get_seq_length(), int(tokens_to_remove)
        length = min(seen, change) if change > 0 else max(0, seen + change)
        if length == seen:
            return
        if length == 0:
            return self.reset()
        starts = self._starts or (0,)
        for layer in self.layers:
            layer.check_crop(length, starts)
        for layer in self.layers:
            layer.crop(seen - length)
        if self._real is not None:
            self._real = self._real[:, :length]
            self._starts = tuple(min(start, length) for start in starts)

    def reset(self) -> None:
        """Empties the cache; its storage stays for the next document."""
        self._empty()
        self.prompt = 0
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; nothing is copied where no row moves."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows of the batch, in their order."""
        rows = indices.tolist()
        if self._starts is None or rows == list(range(len(self._starts))):
            return
        super().batch_select_indices(indices)
        self._starts = tuple(self._starts[row] for row in rows)
        if self._real is not None:
            self._real = self._real.index_select(0, indices.to(self._real.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row, `repeats` times."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))


def _bytes_per_slot(layer: SpanLayer) -> int:
    if layer.keys is None or layer.values is None:
        return 0
    return sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for x in (layer.keys, layer.values))
