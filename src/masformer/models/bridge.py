"""Gives a transformers model its plan: a registered attention function and mask function, found by `layer_idx`.

The mask function hands every layer the same `Layout` (which tokens are padding, which documents are packed), or
None where there is neither. Packing is read from `position_ids` that fall back, by a hook on the model, since
transformers itself sees it only without a mask and a cache. Whatever the positions are, spans count the tokens of a
document: positions that skip or repeat within it widen no window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from masformer.attention import BACKENDS, ConstantSinks, Layout, attend, operator
from masformer.attention.stored import attend_slots, attend_stored
from masformer.attention.units import join, split, split_sinks
from masformer.cache import SpanCache
from masformer.cache.layer import View
from masformer.errors import MasformerError
from masformer.models import adapters, rotary, sinks
from masformer.models.architecture import attention_modules, check_architecture, decoder_layers, running_layers
from masformer.models.sealing import kv_heads, seal_config
from masformer.models.wrappers import bare_model
from masformer.parallel.forward import SlicedPass
from masformer.plan import AttentionPlan, PlanSource
from masformer.spans import FullSpan, Span, UnitSpans, spans_of

NAME = "masformer"
IN_GRAPHS = "masformer_in_graphs"
"""Attribute of an attention module whose layer was compiled with it."""
_INSTEAD = "masformer_attend"
"""The attribute of an attention module that holds what takes the place of `attend`, see `attending_by`."""
MESH = "masformer_mesh"
"""The attribute of the module that runs the layers, see `across.across_devices`."""
CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the cache: the first since 5.2x."""


@dataclass
class _Pass:
    """One forward pass of a model: its packed documents, its cache if that is ours, its slice of a sequence, and the
    layers that attended.

    Compiled layers do not say which they are; `compiled` holds how many they were.
    """

    documents: Tensor | None
    cache: SpanCache | None
    slices: SlicedPass | None = None
    served: set[int] = field(default_factory=set)
    compiled: list[int] = field(default_factory=lambda: [0])


_pass: ContextVar[_Pass | None] = ContextVar("forward_pass", default=None)
_whole: ContextVar[bool] = ContextVar("whole_passes", default=True)


def apply_plan(
    model: PreTrainedModel,
    plan: PlanSource | None = None,
    backend: str = "auto",
    *,
    full: int | None = None,
    placement: str | int | Sequence[int] | None = None,
    local: Span | str | None = None,
) -> PreTrainedModel:
    """Changes the spans of a decoder-only model in place; its weights stay as they are.

    May be called again with another plan.

    Args:
        model: a causal language model of transformers, also inside `PeftModel`, `torch.compile` or DDP.
        plan: one span per layer of the model: an `AttentionPlan`, its text (full@11-18; window:512+4) or a plan file.
        backend: see `masformer.attend`.
        full: number of full layers, in place of `plan`.
        placement: which layers are full, see `place_full_layers`; `middle` by default.
        local: span of the other layers, or its text.

    Returns:
        The same model, with what is around it.

    Raises:
        MasformerError: no plan is named, it cannot be read or has another number of layers, or the architecture cannot
            be done right.
    """
    outer, model = model, bare_model(model)
    config = model.config
    if backend not in BACKENDS:
        raise MasformerError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    check_architecture(model)
    plan = AttentionPlan.from_options(
        config.num_hidden_layers, full, placement, local, kv_heads=kv_heads(config), plan=plan
    )
    if config.model_type == adapters.GPT_NEO:
        adapters.adapt(model)
    layers = attention_modules(model, config)
    if any(weight.is_meta for weight in model.parameters()):  # there are no weights at all, so none is missing
        sinks.add_weights(model, layers, plan)
    sinks.place_sinks(layers, plan)
    if sinks.sink_layers(plan):
        model.__class__ = class_with_sinks(type(model))  # type: ignore[arg-type]
    config._attn_implementation = NAME
    seal_config(config, plan)
    for layer, module in layers.items():
        module.masformer_span, module.masformer_backend = plan.layers[layer], backend
    if not getattr(model, "_masformer_hooked", False):
        owner, _ = running_layers(model.base_model)
        owner.register_forward_pre_hook(_before_forward, with_kwargs=True)
        owner.register_forward_hook(_after_forward, always_call=True)
        model._prepare_cache_for_generation = partial(_prepare_cache_for_generation, model)
        model._masformer_hooked = True
    return outer


