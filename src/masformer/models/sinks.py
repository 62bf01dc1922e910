"""The weights of constant sinks in a model.

They are parameters of a layer's attention module, `sink_logit` [query_heads] and `sink_value` [kv_heads, value_dim],
where the layer's span has a constant sink (`masformer.attention.constant`). A plan by heads that gives it to some units
has them for all; those of the others are not read.

Under a plan that has no use for them, a model keeps its weights aside, where they are neither trained nor written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from masformer.attention import ConstantSinks
from masformer.cost import head_shape
from masformer.errors import MasformerError
from masformer.plan import AttentionPlan
from masformer.spans import LayerSpan, spans_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LOGIT, VALUE = NAMES = ("sink_logit", "sink_value")
_ASIDE = "masformer_sinks_aside"


def sink_layers(plan: AttentionPlan) -> list[int]:
    """The layers of a plan that have a constant sink in some unit."""
    return [number for number, layer in enumerate(plan.layers) if any(span.constant_sink for span in spans_of(layer))]


def is_sink(name: str) -> bool:
    """Whether a weight of that name is one of a constant sink."""
    return name.rpartition(".")[2] in NAMES


def check_there(where: object, held: AttentionPlan, asked: AttentionPlan) -> None:
    """Raises MasformerError where a plan has constant sinks that a checkpoint with another one has no weights for: in a
    layer, or in a unit whose weights, beside those of others, nothing has read or fitted."""

    def adds(ours: LayerSpan, theirs: LayerSpan) -> bool:
        count = max(len(spans_of(ours)), len(spans_of(theirs)))
        units = [spans_of(layer) * (count // len(spans_of(layer))) for layer in (ours, theirs)]
        return any(wanted.constant_sink > there.constant_sink for there, wanted in zip(*units, strict=True))

    layers = enumerate(zip(held.layers, asked.layers, strict=True))
    if missing := [number for number, pair in layers if adds(*pair)]:
        raise _missing(where, missing)


def _missing(where: object, layers: list[int]) -> MasformerError:
    return MasformerError(
        f"the plan has constant sinks in layers {layers}, but {where} has no weights for them; fit them: "
        "masformer convert --sinks fit, or fit_sinks in Python"
    )


def by_layer(weights: Mapping[str, Tensor]) -> dict[int, ConstantSinks]:
    """The constant sinks among the weights of a model, by layer.

    Args:
        weights: by name, as in a checkpoint.
    """
    found: dict[int, list[Tensor]] = {}
    for kind in NAMES:
        for name, weight in weights.items():
            if match := re.search(rf"\.(\d+)\.[\w.]+\.{kind}$", name):
                found.setdefault(int(match[1]), []).append(weight)
    return {layer: sinks for layer in sorted(found) if (sinks := ConstantSinks.of(found[layer])) is not None}


def read_sinks(path: str | os.PathLike[str]) -> dict[int, ConstantSinks]:
    """The constant sinks in a checkpoint, by layer; its other weights are not read.

    Raises:
        MasformerError: it is no folder that has any.
    """
    weights: dict[str, Tensor] = {}
    try:
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                weights |= {name: tensors.get_tensor(name) for name in filter(is_sink, tensors.keys())}
    except Exception as error:  # OSError, and what safetensors makes of damage
        raise MasformerError(f"cannot read {os.fspath(path)}: {' '.join(str(error).split())}") from error
    if not weights:
        raise MasformerError(
            f"{os.fspath(path)} has no weights of constant sinks; allowed: a folder of masformer convert --sinks fit"
        )
    return by_layer(weights)


def check_fit(
    where: object, sinks: Mapping[int, ConstantSinks], plan: AttentionPlan, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """Raises MasformerError where a layer of the plan needs constant sinks and there are none, or of another shape.

    Args:
        where: they come from, for the message.
        sinks: by layer.
        plan: says which.
        shapes: as `shapes` gives them.
    """
    if missing := [each for each in sink_layers(plan) if each not in sinks or sinks[each].value is None]:
        raise _missing(where, missing)
    for layer in sink_layers(plan):
        for kind, tensor, shape in zip(NAMES, sinks[layer].tensors, shapes, strict=True):
            if tensor.shape != shape:
                raise MasformerError(
                    f"{kind} of layer {layer} in {where} must be {list(shape)}, as the model has heads, not "
                    f"{list(tensor.shape)}"
                )


def weights_of(module: nn.Module, own: Tensor | None = None) -> ConstantSinks | None:
    """The constant sinks of an attention module, whether its plan has a use for them or not; None: it has none.

    Args:
        module: of a layer.
        own: the logits that its class was made with.
    """
    if own is not None:
        return ConstantSinks(own, None, always=True)
    weights = vars(module).get(_ASIDE) or module._parameters
    if LOGIT not in weights:
        return None
    return ConstantSinks(*(weights[name] for name in NAMES))  # type: ignore[arg-type]


def named_sinks(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of all constant sinks, also those that are kept aside, by name and in order."""
    for place, module in model.named_modules():
        for name, weight in (*module._parameters.items(), *vars(module).get(_ASIDE, {}).items()):
            if name in NAMES and weight is not None:
                yield f"{place}.{name}", weight


