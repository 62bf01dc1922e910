"""Attention under a span with torch's FlexAttention (Dong et al., arXiv 2412.05496): one fused kernel on CUDA.

FlexAttention computes blocks of 128 queries x 128 keys. It is told which blocks hold a visible pair, and which of them
hold no other, so that only the rest of them need the mask, a function of positions: `span.visible` itself. The blocks
are found from `span.first_visible` and `span.sinks` in memory of (N / 128)^2, once for each span, shape and `Layout`:
all layers of a forward pass share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, lru_cache
from shutil import which
from typing import Any

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils._triton import has_triton
from torch.utils.weak import WeakTensorKeyDictionary

from masformer.attention import constant
from masformer.attention.call import Backend, Call
from masformer.attention.layout import Layout
from masformer.attention.tiled import Tiled
from masformer.spans import Span

BLOCK = 128
"""Queries, and keys, of a block."""

NARROWEST = 16
"""Triton multiplies matrices at least so wide."""

FEW_SCORES = 2**24
"""On the CPU, problems of at most so many scores are not worth the half minute that a kernel takes to compile."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels are compiled for."""

VARIANTS = 1024
"""Kernels that one process may compile: for each span, head shape, dtype, with gradients or without, ..."""


Lists = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Blocks:
    """What FlexAttention is told about a span over given lengths.

    The lists are [batch or 1, 1, blocks] int32 counts and [batch or 1, 1, blocks, blocks] int32 indices: first of the
    blocks of keys for each block of queries, then of the blocks of queries for each block of keys. `full` blocks hold
    visible pairs alone, `partial` ones some.

    Attributes:
        partial: counts and indices, by queries and by keys.
        full: the same.
        shift: [] int32, how many keys come before the first query; a query's position is its index and that.
        tokens: where there is a layout: document and position of each query [batch, query_len], and of each key
            [batch, key_len], int32. Padding has document -1 as a query and -2 as a key.
    """

    partial: Lists
    full: Lists
    shift: Tensor | None
    tokens: Lists | None


shapes_config: Any = torch.fx.experimental._config


class Flex(Backend):
    """FlexAttention on CUDA, and on the CPU, mostly to try there what runs on CUDA."""

    name = "flex"

    def objection(self, call: Call) -> str | None:
        device, dtype = call.query.device.type, call.query.dtype
        if call.dropout:
            return "backend flex has no dropout on attention weights; allowed: dropout 0, or backend tiled"
        if device not in ("cuda", "cpu"):
            return f"backend flex runs on cuda and cpu, not on {device}; use backend tiled"
        if device == "cuda" and dtype not in DTYPES:
            return f"backend flex has no {dtype} on cuda; allowed: float32, bfloat16, float16"
        if device == "cuda" and not has_triton():
            return "backend flex needs Triton on cuda, which is not there; use backend tiled"
        return None

    def run(self, call: Call) -> Tensor:
        """A single query, as in decoding, needs no kernel of its own: it takes those of `tiled`."""
        (query, key, value), span = call.tensors, call.span
        if query.shape[2] == 1:
            return Tiled().run(call)
        blocks = blocks_of(span, query.shape[2], key.shape[2], call.layout, query.device)
        told = call.sinks is not None
        if not is_compiled(call):
            out, sums = _run(query, key, value, blocks, span, call.scale, call.softcap, {}, told, compiled=False)
            return _beside_sinks(call, blocks, out, sums)
        width = value.shape[-1]
        if query.is_cuda:
            query, key, value = _padded(query), _padded(key), _padded(value)
        elif query.requires_grad or key.requires_grad or value.requires_grad:  # torch asks, even if none is needed
            query, key, value = query.detach(), key.detach(), value.detach()
        options = {
            "FORCE_USE_FLEX_ATTENTION": True,  # the kernel for short queries has limits that the other has not
            "IS_DIVISIBLE": query.shape[2] % BLOCK == 0 and key.shape[2] % BLOCK == 0,
        }
        with ExitStack() as stack:
            # Lengths are symbols, each of its own even where two are equal; other numbers are constants of a kernel.
            constants: dict[str, Any] = {"specialize_int": True, "specialize_float": True}
            limits = {"recompile_limit": VARIANTS, "accumulated_recompile_limit": VARIANTS}
            stack.enter_context(torch._dynamo.config.patch(constants | limits))
            stack.enter_context(shapes_config.patch(use_duck_shape=False))
            numbers = call.scale, call.softcap
            out, sums = _compiled()(query, key, value, blocks, span, *numbers, options, told, compiled=True)
        return _beside_sinks(call, blocks, out[..., :width], sums)


