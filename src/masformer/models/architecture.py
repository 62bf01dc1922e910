"""Which architectures a plan can serve, told from their config and their classes; and where their layers are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from masformer.errors import MasformerError
from masformer.models import adapters

_REFUSED = {
    "falcon": "it may add an attention bias (alibi)",
    "bloom": "it adds an attention bias (alibi)",
    "mpt": "it adds an attention bias (alibi)",
}
_NO_SPANS = {
    "position_bias": "it adds a bias to its scores",
    "cross_attention_states": "it has cross-attention",
    "cache_offset": "its layers run several times, with a cache for each time",
    "cycle_offset": "its layers run several times, with a cache for each time",
}
"""What an attention function calls, takes or hands on -> why spans cannot serve it."""
_OTHER_STATE = {name for name in vars(Cache) if name.startswith("update_")}
"""The methods of a cache of transformers by which a module keeps something else than keys and values."""
_KEYS = re.compile(r"(^|_)(q?kv?|key|keys)(_|$)")


def check_architecture(model: PreTrainedModel) -> None:
    """Refuses what its config says a plan cannot serve.

    Raises:
        MasformerError: the architecture cannot be done right, and why.
    """
    config, kind = model.config, model.config.model_type
    reason = _REFUSED.get(kind)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        reason = "it has cross-attention"
    elif getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        reason = "its attention is not causal"
    elif config.get_text_config() is not config:
        reason = "it is not a text-only model"
    elif not set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}:
        reason = "some of its layers are not attention layers"
    elif not reason and kind != adapters.GPT_NEO and not model._can_set_attn_implementation():
        reason = "it does not use the attention interface of transformers"
    if reason:
        raise MasformerError(f"{kind} models cannot take a plan: {reason}")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model with a plan, in order.

    Raises:
        MasformerError: the model has no plan.
    """
    return list(running_layers(model)[1])


def running_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module whose forward runs the layers, the base or what a head calls in its place (OPT), and the layers."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(hasattr(part, "masformer_span") for part in child.modules()):
                return module, child
    raise MasformerError("the model has no plan; call apply_plan first")


def attention_modules(model: PreTrainedModel, config: PretrainedConfig) -> dict[int, Any]:
    """Layer index -> its attention module: one in each layer, which makes its own keys and keeps nothing else.

    Raises:
        MasformerError: the classes of the model say otherwise.
    """
    found: dict[int, Any] = {}
    reason = None
    for module in model.modules():
        if words := _OTHER_STATE & _words(type(module).forward):
            reason = f"it keeps more than keys and values in its cache ({', '.join(sorted(words))})"
        layer = getattr(module, "layer_idx", None)
        if layer is not None and type(module).__name__.endswith("Attention"):
            if not getattr(module, "is_causal", True):
                reason = "its attention is not causal"
            if layer in found and module not in found[layer].modules():
                reason = "a layer has several attention modules"
            for word in _NO_SPANS.keys() & _words(type(module).forward):
                reason = _NO_SPANS[word]
            found[layer] = module
    if not reason and sorted(found) != list(range(config.num_hidden_layers)):
        reason = "no attention module found in some layers"
    makers = {layer: _key_makers(module) for layer, module in found.items()}
    if sharing := sorted(layer for layer, own in makers.items() if not own and any(makers.values())):
        reason = reason or f"layers {sharing} use the keys of other layers"
    if reason:
        raise MasformerError(f"{config.model_type} models cannot take a plan: {reason}")
    return found


def _key_makers(module: nn.Module) -> set[str]:
    """The parts of an attention module that make keys, by their names."""
    return {name for name, _ in module.named_children() if re.search(_KEYS, name) and "norm" not in name}


@cache
def _words(forward: Callable[..., Any]) -> frozenset[str]:
    """The names in the code of a module's forward: what it takes, calls, and hands on."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:  # not of Python
        return frozenset()
    handed = [word for words in code.co_consts if isinstance(words, tuple) for word in words if isinstance(word, str)]
    return frozenset([*code.co_varnames, *code.co_names, *handed])
