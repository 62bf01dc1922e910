"""One call of attention, and what a backend is: it says what it cannot do, and does the rest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from masformer.attention.constant import ConstantSinks
from masformer.attention.layout import Layout
from masformer.spans import Span


@dataclass(frozen=True, eq=False)
class Call:
    """What `masformer.attend` was asked for, checked.

    Attributes:
        query: [batch, query_heads, query_len, head_dim]; the queries are the last positions.
        key: [batch, kv_heads, key_len, head_dim].
        value: [batch, kv_heads, key_len, value_dim].
        span: which keys are visible.
        scale: factor on the scores.
        layout: padding and documents; None: one document a row, without padding.
        dropout: probability that an attention weight is dropped.
        softcap: bound on the scores; None for no bound.
        sinks: the constant sinks that join under this span, in the dtypes to compute with; None: there are none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    span: Span
    scale: float
    layout: Layout | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: ConstantSinks | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The same, and the weights of constant sinks: all that a gradient may be asked of."""
        return self.tensors if self.sinks is None else (*self.tensors, *self.sinks.tensors)

    @property
    def trains(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.inputs)

    @property
    def past(self) -> int:
        """Keys before the first query."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def is_causal(self) -> bool:
        """Whether it is plain causal attention: a full span, one document a row, nothing before it, nothing added."""
        plain = self.softcap is None and self.sinks is None
        return self.span.max_visible is None and self.layout is None and not self.past and plain

    def causal(self) -> Tensor:
        """What torch has kernels of its own for, the fastest of which it takes itself."""
        return causal_attention(*self.tensors, self.scale, self.dropout)

    def run(self, backend: Backend) -> Tensor:
        """What a backend makes of it: of the graph even where every query is padding, and empty where there is none."""
        shape = (*self.query.shape[:3], self.value.shape[-1])
        out = backend.run(self) if math.prod(shape[:3]) else self.query.new_zeros(shape)
        if self.trains and not out.requires_grad:
            out = out + sum(x[..., :0].sum() for x in self.inputs)
        return out


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """Plain causal attention by torch's own kernels, for tensors as in `Call`."""
    key, value = spread(query, key, value)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=True
    )


def spread(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as torch's kernels are fast with them: repeated for the heads of their group where that pays."""
    group, pays = query.shape[1] // key.shape[1], False
    if query.is_cuda and query.dtype == torch.float32:
        # Of torch's kernels that do not write all scores to memory, the one for float32 takes no grouped heads.
        pays = group > 1
    elif query.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # The backward pass gives each thread whole key heads: where they do not go round, threads wait and spin.
        heads, threads = key.shape[0] * key.shape[1], torch.get_num_threads()
        turns, even = group * -(-heads // threads), -(-group * heads // threads)
        pays = even < 0.9 * turns  # it is worth the copies
    return (key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)) if pays else (key, value)


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast, where that is at work and they are not float64."""
    device = tensors[0].device.type
    if device == "meta" or tensors[0].dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


class Backend(ABC):
    """One way to compute attention."""

    name: str

    @abstractmethod
    def objection(self, call: Call) -> str | None:
        """Why this backend cannot do the call, in words for a user; None where it can."""

    @abstractmethod
    def run(self, call: Call) -> Tensor:
        """[batch, query_heads, query_len, value_dim]; only for calls without an objection."""