def _beside_sinks(call: Call, blocks: Blocks, out: Tensor, sums: Tensor | None) -> Tensor:
    """The output with the constant sinks, if there are any; padding has none."""
    if call.sinks is None or sums is None:
        return out
    logit, value = call.sinks.by_head()
    out, _ = constant.join(out, sums, logit[:, None], None if value is None else value[:, None])
    return out if blocks.tokens is None else out.masked_fill((blocks.tokens[0] < 0)[:, None, :, None], 0)


def is_compiled(call: Call) -> bool:
    """Whether FlexAttention runs as a compiled kernel; else torch's own operator runs, which holds all scores.

    On CUDA it always does. On the CPU torch has a kernel for the forward pass alone, and it fails on masks that look up
    the positions of tokens (seen in torch 2.13): it is compiled where neither gradients nor a layout nor log-sum-exps
    (for constant sinks) are needed and there is a C++ compiler, for dtypes that it has and problems that are worth it.
    """
    query = call.query
    if query.is_cuda:
        return True
    if call.layout is not None or call.trains or call.sinks is not None:
        return False
    scores = query.shape[:3].numel() * call.key.shape[2]
    return scores > FEW_SCORES and query.dtype in DTYPES and _has_cpp_compiler()


@cache
def _has_cpp_compiler() -> bool:
    avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return avx2 and any(which(name) for name in ("g++", "clang++"))


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_run, fullgraph=True, dynamic=True)  # fullgraph: an error in place of all scores at once


def _padded(tensor: Tensor) -> Tensor:
    """Heads as wide as a power of two: zeros change no score."""
    width = tensor.shape[-1]
    wide = max(NARROWEST, 1 << (width - 1).bit_length())
    return tensor if wide == width else F.pad(tensor, (0, wide - width))


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    span: Span,
    scale: float,
    softcap: float | None,
    options: Any,
    told: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention, in what is compiled or as it is; the same mask and score function in both.

    With the log-sum-exps of the scores [batch, heads, query_len], if they are to be `told`.
    """

    def visible(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        if blocks.tokens is None:
            return span.visible(query_index if blocks.shift is None else query_index + blocks.shift, key_index)
        documents, positions, key_documents, key_positions = blocks.tokens
        same = documents[batch, query_index] == key_documents[batch, key_index]
        return same & span.visible(positions[batch, query_index], key_positions[batch, key_index])

    def score(value: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return value if softcap is None else softcap * torch.tanh(value / softcap)

    mask = BlockMask(
        seq_lengths=(query.shape[2], key.shape[2]),
        kv_num_blocks=blocks.partial[0],
        kv_indices=blocks.partial[1],
        full_kv_num_blocks=blocks.full[0],
        full_kv_indices=blocks.full[1],
        q_num_blocks=blocks.partial[2],
        q_indices=blocks.partial[3],
        full_q_num_blocks=blocks.full[2],
        full_q_indices=blocks.full[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )
    if compiled:
        aux = AuxRequest(lse=told)
        out, more = flex_attention(query, key, value, score, mask, scale, True, kernel_options=options, return_aux=aux)
        return out, more.lse
    else:  # flex_attention itself would trace this anew for each mask, and refuses gradients on the CPU
        out, sums, *_ = flex_operator(query, key, value, score, mask.as_tuple(), scale, options)
        return out, sums * math.log(2) if told else None


# Which blocks hold what


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The documents of a layout -> (span, query length, keys that are missing, device) -> blocks."""


def blocks_of(span: Span, query_len: int, key_len: int, layout: Layout | None, device: torch.device) -> Blocks:
    """The blocks of a span, made once for all layers of a forward pass; without a layout, for all passes.

    Args:
        span: the span.
        query_len: the queries are the last `query_len` positions.
        key_len: number of keys.
        layout: the documents; None: one document a row, without padding.
        device: where the tensors shall lie.
    """
    if layout is None:
        return _plain_blocks(span, query_len, key_len, device)
    known = _known.setdefault(layout.documents, {})
    name = span, query_len, layout.skipped, device
    if name not in known:
        with torch.inference_mode(False), torch.no_grad():  # whoever trains next may find them here
            known[name] = _layout_blocks(span, query_len, layout, device)
    return known[name]  # type: ignore[no-any-return]