def add_sinks(model: PreTrainedModel, plan: AttentionPlan) -> None:
    """Gives a model zeros as weights of the constant sinks that a plan has and the model has not; for new models."""
    model = bare_model(model)
    if model.config.model_type == adapters.GPT_NEO:
        adapters.adapt(model)
    sinks.add_weights(model, attention_modules(model, model.config), plan)


def give_sinks(model: PreTrainedModel, plan: AttentionPlan, given: Mapping[int, ConstantSinks]) -> None:
    """Gives a model the weights of the constant sinks that a plan has, and puts the plan to work.

    Args:
        model: that may have none.
        plan: one span per layer.
        given: layer -> its constant sinks.

    Raises:
        MasformerError: one is missing, or of another shape.
    """
    model = bare_model(model)
    sinks.check_fit("the weights given", given, plan, sinks.shapes(model.config))
    add_sinks(model, plan)
    apply_plan(model, plan)
    for layer, module in attention_modules(model, model.config).items():
        if layer in sinks.sink_layers(plan):
            for name, tensor in zip(sinks.NAMES, given[layer].tensors, strict=True):
                module.get_parameter(name).data.copy_(tensor)


@cache
def class_with_sinks(stock: Any) -> Any:
    """The class whose new models have the weights of the constant sinks that the plan in their config has."""
    if issubclass(stock, _WithSinks):
        return stock
    return type(stock.__name__, (_WithSinks, stock), {"stock": stock, "__module__": stock.__module__})


class _WithSinks:
    """What a model class becomes in front of itself."""

    stock: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if (plan := getattr(config, "masformer", None)) is not None:
            add_sinks(self, AttentionPlan.from_dict(plan))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made at run time, so no pickle finds it by name
        return _unpickled, (self.stock,), dict(self.__dict__)


def _unpickled(stock: Any) -> Any:
    made = class_with_sinks(stock)
    return made.__new__(made)


def _between_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where torch compiles a model as a whole, the function runs as it is written, between two graphs."""
    apart = _disable_dynamo(function)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (apart if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return run


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns [batch, query_len, heads, head_dim].

    It is part of a graph only where `compile_layers` asks for that, in passes without a cache.
    """
    return (_attend_layer if getattr(module, IN_GRAPHS, False) else _attend_apart)(module, *args, **kwargs)


