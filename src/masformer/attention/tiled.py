"""Local attention in strided tiles over torch's scaled_dot_product_attention: any device, differentiable.

Rows are cut into documents, so that padding and packing need no mask. Within a document, queries below
`span.max_visible` see every earlier key: plain causal attention. Later queries are taken in tiles whose recent keys
are an overlapping strided view of the keys (no copy without sinks); the pattern repeats with `span.period`, so that
one small mask, made by `span.visible` for the first tile, serves all tiles of its family. Where torch's kernel does
not take grouped query heads, they become further query rows of their key head. Extra memory grows as
N * (window + tile).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from masformer.attention.layout import Layout, Segment
from masformer.spans import Span


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    scale: float,
    layout: Layout | None,
    dropout: float,
    softcap: float | None,
    tile: int | None = None,
) -> Tensor:
    """See `masformer.attention.attend` for the shapes; `tile` is the number of queries in a tile."""
    kernel = Kernel(scale, dropout, softcap)
    if tile is None:
        tile = tile_size(query, value, span, kernel)
    if layout is None:
        return _document(query, key, value, span, kernel, tile, None, 0)
    past = key.shape[2] - query.shape[2]
    rows = []
    for row, segments in enumerate(layout.rows):
        pieces, done = [], past
        skipped = 0 if layout.skipped is None else layout.skipped[row]
        for segment in segments:
            first = max(segment.start, past)
            if segment.stop <= first:
                continue
            q, k, v = query[row : row + 1], key[row : row + 1], value[row : row + 1]
            q = q[:, :, first - past : segment.stop - past]
            k, v = k[:, :, segment.start : segment.stop], v[:, :, segment.start : segment.stop]
            out = _document(q, k, v, span, kernel, tile, _kept(segment, k), skipped)
            pieces += [_zeros(q, v, first - done), out]
            done = segment.stop
        pieces.append(_zeros(query[row : row + 1], value, key.shape[2] - done))
        rows.append(_join(pieces, 2))
    return _join(rows, 0)


def tile_size(query: Tensor, value: Tensor, span: Span, kernel: Kernel) -> int:
    """How many queries share a tile; measured choices (benchmarks/notes.md).

    Narrow tiles compute fewer scores that the mask hides; wide ones share more keys, which saves copies where there
    are sinks, additions in the backward pass, and calls where query heads become rows.
    """
    trains = torch.is_grad_enabled() and query.requires_grad
    if not kernel.groups_heads(query, value):
        return 128 if trains or span.sinks else 64
    if not trains and (not span.sinks or kernel.tells_sums(query, value)):
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


class Kernel:
    """Dense attention on small pieces: softmax(cap(q k^T * scale) + mask) v, with dropout on the weights."""

    def __init__(self, scale: float, dropout: float, softcap: float | None) -> None:
        self.scale, self.dropout, self.softcap = scale, dropout, softcap

    def is_fused(self, query: Tensor) -> bool:
        """Whether torch has a kernel that never holds the scores of all pairs."""
        return self.softcap is None and (not self.dropout or query.is_cuda)

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, dropout_p=self.dropout, enable_gqa=True
        )

    def groups_heads(self, query: Tensor, value: Tensor) -> bool:
        """Whether the kernel takes more query heads than key heads as they lie, and is as fast for few queries."""
        return query.device.type == "cpu" and self.is_fused(query) and query.shape[-1] == value.shape[-1]

    def tells_sums(self, query: Tensor, value: Tensor) -> bool:
        """Whether torch has a kernel that also returns the log-sum-exp of the scores.

        It has on the CPU, without gradients, for values as wide as the keys.
        """
        plain = self.softcap is None and not self.dropout and query.device.type == "cpu"
        plain = plain and query.shape[-1] == value.shape[-1]
        return plain and not torch.is_grad_enabled() and hasattr(torch.ops.aten, FLASH_CPU)

    def causal_after(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of the last positions, without a mask as long as the past."""
        batch, heads, new, dim = query.shape
        kv_heads, past = key.shape[1], key.shape[2] - new
        group = heads // kv_heads
        folded = query.reshape(batch, kv_heads, group * new, dim)
        old, old_sum = self._with_sums(folded, key[:, :, :past], value[:, :, :past])
        own, own_sum = self._with_sums(query, key[:, :, past:], value[:, :, past:], is_causal=True)
        return _joined(old.reshape(own.shape), old_sum.reshape(own_sum.shape), own, own_sum)

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
        return _joined(far, far_sum, near, near_sum)

    def _with_sums(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **mask: Tensor) -> Any:
        flash = getattr(torch.ops.aten, FLASH_CPU)
        return flash(query, key, value, 0.0, is_causal, scale=self.scale, **mask)

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As many heads in `query` as in `key`, unless it `groups_heads`; scores are made anew in the backward pass."""
        if self.is_fused(query):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scale, dropout_p=self.dropout, enable_gqa=True
            )
        if torch.is_grad_enabled():
            return checkpoint(self._plain, query, key, value, mask, use_reentrant=False)  # type: ignore[no-any-return]
        return self._plain(query, key, value, mask)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = (query @ key.transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(value.dtype)
        return F.dropout(weights, self.dropout) @ value


def _joined(left: Tensor, left_sum: Tensor, right: Tensor, right_sum: Tensor) -> Tensor:
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
) -> Tensor:
    """Attention within one document: the queries are its last positions.

    `keep` [key_len] marks the keys that are no padding, None where all are real. So many positions as `skipped` lie
    between the span's sinks and the other keys, seen by none of the queries; without them positions are indices.
    """
    end = key.shape[2] + skipped
    at = start = end - query.shape[2]
    head = end if span.max_visible is None else min(end, span.max_visible)
    outputs = []
    if start == 0 and keep is None and kernel.is_fused(query):
        outputs.append(kernel.causal(query[:, :, :head], key[:, :, :head], value[:, :, :head]))
        at = head
    elif span.max_visible is None and keep is None and kernel.tells_sums(query, value):
        return kernel.causal_after(query, key, value)
    while at < end:
        step = count = 0
        if span.period is not None and at >= head:
            step = max(1, tile // span.period) * span.period
            count = (end - at) // step
        if not count:
            step, count = min(tile, end - at), 1
        part = query[:, :, at - start : at - start + count * step]
        families = [
            _tiles(
                part, key, value, span, kernel, keep, skipped, at, count, step, range(first, min(first + tile, step))
            )
            for first in range(0, step, tile)
        ]
        outputs.append(torch.cat(families, 3).flatten(2, 3) if len(families) > 1 else families[0].flatten(2, 3))
        at += count * step
    out = _join(outputs, 2)
    return out if keep is None else out.masked_fill(~keep[start - skipped :, None], 0)


def _tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    kernel: Kernel,
    keep: Tensor | None,
    skipped: int,
    at: int,
    count: int,
    step: int,
    family: range,
) -> Tensor:
    """The queries at positions at + i * step + family for all i < count: [batch, heads, count, len(family), dim].

    `query` starts at position `at` and holds count * step positions.
    """
    batch, heads, _, dim = query.shape
    kv_heads, width = key.shape[1], len(family)
    group = heads // kv_heads
    at += family.start
    low = int(span.first_visible(torch.tensor(at)))
    extra = -(at + width - low) % ALIGNED
    low -= extra if low - extra >= span.sinks + skipped else 0
    length = at + width - low
    sinks = min(span.sinks, low)

    beside = (
        bool(sinks) and keep is None and kernel.tells_sums(query, value)
    )  # sinks apart from the others, without a copy

    def strided(x: Tensor) -> Tensor:
        """[heads, key_len, dim] -> [count, heads, sinks + length, dim], the keys each tile may see."""
        first = low - skipped
        tiles = x[:, first : first + length + (count - 1) * step].unfold(1, length, step).permute(1, 0, 3, 2)
        if sinks and not beside:
            tiles = torch.cat([x[:, :sinks].expand(count, -1, -1, -1), tiles], 2)
        return tiles

    index = torch.arange(at + width, device=key.device)
    seen = index[low:] if beside else torch.cat([index[:sinks], index[low:]])
    visible = span.visible(index[at:, None], seen)
    if keep is not None:
        own = seen == index[at:, None]  # padding sees itself, so that no softmax is empty; its output is dropped
        visible = visible & (strided(keep[None, :, None]).mT | own)
    native = kernel.groups_heads(query, value)
    mask = (
        None if visible.all() and not beside else visible.repeat(*[1] * (visible.ndim - 2), 1 if native else group, 1)
    )

    rows = []
    for row in range(batch):
        folded = query[row].unflatten(1, (count, step))[:, :, family.start : family.stop].transpose(0, 1)
        if not native:
            folded = folded.reshape(count, kv_heads, group * width, dim)
        if beside and mask is not None:
            first, second = (x[row, None, :, :sinks] for x in (key, value))
            out = kernel.masked_beside(folded, strided(key[row]), strided(value[row]), mask, first, second)
        else:
            out = kernel.masked(folded, strided(key[row]), strided(value[row]), mask)
        rows.append(out.reshape(count, heads, width, -1).transpose(0, 1))
    return torch.stack(rows) if batch > 1 else rows[0][None]