@lru_cache(maxsize=32)
def _plain_blocks(span: Span, query_len: int, key_len: int, device: torch.device) -> Blocks:
    with torch.inference_mode(False), torch.no_grad():
        index = torch.arange(key_len, dtype=torch.int32, device=device)[None]
        past = key_len - query_len
        partial, full = _lists(span, query_len, torch.zeros_like(index), index, 0)
        return Blocks(partial, full, torch.tensor(past, dtype=torch.int32, device=device) if past else None, None)


def _layout_blocks(span: Span, query_len: int, layout: Layout, device: torch.device) -> Blocks:
    documents = torch.full(layout.documents.shape, -1, dtype=torch.int32)
    for row, segments in enumerate(layout.rows):
        for segment in segments:
            documents[row, segment.start : segment.stop] = segment.start
    documents = documents.masked_fill_(layout.documents.cpu() < 0, -1).to(device)
    index = torch.arange(documents.shape[1], dtype=torch.int32, device=device)[None]
    positions = index - documents
    skipped: Tensor | int = 0
    if layout.skipped is not None:
        skipped = torch.tensor(layout.skipped, dtype=torch.int32, device=device)[:, None]
        positions = positions + skipped * (positions >= span.sinks)
    partial, full = _lists(span, query_len, documents, positions, skipped)
    past = documents.shape[1] - query_len
    keys = documents.masked_fill(documents < 0, -2)
    tokens = documents[:, past:].contiguous(), positions[:, past:].contiguous(), keys, positions
    return Blocks(partial, full, None, tokens)


def _lists(
    span: Span, query_len: int, documents: Tensor, positions: Tensor, skipped: Tensor | int
) -> tuple[Lists, Lists]:
    """`Blocks.partial` and `Blocks.full`.

    A query sees two runs of keys: the sinks of its document, and those from `span.first_visible` to itself.

    Args:
        span: the span.
        query_len: the queries are the last `query_len` tokens.
        documents: [batch, key_len] index of the first token of each token's document; -1 for padding.
        positions: [batch, key_len] position of each token in its document.
        skipped: [batch, 1], positions that are missing among the keys, after the sinks.
    """
    batch, key_len = documents.shape
    rows, columns = -(-query_len // BLOCK), -(-key_len // BLOCK)
    index = torch.arange(key_len, device=documents.device).expand(batch, -1)[:, key_len - query_len :]
    first, position = (x[:, key_len - query_len :].long() for x in (documents, positions))
    oldest = span.first_visible(position)
    oldest = first + torch.where(oldest >= span.sinks + skipped, oldest - skipped, oldest.clamp(max=span.sinks))
    apart = oldest > first + span.sinks  # else the two runs are one, from the first token on
    row = torch.arange(query_len, device=documents.device) // BLOCK * (columns + 1)

    def count(start: Tensor, stop: Tensor, there: Tensor) -> Tensor:
        """[batch, rows, columns]: of how many queries of a row a column of blocks is one of start..stop-1."""
        change = torch.zeros(batch, rows * (columns + 1), dtype=torch.int32, device=documents.device)
        counts = (there & (first >= 0) & (start < stop)).int()
        change.scatter_add_(1, row + start.clamp(0, columns), counts)
        change.scatter_add_(1, row + stop.clamp(0, columns), -counts)
        return change.view(batch, rows, columns + 1).cumsum(-1, dtype=torch.int32)[..., :columns]

    low, everywhere = torch.where(apart, oldest, first), torch.ones_like(apart)
    seen = count(low // BLOCK, index // BLOCK + 1, everywhere)
    whole = count(-(-low // BLOCK), (index + 1) // BLOCK, everywhere)
    if span.sinks:
        seen += count(first // BLOCK, (first + span.sinks - 1) // BLOCK + 1, apart)
        whole += count(-(-first // BLOCK), (first + span.sinks) // BLOCK, apart)
    padding = F.pad(documents < 0, (0, columns * BLOCK - key_len), value=True).view(batch, 1, columns, BLOCK)
    full = (whole == BLOCK) & ~padding.any(-1)
    return _ordered((seen > 0) & ~full), _ordered(full)


def _ordered(blocks: Tensor) -> Lists:
    """[batch, rows, columns] bool -> counts and indices, by rows and by columns."""
    by_rows, by_columns = (
        (
            dense.sum(-1, dtype=torch.int32)[:, None],
            torch.argsort(dense.int(), dim=-1, descending=True, stable=True).int()[:, None].contiguous(),
        )
        for dense in (blocks, blocks.mT)
    )
    return *by_rows, *by_columns
