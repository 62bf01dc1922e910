"""Constant sinks: weights of a layer that join its softmax, in place of the first tokens of a text.

With z the log-sum-exp of a query's scores and `out` its attention to the keys, a sink of logit c and value u takes the
share w = exp(c) / (exp(c) + exp(z)) and leaves (1 - w) out + w u. The backward pass of what the keys gave is exact with
the *joined* output and log-sum-exp, as in `masformer.attention.flash`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from masformer.errors import MasformerError
from masformer.spans import LayerSpan, spans_of


@dataclass(frozen=True, eq=False)
class ConstantSinks:
    """The constant sinks of one layer.

    Attributes:
        logit: [query_heads], beside the scores after scale and soft cap; -inf for no sink.
        value: [kv_heads, value_dim], which the query heads of a KV head share; None: zero, as in gpt-oss
            (arXiv 2508.10925).
        always: whether they join under every span, as those do that a model was trained with; else under spans that say
            so (window:512+sink).
    """

    logit: Tensor
    value: Tensor | None = None
    always: bool = False

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> ConstantSinks | None:
        """The inverse of `tensors`; None of none."""
        logit, value = (*tensors, None, None)[:2]
        return None if logit is None else cls(logit, value)

    @property
    def tensors(self) -> list[Tensor]:
        """The logit, and the value if there is one."""
        return [self.logit] if self.value is None else [self.logit, self.value]

    def under(self, span: LayerSpan) -> ConstantSinks | None:
        """Themselves where they join under this span, or under that of some unit."""
        return self if self.always or any(each.constant_sink for each in spans_of(span)) else None

    def of_heads(self, heads: tuple[int, ...], kv_heads: int) -> ConstantSinks:
        """Those of some KV heads and their query heads, of so many."""
        logit = torch.stack([self.logit.view(kv_heads, -1)[head] for head in heads]).flatten()
        value = None if self.value is None else torch.stack([self.value[head] for head in heads])
        return replace(self, logit=logit, value=value)

    def like(self, query: Tensor, value: Tensor) -> ConstantSinks:
        """The same in the dtypes in which they are computed with."""
        logit = self.logit.to(torch.promote_types(query.dtype, torch.float32))
        return replace(self, logit=logit, value=None if self.value is None else self.value.to(value.dtype))

    def by_head(self) -> tuple[Tensor, Tensor | None]:
        """Logits [query_heads] and values [query_heads, value_dim]."""
        if self.value is None:
            return self.logit, None
        return self.logit, self.value.repeat_interleave(len(self.logit) // len(self.value), 0)


def check_sinks(sinks: ConstantSinks | None, span: LayerSpan, query: Tensor, value: Tensor) -> None:
    """Raises MasformerError where sinks and span do not go together, or shapes do not fit."""
    asked = any(each.constant_sink for each in spans_of(span))
    if asked and sinks is None:
        raise MasformerError(f"{_said(span)} has a constant sink, but its weights are missing; pass them as sinks")
    if sinks is None:
        return
    if not asked and not sinks.always:
        raise MasformerError(f"constant sinks are given, but {_said(span)} has none; allowed: as in window:512+sink")
    for name, tensor, shape in (
        ("logit", sinks.logit, (query.shape[1],)),
        ("value", sinks.value, (value.shape[1], value.shape[3])),
    ):
        if tensor is not None and tensor.shape != shape:
            raise MasformerError(f"the {name} of constant sinks must be {list(shape)}, got {list(tensor.shape)}")


def _said(span: LayerSpan) -> str:
    return ",".join(map(str, spans_of(span)))


def join(out: Tensor, sums: Tensor, logit: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention to keys and a sink from that to the keys.

    Args:
        out: [..., dim], attention to the keys.
        sums: [...], the log-sum-exps of its scores.
        logit: broadcasts with `sums`.
        value: broadcasts with `out`; None: zero.

    Returns:
        The same of keys and sink together.
    """
    share = torch.sigmoid(logit - sums)[..., None].to(out.dtype)
    joined = out * (1 - share) if value is None else torch.lerp(out, value.expand_as(out), share)
    return joined, torch.logaddexp(sums, logit.expand_as(sums))


def gradients(
    grad: Tensor, joined: Tensor, total: Tensor, logit: Tensor, value: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What each query adds to the gradients of logit [...] and of value [..., dim]; arguments as `join` has them.

    d logit = w (grad * value - grad * joined), d value = w grad.
    """
    share = (logit - total).exp()
    grad = grad.to(share.dtype)
    slope = -(grad * joined).sum(-1)
    if value is None:
        return share * slope, None
    return share * (slope + (grad * value).sum(-1)), share[..., None] * grad


def weight_gradients(sinks: ConstantSinks, grad: Tensor, joined: Tensor, total: Tensor) -> list[Tensor]:
    """The gradients of `sinks.tensors`.

    Args:
        sinks: that were joined.
        grad: [tokens, heads, dim], of the output.
        joined: [tokens, heads, dim], the output.
        total: [tokens, heads], its log-sum-exps.
    """
    each = zip(gradients(grad, joined, total, *sinks.by_head()), sinks.tensors, strict=False)
    return [
        found.sum(0).view(len(weight), -1, *weight.shape[1:]).sum(1).to(weight.dtype)
        for found, weight in each
        if found is not None
    ]
