"""Local attention in strided tiles over torch's scaled_dot_product_attention: any device, differentiable.

Rows are cut into documents, so that padding and packing need no mask. Within a document, queries below
`span.max_visible` see every earlier key: plain causal attention. Later queries are taken in tiles whose recent keys
are an overlapping strided view of the keys (no copy without sinks); the pattern repeats with `span.period`, so that
one small mask, made by `span.visible` for the first tile, serves all tiles of its family. Grouped query heads become
further query rows of their key head. Extra memory grows as N * (window + tile).
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
    """See `masformer.attention.attend` for the shapes; `tile` is the number of queries in a tile.

    Narrow tiles compute fewer scores that the mask hides; wide ones share more keys, which saves copies where there
    are sinks and additions in the backward pass.
    """
    kernel = Kernel(scale, dropout, softcap)
    if tile is None:
        tile = 64 if not span.sinks or kernel.tells_sums(query, value) else 128
        tile = 128 if torch.is_grad_enabled() and query.requires_grad else tile
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


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _zeros(query: Tensor, value: Tensor, length: int) -> Tensor:
    return query.new_zeros(1, query.shape[1], length, value.shape[-1])


def _kept(segment: Segment, key: Tensor) -> Tensor | None:
    return None if segment.keep is None else segment.keep.to(key.device)


FLASH_CPU = "_scaled_dot_product_flash_attention_for_cpu"
"""What `scaled_dot_product_attention` calls on the CPU; returns the log-sum-exps as well."""


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
        own_keys, own_values = (x[:, :, past:].repeat_interleave(group, 1) for x in (key, value))
        own, own_sum = self._with_sums(query, own_keys, own_values, is_causal=True)
        return _joined(old.reshape(own.shape), old_sum.reshape(own_sum.shape), own, own_sum)

    def masked_beside(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """Attention to keys under a mask and to further keys and values, `first` and `second`, that all queries see."""
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        near, near_sum = self._with_sums(query, key, value, attn_mask=bias)
        far, far_sum = self._with_sums(query, first, second)
        return _joined(far, far_sum, near, near_sum)

    def _with_sums(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **mask: Tensor) -> Any:
        flash = getattr(torch.ops.aten, FLASH_CPU)
        return flash(query, key, value, 0.0, is_causal, scale=self.scale, **mask)

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As many heads in `query` as in `key`; the scores are made anew in the backward pass."""
        if self.is_fused(query):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scale, dropout_p=self.dropout
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
        outputs.append(_join(families, 3).flatten(2, 3))
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
    mask = None if visible.all() and not beside else visible.repeat(*[1] * (visible.ndim - 2), group, 1)

    rows = []
    for row in range(batch):
        folded = query[row].reshape(kv_heads, group, count, step, dim)[..., family.start : family.stop, :]
        folded = folded.permute(2, 0, 1, 3, 4).reshape(count, kv_heads, group * width, dim)
        if beside and mask is not None:
            first = (x[row, None, :, :sinks].expand(count, -1, -1, -1) for x in (key, value))
            out = kernel.masked_beside(folded, strided(key[row]), strided(value[row]), mask, *first)
        else:
            out = kernel.masked(folded, strided(key[row]), strided(value[row]), mask)
        out = out.reshape(count, kv_heads, group, width, -1).permute(1, 2, 0, 3, 4)
        rows.append(out.reshape(1, heads, count, width, -1))
    return _join(rows, 0)
