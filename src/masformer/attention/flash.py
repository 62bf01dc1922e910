"""Spans on FlashAttention as torch ships it (Dao, arXiv 2307.08691), forward and backward.

A span is cut into parts (`masformer.attention.parts`), each of them one call of torch's kernel; sinks outside the
window are added by `masformer.attention.sinks`. Outputs are joined by the log-sum-exps of their scores. The backward
pass of each part is exact with the *joined* output and log-sum-exp, as in ring attention (Liu et al., arXiv
2310.01889): the weights are exp(score - log-sum-exp), and d score = weight * (d weight - sum(d out * out)), whichever
keys a part holds.

Kernels that the user activates through torch (FlashAttention 3 and 4) work underneath. Newer kernels have been wrong on
just such windows, so that each kind of call is held against dense attention at its first use on a device.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from masformer.attention import constant
from masformer.attention import sinks as sinks_beside
from masformer.attention.call import Backend, Call
from masformer.attention.constant import ConstantSinks
from masformer.attention.parts import Part, parts_of
from masformer.attention.reference import Reference
from masformer.attention.tiled import joined
from masformer.spans import BlockSpan, FullSpan, Span, WindowSpan

WIDEST = 256
"""The widest head that the kernels take."""

DTYPES = {torch.bfloat16, torch.float16}

MOST_SINKS = 64
"""The kernel for sinks holds all of them at once."""

ROUNDING = 2e-2
"""Errors of the kernels, as a share of the norm, are 2e-3 to 4e-3 in bfloat16; above this bound they are wrong."""


class Flash(Backend):
    """Torch's FlashAttention, in half precision on NVIDIA GPUs."""

    name = "flash"

    def objection(self, call: Call) -> str | None:
        query, key, value = call.tensors
        reason = _objection(
            query.device,
            frozenset(x.dtype for x in call.tensors),
            (query.shape[-1], value.shape[-1]),
            call.span,
            bool(call.dropout or call.softcap is not None),
        )
        instead = "use backend flex or tiled"
        if reason is not None:
            return f"{reason}; {instead}"
        if call.layout is not None and call.layout.has_holes:
            return f"backend flash takes no padding between the tokens of a document; {instead}"
        if call.past and call.trains and (call.layout is not None or isinstance(call.span, BlockSpan)):
            return f"backend flash has no gradients for such queries after a past; {instead}"
        if not _is_right(query.device, query.dtype, query.shape[-1], query.shape[1] // key.shape[1], _kind(call.span)):
            return f"backend flash gives wrong results for {call.span} on this GPU; {instead}"
        return None

    def run(self, call: Call) -> Tensor:
        if call.is_causal:  # torch may have a faster kernel than this one: cuDNN's on Hopper GPUs takes two thirds
            return call.causal()
        if call.trains:
            return _Flash.apply(call, *call.inputs)[0]  # type: ignore[no-any-return]
        return self.forward(call)[0]

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """The output, laid out in memory as [batch, query_len, heads, dim], and the log-sum-exps of the scores.

        Both with the constant sinks, if there are any. The sums are [batch * heads * query_len], in the order of the
        first part's kernel.
        """
        q, k, v = map(_in_rows, call.tensors)
        parts = parts_of(call)
        out, sums = _forward(parts.parts[0], q, k, v, call.scale)
        out = _end_to_end(out)  # the kernel writes in the order of the queries, which may be that of heads
        if len(parts.parts) > 1:
            flat, shape, totals = out.flatten(0, 1), sums.shape, _by_token(sums)
            for part in parts.parts[1:]:
                more, more_sums = _forward(part, q, k, v, call.scale)
                here, here_totals = flat[part.queries], totals[:, part.queries]
                more_totals = _by_token(more_sums)
                if part.alive is not None:
                    more_totals = more_totals.masked_fill(~part.alive, -torch.inf)
                flat[part.queries] = joined(here, here_totals.T, more.flatten(0, 1), more_totals.T)
                totals[:, part.queries] = torch.logaddexp(here_totals, more_totals)
            sums = _by_sequence(totals, shape)
        if parts.sinks is not None:
            q, k, v = map(_end_to_end, (q, k, v))
            sinks_beside.join(parts.sinks, q, k, v, out.view(q.shape), sums, call.scale)
        if call.sinks is not None:
            flat, totals = constant.join(out.flatten(0, 1), _by_token(sums).T, *call.sinks.by_head())
            out, sums = flat.view(out.shape), _by_sequence(totals.T, sums.shape)
        if parts.dead is not None:
            out.flatten(0, 1).masked_fill_(parts.dead, 0)
        return _by_head(out, call.query), sums.view(-1)

    def backward(self, call: Call, grad: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, ...]:
        """The gradients of `call.inputs`, from what `forward` gave.

        Those of query, key and value are laid out as its output.
        """
        q, k, v, g, o = map(_in_rows, (*call.tensors, grad, out))
        parts = parts_of(call)
        g = g if parts.dead is None else g.masked_fill(parts.dead.view(*g.shape[:2], 1, 1), 0)
        first = parts.parts[0]
        sums = sums.view(-1, q.shape[2], first.alike[1] if first.alike else q.shape[:2].numel())
        grads = tuple(map(_end_to_end, _backward(first, g, q, k, v, o, sums, call.scale)))
        if len(parts.parts) > 1:
            totals = _by_token(sums)
            for part in parts.parts[1:]:
                here = totals[:, part.queries]
                if part.alive is not None:
                    here = here.masked_fill(~part.alive, torch.inf)  # weights of exp(-inf) = 0
                shape = (part.alike[0], len(here), part.alike[1]) if part.alike else (1, *here.shape)
                more = _backward(part, g, q, k, v, o, _by_sequence(here, shape), call.scale)
                for whole, added, where in zip(grads, more, (part.queries, part.keys, part.keys), strict=True):
                    whole.flatten(0, 1)[where] += added.flatten(0, 1)
        if parts.sinks is not None:
            g, q, k, v, o = map(_end_to_end, (g, q, k, v, o))
            of_all = (x.view(like.shape) for x, like in zip(grads, (q, k, v), strict=True))
            sinks_beside.add_gradients(parts.sinks, g, q, k, v, o, sums, call.scale, *of_all)
        if call.sinks is None:
            return tuple(map(_by_head, grads, call.tensors))
        totals = _by_token(sums).T
        constants = constant.weight_gradients(call.sinks, g.flatten(0, 1), o.flatten(0, 1), totals)
        return *map(_by_head, grads, call.tensors), *constants

    def piece(self, call: Call, causal: bool) -> tuple[Tensor, Tensor]:
        """See `masformer.attention.pieces.attend_piece`."""
        q, k, v = map(_in_rows, call.tensors)
        out, sums = _forward(_piece(call, causal), q, k, v, call.scale)
        totals = _by_token(sums).unflatten(1, (len(call.query), -1)).transpose(0, 1)
        return _by_head(out, call.query), totals

    def piece_gradients(
        self, call: Call, causal: bool, grad: Tensor, out: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `masformer.attention.pieces.piece_gradients`."""
        part = _piece(call, causal)
        q, k, v, g, o = map(_in_rows, (*call.tensors, grad, out))
        rows, heads, length = sums.shape
        shape = (part.alike[0], heads, part.alike[1]) if part.alike else (1, heads, rows * length)
        sums = _by_sequence(sums.transpose(0, 1).reshape(heads, -1), shape)
        of_q, of_k, of_v = map(_by_head, _backward(part, g, q, k, v, o, sums, call.scale), call.tensors)
        return of_q, of_k, of_v


def _piece(call: Call, causal: bool) -> Part:
    if causal:
        return parts_of(call).parts[0]
    queries, keys = (x.shape[:3:2].numel() for x in (call.query, call.key))
    longest = call.query.shape[2], call.key.shape[2]
    return Part(slice(0, queries), slice(0, keys), (len(call.query), *longest), None, longest, causal=False)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, sums = Flash().forward(call)
        ctx.save_for_backward(out, sums, *inputs)
        ctx.rest = call.span, call.scale, call.layout
        ctx.mark_non_differentiable(sums)
        return out, sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        out, sums, query, key, value, *constants = ctx.saved_tensors
        span, scale, layout = ctx.rest
        call = Call(query, key, value, span, scale, layout, sinks=ConstantSinks.of(constants))
        return None, *Flash().backward(call, grad, out, sums)


def _in_rows(x: Tensor) -> Tensor:
    """[batch, heads, length, dim] -> [batch, length, heads, dim], without a copy as models and caches hold it."""
    x = x.transpose(1, 2)
    return x if x.stride(3) == 1 else x.contiguous()


def _end_to_end(x: Tensor) -> Tensor:
    """[batch, length, heads, dim] whose tokens lie at one distance through all rows; a copy where they do not."""
    flat = x.flatten(0, 1)
    return flat.view(*x.shape[:2], *flat.shape[1:])  # with the distance as stride, also of rows of one token


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """Tokens end to end in whatever sequences -> [batch, heads, length, dim], without a copy."""
    if x.shape[0] != like.shape[0]:
        x = x.view(like.shape[0], like.shape[2], *x.shape[2:])
    return x.transpose(1, 2)


def _by_token(sums: Tensor) -> Tensor:
    """[sequences, heads, length] -> [heads, tokens], a copy."""
    return sums.transpose(0, 1).reshape(sums.shape[1], -1).clone()


def _by_sequence(totals: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `_by_token`."""
    return totals.view(shape[1], shape[0], shape[2]).transpose(0, 1).contiguous()


# The kernels


def _forward(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [sequences, length, heads, dim] and log-sum-exps [sequences, heads, length] of one part.

    Sequences that are not alike lie in one, end to end. Tensors are [batch, length, heads, dim].
    """
    q, k, v = (_sequences(x, part, where) for x, where in ((q, part.queries), (k, part.keys), (v, part.keys)))
    ends, lengths = part.ends or (None, None), (*part.longest, 0.0, part.causal)
    out, sums, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *ends, *lengths, False, **_options(part, scale))
    return (out, sums) if part.alike else (out[None], sums[None])


def _backward(
    part: Part, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's gradients, in the same form, from the joined output and sums [sequences, heads, length]."""
    g, q, out = (_sequences(x, part, part.queries) for x in (g, q, out))
    k, v = (_sequences(x, part, part.keys) for x in (k, v))
    ends, lengths = part.ends or (None, None), (*part.longest, 0.0, part.causal)
    grads = torch.ops.aten._flash_attention_backward(
        *(g, q, k, v, out, sums if part.alike else sums[0]),
        *ends,
        *lengths,
        *_no_dropout(q.device),
        **_options(part, scale),
    )
    q_grad, k_grad, v_grad = grads if part.alike else (x[None] for x in grads)
    return q_grad, k_grad, v_grad


def _sequences(x: Tensor, part: Part, where: slice) -> Tensor:
    """The tokens of a part: [sequences, length, heads, dim], or end to end [tokens, heads, dim]."""
    rows, length, *rest = x.shape
    if part.alike and where.start == 0 and where.stop == rows * length:
        count = part.alike[0]
        return x if count == rows else x.reshape(count, -1, *rest)
    x = x.flatten(0, 1)[where]
    return x.unflatten(0, (part.alike[0], -1)) if part.alike else x


@cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of the dropout that there is none of: the backward kernel asks for it."""
    with torch.inference_mode(False):
        return torch.zeros(2, dtype=torch.uint64, device=device), torch.zeros((), dtype=torch.uint64, device=device)


def _options(part: Part, scale: float) -> dict[str, Any]:
    window = {} if part.left is None else {"window_size_left": part.left, "window_size_right": 0}
    return {"scale": scale, **window}


@cache
def _objection(
    device: torch.device, dtypes: frozenset[torch.dtype], widths: tuple[int, int], span: Span, other: bool
) -> str | None:
    """What speaks against such calls, whatever their lengths; asked once, as a model asks in every layer."""
    if device.type != "cuda" or torch.version.hip is not None:
        where = "AMD GPUs" if device.type == "cuda" else device.type
        return f"backend flash runs on NVIDIA GPUs, not on {where}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "backend flash needs a GPU of compute capability 8.0 or later"
    if len(dtypes) > 1 or not dtypes <= DTYPES:
        return f"backend flash takes bfloat16 and float16, not {' and '.join(sorted(map(str, dtypes)))}"
    if widths[0] != widths[1] or widths[0] > WIDEST or widths[0] % 8:
        given = f"not {widths[0]} and {widths[1]}"
        return f"backend flash takes keys and values of one width, a multiple of 8 up to {WIDEST}, {given}"
    if other:
        return "backend flash has neither dropout on attention weights nor soft caps"
    if span.sinks > MOST_SINKS:
        return f"backend flash takes at most {MOST_SINKS} sinks, not {span.sinks}"
    if span.sinks and not has_triton():
        return "backend flash needs Triton for sinks, which is not there"
    return None


# Trust


def _kind(span: Span) -> Span:
    """A span of the same kind that is short enough to try."""
    if isinstance(span, WindowSpan):
        return WindowSpan(min(span.size, 1024), span.sinks)
    if isinstance(span, BlockSpan):
        return BlockSpan(min(span.size, 256), min(span.lookback, 2))
    return FullSpan()


def _is_right(device: torch.device, dtype: torch.dtype, dim: int, group: int, span: Span) -> bool:
    """Whether the kernels give what dense attention gives; tried once a process for each kind of call."""
    if torch.cuda.is_current_stream_capturing():
        return True
    return _tried(device, dtype, dim, group, span)


@cache
def _tried(device: torch.device, dtype: torch.dtype, dim: int, group: int, span: Span) -> bool:
    length = (span.max_visible or 200) + 101
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        make = torch.Generator(device).manual_seed(0)
        query, key, value, weight = (
            torch.randn(2, length, heads, dim, generator=make, device=device, dtype=dtype).transpose(1, 2)
            for heads in (2 * group, 2, 2, 2 * group)
        )
        past = 50 if isinstance(span, FullSpan) else 0  # without one, torch's own choice of a kernel runs
        query, weight = query[:, :, past:].contiguous(), weight[:, :, past:]  # queries lie head by head
        found = []
        for backend, precision in ((Reference(), torch.float32), (Flash(), dtype)):
            q, k, v = tensors = [x.detach().to(precision).requires_grad_() for x in (query, key, value)]
            out = backend.run(Call(q, k, v, span, dim**-0.5))
            found.append([out.detach(), *torch.autograd.grad(out, tensors, weight.to(precision))])
        errors = [float((mine.float() - exact).norm() / exact.norm()) for exact, mine in zip(*found, strict=True)]
    if all(error < ROUNDING for error in errors):  # a NaN is not
        return True
    shown = ", ".join(f"{error:.1e}" for error in errors)
    warnings.warn(
        f"torch's FlashAttention is wrong for {span}, head width {dim}, {dtype} on "
        f"{torch.cuda.get_device_name(device)} (errors of output and gradients {shown}); another backend is taken",
        stacklevel=2,
    )
    return False
