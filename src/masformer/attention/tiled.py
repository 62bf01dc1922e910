"""Local attention in strided tiles over torch's scaled_dot_product_attention: any device, differentiable.

Rows are cut into documents, so that padding and packing need no mask. Within a document, queries below
`span.max_visible` see every earlier key: plain causal attention. Later queries are taken in tiles whose recent keys
are an overlapping strided view of the keys (no copy without sinks); the pattern repeats with `span.period`, so that
one small mask, made by `span.visible` for the first tile, serves them all. Grouped query heads become further query
rows of their key head. Extra memory grows as N * (window + tile).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from masformer.spans import Span

TILE = 128


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, span: Span, scale: float, documents: Tensor | None, tile: int = TILE
) -> Tensor:
    """See `masformer.attention.attend` for the shapes; `tile` is the number of queries in a tile."""
    if documents is None:
        return torch.cat(_document(query, key, value, span, scale, tile, None), 2)
    past = key.shape[2] - query.shape[2]
    rows = []
    for row in range(query.shape[0]):
        q, k, v = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for name in documents[row].unique().tolist():
            if name < 0:
                continue
            mine = documents[row] == name
            found = mine.nonzero()[:, 0]
            start, stop = int(found[0]), int(found[-1]) + 1
            first = max(start, past)
            if stop <= first:
                continue
            keep = None if found.numel() == stop - start else mine[start:stop]
            part = torch.cat(
                _document(
                    q[:, :, first - past : stop - past],
                    k[:, :, start:stop],
                    v[:, :, start:stop],
                    span,
                    scale,
                    tile,
                    keep,
                ),
                2,
            )
            if keep is not None:
                part = part.masked_fill(~mine[first:stop, None], 0)
            out = out + F.pad(part, (0, 0, first - past, query.shape[2] - (stop - past)))
        rows.append(out)
    return torch.cat(rows)


def _document(
    query: Tensor, key: Tensor, value: Tensor, span: Span, scale: float, tile: int, keep: Tensor | None
) -> list[Tensor]:
    """Attention within one document (positions are indices); the pieces of the output in order of the queries.

    `keep` [key_len] marks the keys that belong to the document, None where all do.
    """
    end = key.shape[2]
    start = end - query.shape[2]
    head = end if span.max_visible is None else min(end, span.max_visible)
    outputs = []
    at = start
    if start == 0 and keep is None and head > 0:
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, :head], key[:, :, :head], value[:, :, :head], is_causal=True, scale=scale, enable_gqa=True
            )
        )
        at = head
    while at < end:
        count, width = 1, min(tile, end - at)
        if at >= head and keep is None and span.period is not None:
            step = max(1, tile // span.period) * span.period
            if step <= tile and (end - at) // step > 0:
                count, width = (end - at) // step, step
        total = count * width
        part = query[:, :, at - start : at - start + total]
        outputs.append(_tiles(part, key, value, span, scale, at, count, width, keep))
        at += total
    return outputs


def _tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    scale: float,
    at: int,
    count: int,
    width: int,
    keep: Tensor | None,
) -> Tensor:
    """`count` tiles of `width` queries, the first at position `at`, in one call a row."""
    batch, heads, total, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    low = int(span.first_visible(torch.tensor(at)))
    length = at + width - low
    sinks = min(span.sinks, low)
    index = torch.arange(at + width, device=key.device)
    seen = torch.cat([index[:sinks], index[low:]])
    visible = span.visible(index[at:, None], seen)
    if keep is not None:
        visible = visible & (keep[seen] | (seen == index[at:, None]))
    mask = None if visible.all() else visible.repeat(group, 1)

    def strided(x: Tensor) -> Tensor:
        tiles = x[:, low : low + length + (count - 1) * width].unfold(1, length, width).permute(1, 0, 3, 2)
        if sinks:
            tiles = torch.cat([x[:, :sinks].expand(count, -1, -1, -1), tiles], 2)
        return tiles

    rows = []
    for row in range(batch):
        folded = query[row].reshape(kv_heads, group, count, width, dim)
        folded = folded.permute(2, 0, 1, 3, 4).reshape(count, kv_heads, group * width, dim)
        out = F.scaled_dot_product_attention(
            folded, strided(key[row]), strided(value[row]), attn_mask=mask, scale=scale
        )
        out = out.reshape(count, kv_heads, group, width, -1).permute(1, 2, 0, 3, 4)
        rows.append(out.reshape(heads, total, -1))
    return torch.stack(rows)
