"""Full attention of heads that devices cannot share: the keys of one slice at a time pass by (Liu et al., arXiv
2310.01889), and the outputs are joined by log-sum-exps.

While a slice is computed with, the next one is on its way, from the device that has it: a device holds two slices of
keys beside its own. The backward pass fetches them again, and sends each slice the gradients of its keys.

Slices are contiguous, and later queries see more keys. So that all devices do the same work, two of them, as far from
the middle as each other, swap half of their queries (`masformer.parallel.slices.ring_queries`).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from masformer.attention import ConstantSinks, Layout, constant
from masformer.attention.call import Call
from masformer.attention.layout import Segment
from masformer.attention.pieces import attend_piece, piece_gradients
from masformer.attention.tiled import joined
from masformer.parallel.slices import kept, partner, ring_queries, ring_sent
from masformer.spans import FullSpan


@dataclass(frozen=True, eq=False)
class _Piece:
    """Queries that see the same keys of a slice, or a triangle of both.

    Attributes:
        rows: of the batch.
        queries: which of those that the device computes.
        keys: which of those that it was sent.
        causal: whether it is a triangle.
        layout: documents of a triangle.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool = False
    layout: Layout | None = None


@dataclass(frozen=True, eq=False)
class _Turn:
    """One exchange.

    Attributes:
        to: the device that is sent keys of this one's slice.
        leaves: how many tokens of each row, the last ones.
        source: the device whose keys come.
        comes: how many tokens of each row.
        pieces: what is computed with them.
    """

    to: int
    leaves: int
    source: int
    comes: int
    pieces: tuple[_Piece, ...]


@dataclass(frozen=True)
class Options:
    """How a ring attends.

    Attributes:
        kv_heads: of the keys.
        head_dim: of the keys; what else a head has in the exchange is its value.
        scale: see `masformer.attend`, also for the others.
        dropout: see there.
        softcap: see there.
        backend: see `masformer.attention.pieces.attend_piece`.
    """

    kv_heads: int
    head_dim: int
    scale: float
    dropout: float
    softcap: float | None
    backend: str

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """See `apart`."""
        return apart(both, self.kv_heads, self.head_dim)


