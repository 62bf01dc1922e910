"""Gives a transformers model its plan: a registered attention function and mask function, found by `layer_idx`.

The mask function hands every layer one tensor [batch, key_len] of document numbers, 0 for padding, or None where
there is neither padding nor packing. Packing is read from `position_ids` that restart, by a hook on the model, since
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

from masformer.attention import BACKENDS, attend
from masformer.errors import MasformerError
from masformer.models.checkpoint import seal_config
from masformer.plan import AttentionPlan

NAME = "masformer"
REFUSED = {
    "gpt_oss": "its softmax has learned sinks",
    "falcon": "it may add an attention bias (alibi)",
    "bloom": "it adds an attention bias (alibi)",
    "mpt": "it adds an attention bias (alibi)",
}
_packed: ContextVar[Tensor | None] = ContextVar("packed_documents", default=None)


def apply_plan(model: PreTrainedModel, plan: AttentionPlan, backend: str = "auto") -> PreTrainedModel:
    """Changes the spans of a decoder-only model in place; its weights stay as they are.

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
    elif getattr(config, "attn_logit_softcapping", None) is not None:
        reason = "its attention scores have a soft cap"
    elif getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        reason = "its attention is not causal"
    elif config.get_text_config() is not config:
        reason = "it is not a text-only model"
    elif not set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}:
        reason = "some of its layers are not attention layers"
    elif not reason and not model._can_set_attn_implementation():
        reason = "it does not use the attention interface of transformers"
    if reason:
        raise MasformerError(f"{kind} models cannot take a plan: {reason}")


def _attention_modules(model: PreTrainedModel, config: PretrainedConfig) -> dict[int, Any]:
    """Layer index -> its attention module."""
    found: dict[int, Any] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is not None and type(module).__name__.endswith("Attention"):
            found[layer] = module
    if sorted(found) != list(range(config.num_hidden_layers)):
        raise MasformerError(f"{config.model_type} models cannot take a plan: no attention module found in some layers")
    return found


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns [batch, query_len, heads, head_dim]."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise MasformerError(f"{type(module).__name__} passes {name}, which spans do not support")
    if dropout:
        raise MasformerError(f"attention dropout ({dropout}) is not supported; set it to 0 in the config")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise MasformerError("a 4-D attention mask is not supported; pass a 2-D padding mask or packed position_ids")
    if attention_mask is not None and attention_mask.shape[1] != key.shape[2]:
        raise MasformerError(f"the cache holds {key.shape[2]} keys of {attention_mask.shape[1]}; use DynamicCache")
    out = attend(
        query,
        key,
        value,
        module.masformer_span,  # type: ignore[arg-type]
        scale=scaling,
        padding_mask=None if attention_mask is None else attention_mask > 0,
        document_ids=attention_mask,
        backend=module.masformer_backend,  # type: ignore[arg-type]
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int, kv_length: int, attention_mask: Tensor | None = None, device: Any = None, **kwargs: Any
) -> Tensor | None:
    """The mask function that transformers calls: document numbers [batch, key_len], 0 for padding, or None."""
    documents = _packed.get()
    if attention_mask is None or bool(attention_mask.all()):
        return documents
    real = attention_mask[:, :kv_length].long()
    return real if documents is None else documents * real


def _before_forward(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(base.forward).bind(*args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    cache = given.get("cache", given.get("past_key_values"))
    past = 0
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
            documents = nn.functional.pad(restart.long().cumsum(-1), (1, 0)) + 1
            tokens = given.get("input_ids", given.get("inputs_embeds"))
            documents = documents.expand(tokens.shape[0], -1)
    _packed.set(documents)


def _after_forward(base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _packed.set(None)


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