def _attend_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | SlicedPass | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kwargs.get("position_bias") is not None:
        raise MasformerError(f"{type(module).__name__} passes position_bias, which spans do not support")
    if isinstance(attention_mask, Tensor):
        raise MasformerError("an explicit attention mask is not supported; pass a 2-D padding mask or position_ids")
    if not hasattr(module, "masformer_span"):
        raise MasformerError("the model was made of a config with a plan, but has none at work; call apply_plan first")
    # What torch traces sees neither the pass nor a cache; there the operator counts its calls.
    current = None if torch.compiler.is_compiling() else _pass.get()
    span: Any = module.masformer_span
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if current is not None:
        current.served.add(module.layer_idx)  # type: ignore[arg-type]
    options: dict[str, Any] = {"scale": scaling, "dropout": dropout, "softcap": softcap}
    options["backend"] = module.masformer_backend
    constant = sinks.weights_of(module, s_aux)
    own = constant and constant.under(span)
    if current is not None and current.cache is not None:
        parts = current.cache.seen(module.layer_idx, key, value)  # type: ignore[arg-type]
        if isinstance(span, UnitSpans):
            each = zip(split(query, span), parts, span.groups, split_sinks(own, span), strict=True)
            out = join([_attend_kept(some, *part, group.span, of, options) for some, part, group, of in each], span)
        else:
            out = _attend_kept(query, *parts[0], span, own, options)  # type: ignore[arg-type]
        return out.transpose(1, 2).contiguous(), None
    if isinstance(attention_mask, SlicedPass):
        out = attention_mask.attend(query, key, value, span, sinks=own, **options)
        return out.transpose(1, 2).contiguous(), None
    if current is not None and current.slices is not None:
        raise MasformerError(f"{type(module).__name__} is not handed the mask of its model, so it knows of no slices")
    if attention_mask is not None and attention_mask.documents.shape[1] != key.shape[2]:
        expected = attention_mask.documents.shape[1]
        raise MasformerError(f"the cache holds {key.shape[2]} keys of {expected}; use SpanCache or DynamicCache")
    if (instead := getattr(module, _INSTEAD, None)) is not None:
        out = instead(query, key, value, span, layout=attention_mask, sinks=constant, **options)
    else:
        out = attend(query, key, value, span, layout=attention_mask, sinks=own, **options)
    return out.transpose(1, 2).contiguous(), None


_attend_apart = _between_graphs(_attend_layer)


def _attend_kept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: View,
    span: Span,
    constant: ConstantSinks | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention to what a cache keeps."""
    if not view.stored:
        return attend(query, key, value, span, layout=view.layout, sinks=constant, **options)
    if view.slots is not None:
        of_slots = {name: options[name] for name in ("scale", "softcap")}
        return attend_slots(query, key, value, view.slots, sinks=constant, **of_slots)
    out = attend_stored(query, key, value, view.visible, sinks=constant, **options)
    return out if view.dead is None else out.masked_fill(view.dead, 0)


@contextmanager
def attending_by(model: PreTrainedModel, function: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, a function gives the attention of every layer in passes with no cache or a DynamicCache.

    It is called with the number of the layer and then as `attend`, whose place it takes; `sinks` are the constant sinks
    of the layer, whether its span has one or not. Layers that were compiled run as they are written.

    Args:
        model: a model with a plan.
        function: (layer, query, key, value, span, **options of `attend`) -> [batch, query_heads, query_len, value_dim].
    """
    model = bare_model(model)
    layers = decoder_layers(model)
    compiled = [layer._compiled_call_impl for layer in layers]
    modules = attention_modules(model, model.config)
    try:
        for layer in layers:
            layer._compiled_call_impl = None
        for number, module in modules.items():
            setattr(module, _INSTEAD, partial(function, number))
        yield
    finally:
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call
        for module in modules.values():
            vars(module).pop(_INSTEAD, None)


@_between_graphs
def _mask(
    batch_size: int, kv_length: int, attention_mask: Tensor | None = None, device: Any = None, **kwargs: Any
) -> Layout | SlicedPass | None:
    """The mask function that transformers calls; a cache of ours and a sequence in slices give each layer its own."""
    current = _pass.get()
    if current is not None and current.slices is not None:
        return current.slices  # handed on by the layers, also where a backward pass runs them again
    if current is not None and current.cache is not None:
        return None
    real = None if attention_mask is None else attention_mask[:, :kv_length]
    return Layout.of(real, None if current is None else current.documents)


