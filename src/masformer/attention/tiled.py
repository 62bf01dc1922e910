"""Local attention in strided tiles over torch's scaled_dot_product_attention: any device, differentiable.

Rows are cut into documents, so that padding and packing need no mask. Within a document, queries below
`span.max_visible` see every earlier key: plain causal attention. Later queries are taken in tiles whose recent keys
are an overlapping strided view of the keys (no copy without sinks); the pattern repeats with `span.period`, so that
one small mask, made by `span.visible` for the first tile, serves all tiles of its family. Where torch's kernel does
not take grouped query heads, they become further query rows of their key head. Extra memory grows as
N * (window + tile).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from masformer.attention import constant
from masformer.attention.call import Backend, Call, causal_attention, spread
from masformer.attention.constant import ConstantSinks
from masformer.attention.layout import Segment
from masformer.spans import Span


class Tiled(Backend):
    """Tiles over torch's own kernels, wherever torch runs.

    Args:
        tile: queries of a tile; by default the measured choice of `tile_size`.
    """

    name = "tiled"

    def __init__(self, tile: int | None = None) -> None:
        self.tile = tile

    def objection(self, call: Call) -> str | None:
        return None

    def run(self, call: Call) -> Tensor:
        (query, key, value), span, layout = call.tensors, call.span, call.layout
        kernel = Kernel(call.scale, call.dropout, call.softcap, call.sinks)
        tile = self.tile or tile_size(call, kernel)
        past, length = call.past, key.shape[2]
        if layout is None and not past and kernel.is_fused(query, value) and length <= (span.max_visible or length):
            return kernel.causal(query, key, value)
        rows = [(Segment(0, length),)] * len(query) if layout is None else layout.rows
        skipped = [0] * len(query) if layout is None or layout.skipped is None else layout.skipped
        room = None if call.trains else _room(query, value)
        made = []
        for row, segments in enumerate(rows):
            q, k, v = (x[row : row + 1] for x in (query, key, value))
            pieces, done = [], past
            for segment in segments:
                first, stop = max(segment.start, past), segment.stop
                if stop <= first:
                    continue
                part = slice(first - past, stop - past)
                own = k[:, :, segment.start : stop], v[:, :, segment.start : stop]
                target = None if room is None else room[row : row + 1, :, part]
                out = _document(q[:, :, part], *own, span, kernel, tile, _kept(segment, k), skipped[row], target)
                if room is None:
                    pieces += [_zeros(q, v, first - done), out]
                else:
                    room[row, :, done - past : first - past] = 0
                done = stop
            if room is None:
                made.append(_join([*pieces, _zeros(q, v, length - done)], 2))
            else:
                room[row, :, done - past :] = 0
        return _join(made, 0) if room is None else room

    def piece(self, call: Call, causal: bool) -> tuple[Tensor, Tensor]:
        """See `masformer.attention.pieces.attend_piece`."""
        kernel = Kernel(call.scale, call.dropout, call.softcap)
        if call.layout is None:
            return kernel.told(*call.tensors, causal=causal)
        out = _room(call.query, call.value).zero_()
        sums = out.new_zeros(out.shape[:3], dtype=torch.promote_types(out.dtype, torch.float32))
        for here in _documents_of(call):
            out[here], sums[here] = kernel.told(*(x[here] for x in call.tensors), causal=causal)
        return out, sums

    def piece_gradients(
        self, call: Call, causal: bool, grad: Tensor, out: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `masformer.attention.pieces.piece_gradients`."""
        kernel = Kernel(call.scale, call.dropout, call.softcap)
        if call.layout is None:
            return kernel.told_gradients(grad, *call.tensors, out, sums, causal=causal)
        query, key, value = (torch.zeros_like(x) for x in call.tensors)
        for here in _documents_of(call):
            given = (x[here] for x in (grad, *call.tensors, out, sums))
            query[here], key[here], value[here] = kernel.told_gradients(*given, causal=causal)
        return query, key, value


def _documents_of(call: Call) -> Iterator[tuple[slice, slice, slice]]:
    """Where the documents of a layout lie in [batch, heads, length]."""
    for row, segments in enumerate(call.layout.rows if call.layout else ()):
        for segment in segments:
            yield slice(row, row + 1), slice(None), slice(segment.start, segment.stop)


