"""The spans that a stock model was trained with, found by asking its class instead of believing its config.

A config may carry keys that its class never reads: `sliding_window` means nothing to Llama. So the class is built
without weights, with an attention and a mask function that note what each layer is given, and the spans are read off
the masks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from masformer.configs import once_per_config
from masformer.errors import MasformerError
from masformer.models import adapters
from masformer.plan import AttentionPlan
from masformer.spans import LARGEST_SIZE, FullSpan, Span, WindowSpan

NAME = "masformer_probe"
_FAR = LARGEST_SIZE
"""A position as far away as a window reaches at most."""


@dataclass(frozen=True)
class StockLayer:
    """What transformers gives an attention layer.

    Attributes:
        mask: its mask function, (batch, head, query, key positions) -> bool tensor.
        window: the window that FlashAttention would get.
        kv_heads: heads of its keys; None where it hands them to no attention function.
    """

    mask: Any
    window: int | None = None
    kv_heads: int | None = None


_seen: ContextVar[dict[int, StockLayer]] = ContextVar("seen_masks")


@once_per_config
def native_plan(config: PretrainedConfig) -> AttentionPlan:
    """The spans a stock model was trained with: what the masks of its class let through, layer by layer.

    Its `kv_heads` are those that the class makes; None where they are not alike in all layers.

    Raises:
        MasformerError: the class does not run with this config, or the mask of some layer is neither causal nor a
            causal window.
    """
    layers, kind = config.num_hidden_layers, config.model_type
    if kind == adapters.GPT_NEO:  # has no hook; its masks follow these two
        local = WindowSpan(config.window_size)
        known = tuple(local if kind == "local" else FullSpan() for kind in config.attention_layers)
        return AttentionPlan(known, config.num_attention_heads)
    seen = stock_layers(config)
    spans: list[Span] = []
    for layer in range(layers):
        span = _span(seen[layer].mask) if layer in seen else None
        if span is None:
            raise MasformerError(f"layer {layer} of this {kind} model has no mask that is causal or a causal window")
        spans.append(span)
    heads = {layer.kv_heads for layer in seen.values()}
    return AttentionPlan(tuple(spans), heads.pop() if len(heads) == 1 else None)


@once_per_config
def stock_layers(config: PretrainedConfig) -> Mapping[int, StockLayer]:
    """What transformers gives each attention layer of a model with this config; no weights are needed.

    Returns:
        Layer -> what it is given.

    Raises:
        MasformerError: transformers cannot run such a model.
    """
    config = copy.deepcopy(config)
    for rope in _ropes(config):  # some compute their frequencies from values, which a model without weights has not
        rope["rope_type"] = "default"
    seen: dict[int, StockLayer] = {}
    token = _seen.set(seen)
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=NAME).eval()
            _skip_failures(model)
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


def agrees(mask: Any, span: Span) -> bool:
    """Whether a mask function lets through what the span does, for queries and keys around the span's edges."""
    size = span.max_visible or 64
    queries = torch.tensor(sorted({0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 5}))[:, None]
    near = [int(query) + far + step for query in queries for far in (-size, 0) for step in range(-2, 3)]
    keys = torch.tensor(sorted({0, *(key for key in near if key >= 0)}))[None]
    zero = torch.zeros((), dtype=torch.long)
    return bool((mask(zero, zero, queries, keys) == span.visible(queries, keys)).all())


def _span(mask: Any) -> Span | None:
    """The span that a mask function is; None where it is none."""
    if not callable(mask):
        return None
    try:
        span = _window(mask)
        return span if agrees(mask, span) else None
    except Exception:  # a mask that reads values, which a model without weights has not: chunks (Llama 4)
        return None


def _window(mask: Any) -> Span:
    """The causal span that reaches as far back as a mask function does from a position far away."""
    zero, query = torch.zeros((), dtype=torch.long), torch.tensor(_FAR)
    hidden, seen = -1, _FAR  # the first key that is seen lies after the one and not after the other
    while seen - hidden > 1:
        middle = (hidden + seen) // 2
        hidden, seen = (hidden, middle) if bool(mask(zero, zero, query, torch.tensor(middle))) else (middle, seen)
    return FullSpan() if seen == 0 else WindowSpan(_FAR - seen + 1)


def _skip_failures(model: nn.Module) -> None:
    """Lets each layer pass its input on where it fails after its mask is noted: experts may read values, say."""
    for stack in model.modules():
        for layer in stack if isinstance(stack, nn.ModuleList) else ():
            inner = [part for part in layer.modules() if _is_attention(part)]
            if inner:
                for part in inner:
                    part.register_forward_pre_hook(_note_module, with_kwargs=True)
                layer.forward = _Tolerant(layer.forward, {int(part.layer_idx) for part in inner})  # type: ignore[arg-type]


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and getattr(module, "layer_idx", None) is not None


class _Tolerant:
    def __init__(self, forward: Any, layers: set[int]) -> None:
        self.forward, self.layers = forward, layers

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.forward(hidden_states, *args, **kwargs)
        except Exception:
            if not self.layers <= _seen.get().keys():
                raise
            return hidden_states


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return [rope for rope in parameters.values() if isinstance(rope, dict)] or [parameters]


def _note_module(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.get("attention_mask")
    if callable(mask):
        _seen.get()[module.layer_idx] = StockLayer(mask)


def _note_mask(*args: Any, mask_function: Any, **kwargs: Any) -> Any:
    """The mask function that transformers calls: hands on the rule itself."""
    return mask_function


def _note_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    seen = StockLayer(attention_mask, kwargs.get("sliding_window"), key.shape[1])
    _seen.get()[module.layer_idx] = seen  # type: ignore[index]
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]), None


AttentionInterface.register(NAME, _note_attention)
AttentionMaskInterface.register(NAME, _note_mask)
