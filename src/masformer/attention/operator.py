"""Attention as one operator of torch, `masformer::attend`, which is what `torch.compile` sees of it.

A graph holds the operator as a whole; which backend does the call is decided when it runs. FlashAttention has a
backward pass of its own; for the other backends the operator computes attention anew in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from masformer.attention.auto import Auto
from masformer.attention.call import Backend, Call
from masformer.attention.constant import ConstantSinks
from masformer.attention.flash import Flash
from masformer.attention.layout import Layout
from masformer.attention.named import BACKENDS
from masformer.errors import MasformerError
from masformer.spans import Span

calls: ContextVar[list[int] | None] = ContextVar("calls", default=None)
"""Where set: a list of one number, to which each forward pass of the operator adds one."""

_span = lru_cache(Span.parse)


def attend(call: Call, documents: Tensor | None, backend: str) -> Tensor:
    """`call` by the operator; `documents` stands for its layout."""
    if call.dropout:
        raise MasformerError("attention dropout is not possible in a compiled model; set the model's to 0")
    skipped = None if call.layout is None or call.layout.skipped is None else list(call.layout.skipped)
    sinks = (None, None) if call.sinks is None else (call.sinks.logit, call.sinks.value)
    options = documents, skipped, str(call.span), call.scale, call.softcap, backend
    return torch.ops.masformer.attend(*call.tensors, *sinks, *options)[0]  # type: ignore[no-any-return]


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logit: Tensor | None,
    sink_value: Tensor | None,
    documents: Tensor | None,
    skipped: list[int] | None,
    span: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Call, Backend]:
    """The call, and the backend that does it."""
    layout = None
    if documents is not None:
        layout = Layout.known(documents, None if skipped is None else tuple(skipped))
    sinks = None if sink_logit is None else ConstantSinks(sink_logit, sink_value)
    call = Call(query, key, value, _span(span), scale, layout, 0.0, softcap, sinks)
    named = BACKENDS[backend]
    if (reason := named.objection(call)) is not None:
        raise MasformerError(reason)
    return call, named.choose(call) if isinstance(named, Auto) else named


@torch.library.custom_op("masformer::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logit: Tensor | None,
    sink_value: Tensor | None,
    documents: Tensor | None,
    skipped: list[int] | None,
    span: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call, chosen = _read(query, key, value, sink_logit, sink_value, documents, skipped, span, scale, softcap, backend)
    counted = calls.get()
    if counted is not None:
        counted[0] += 1
    if isinstance(chosen, Flash):
        out, sums = chosen.forward(call)
    else:
        out, sums = call.run(chosen), torch.zeros_like(_sums(query))
    return _in_order(out), sums


def _sums(query: Tensor) -> Tensor:
    """Room for the log-sum-exps of all scores."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch * heads * length, dtype=torch.promote_types(query.dtype, torch.float32))


def _in_order(x: Tensor) -> Tensor:
    """The same, laid out in memory as [batch, length, heads, dim]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _room(like: Tensor, width: int) -> Tensor:
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _room(query, value.shape[-1]), _sums(query)


@torch.library.custom_op("masformer::attend_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    sink_logit: Tensor | None,
    sink_value: Tensor | None,
    documents: Tensor | None,
    skipped: list[int] | None,
    span: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> list[Tensor]:
    call, chosen = _read(query, key, value, sink_logit, sink_value, documents, skipped, span, scale, softcap, backend)
    if isinstance(chosen, Flash):
        grads = chosen.backward(call, grad, out, sums)
    else:
        with _recording():
            q, k, v, *constants = inputs = [x.detach().requires_grad_() for x in call.inputs]
            sinks = ConstantSinks.of(constants)
            again = Call(q, k, v, call.span, call.scale, call.layout, softcap=call.softcap, sinks=sinks).run(chosen)
            grads = torch.autograd.grad(again, inputs, grad, materialize_grads=True)
    return [*map(_in_order, grads[:3]), *(x.contiguous() for x in grads[3:])]


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd within an operator, where torch has switched it off for the thread."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, *rest: Any) -> list[Tensor]:
    constants = [torch.empty_like(each) for each in rest[:2] if each is not None]
    return [*(_room(x, x.shape[-1]) for x in (query, key, value)), *constants]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sink_logit, sink_value, documents, *rest = inputs
    ctx.save_for_backward(query, key, value, *output, sink_logit, sink_value, documents)
    ctx.rest = rest
    ctx.mark_non_differentiable(output[1])


def _back(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.masformer.attend_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * (11 - len(grads))


_attend.register_autograd(_back, setup_context=_save)
