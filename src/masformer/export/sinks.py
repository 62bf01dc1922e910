"""Constant sinks as other tools have them: a logit without a value, and the value in two biases.

The shares of a softmax sum to one, so that with the share p_j of key j and p of the sink

    sum of p_j v_j + p u = u + sum of p_j (v_j - u):

a bias of -u on the value projection, and one of W_o u on the output projection W_o. A layer without a sink has a logit
that weighs nothing, and zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masformer.attention import ConstantSinks

NO_SINK = -1e30
"""The logit of a sink that weighs nothing."""


def no_sink(dtype: torch.dtype) -> float:
    """The same, as far as the dtype holds it."""
    return max(NO_SINK, torch.finfo(dtype).min)


def value_bias(sinks: ConstantSinks) -> Tensor:
    """What is added to the bias of the value projection of a layer whose sinks have values, in float64."""
    return -_values(sinks).flatten()


def output_bias(sinks: ConstantSinks, output: Tensor) -> Tensor:
    """What is added to that of the output projection, in float64.

    Args:
        sinks: of a layer, with values.
        output: [hidden, query_heads x value_dim], the weight of the projection.
    """
    value = _values(sinks).to(output.device)
    every = value.repeat_interleave(len(sinks.logit) // len(value), 0)
    return output.detach().double() @ every.flatten()


def _values(sinks: ConstantSinks) -> Tensor:
    assert sinks.value is not None
    return sinks.value.detach().double()
