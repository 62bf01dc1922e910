"""Gives a transformers model its plan: a registered attention function and mask function, found by `layer_idx`.

The mask function hands every layer the same `Layout` (which tokens are padding, which documents are packed), or
None where there is neither. Packing is read from `position_ids` that restart, by a hook on the model, since
transformers itself sees it only without a cache.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from masformer.attention import BACKENDS, Layout, attend
from masformer.errors import MasformerError
from masformer.models import adapters
from masformer.models.sealing import seal_config
from masformer.plan import AttentionPlan

NAME = "masformer"
REFUSED = {
    "gpt_oss": "its softmax has learned sinks",
    "falcon": "it may add an attention bias (alibi)",
    "bloom": "it adds an attention bias (alibi)",
    "mpt": "it adds an attention bias (alibi)",
}
_packed: ContextVar[Tensor | None] = ContextVar("packed_documents", default=None)
_served: ContextVar[set[int] | None] = ContextVar("served_layers", default=None)


def apply_plan(model: PreTrainedModel, plan: AttentionPlan, backend: str = "auto") -> PreTrainedModel:
    """Changes the spans of a decoder-only model in place; its weights stay as they are.

    May be called again with another plan.

    Args:
        model: a causal language model of transformers.
        plan: one span per layer of the model.
        backend: see `masformer.attend`.

    Returns:
        The same model.

    Raises:
        MasformerError: the plan has another number of layers, or the architecture cannot be done right.
    """
    config = model.config
    if backend not in BACKENDS:
        raise MasformerError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    _check_architecture(model)
    plan.for_layers(config.num_hidden_layers)
    if config.model_type == adapters.GPT_NEO:
        adapters.adapt(model)
    layers = _attention_modules(model, config)
    config._attn_implementation = NAME
    seal_config(config, plan)
    for layer, module in layers.items():
        module.masformer_span, module.masformer_backend = plan[layer], backend
    if not getattr(model, "_masformer_hooked", False):
        base = model.base_model
        base.register_forward_pre_hook(_before_forward, with_kwargs=True)
        base.register_forward_hook(_after_forward, always_call=True)
        model._masformer_hooked = True
    return model


def _check_architecture(model: PreTrainedModel) -> None:
    config, kind = model.config, model.config.model_type
    reason = REFUSED.get(kind)
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


def _attention_modules(model: PreTrainedModel, config: PretrainedConfig) -> dict[int, Any]:
    """Layer index -> its attention module."""
    found: dict[int, Any] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is not None and type(module).__name__.endswith("Attention"):
            if not getattr(module, "is_causal", True):
                raise MasformerError(f"{config.model_type} models cannot take a plan: its attention is not causal")
            found[layer] = module
    if sorted(found) != list(range(config.num_hidden_layers)):
        raise MasformerError(f"{config.model_type} models cannot take a plan: no attention module found in some layers")
    return found


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns [batch, query_len, heads, head_dim]."""
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise MasformerError(f"{type(module).__name__} passes {name}, which spans do not support")
    if isinstance(attention_mask, Tensor):
        raise MasformerError("an explicit attention mask is not supported; pass a 2-D padding mask or position_ids")
    if attention_mask is not None and attention_mask.documents.shape[1] != key.shape[2]:
        expected = attention_mask.documents.shape[1]
        raise MasformerError(f"the cache holds {key.shape[2]} keys of {expected}; use DynamicCache")
    served = _served.get()
    if served is not None:
        served.add(module.layer_idx)  # type: ignore[arg-type]
    out = attend(
        query,
        key,
        value,
        module.masformer_span,  # type: ignore[arg-type]
        scale=scaling,
        layout=attention_mask,
        dropout=dropout,
        softcap=softcap,
        backend=module.masformer_backend,  # type: ignore[arg-type]
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int, kv_length: int, attention_mask: Tensor | None = None, device: Any = None, **kwargs: Any
) -> Layout | None:
    """The mask function that transformers calls."""
    real = None if attention_mask is None else attention_mask[:, :kv_length]
    return Layout.of(real, _packed.get())


def _before_forward(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    signature = inspect.signature(base.forward)
    given = signature.bind(*args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    cache = given.get("cache", given.get("past_key_values"))
    past = 0
    use_cache = given.get("use_cache")
    if cache is None and not base.training and (base.config.use_cache if use_cache is None else use_cache):
        # the one that the model would make for itself drops keys by its config
        name = "cache" if "cache" in signature.parameters else "past_key_values"
        kwargs = {key: value for key, value in kwargs.items() if key != "past_key_values"} | {name: DynamicCache()}
    if cache is not None:
        _check_cache(cache)
        past = cache.get_seq_length()
    documents = None
    positions = given.get("position_ids")
    if positions is not None and positions.ndim == 2 and positions.shape[1] > 1:
        padding = given.get("attention_mask")
        restart = positions[:, 1:] != positions[:, :-1] + 1
        if padding is not None and padding.ndim == 2:
            real = padding[:, -positions.shape[1] :].bool()
            restart = restart & real[:, 1:] & real[:, :-1]
        if bool(restart.any()):
            if past:
                raise MasformerError("packed position_ids together with a filled cache are not supported")
            documents = nn.functional.pad(restart.long().cumsum(-1), (1, 0))
            tokens = given.get("input_ids", given.get("inputs_embeds"))
            documents = documents.expand(tokens.shape[0], -1)
    _packed.set(documents)
    _served.set(set())
    return args, kwargs


def _after_forward(base: Any, args: tuple[Any, ...], output: Any) -> None:
    served = _served.get()
    _packed.set(None)
    _served.set(None)
    if output is not None and served is not None and len(served) != base.config.num_hidden_layers:
        missing = sorted(set(range(base.config.num_hidden_layers)) - served)
        raise MasformerError(f"{base.config.model_type} models cannot take a plan: layers {missing} did not follow it")


def _check_cache(cache: Any) -> None:
    """Makes an empty cache keep every key in every layer: the plan, not the config, says what a layer may see."""
    if type(cache) is not DynamicCache:
        raise MasformerError(f"{type(cache).__name__} is not supported with a plan; use DynamicCache")
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            if layer.get_seq_length():
                raise MasformerError("the cache has dropped keys that the plan may need; start with an empty one")
            cache.layers[index] = DynamicLayer()


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
adapters.register(NAME, _attention)
