"""What stock transformers does with a config: which keys each layer's mask lets through, found by asking it.

A model is built without weights, with an attention and a mask function that note what they are given. The mask
function of each layer, and the window that FlashAttention would get, are then held against the plan. So an export is
refused where the installed transformers would not follow it, whatever the tables say.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from masformer.errors import MasformerError
from masformer.models import adapters
from masformer.models.sealing import native_plan
from masformer.plan import AttentionPlan
from masformer.spans import Span

NAME = "masformer_probe"
_seen: ContextVar[dict[int, tuple[Any, int | None]]] = ContextVar("seen_masks")


def check_stock(config: PretrainedConfig, plan: AttentionPlan, *, cache: bool = True) -> None:
    """Holds the masks and the cache of the stock model against the plan, layer by layer.

    Args:
        config: as AutoConfig reads it from the exported folder.
        plan: one span per layer.
        cache: whether the cache matters; other tools have their own.

    Raises:
        MasformerError: some layer would see other keys.
    """
    if config.model_type == adapters.GPT_NEO:  # has no hook; its masks follow attention_layers and window_size
        wrong = [layer for layer, span in enumerate(native_plan(config)) if span != plan[layer]]
    else:
        masks = _masks(config)
        cached = DynamicCache(config=config).layers if cache else []
        wrong = [
            layer
            for layer, span in enumerate(plan)
            if layer not in masks
            or not _same(*masks[layer], span)
            or (layer < len(cached) and not _keeps(cached[layer], span))
        ]
    if wrong:
        raise MasformerError(
            f"transformers {transformers.__version__} would not run {plan[wrong[0]]} in layer {wrong[0]} of a "
            f"{config.model_type} model with these settings"
        )


def _masks(config: PretrainedConfig) -> dict[int, tuple[Any, int | None]]:
    """Layer -> the mask function it is given, (batch, head, query, key positions) -> bool tensor, and its window."""
    config = copy.deepcopy(config)
    for rope in _ropes(config):  # some compute their frequencies from values, which a model without weights has not
        kept = {key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")}
        rope.clear()
        rope.update(kept, rope_type="default")
    seen: dict[int, tuple[Any, int | None]] = {}
    token = _seen.set(seen)
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=NAME).eval()
            tokens = torch.zeros(1, 2, dtype=torch.long)
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except Exception as error:  # each class fails in its own way on settings that it does not know
        text = " ".join(str(error).split())
        raise MasformerError(
            f"transformers {transformers.__version__} cannot run this {config.model_type}: {text}"
        ) from error
    finally:
        _seen.reset(token)
    return seen


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return [rope for rope in parameters.values() if isinstance(rope, dict)] or [parameters]


def _same(mask: Any, window: int | None, span: Span) -> bool:
    """Whether a mask function lets through what the span does, for queries around its edges, and the window agrees."""
    if not callable(mask) or window != span.max_visible:
        return False
    size = span.max_visible or 64
    queries = torch.tensor(sorted({0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 5}))[:, None]
    keys = torch.arange(int(queries.max()) + 2)[None]
    zero = torch.zeros((), dtype=torch.long)
    return bool((mask(zero, zero, queries, keys) == span.visible(queries, keys)).all())


def _keeps(layer: Any, span: Span) -> bool:
    """Whether a layer of the stock cache gives a new token the keys that the span lets it see, and no others.

    Decoding one token at a time runs without a mask: a sliding layer has to have dropped the rest.
    """
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return True
    if layer.sliding_window != span.max_visible:
        return False
    length = layer.sliding_window + 2
    layer.update(*[torch.zeros(1, 1, length, 1)] * 2)
    keys, _ = layer.update(*[torch.zeros(1, 1, 1, 1)] * 2)
    return bool(keys.shape[2] == layer.sliding_window)


def _note_mask(*args: Any, mask_function: Any, **kwargs: Any) -> Any:
    """The mask function that transformers calls: hands on the rule itself."""
    return mask_function


def _note_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    _seen.get()[module.layer_idx] = attention_mask, kwargs.get("sliding_window")  # type: ignore[index]
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]), None


AttentionInterface.register(NAME, _note_attention)
AttentionMaskInterface.register(NAME, _note_mask)
