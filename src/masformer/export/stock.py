"""What stock transformers does with a config: which keys each layer's mask lets through, found by asking it.

The mask function of each layer, and the window that FlashAttention would get, are held against the plan. So an export
is refused where the installed transformers would not follow it, whatever the tables say.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from masformer.errors import MasformerError
from masformer.models import adapters
from masformer.models.native import agrees, native_plan, stock_layers
from masformer.plan import AttentionPlan
from masformer.spans import Span

SAMPLE = "The quick brown fox, 12 jumps: naïve 東京 — don't!\n\n    def f(x):\treturn x"
"""A text with something of everything, on which two tokenizers are compared."""


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
        seen = stock_layers(config)
        cached = DynamicCache(config=config).layers if cache else []
        wrong = [
            layer
            for layer, span in enumerate(plan)
            if layer not in seen
            or seen[layer].window != span.max_visible
            or not agrees(seen[layer].mask, span)
            or (layer < len(cached) and not _keeps(cached[layer], span))
        ]
    if wrong:
        raise MasformerError(
            f"transformers {transformers.__version__} would not run {plan[wrong[0]]} in layer {wrong[0]} of a "
            f"{config.model_type} model with these settings"
        )


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
