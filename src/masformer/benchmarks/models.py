"""What whole models are measured as: a plan, full attention, and transformers by itself, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from masformer.benchmarks.limits import Limits
from masformer.benchmarks.rows import Row
from masformer.benchmarks.timing import Timing, check_cap
from masformer.cache import SpanCache
from masformer.cost import ModelShape, cost
from masformer.errors import MasformerError, check_int
from masformer.export.twins import sliding_twin, stock_twin, without_sinks
from masformer.models.bridge import apply_plan, cache_name
from masformer.models.checkpoint import load_config
from masformer.models.native import native_plan
from masformer.models.positions import position_limit
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan

FULL = "all full, masformer"
STOCK = "transformers, DynamicCache"
STATIC = "transformers, StaticCache"
SLIDING = "transformers, sliding layers of"
"""Names of what is measured beside the plans; the last is followed by the plan, whose sinks are left out."""


@dataclass(frozen=True)
class Variant:
    """A model and the cache that it generates with.

    Attributes:
        name: for people.
        model: ready to run, once `apply` has been called.
        make_cache: an empty cache with room for so many tokens.
        visible: what its layers see, as a plan.
        ours: whether that plan is given to the model; else transformers runs it by itself.
    """

    name: str
    model: PreTrainedModel
    make_cache: Callable[[int], Any]
    visible: AttentionPlan
    ours: bool = True

    def apply(self, backend: str) -> None:
        """Gives the model, which plans share, its plan."""
        if self.ours:
            apply_plan(self.model, self.visible, backend)

    def run(self, tokens: Tensor, cache: Any) -> Tensor:
        """One forward pass; the next token of each row, [batch, 1]."""
        out = self.model(tokens, use_cache=True, logits_to_keep=1, **{cache_name(self.model): cache})
        return out.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]


def variants(
    model: PreTrainedModel, plans: Mapping[str, AttentionPlan], *, caches: bool = True, peers: bool = True
) -> list[Variant]:
    """What is measured: each plan, full attention under masformer, and the same weights in transformers as it is.

    With `caches`, so are its static cache and, where a class of its has them for these weights and the plan's spans,
    its own sliding layers; sinks, which it does not know, are left out there. Without `peers`, nothing of transformers
    by itself is measured: its sliding layers need a mask of all pairs.
    """
    layers = model.config.num_hidden_layers
    full = AttentionPlan.uniform(layers, FullSpan())
    found = [Variant(name, model, _span_cache(plan), plan) for name, plan in plans.items() if plan != full]
    found.append(Variant(FULL, model, _span_cache(full), full))
    if not peers:
        return found
    stock = stock_twin(model)
    native = native_plan(stock.config)
    found.append(Variant(STOCK if caches else STOCK.partition(",")[0], stock, _dynamic_cache(stock), native, False))
    if caches:
        found.append(
            Variant(STATIC, stock, lambda room: StaticCache(config=stock.config, max_cache_len=room), native, False)
        )
    for name, plan in plans.items() if caches else ():
        twin = sliding_twin(model, plan)
        if twin is not None:
            found.append(Variant(f"{SLIDING} {name}", twin, _dynamic_cache(twin), without_sinks(plan), False))
    return found


def _span_cache(plan: AttentionPlan) -> Callable[[int], SpanCache]:
    return lambda room: SpanCache(plan, reserve=room)


def _dynamic_cache(stock: PreTrainedModel) -> Callable[[int], DynamicCache]:
    return lambda room: DynamicCache(config=stock.config)


def random_model(source: str, plan: AttentionPlan | None, dtype: Any, device: torch.device) -> PreTrainedModel:
    """A model of a config alone, with random weights: times do not depend on what they are.

    Args:
        source: folder with a config.json, or the file.
        plan: one span per layer; by default the spans that the config says.
        dtype: torch dtype of the weights, or "auto" for the config's own.
        device: where it is made.

    Raises:
        MasformerError: the config cannot be read, or the architecture cannot take the plan.
    """
    config, native = load_config(source)
    wanted = (config.dtype or torch.float32) if dtype == "auto" else dtype
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=wanted)
    return apply_plan(model.eval(), plan or native)


def check_sizes(
    model: PreTrainedModel,
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    repeats: int,
    rows: int,
    cap: float | None,
    beyond: int = 0,
) -> None:
    """Before any work: whether all that is asked for can be measured.

    Raises:
        MasformerError: a value out of range, or a length beyond the model's positions.
    """
    check_int("repeats", repeats, 1)
    check_int("rows", rows, 1)
    check_cap(cap)
    if not lengths or not plans:
        raise MasformerError("nothing to measure: at least one plan and one length are needed")
    limit = position_limit(model.config)
    for length in lengths:
        check_int("length", length, 1)
        if limit is not None and length + beyond > limit:
            more = f" of prompt and {beyond} more are" if beyond else " are"
            raise MasformerError(
                f"{length} tokens{more} beyond the {limit} positions of the model; "
                f"allowed: {'prompts' if beyond else 'lengths'} of up to {limit - beyond}, "
                "or extend the model with --max-positions"
            )
    for plan in plans.values():
        plan.for_layers(model.config.num_hidden_layers)


def random_tokens(model: PreTrainedModel, length: int, rows: int = 1) -> Tensor:
    """[rows, length]: no time depends on what they are."""
    return torch.randint(0, model.config.vocab_size, (rows, length), device=model.device)


def filled_cache(variant: Variant, length: int, room: int, rows: int) -> Any:
    """The variant's cache after a prompt of so many tokens, whose keys and values are random: none is run."""
    model, cache = variant.model, variant.make_cache(room)
    shape = ModelShape.of(model.config)
    keys, values = (
        torch.randn(rows, shape.kv_heads, length, width, dtype=model.dtype, device=model.device)
        for width in (shape.head_dim, shape.value_dim)
    )
    if isinstance(cache, SpanCache):
        cache.begin(rows, length)
    for layer in range(shape.num_layers):
        cache.update(keys, values, layer)
    return cache