def _room(query: Tensor, value: Tensor) -> Tensor:
    """[batch, heads, query_len, value_dim] to write into, in the order of `_join`."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def tile_size(call: Call, kernel: Kernel) -> int:
    """How many queries share a tile; measured choices (benchmarks/notes.md).

    Narrow tiles compute fewer scores that the mask hides; wide ones share more keys, which saves copies where there
    are sinks, additions in the backward pass, and calls where query heads become rows.
    """
    query, value, span = call.query, call.value, call.span
    if span.max_visible is None and kernel.takes_wide_tiles(query, value):
        return WIDE
    if not kernel.groups_heads(query, value):
        return 128 if call.trains or span.sinks else 64
    if not call.trains and (not span.sinks or kernel.tells_sums(query, value)):
        return 32
    return min(max((span.max_visible or 0) // 64 * 16, 32), 128)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat of [batch, heads, length, dim], laid out in memory as [batch, length, heads, dim].

    So do torch's kernels on the CPU, and so models want it: neither needs a copy in another order.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], {0: 0, 2: 1}[dim]).transpose(1, 2)


def _zeros(query: Tensor, value: Tensor, length: int) -> Tensor:
    return query.new_zeros(1, query.shape[1], length, value.shape[-1])


def _kept(segment: Segment, key: Tensor) -> Tensor | None:
    return None if segment.keep is None else segment.keep.to(key.device)


FLASH_CPU = "_scaled_dot_product_flash_attention_for_cpu"
"""What `scaled_dot_product_attention` calls on the CPU; returns the log-sum-exps as well."""


ALIGNED = 16
"""The keys of a tile are a multiple of so many: matrix products of other widths are up to a sixth slower on CPUs."""

WIDE = 1024
"""Queries of a tile of full attention where scores take no memory: narrow ones are launched one after the other."""

STRIP = 128
"""Queries whose scores exist at a time, where torch has no kernel."""


class Kernel:
    """Dense attention on small pieces: softmax(cap(q k^T * scale) + mask) v, with dropout on the weights.

    The heads of all pieces are those of the constant sinks, if there are any.
    """

    def __init__(self, scale: float, dropout: float, softcap: float | None, sinks: ConstantSinks | None = None) -> None:
        self.scale, self.dropout, self.softcap, self.sinks = scale, dropout, softcap, sinks

    def is_fused(self, query: Tensor, value: Tensor) -> bool:
        """Whether torch has a kernel that never holds the scores of all pairs."""
        if self.sinks is not None:
            return self._has_sums(query, value)
        return self.softcap is None and (not self.dropout or query.is_cuda)

    def takes_wide_tiles(self, query: Tensor, value: Tensor) -> bool:
        """Whether tiles as wide as `WIDE` cost no memory, and save launches."""
        return query.is_cuda and self.is_fused(query, value)

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.sinks is not None:
            return self._beside_sink(query, *spread(query, key, value), is_causal=True)
        return causal_attention(query, key, value, self.scale, self.dropout)

    def groups_heads(self, query: Tensor, value: Tensor) -> bool:
        """Whether the kernel takes more query heads than key heads as they lie, and is as fast for few queries."""
        return query.device.type == "cpu" and self.is_fused(query, value) and query.shape[-1] == value.shape[-1]

    def tells_sums(self, query: Tensor, value: Tensor) -> bool:
        """Whether torch has a kernel that also returns the log-sum-exp of the scores, here without gradients."""
        return self._has_sums(query, value) and not torch.is_grad_enabled()

    def _has_sums(self, query: Tensor, value: Tensor) -> bool:
        """Whether `FLASH_CPU` can do it: on the CPU, for values as wide as the keys."""
        plain = self.softcap is None and not self.dropout and query.device.type == "cpu"
        return plain and query.shape[-1] == value.shape[-1] and hasattr(torch.ops.aten, FLASH_CPU)

    def causal_after(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of the last positions, without a mask as long as the past."""
        batch, heads, new, dim = query.shape
        kv_heads, past = key.shape[1], key.shape[2] - new
        group = heads // kv_heads
        folded = query.reshape(batch, kv_heads, group * new, dim)
        old, old_sum = self._with_sums(folded, key[:, :, :past], value[:, :, :past])
        own, own_sum = self._with_sums(query, key[:, :, past:], value[:, :, past:], is_causal=True)
        return self._joined(query, old.reshape(own.shape), old_sum.reshape(own_sum.shape), own, own_sum)

    def masked_beside(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """Attention of tiles [tiles, heads, width, dim] to keys under a mask, and to further keys and values.

        `first` and `second`, [1, kv_heads, some, dim], are seen by all queries of all tiles.
        """
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        near, near_sum = self._with_sums(query, key, value, attn_mask=bias)
        tiles, heads, width, _ = query.shape
        row = query.transpose(0, 1).reshape(1, heads, tiles * width, -1)
        far, far_sum = (x.unflatten(2, (tiles, width))[0].transpose(0, 1) for x in self._with_sums(row, first, second))
        return self._joined(query, far, far_sum, near, near_sum)

    def _joined(self, query: Tensor, left: Tensor, left_sum: Tensor, right: Tensor, right_sum: Tensor) -> Tensor:
        """Attention to two sets of keys, and to the sink."""
        out = joined(left, left_sum, right, right_sum)
        if self.sinks is None:
            return out
        return constant.join(out, torch.logaddexp(left_sum, right_sum), *self._sink(query))[0]

    def _sink(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [heads, rows] and values [heads, 1, dim] for queries [..., heads, rows, dim].

        The rows of a key head may be those of its query heads, one after the other.
        """
        assert self.sinks is not None
        logit, value = self.sinks.logit, self.sinks.value
        heads, rows = query.shape[-3:-1]
        logit = logit.view(heads, -1)
        logit = logit.repeat_interleave(rows // logit.shape[1], 1)
        return logit, None if value is None else value.repeat_interleave(heads // len(value), 0)[:, None]

    def _beside_sink(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attention to keys and the sink, where the kernel has sums."""
        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        if torch.is_grad_enabled():
            return _BesideSink.apply(query, key, value, *self._sink(query), bias, is_causal, self)  # type: ignore[no-any-return]
        out, sums = self._with_sums(query, key, value, is_causal, attn_mask=bias)
        return constant.join(out, sums, *self._sink(query))[0]

    def _with_sums(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **mask: Tensor | None
    ) -> Any:
        flash = getattr(torch.ops.aten, FLASH_CPU)
        return flash(query, key, value, 0.0, is_causal, scale=self.scale, **mask)

    def told(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Attention to all keys, or causal to as many as there are queries, and its log-sum-exps; no graph is kept."""
        if self._has_sums(query, value):
            return self._with_sums(query, key, value, causal)  # type: ignore[no-any-return]
        found = [
            self._scored(query[:, :, rows], key[:, :, seen], value[:, :, seen], mask=mask)
            for rows, seen, mask in _strips(query, key, causal)
        ]
        out, sums = (torch.cat(each, 2) for each in zip(*found, strict=True))
        return out, sums

    def told_gradients(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of query, key and value, from the output and log-sum-exps that were joined with those to other keys."""
        if self._has_sums(query, value):
            backward = getattr(torch.ops.aten, f"{FLASH_CPU}_backward")
            given = grad, query, key, value, out, sums, 0.0, causal
            return backward(*given, attn_mask=None, scale=self.scale)  # type: ignore[no-any-return]
        grads = [torch.zeros_like(x, dtype=sums.dtype) for x in (query, key, value)]
        for rows, seen, mask in _strips(query, key, causal):
            places = rows, seen, seen
            with torch.enable_grad():
                inputs = [
                    x[:, :, at].detach().requires_grad_() for x, at in zip((query, key, value), places, strict=True)
                ]
                own, own_sums = self._scored(*inputs, mask=mask)
            slope = grad[:, :, rows] * (own_sums.detach() - sums[:, :, rows]).exp()[..., None]
            of_sums = (slope * (own.detach() - out[:, :, rows])).sum(-1)
            found = torch.autograd.grad((own, own_sums), inputs, (slope.to(own.dtype), of_sums))
            for whole, at, part in zip(grads, places, found, strict=True):
                whole[:, :, at] += part
        of_query, of_key, of_value = grads
        return of_query, of_key, of_value

    def _scored(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention and its log-sum-exps from the scores of all pairs."""
        folded = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        scores = self._scores(folded, key)
        if mask is not None:
            scores = scores.masked_fill(~mask.repeat(scores.shape[2] // len(mask), 1), -torch.inf)
        scores = scores.to(torch.promote_types(query.dtype, torch.float32))
        sums = scores.logsumexp(-1)
        weights = (scores - sums[..., None]).exp().to(value.dtype)
        out = F.dropout(weights, self.dropout) @ value
        return out.reshape(*query.shape[:3], -1), sums.reshape(query.shape[:3])

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        scores = (query @ key.transpose(-1, -2)) * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As many heads in `query` as in `key`, unless it `groups_heads`; scores are made anew in the backward pass."""
        if self.is_fused(query, value):
            if self.sinks is not None:
                return self._beside_sink(query, key, value, mask)
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scale, dropout_p=self.dropout, enable_gqa=True
            )
        if torch.is_grad_enabled():
            return checkpoint(self._plain, query, key, value, mask, use_reentrant=False)  # type: ignore[no-any-return]
        return self._plain(query, key, value, mask)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = self._scores(query, key)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        dtype = torch.promote_types(query.dtype, torch.float32)
        if self.sinks is None:
            weights = scores.softmax(-1, dtype=dtype).to(value.dtype)
            return F.dropout(weights, self.dropout) @ value
        logit, u = self._sink(query)
        column = logit[..., None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores.to(dtype), column], -1).softmax(-1).to(value.dtype)
        out = F.dropout(weights[..., :-1], self.dropout) @ value
        return out if u is None else out + weights[..., -1:] * u


def _strips(query: Tensor, key: Tensor, causal: bool) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """A few queries at a time, the keys that they see, and which of those each sees; None: all."""
    for first in range(0, query.shape[2], STRIP):
        rows = slice(first, min(first + STRIP, query.shape[2]))
        if not causal:
            yield rows, slice(0, key.shape[2]), None
            continue
        index = torch.arange(rows.stop, device=query.device)
        yield rows, slice(0, rows.stop), index <= index[rows, None]


class _BesideSink(torch.autograd.Function):
    """Attention to keys and a constant sink by torch's kernel for CPUs, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logit: Tensor,
        u: Tensor | None,
        bias: Tensor | None,
        is_causal: bool,
        kernel: Kernel,
    ) -> Tensor:
        out, sums = kernel._with_sums(query, key, value, is_causal, attn_mask=bias)
        out, total = constant.join(out, sums, logit, u)
        ctx.save_for_backward(query, key, value, logit, u, bias, out, total)
        ctx.is_causal, ctx.scale = is_causal, kernel.scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, logit, u, bias, out, total = ctx.saved_tensors
        given = grad, query, key, value, out, total, 0.0, ctx.is_causal
        grads = getattr(torch.ops.aten, f"{FLASH_CPU}_backward")(*given, attn_mask=bias, scale=ctx.scale)
        of_logit, of_u = constant.gradients(grad, out, total, logit, u)
        of_u = None if of_u is None or u is None else of_u.sum_to_size(u.shape).to(u.dtype)
        return *grads, of_logit.sum_to_size(logit.shape), of_u, None, None, None


def joined(left: Tensor, left_sum: Tensor, right: Tensor, right_sum: Tensor) -> Tensor:
    """Attention to two sets of keys from that to each: outputs [..., dim] and log-sum-exps of the scores [...].

    As FlashAttention joins its blocks (Dao et al., arXiv 2205.14135, section 3.1).
    """
    share = torch.sigmoid(right_sum - left_sum)[..., None].to(right.dtype)
    return torch.lerp(left, right, share)


def _document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    kernel: Kernel,
    tile: int,
    keep: Tensor | None,
    skipped: int,
    room: Tensor | None,
) -> Tensor:
    """Attention within one document, [1, heads, ...]: the queries are its last positions.

    `keep` [key_len] marks the keys that are no padding, None where all are real. So many positions as `skipped` lie
    between the span's sinks and the other keys, seen by none of the queries; without them positions are indices.
    The output is written into `room`, where there is one.
    """
    end = key.shape[2] + skipped
    at = start = end - query.shape[2]
    head = end if span.max_visible is None else min(end, span.max_visible)
    outputs: list[Tensor] = []

    def put(part: Tensor, first: int, stop: int) -> None:
        if room is None:
            outputs.append(part)
        else:
            room[:, :, first - start : stop - start] = part

    if start == 0 and keep is None and kernel.is_fused(query, value):
        put(kernel.causal(query[:, :, :head], key[:, :, :head], value[:, :, :head]), 0, head)
        at = head
    elif span.max_visible is None and keep is None and kernel.tells_sums(query, value):
        put(kernel.causal_after(query, key, value), start, end)
        at = end
    while at < end:
        step = count = 0
        if span.period is not None and at >= head:
            step = max(1, tile // span.period) * span.period
            count = (end - at) // step
        if not count:
            step, count = min(tile, end - at), 1
        here = slice(at - start, at - start + count * step)
        part = query[:, :, here].unflatten(2, (count, step))
        target = None if room is None else room[:, :, here].unflatten(2, (count, step))
        families = []
        for first in range(0, step, tile):
            family = slice(first, min(first + tile, step))
            into = None if target is None else target[:, :, :, family]
            families.append(
                _tiles(part[:, :, :, family], key, value, span, kernel, keep, skipped, at + first, step, into)
            )
        if room is None:
            outputs.append(families[0] if len(families) == 1 else torch.cat(families, 3))
            outputs[-1] = outputs[-1].flatten(2, 3)
        at += count * step
    out = _join(outputs, 2) if room is None else room
    if keep is None:
        return out
    padding = ~keep[start - skipped :, None]
    return out.masked_fill(padding, 0) if room is None else out.masked_fill_(padding, 0)


@dataclass(frozen=True)
class _Geometry:
    """What the first tile of a family sees; the others see the same, further on.

    Attributes:
        low: position of the first key of the strided view.
        length: keys of the view.
        sinks: keys before it that all queries see.
        visible: bool [width, keys], of the sinks (unless they are apart) and the view.
        everything: whether all of it is visible.
        own: bool as `visible`, True where a query meets its own key.
    """

    low: int
    length: int
    sinks: int
    visible: Tensor
    everything: bool
    own: Tensor


@lru_cache(maxsize=256)
def _geometry(span: Span, at: int, width: int, skipped: int, apart: bool, device: torch.device) -> _Geometry:
    """Of queries at..at + width - 1; with `apart`, sinks are not among the keys of the mask."""
    with torch.inference_mode(False):  # kept for calls that save it for a backward pass
        low = int(span.first_visible(torch.tensor(at)))
        extra = -(at + width - low) % ALIGNED
        low -= extra if low - extra >= span.sinks + skipped else 0
        sinks = min(span.sinks, low)
        index = torch.arange(at + width, device=device)
        seen = index[low:] if apart else torch.cat([index[:sinks], index[low:]])
        visible, own = span.visible(index[at:, None], seen), seen == index[at:, None]
        return _Geometry(low, at + width - low, sinks, visible, bool(visible.all()), own)


CHUNK = 2**21
"""Values of output that exist, without gradients, beside the whole."""


def _tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    kernel: Kernel,
    keep: Tensor | None,
    skipped: int,
    at: int,
    step: int,
    room: Tensor | None,
) -> Tensor:
    """Attention of tiles of queries, [1, heads, tiles, width, dim]; tile i starts at position at + i * step."""
    _, heads, count, width, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    apart = keep is None and kernel.tells_sums(query, value)  # sinks by themselves, without a copy
    geometry = _geometry(span, at, width, skipped, apart, key.device)
    low, length, sinks = geometry.low, geometry.length, geometry.sinks
    beside = apart and bool(sinks)

    def strided(x: Tensor) -> Tensor:
        """[1, heads, key_len, dim] -> [tiles, heads, sinks + length, dim], the keys each tile may see."""
        first = low - skipped
        tiles = x[0, :, first : first + length + (count - 1) * step].unfold(1, length, step).permute(1, 0, 3, 2)
        if sinks and not beside:
            tiles = torch.cat([x[:, :, :sinks].expand(count, -1, -1, -1), tiles], 2)
        return tiles

    visible, everything = geometry.visible, geometry.everything
    if keep is not None:
        # padding sees itself, so that no softmax is empty; its output is dropped
        visible = visible & (strided(keep[None, None, :, None]).mT | geometry.own)
        everything = False
    mask = None
    if beside or not everything:
        native = kernel.groups_heads(query, value)
        mask = visible if native else visible.repeat(*[1] * (visible.ndim - 2), group, 1)

    queries, keys, values = query[0].transpose(0, 1), strided(key), strided(value)
    chunk = count if room is None else max(1, CHUNK // (heads * width * dim))
    for first in range(0, count, chunk):
        part = slice(first, first + chunk)
        q, k, v = queries[part], keys[part], values[part]
        if not kernel.groups_heads(query, value):
            q = q.reshape(len(q), kv_heads, group * width, dim)
        here = mask[part] if mask is not None and mask.ndim == 4 else mask
        if beside and here is not None:
            out = kernel.masked_beside(q, k, v, here, key[:, :, :sinks], value[:, :, :sinks])
        else:
            out = kernel.masked(q, k, v, here)
        out = out.reshape(len(q), heads, width, -1).transpose(0, 1)
        if room is not None:
            room[0, :, part] = out
    return out[None] if room is None else room