def side_by_side(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values of all heads of each token, [batch, tokens, ...], of those by head."""
    return torch.cat([x.transpose(1, 2).flatten(2) for x in (key, value)], -1)


def apart(both: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of `side_by_side`: keys [batch, kv_heads, tokens, head_dim], and values."""
    wide = kv_heads * head_dim
    key, value = (x.unflatten(2, (kv_heads, -1)).transpose(1, 2) for x in both.split([wide, both.shape[2] - wide], -1))
    return key, value


class Ring:
    """What full attention exchanges, and who computes what: the same for all layers of a pass.

    Args:
        mesh: the devices, of one dimension.
        batch: rows.
        length: tokens of a slice.
        layout: documents of the whole sequence.
    """

    def __init__(self, mesh: DeviceMesh, batch: int, length: int, layout: Layout | None) -> None:
        self.mesh, self.batch, self.length = mesh, batch, length
        self.devices, self.number = mesh.size(), mesh.get_local_rank()
        parts = [ring_queries(device, self.devices, length) for device in range(self.devices)]
        crossing = _Crossing(layout, batch)
        seen = [[range(crossing.first(part), part.stop) for part in each] for each in parts]
        table = ring_sent(seen, length)
        self.queries = parts[self.number]
        self.own = tuple(self._pieces(self.number, length, layout, crossing))
        self.turns: list[_Turn] = []
        for step in range(1, self.devices):
            if any(table[device][(device + step) % self.devices] for device in range(self.devices)):
                to, source = (self.number + step) % self.devices, (self.number - step) % self.devices
                comes = table[source][self.number]
                pieces = tuple(self._pieces(source, comes, layout, crossing))
                self.turns.append(_Turn(to, table[self.number][to], source, comes, pieces))
        self.dead = None
        if layout is not None:
            documents = torch.cat([layout.documents[:, part.start : part.stop] for part in self.queries], 1)
            self.dead = (documents < 0)[:, None, :, None] if bool((documents < 0).any()) else None

    def attend(self, query: Tensor, both: Tensor, sinks: ConstantSinks | None, options: Options) -> Tensor:
        """Attention of the slice's queries to the whole sequence.

        Args:
            query: [batch, query_heads, length, head_dim].
            both: keys and values, [batch, length, values of all heads], see `Options.split`.
            sinks: constant sinks.
            options: the others.

        Returns:
            [batch, query_heads, length, value_dim].
        """
        constants = () if sinks is None else sinks.tensors
        return self._swapped(_Attention.apply(self, options, self._swapped(query), both, *constants))

    def round(self, both: Tensor, visit: Callable[[Sequence[_Piece], Tensor, _Turn | None], None]) -> None:
        """Shows the keys of all slices, one after the other, while the next ones are on their way."""
        coming = [self._sent(turn, both) for turn in self.turns[:1]]
        visit(self.own, both, None)
        for number, turn in enumerate(self.turns):
            there = coming.pop()()
            coming = [self._sent(after, both) for after in self.turns[number + 1 : number + 2]]
            visit(turn.pieces, there, turn)
            del there

    def exchange(self, x: Tensor, to: int, source: int, count: int) -> Callable[[], Tensor]:
        """Sends [batch, tokens, ...] to one device and receives so many tokens from another; called, it waits."""
        found = x.new_empty(self.batch, count, *x.shape[2:])
        comes, leaves = [0] * self.devices, [0] * self.devices
        comes[source], leaves[to] = found.shape[:2].numel(), x.shape[:2].numel()
        own = x.flatten(0, 1).contiguous()
        group = self.mesh.get_group()
        work = dist.all_to_all_single(found.flatten(0, 1), own, comes, leaves, group=group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return found

        return wait

    def noise(self, seed: int | None, like: Tensor) -> Iterator[AbstractContextManager[None]]:
        """For each piece random numbers of its own, by a seed the same again; without one none are drawn."""
        devices = [like.device] if like.is_cuda else []
        for number in itertools.count(self.number, self.devices):
            yield nullcontext() if seed is None else _seeded(seed + number, devices)

    def _sent(self, turn: _Turn, both: Tensor) -> Callable[[], Tensor]:
        return self.exchange(both[:, self.length - turn.leaves :], turn.to, turn.source, turn.comes)

    def _swapped(self, x: Tensor) -> Tensor:
        """[batch, heads, length, dim] of the slice -> of `queries`, and back."""
        stays = kept(self.number, self.devices, self.length)
        if self.length == 1:  # nobody has half of a query
            return x
        own, leaves = x.transpose(1, 2).split([stays, self.length - stays], 1)
        sizes = [0] * self.devices
        sizes[partner(self.number, self.devices)] = leaves.shape[:2].numel()
        found = all_to_all_single_autograd(leaves.flatten(0, 1).contiguous(), sizes, sizes, self.mesh)
        return torch.cat([own, found.view(leaves.shape)], 1).transpose(1, 2)

    def _pieces(self, source: int, count: int, layout: Layout | None, crossing: _Crossing) -> Iterator[_Piece]:
        """What the device computes with the last tokens of a slice."""
        stop = (source + 1) * self.length
        base, done = stop - count, 0
        for part in self.queries:
            if base <= part.start < stop:
                keys = slice(part.start - base, part.stop - base)
                yield _Piece(slice(0, self.batch), slice(done, done + len(part)), keys, True, _within(layout, part))
            at = 0
            for (first, queries), rows in itertools.groupby(crossing.of(part, row) for row in range(self.batch)):
                some = slice(at, at := at + len(list(rows)))
                keys = slice(max(first, base) - base, min(part.start, stop) - base)
                if queries and keys.start < keys.stop:
                    yield _Piece(some, slice(done, done + queries), keys)
            done += len(part)


@contextmanager
def _seeded(seed: int, devices: Sequence[torch.device]) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


class _Crossing:
    """The documents that begin before some queries and go on among them."""

    def __init__(self, layout: Layout | None, batch: int) -> None:
        self.rows: Sequence[Sequence[Segment]] | None = None if layout is None else layout.rows
        self.starts = [[segment.start for segment in row] for row in self.rows or ()]
        self.batch = batch

    def of(self, part: range, row: int) -> tuple[int, int]:
        """The first token of that document, and how many of the queries are of it; (first query, 0): there is none."""
        if self.rows is None:
            return (0, len(part)) if part.start else (0, 0)
        number = bisect_right(self.starts[row], part.start - 1) - 1
        if number < 0 or self.rows[row][number].stop <= part.start:
            return part.start, 0
        segment = self.rows[row][number]
        return segment.start, min(segment.stop, part.stop) - part.start

    def first(self, part: range) -> int:
        """The oldest token that the queries see, of all rows."""
        return min(self.of(part, row)[0] for row in range(self.batch))


def _within(layout: Layout | None, part: range) -> Layout | None:
    """The documents of some tokens alone."""
    if layout is None:
        return None
    return Layout.within(layout.documents[:, part.start : part.stop])


class _Attention(torch.autograd.Function):
    """Of the queries that the device computes; keeps no keys but those of its own slice."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, options: Options, query: Tensor, both: Tensor, *constants: Tensor) -> Tensor:
        wide = both.shape[2] // options.kv_heads - options.head_dim
        dtype = torch.promote_types(query.dtype, torch.float32)
        batch, heads, length, _ = query.shape
        out = query.new_zeros(batch, length, heads, wide, dtype=dtype).transpose(1, 2)
        sums = query.new_full((batch, heads, length), -torch.inf, dtype=dtype)

        def visit(pieces: Sequence[_Piece], both: Tensor, _: _Turn | None) -> None:
            for piece in pieces:
                here = piece.rows, slice(None), piece.queries
                call = _call(options, query[here], both, piece)
                with next(noise):
                    some, some_sums = attend_piece(call, piece.causal, options.backend)
                out[here] = joined(out[here], sums[here], some.to(dtype), some_sums)
                sums[here] = torch.logaddexp(sums[here], some_sums)

        ctx.seed = int(torch.randint(2**60, ())) if options.dropout else None
        noise = ring.noise(ctx.seed, query)
        ring.round(both, visit)
        sinks = ConstantSinks.of(constants)
        if sinks is not None:
            logit, value = sinks.by_head()
            out, sums = constant.join(out, sums, logit[:, None], None if value is None else value[:, None].to(dtype))
        if ring.dead is not None:
            out = out.masked_fill(ring.dead, 0)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, both, out, sums, *constants)
        ctx.rest = ring, options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, both, out, sums, *constants = ctx.saved_tensors
        ring, options = ctx.rest
        needed = ctx.needs_input_grad[2:]
        if ring.dead is not None:
            grad = grad.masked_fill(ring.dead, 0)
        of_query, of_both = (torch.zeros_like(x, dtype=sums.dtype) for x in (query, both))
        returning: list[tuple[_Turn, Callable[[], Tensor]]] = []

        def take() -> None:
            for turn, wait in returning:
                of_both[:, ring.length - turn.leaves :] += wait()
            returning.clear()

        def visit(pieces: Sequence[_Piece], there: Tensor, turn: _Turn | None) -> None:
            found = of_both if turn is None else torch.zeros_like(there, dtype=sums.dtype)
            for piece in pieces:
                here = piece.rows, slice(None), piece.queries
                call = _call(options, query[here], there, piece)
                given = grad[here], out[here], sums[here]
                with next(noise):
                    grads = piece_gradients(call, piece.causal, *given, options.backend)
                of_keys = options.split(found[piece.rows, piece.keys])
                for whole, part in zip((of_query[here], *of_keys), grads, strict=True):
                    whole += part
            if turn is not None and needed[1]:
                take()
                back = ring.exchange(found.to(both.dtype), turn.source, turn.to, turn.leaves)
                returning.append((turn, back))

        noise = ring.noise(ctx.seed, query)
        if any(needed[:2]):
            ring.round(both, visit)
            take()
        grads: list[Tensor | None] = [of_query.to(query.dtype), of_both.to(both.dtype)]
        sinks = ConstantSinks.of(constants)
        if sinks is not None:
            tokens = (x.transpose(1, 2).flatten(0, 1) for x in (grad, out, sums))
            grads += constant.weight_gradients(sinks, *tokens)
        return None, None, *(x if asked else None for x, asked in zip(grads, needed, strict=True))


def _call(options: Options, query: Tensor, both: Tensor, piece: _Piece) -> Call:
    key, value = options.split(both[piece.rows, piece.keys])
    return Call(query, key, value, FullSpan(), options.scale, piece.layout, options.dropout, options.softcap)