@dataclass(frozen=True)
class Work:
    """What one variant has to do at one length, in the terms of the cost model (`masformer.cost`).

    Attributes:
        flops: of matrix products, visible pairs only.
        bytes: that must be moved at least: each weight read, and the cache written or read.
    """

    flops: float
    bytes: float


def forward_work(model: PreTrainedModel, plan: AttentionPlan, length: int, logits: int, rows: int = 1) -> Work:
    """One forward pass over rows of `length` tokens, with logits at `logits` of each."""
    shape, size = ModelShape.of(model.config), model.dtype.itemsize
    whole = cost(shape, plan, length, cache_bytes_per_value=size)
    head = model.get_output_embeddings().weight.numel()
    flops = whole.forward_flops - 2 * head * (length - logits)
    return Work(rows * flops, shape.matmul_weights * size + rows * whole.kv_cache_bytes)


def decode_work(model: PreTrainedModel, plan: AttentionPlan, length: int, new: int, rows: int = 1) -> Work:
    """`new` tokens of each row, one after the other, after `length` others; rows share a reading of the weights."""
    shape, size = ModelShape.of(model.config), model.dtype.itemsize
    before, after = (cost(shape, plan, n, cache_bytes_per_value=size) for n in (length, length + new))
    weights, cache = shape.matmul_weights * size, (before.kv_cache_bytes + after.kv_cache_bytes) / 2
    return Work(rows * (after.forward_flops - before.forward_flops), new * (weights + rows * cache))


def baseline(measured: Sequence[Variant]) -> str:
    """The name of what the others are compared with: transformers by itself if it is measured, else full attention."""
    return next((variant.name for variant in measured if not variant.ours), FULL)


def prediction(
    length: int, variant: Variant, timing: Timing, compared: Timing, work: Work, full: Work, tokens: int
) -> Row:
    """The columns that rows of whole models share.

    `speedup` is over the baseline; `ideal` what the cost model predicts from operations alone; `share` their ratio.
    """
    speedup, ideal = compared.median / timing.median, full.flops / work.flops
    return {
        "length": length,
        "name": variant.name,
        "plan": str(variant.visible) if variant.ours else None,
        "seconds": list(timing.seconds),
        "median": timing.median,
        "tokens_per_second": tokens / timing.median,
        "speedup": speedup,
        "ideal": ideal,
        "share": speedup / ideal,
    }


def model_row(
    length: int, variant: Variant, timing: Timing, compared: Timing, work: Work, full: Work, limits: Limits, tokens: int
) -> Row:
    """The same, and the columns of `Limits.of`."""
    row = prediction(length, variant, timing, compared, work, full, tokens)
    return row | limits.of(timing.median, work.flops, work.bytes)