@_between_graphs
def _before_forward(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    signature = _signature(type(base).forward)
    given = signature.bind(base, *args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    asked = base.config.use_cache if given.get("use_cache") is None else given["use_cache"]
    mesh = getattr(base, MESH, None)
    if mesh is not None:
        if cache is not None or given.get("use_cache"):
            raise MasformerError("there is no cache across devices; pass use_cache=False")
        asked = False
    bare = cache is None and not asked
    if cache is None and not base.training and asked:
        cache = SpanCache(AttentionPlan.from_dict(base.config.masformer))
        kwargs = {key: value for key, value in kwargs.items() if key not in CACHE_NAMES} | {cache_name(base): cache}
    check_cache(cache, base.config)
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    real = given.get("attention_mask")
    real = real if isinstance(real, Tensor) and real.ndim == 2 else None
    positions = given.get("position_ids")
    slices = None
    if mesh is not None:
        rows, length = tokens.shape[:2]
        slices = SlicedPass(mesh, positions, real, rows, length, tokens.device)
        if positions is None:
            kwargs = kwargs | {"position_ids": slices.own_positions}
        kwargs, positions, real = kwargs | {"use_cache": False}, slices.positions, slices.real
    documents = _packed_documents(positions, real, tokens, skips=bare and given.get("attention_mask") is None)
    if rotary.depends_on_length(base.config):
        _choose_rotary_table(base, cache, positions, tokens.shape[1], is_part=slices is not None)
    if slices is not None:
        slices.begin(documents)
    elif isinstance(cache, SpanCache):
        cache.begin(tokens.shape[0], tokens.shape[1], real, documents)
    elif documents is not None and cache is not None and cache.get_seq_length():
        raise MasformerError("packed position_ids together with a filled cache are not supported")
    current = _Pass(documents, cache if isinstance(cache, SpanCache) else None, slices)
    _pass.set(current)
    operator.calls.set(current.compiled)
    return args, kwargs


def cache_name(base: nn.Module) -> str:
    """What a model calls its cache: `cache`, or `past_key_values` in older versions of transformers."""
    return next(name for name in CACHE_NAMES if name in _signature(type(base).forward).parameters)


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _packed_documents(positions: Tensor | None, real: Tensor | None, tokens: Tensor, skips: bool) -> Tensor | None:
    """[batch, length] number of the document of each token; None where every row is one document.

    A document starts where positions fall back: to less than that of the last real token before, or from 0 to 0, the
    end of a document of one token, unless other positions of the row repeat as well.

    Args:
        positions: `position_ids`.
        real: padding mask, which ends with these tokens.
        tokens: [batch, length, ...].
        skips: a document also starts where positions skip or repeat, as transformers has it where it is given neither
            a mask nor a cache.
    """
    if positions is None or positions.ndim != 2 or positions.shape[1] < 2:
        return None
    own = torch.ones_like(positions, dtype=torch.bool)
    if real is not None:
        own = real[:, -positions.shape[1] :].bool()
        positions = positions.expand(len(own), -1)
    last = torch.where(own, torch.arange(own.shape[1], device=own.device), 0).cummax(-1).values
    before = positions.gather(1, last.to(positions.device))[:, :-1]
    both = own[:, 1:] & (own.cumsum(-1)[:, :-1] > 0)
    after = positions[:, 1:]
    if skips:
        restart = after != before + 1
    else:
        repeats = ((after == before) & (after > 0) & both).any(-1, keepdim=True)
        restart = (after < before) | ((after == before) & (after == 0) & ~repeats)
    restart = restart & both
    if not bool(restart.any()):
        return None
    return nn.functional.pad(restart.long().cumsum(-1), (1, 0)).expand(tokens.shape[0], -1)


def _choose_rotary_table(base: Any, cache: Any, positions: Tensor | None, new: int, is_part: bool = False) -> None:
    """Announces the length of the text, and refuses a piece of it whose table is another than that of the cached keys.

    A single token is what generation adds; its table changes where it does in transformers. The positions may be those
    of a longer text than the pass has, which then `is_part` of it.
    """
    seen = 0 if cache is None else cache.get_seq_length()
    before, after = seen, seen + new
    if positions is not None:
        before, after = min(seen, int(positions[..., 0].max())), int(positions.max()) + 1
    prompt = cache.prompt if isinstance(cache, SpanCache) else 0
    before = max(prompt, before)
    if seen and new > 1 and rotary.table(base.config, before) != rotary.table(base.config, max(prompt, after)):
        raise MasformerError(
            f"the rotary positions of this {base.config.model_type} model depend on the length of the whole text: a "
            f"cache filled for {before} positions cannot take {new} tokens more, up to {after}; give the text in one "
            f"pass, or say its length ahead with SpanCache(plan, prompt=LENGTH)"
        )
    rotary.announce(base, max(prompt, after) if is_part or prompt > after else 0)


@_between_graphs
def _after_forward(base: Any, args: tuple[Any, ...], output: Any) -> None:
    current = _pass.get()
    _pass.set(None)
    operator.calls.set(None)
    if not _whole.get() or output is None or current is None:
        return
    if len(current.served) == base.config.num_hidden_layers:
        return
    plan = AttentionPlan.from_dict(base.config.masformer)
    calls = [set(spans_of(layer)) for layer in plan.layers]  # of attention: one for each group of units
    count = sum(len(calls[layer]) for layer in current.served) + current.compiled[0]
    if any(layer._compiled_call_impl for layer in running_layers(base)[1]):
        # A compiled layer with full attention may be torch's own causal attention, which says nothing.
        count += sum(span == FullSpan() for each in calls for span in each)
    if count < sum(map(len, calls)):
        if (other := base.config._attn_implementation) != NAME:
            raise MasformerError(
                f"the attention implementation was set to {other!r}, which follows no plan; apply_plan sets it right, "
                "and its backend says how spans are computed"
            )
        missing = sorted(set(range(base.config.num_hidden_layers)) - current.served)
        raise MasformerError(f"{base.config.model_type} models cannot take a plan: layers {missing} did not follow it")


@contextmanager
def partial_passes() -> Iterator[None]:
    """Within it, layers that do not attend are no error: somebody else gives their outputs."""
    token = _whole.set(False)
    try:
        yield
    finally:
        _whole.reset(token)


def check_cache(cache: Any, config: PretrainedConfig) -> None:
    """Our cache must be of the same plan; an empty DynamicCache is made to keep every key in every layer."""
    if cache is None:
        return
    if isinstance(cache, SpanCache):
        if cache.text != config.masformer["plan"]:
            raise MasformerError(f"the cache is of the plan {cache.text}, the model of {config.masformer['plan']}")
        if len(cache.plan) != config.num_hidden_layers:
            raise MasformerError(f"the cache is of {len(cache.plan)} layers, the model of {config.num_hidden_layers}")
        return
    if type(cache) is not DynamicCache or cache.offloading:
        raise MasformerError(f"{_kind(cache)} is not supported with a plan; use SpanCache or DynamicCache")
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            if layer.get_seq_length():
                raise MasformerError("the cache has dropped keys that the plan may need; start with an empty one")
            cache.layers[index] = DynamicLayer()


def _kind(cache: Any) -> str:
    return f"an offloaded {type(cache).__name__}" if getattr(cache, "offloading", False) else type(cache).__name__


def _prepare_cache_for_generation(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """What `generate` calls: makes a SpanCache where transformers would make a DynamicCache."""
    given = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    prompt = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[1]
    length = prompt if positions is None else int(positions.max()) + 1
    if isinstance(given, SpanCache) and not given.get_seq_length():
        given.prompt = max(given.prompt, length)
    name = next((name for name in CACHE_NAMES if type(model_kwargs.get(name)) is DynamicCache), None)
    if given is not None or name is None:
        return
    check_cache(model_kwargs[name], model.config)
    longest = generation_config.max_length or 0
    reserve = longest if longest <= 2 * prompt else prompt  # all there can be, unless that is far more than there is
    model_kwargs[name] = SpanCache(AttentionPlan.from_dict(model.config.masformer), reserve=reserve, prompt=length)
    if getattr(generation_config, "is_assistant", False):
        model_kwargs[name].activate_past_recording()


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
adapters.register(NAME, _attention)
