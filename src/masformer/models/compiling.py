"""Decoder layers compiled by torch, one graph for all layers of one span.

Between its attention a layer is a row of small operations, which cost more launched one by one than attention saves.
Layers are compiled one by one and not the model as a whole: all of them share a few graphs, so that compiling takes
seconds whatever the depth, and checkpointing, FSDP and the model's own hooks work around the layers as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from masformer.errors import MasformerError
from masformer.models.architecture import decoder_layers
from masformer.models.bridge import CACHE_NAMES, IN_GRAPHS
from masformer.models.wrappers import bare_model

GRAPHS = 64
"""Graphs of one kind of layer: for each span, shape that is no symbol, dtype, gradient mode, ..."""


def compile_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Compiles the decoder layers of a model with a plan, in place; done twice it changes nothing.

    A pass with a cache, as in generation, runs as before: there the keys of a layer lie where its cache keeps them. But
    in graphs of tokens (`masformer.models.graphs`) the parts of a layer beside its attention are compiled.
    A copy of the model is not compiled.

    Args:
        model: a model that `apply_plan` or `load_model` gave its plan.

    Returns:
        The same model.

    Raises:
        MasformerError: the model has no plan, or drops attention weights in training.
    """
    outer, model = model, bare_model(model)
    layers = decoder_layers(model)
    for name in ("attention_dropout", "attn_pdrop"):
        if rate := getattr(model.config, name, 0):
            raise MasformerError(
                f"compiled layers have no attention dropout, and the model's {name} is {rate}; set it to 0, or do not "
                "compile"
            )
    for layer in layers:
        if layer._compiled_call_impl is None:
            layer._compiled_call_impl = _Compiled(layer)
        for module in layer.modules():
            if hasattr(module, "masformer_span"):
                setattr(module, IN_GRAPHS, True)
    return outer


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_layers` was called on the model."""
    return any(isinstance(module._compiled_call_impl, _Compiled) for module in model.modules())


@contextmanager
def parts_compiled(model: nn.Module) -> Iterator[None]:
    """Within it, the norms and feed-forward parts of compiled layers are compiled in passes with a cache too."""
    layers = decoder_layers(model) if is_compiled(model) else []
    parts = [part for layer in layers for part in layer.children() if _is_apart(part)]
    try:
        for part in parts:
            part._compiled_call_impl = torch.compile(part._call_impl, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
            yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def _is_apart(part: nn.Module) -> bool:
    """Whether it has weights and holds no attention."""
    attends = any(hasattr(module, "masformer_span") for module in part.modules())
    return not attends and part._compiled_call_impl is None and any(True for _ in part.parameters())


class _Compiled:
    """What torch calls in place of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.eager = layer._call_impl
        self.compiled = torch.compile(layer._call_impl, fullgraph=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in CACHE_NAMES):
            return self.eager(*args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
            return self.compiled(*args, **kwargs)
