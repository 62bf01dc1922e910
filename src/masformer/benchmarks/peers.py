"""Other implementations of attention under a span, to measure against: each where it is installed and able.

They are run as their own users would: transformers' functions with its masks, FlexAttention compiled, and the packages
`local-attention` and `flash-attn`. What one cannot do is said, not left out in silence. torch's own FlashAttention is
called directly, as the limit of what a window can cost on a GPU.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from masformer.spans import BlockSpan, Span, WindowSpan

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query [batch, heads, length, dim], key and value [batch, kv_heads, length, dim] -> as the query."""
Made = tuple[Attention, Span]
"""A peer, and the span that it really computes."""


DIRECT = "torch-flash"
"""The peer that calls torch's kernel directly: ours are held against it."""


class UnableError(Exception):
    """Why a peer does not run here."""


def transformers_sdpa(span: Span, query: Tensor, key: Tensor, backward: bool) -> Made:
    """Transformers' default on a sliding layer: `scaled_dot_product_attention` with an N x N mask, made beforehand."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _check_memory(query, query.shape[2] ** 2 * query.element_size())
    mask = _mask(span, query)
    module = _module(query, key)
    return lambda q, k, v: sdpa_attention_forward(module, q, k, v, mask)[0].transpose(1, 2), span


def transformers_eager(span: Span, query: Tensor, key: Tensor, backward: bool) -> Made:
    """Transformers' `eager`: all scores of all heads, with an additive N x N mask made beforehand."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    batch, heads, length, dim = query.shape
    _check_memory(query, batch * heads * length**2 * query.element_size() * (5 if backward else 3))
    mask = torch.zeros(1, 1, length, length, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(~_mask(span, query), torch.finfo(query.dtype).min)
    module = _module(query, key)
    return lambda q, k, v: eager_attention_forward(module, q, k, v, mask, dim**-0.5)[0].transpose(1, 2), span


def flex(span: Span, query: Tensor, key: Tensor, backward: bool) -> Made:
    """torch's FlexAttention, compiled, with a block mask of the span made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cpu = query.device.type == "cpu"
    if cpu and backward:
        raise UnableError("FlexAttention has no backward pass on the CPU")
    if cpu and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UnableError("compiling FlexAttention for the CPU needs a C++ compiler")
    length = query.shape[2]
    _check_memory(query, 3 * length**2)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return span.visible(i, j)

    blocks = create_block_mask(visible, None, None, length, length, device=str(query.device))
    torch._dynamo.config.recompile_limit = (
        1024  # one kernel a span and a length; beyond the limit it would run uncompiled
    )
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True), span  # type: ignore[return-value]


def local_attention(span: Span, query: Tensor, key: Tensor, backward: bool) -> Made:
    """The package `local-attention`: windows of it hold one key more than ours; it knows no sinks."""
    try:
        package: Any = importlib.import_module("local_attention")
    except ImportError:
        raise UnableError("the package local-attention is not installed") from None
    if span.sinks:
        raise UnableError("local-attention has no sinks")
    options: dict[str, Any]
    runs: Span = span
    if isinstance(span, WindowSpan):
        runs = WindowSpan(span.size + 1)
        options = {"window_size": span.size, "look_backward": 1, "exact_windowsize": True}
    elif isinstance(span, BlockSpan):
        options = {"window_size": span.size, "look_backward": span.lookback}
    else:
        raise UnableError(f"local-attention has no {span}")
    run = package.LocalAttention(**options, causal=True, autopad=True, use_rotary_pos_emb=False)
    group = query.shape[1] // key.shape[1]
    return lambda q, k, v: run(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)), runs


def flash(span: Span, query: Tensor, key: Tensor, backward: bool) -> Made:
    """The package `flash-attn`, with its own window."""
    try:
        package: Any = importlib.import_module("flash_attn")
    except ImportError:
        raise UnableError("the package flash-attn is not installed") from None
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        raise UnableError("flash-attn needs CUDA, and float16 or bfloat16")
    if not isinstance(span, WindowSpan) or span.sinks:
        raise UnableError(f"flash-attn has no {span}")
    window = (span.size - 1, 0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return package.flash_attn_func(q, k, v, causal=True, window_size=window).transpose(1, 2)  # type: ignore[no-any-return]

    return run, span


class _Direct(torch.autograd.Function):
    """torch's FlashAttention on [batch, length, heads, dim], with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:  # type: ignore[override]
        out, lse, *random = direct_forward(q, k, v, left)
        ctx.save_for_backward(q, k, v, out, lse, *random)
        ctx.left = left
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        return (*direct_backward(gradient, q, k, v, out, lse, seed, offset, ctx.left), None)


def direct_forward(q: Tensor, k: Tensor, v: Tensor, left: int) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and two states of the random generator; `left` keys before a query's own, or -1 for all."""
    out: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False),
        scale=q.shape[-1] ** -0.5,
        window_size_left=left,
        window_size_right=0,
    )
    return out[:4]


def direct_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor, left: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *(gradient, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, True, seed, offset),
        scale=q.shape[-1] ** -0.5,
        window_size_left=left,
        window_size_right=0,
    )
    return found


def torch_flash(span: Span, query: Tensor, key: Tensor, backward: bool) -> Made:
    """torch's own FlashAttention, called directly: a window without its sinks, or own blocks as rows of their own."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        raise UnableError("torch's FlashAttention needs CUDA, and float16 or bfloat16")
    return direct(span, query.shape[2])


def direct(span: Span, length: int) -> Made:
    """The same, without a look at the device."""
    runs: Span
    if isinstance(span, WindowSpan):
        rows, left, runs = length, span.size - 1, WindowSpan(span.size)
    elif isinstance(span, BlockSpan) and not span.lookback and length % span.size == 0:
        rows, left, runs = span.size, -1, span
    else:
        raise UnableError(f"torch's FlashAttention has no {span}")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, _, dim = q.shape
        q, k, v = (x.transpose(1, 2).reshape(-1, rows, x.shape[1], dim) for x in (q, k, v))
        return _Direct.apply(q, k, v, left).reshape(batch, length, heads, dim).transpose(1, 2)  # type: ignore[no-any-return]

    return run, runs


PEERS: dict[str, Callable[[Span, Tensor, Tensor, bool], Made]] = {
    "hf-sdpa": transformers_sdpa,
    "hf-eager": transformers_eager,
    "flex-attention": flex,
    "local-attention": local_attention,
    "flash-attn": flash,
    DIRECT: torch_flash,
}
"""Name -> what makes it for a span and for inputs of given shapes, or raises `UnableError`."""


def _mask(span: Span, query: Tensor) -> Tensor:
    index = torch.arange(query.shape[2], device=query.device)
    return span.visible(index[:, None], index[None, :])[None, None]


def _module(query: Tensor, key: Tensor) -> Any:
    return SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], training=False, is_causal=True)


def _check_memory(query: Tensor, needed: int) -> None:
    """Half of what is free may be taken."""
    if query.is_cuda:
        free = torch.cuda.mem_get_info(query.device)[0]
    else:
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if needed > free // 2:
        raise UnableError(f"it would need {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
