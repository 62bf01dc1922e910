"""The attention of one slice: torch's own collectives around `masformer.attend`.

All exchanges are `all_to_all_single`. Every device makes the same ones in the same order, forward and backward, also
where it has nothing to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from masformer.attention import ConstantSinks, Layout, attend
from masformer.attention.call import in_autocast
from masformer.attention.constant import check_sinks
from masformer.attention.units import attend_units
from masformer.errors import MasformerError
from masformer.parallel.ring import Options, Ring, apart, side_by_side
from masformer.parallel.slices import copies, needed, on_device, sent, traffic
from masformer.spans import LayerSpan, Span, UnitSpans


def sequence_mesh(devices: int, device_type: str) -> DeviceMesh:
    """The devices that share sequences with this process: neighbours by number, so many of them.

    Args:
        devices: that share a sequence; the processes are a multiple of it.
        device_type: `cuda` or `cpu`.

    Returns:
        The dimension `sequence` of a mesh of all processes; the other one is `data`.
    """
    shape = dist.get_world_size() // devices, devices
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "sequence"))["sequence"]


class SlicedPass:
    """One forward pass of a slice. All devices of the mesh make one together.

    Args:
        mesh: the devices, of one dimension, in the order of their slices.
        positions: [batch, length] of the slice; None: they count on from slice to slice.
        real: [batch, length], padding mask of the slice.
        batch: rows.
        length: tokens of the slice.
        device: where tensors are.

    Attributes:
        positions: those of all slices, [batch, devices * length].
        real: the padding mask of all slices; None: there is no padding.

    Raises:
        MasformerError: the devices were given slices that are not alike.
    """

    def __init__(
        self, mesh: DeviceMesh, positions: Tensor | None, real: Tensor | None, batch: int, length: int, device: Any
    ) -> None:
        self.mesh, self.batch, self.length = mesh, batch, length
        self.devices, self.number = mesh.size(), mesh.get_local_rank()
        shapes = self._of_all(torch.tensor([batch, length], device=device)).tolist()
        if shapes != [shapes[0]] * self.devices:
            raise MasformerError(
                f"the devices of one sequence have slices of different [rows, tokens]: {shapes}; pad them alike"
            )
        for name, given in (("position_ids", positions), ("attention_mask", real)):
            if given is not None and given.shape[-1] != length:
                raise MasformerError(f"{name} must be those of the slice, [rows, {length}], got {list(given.shape)}")
        if positions is None:
            positions = torch.arange(length, device=device)[None] + self.number * length
        parts = [positions.expand(batch, -1), torch.ones_like(positions) if real is None else real]
        own = torch.stack([part.expand(batch, -1).to(device, torch.int32) for part in parts])
        found = self._of_all(own).permute(1, 2, 0, 3).flatten(2)
        self.positions, there = found[0].long(), found[1].bool()
        self.real = None if bool(there.all()) else there
        self.layout: Layout | None = None
        self._routes: dict[Span, _Route] = {}
        self._ring: Ring | None = None

    def _of_all(self, own: Tensor) -> Tensor:
        """[devices, ...], what each device has."""
        each = [torch.empty_like(own) for _ in range(self.devices)]
        dist.all_gather(each, own, group=self.mesh.get_group())
        return torch.stack(each)

    @property
    def own_positions(self) -> Tensor:
        """Those of the slice, [batch, length]."""
        return self.positions[:, self.number * self.length : (self.number + 1) * self.length]

    def begin(self, documents: Tensor | None) -> None:
        """Says which documents are packed.

        Args:
            documents: [batch, devices * length], their numbers; None: every row is one.

        Raises:
            MasformerError: padding lies between the tokens of a document.
        """
        self.layout = Layout.of(self.real, documents)
        if self.layout is not None and self.layout.has_holes:
            raise MasformerError("padding between the tokens of a document is not supported across devices")

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span: LayerSpan,
        *,
        sinks: ConstantSinks | None = None,
        **options: Any,
    ) -> Tensor:
        """`masformer.attend` of the slice's queries to the whole sequence.

        Args:
            query: [batch, query_heads, length, head_dim].
            key: [batch, kv_heads, length, head_dim].
            value: [batch, kv_heads, length, value_dim].
            span: of the layer.
            sinks: constant sinks.
            **options: others of `masformer.attend`.

        Returns:
            [batch, query_heads, length, value_dim].
        """
        query, key, value = in_autocast(query, key, value)
        if isinstance(span, UnitSpans):
            return attend_units(query, key, value, span, partial(self.attend, **options), sinks)
        way = traffic(span, query.shape[1], key.shape[1], self.devices, self.length).way
        if way == "by heads":
            return self._by_heads(query, key, value, span, sinks, options)
        if way == "ring":
            check_sinks(sinks, span, query, value)
            return self._by_ring(query, key, value, sinks, **options)
        route = self._route(span)
        key, value = self._fetched(key, value, route)
        return attend(query, key, value, span, layout=route.layout, sinks=sinks, **options)

    def _route(self, span: Span) -> _Route:
        if span not in self._routes:
            self._routes[span] = _Route.of(span, self)
        return self._routes[span]

    def _fetched(self, key: Tensor, value: Tensor, route: _Route) -> tuple[Tensor, Tensor]:
        """Keys and values with those before them, [batch, kv_heads, route.before + length, ...]."""
        if not route.is_used:
            return key, value
        own = side_by_side(key, value)
        tokens = own.flatten(0, 1)
        got = all_to_all_single_autograd(tokens[route.send], route.received, route.sent, self.mesh)
        if route.fills:
            got = torch.cat([got, got.new_zeros(1, got.shape[1])])
        if route.place is not None:
            got = got[route.place]
        both = torch.cat([got.view(self.batch, route.before, own.shape[2]), own], 1)
        every_key, every_value = apart(both, key.shape[1], key.shape[3])
        return every_key.to(key.dtype), every_value.to(value.dtype)

    def _by_ring(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: ConstantSinks | None,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention of heads that see all keys before them, and that the devices do not share."""
        if self._ring is None:
            self._ring = Ring(self.mesh, self.batch, self.length, self.layout)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        sinks = None if sinks is None else sinks.like(query, value)
        options = Options(key.shape[1], key.shape[3], scale, dropout, softcap, backend)
        return self._ring.attend(query, side_by_side(key, value), sinks, options)

    def _by_heads(
        self, query: Tensor, key: Tensor, value: Tensor, span: Span, sinks: ConstantSinks | None, options: Any
    ) -> Tensor:
        """Attention of some heads of all slices, each back where its queries are."""
        many = copies(query.shape[1], key.shape[1], self.devices) or 1
        tensors = query, *(x if many == 1 else x.repeat_interleave(many, 1) for x in (key, value))
        mine = torch.cat([self._scattered(x) for x in tensors], 1)
        got = self._exchanged(mine)
        sizes = [x.numel() // self.devices for x in tensors]
        query, key, value = (
            self._whole(part, x.shape[1] // self.devices, x.shape[3]).to(x.dtype)
            for part, x in zip(got.split(sizes, 1), tensors, strict=True)
        )
        if sinks is not None:
            constant = None if sinks.value is None else sinks.value.repeat_interleave(many, 0)
            share = key.shape[1]
            heads = tuple(range(self.number * share, (self.number + 1) * share))
            sinks = replace(sinks, value=constant).of_heads(heads, share * self.devices)
        out = attend(query, key, value, span, layout=self.layout, sinks=sinks, **options)
        back = out.unflatten(2, (self.devices, -1)).movedim(2, 0).flatten(1)
        slices = self._exchanged(back).view(self.devices, self.batch, -1, self.length, out.shape[3])
        return slices.transpose(0, 1).flatten(1, 2)

    def _scattered(self, x: Tensor) -> Tensor:
        """[batch, heads, length, dim] -> [devices, values of the heads of each]."""
        shares: Tensor = x.unflatten(1, (self.devices, -1))
        return shares.movedim(1, 0).flatten(1)

    def _whole(self, part: Tensor, heads: int, dim: int) -> Tensor:
        """[devices, values of some heads of each slice] -> [batch, heads, devices * length, dim]."""
        slices = part.reshape(self.devices, self.batch, heads, self.length, dim)
        return slices.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchanged(self, x: Tensor) -> Tensor:
        """Row i goes to device i."""
        ones = [1] * self.devices
        found: Tensor = all_to_all_single_autograd(x.contiguous(), ones, ones, self.mesh)
        return found


@dataclass(frozen=True, eq=False)
class _Route:
    """What the keys of one span need: the same for all layers of a pass.

    Attributes:
        send: [sent] index among the slice's tokens, rows end to end, of those that are sent.
        sent: how many to each device.
        received: how many from each device.
        place: [batch * before] index among the received ones, or the zeros after them; None: they are in order.
        before: keys of a row before its own.
        fills: whether rows need other numbers of keys, and zeros fill those up that need fewer.
        is_used: whether any device sends anything.
        layout: documents of these and the slice's own tokens.
    """

    send: Tensor
    sent: list[int]
    received: list[int]
    place: Tensor | None
    before: int
    fills: bool
    is_used: bool
    layout: Layout | None

    @classmethod
    def of(cls, span: Span, whole: SlicedPass) -> _Route:
        """The route of the keys for one device."""
        batch, length, devices, number = whole.batch, whole.length, whole.devices, whole.number
        device = whole.positions.device
        needs = [_needs(span, whole.layout, batch, to * length) for to in range(devices)]

        def between(source: int, to: int) -> list[tuple[int, range]]:
            """(row, tokens) in the order in which they are sent."""
            return [(row, on_device(part, source, length)) for row, parts in enumerate(needs[to]) for part in parts]

        counts = sent(lambda source, to: sum(len(part) for _, part in between(source, to)), devices)
        leaving = [
            _index(part) + (row - number) * length
            for to in range(number + 1, devices)
            for row, part in between(number, to)
        ]
        rows: list[list[Tensor]] = [[] for _ in range(batch)]
        at = 0
        for source in range(number):
            for row, part in between(source, number):
                rows[row].append(_index(range(at, at + len(part))))
                at += len(part)
        places = [torch.cat([_index(range(0)), *row]) for row in rows]
        before = max(map(len, places))
        filled = [torch.cat([torch.full((before - len(row),), at), row]) for row in places]
        place = torch.cat(filled)
        in_order = torch.equal(place, torch.arange(at))
        return cls(
            send=torch.cat([_index(range(0)), *leaving]).to(device),
            sent=list(counts[number]),
            received=[each[number] for each in counts],
            place=None if in_order else place.to(device),
            before=before,
            fills=bool((place == at).any()),
            is_used=any(map(any, counts)),
            layout=_layout(whole, needs[number], before),
        )


def _needs(span: Span, layout: Layout | None, batch: int, start: int) -> list[tuple[range, ...]]:
    """Of each row the tokens before a slice whose keys it needs."""
    if layout is None:
        return [needed(span, 0, start)] * batch
    crossing = [[part.start for part in row if part.start < start < part.stop] or [start] for row in layout.rows]
    return [needed(span, first, start) for (first,) in crossing]


def _layout(whole: SlicedPass, needs: Sequence[tuple[range, ...]], before: int) -> Layout | None:
    """Of the keys that a slice fetches and its own."""
    if whole.layout is None:
        return None
    documents, start = whole.layout.documents, whole.number * whole.length
    early = documents.new_full((whole.batch, before), -1)
    for row, parts in enumerate(needs):
        tokens = torch.cat([_index(range(0)), *map(_index, parts)]).to(documents.device)
        early[row, before - len(tokens) :] = documents[row, tokens]
    here = torch.cat([early, documents[:, start : start + whole.length]], 1)
    return Layout.within(here)


def _index(part: range) -> Tensor:
    return torch.arange(part.start, part.stop)