def place_sinks(modules: Mapping[int, nn.Module], plan: AttentionPlan) -> None:
    """Makes the weights of those layers parameters whose spans have a constant sink, and keeps the others aside.

    Args:
        modules: layer -> its attention module.
        plan: the one that is to work.

    Raises:
        MasformerError: a layer has no weights, or sinks that its class was made with. Nothing is changed then.
    """
    check_own(own_sinks(modules), plan)
    wanted = sink_layers(plan)
    if missing := [layer for layer in wanted if weights_of(modules[layer]) is None]:
        raise _missing("the model", missing)
    for layer, module in modules.items():
        aside = vars(module).pop(_ASIDE, {})
        if layer in wanted:
            like = next(module.parameters())
            for name, weight in aside.items():
                module.register_parameter(name, weight)
                weight.data = weight.data.to(like.device)
        elif LOGIT in module._parameters:
            vars(module)[_ASIDE] = {name: module._parameters.pop(name) for name in NAMES}
        elif aside:
            vars(module)[_ASIDE] = aside


def own_sinks(modules: Mapping[int, nn.Module]) -> tuple[int, ...]:
    """The layers with sinks that their class was made with."""
    return tuple(layer for layer, module in modules.items() if getattr(module, "sinks", None) is not None)


def check_own(layers: Collection[int], plan: AttentionPlan) -> None:
    """Raises MasformerError where a plan has constant sinks in layers that have sinks of their own, which are given."""
    if own := [layer for layer in sink_layers(plan) if layer in layers]:
        raise MasformerError(
            f"the plan has constant sinks in layers {own}, which have sinks of their own that join under every span; "
            "leave +sink out"
        )


def add_weights(model: PreTrainedModel, modules: Mapping[int, nn.Module], plan: AttentionPlan) -> None:
    """Gives those layers zeros whose spans have a constant sink, and which have no weights for it.

    Args:
        model: whose layers they are; says dtype and shapes.
        modules: layer -> its attention module.
        plan: says which.

    Raises:
        MasformerError: a layer has sinks that its class was made with.
    """
    check_own(own_sinks(modules), plan)
    for layer in sink_layers(plan):
        module = modules[layer]
        if weights_of(module) is None:
            like = next(module.parameters())
            for name, shape in zip(NAMES, shapes(model.config), strict=True):
                zeros = torch.zeros(shape, dtype=model.dtype, device=like.device)
                module.register_parameter(name, nn.Parameter(zeros))


def shapes(config: PretrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the logits and of the values of a layer."""
    query_heads, kv_heads, _, value_dim = head_shape(config)
    return (query_heads,), (kv_heads, value_dim)


def without_sink_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The other weights of a model."""
    return {name: weight for name, weight in weights.items() if not is_sink(name)}
