"""Measured prefill and decoding of whole models: a plan, full attention, and transformers' own caches, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from masformer.benchmarks.timing import compare_times, peak_memory
from masformer.cache import SpanCache
from masformer.cost import bytes_text
from masformer.errors import MasformerError, check_int
from masformer.models.bridge import apply_plan, cache_name
from masformer.models.positions import position_limit
from masformer.models.twins import sliding_twin, stock_twin
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan

FULL = "all full, SpanCache"
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
        plan: None for transformers as it is.
    """

    name: str
    model: PreTrainedModel
    make_cache: Callable[[int], Any]
    plan: AttentionPlan | None = None

    def apply(self) -> None:
        """Gives the model, which plans share, its plan."""
        if self.plan is not None:
            apply_plan(self.model, self.plan)

    def run(self, tokens: Tensor, cache: Any) -> Tensor:
        """One forward pass; the next token of each row, [batch, 1]."""
        out = self.model(tokens, use_cache=True, logits_to_keep=1, **{cache_name(self.model): cache})
        return out.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]


def variants(model: PreTrainedModel, plans: Mapping[str, AttentionPlan]) -> list[Variant]:
    """What is measured: each plan, full attention in our cache, and the same weights in transformers as it is.

    Transformers' static cache is measured too, and its own sliding layers where a class of its has them for these
    weights and the plan's spans; sinks, which it does not know, are left out there.
    """
    layers = model.config.num_hidden_layers
    full = AttentionPlan.uniform(layers, FullSpan())
    stock = stock_twin(model)
    found = [Variant(name, model, _span_cache(plan), plan) for name, plan in plans.items() if plan != full]
    found.append(Variant(FULL, model, _span_cache(full), full))
    found.append(Variant(STOCK, stock, _dynamic_cache(stock)))
    found.append(Variant(STATIC, stock, lambda room: StaticCache(config=stock.config, max_cache_len=room)))
    for name, plan in plans.items():
        twin = sliding_twin(model, plan)
        if twin is not None:
            found.append(Variant(f"{SLIDING} {name}", twin, _dynamic_cache(twin)))
    return found


def _span_cache(plan: AttentionPlan) -> Callable[[int], SpanCache]:
    return lambda room: SpanCache(plan, reserve=room)


def _dynamic_cache(stock: PreTrainedModel) -> Callable[[int], DynamicCache]:
    return lambda room: DynamicCache(config=stock.config)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in any cache, room to grow included."""
    if isinstance(cache, SpanCache):
        return cache.storage_nbytes
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


@torch.inference_mode()
def bench_prefill(
    model: PreTrainedModel,
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Times a prompt's forward pass into an empty cache, up to the first token.

    Args:
        model: a model with a plan, in evaluation mode.
        plans: name -> plan.
        lengths: prompt lengths in tokens.
        repeats: timed rounds, after one in which memory is measured.
        progress: called with a line before each call.

    Returns:
        One row per length and variant: `length`, `name`, `plan`, `seconds` (all rounds), `median`, `tokens_per_second`,
        `speedup` over transformers' default cache with full attention, `cache_bytes` and `peak_bytes`.

    Raises:
        MasformerError: a value out of range, or a length beyond the model's positions.
    """
    _check(model, plans, lengths, repeats, 0)
    rows, measured = [], variants(model, plans)
    for length in lengths:
        tokens = _tokens(model, length)
        memory, caches = {}, {}
        for variant in measured:
            progress(f"{length}: {variant.name}, memory")
            variant.apply()
            cache = variant.make_cache(length + 1)
            memory[variant.name] = peak_memory(partial(variant.run, tokens, cache))
            caches[variant.name] = cache_bytes(cache)
            del cache

        def prefill(variant: Variant, tokens: Tensor = tokens) -> None:
            variant.apply()
            variant.run(tokens, variant.make_cache(tokens.shape[1] + 1))

        calls = {variant.name: partial(prefill, variant) for variant in measured}
        times = compare_times(calls, repeats, progress, warm_up=False)
        rows += _rows(length, length, measured, {name: each.seconds for name, each in times.items()}, caches, memory)
    return rows


@torch.inference_mode()
def bench_decode(
    model: PreTrainedModel,
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    *,
    new: int = 32,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Times greedy decoding after a prompt: `repeats` rounds of `new` tokens, each round going on where the last ended.

    Args:
        model: a model with a plan, in evaluation mode.
        plans: name -> plan.
        lengths: prompt lengths in tokens.
        new: tokens of one round.
        repeats: timed rounds, after one for warming up.
        progress: called with a line before each call.

    Returns:
        Rows as of `bench_prefill`; `cache_bytes` at the end.

    Raises:
        MasformerError: a value out of range, or a length beyond the model's positions.
    """
    check_int("new tokens", new, 1)
    _check(model, plans, lengths, repeats, new * (repeats + 1))
    rows, measured = [], variants(model, plans)
    for length in lengths:
        tokens, room = _tokens(model, length), length + new * (repeats + 1) + 1
        states: dict[str, tuple[Any, list[Tensor]]] = {}
        for variant in measured:
            progress(f"{length}: {variant.name}, prompt")
            variant.apply()
            cache = variant.make_cache(room)
            states[variant.name] = cache, [variant.run(tokens, cache)]

        def decode(variant: Variant, states: dict[str, tuple[Any, list[Tensor]]] = states) -> None:
            variant.apply()
            cache, last = states[variant.name]
            for _ in range(new):
                last[0] = variant.run(last[0], cache)

        calls = {variant.name: partial(decode, variant) for variant in measured}
        times = compare_times(calls, repeats, progress)
        memory = {}
        for variant in measured:
            variant.apply()
            cache, last = states[variant.name]
            memory[variant.name] = peak_memory(partial(variant.run, last[0], cache))
        caches = {name: cache_bytes(cache) for name, (cache, _) in states.items()}
        seconds = {name: each.seconds for name, each in times.items()}
        rows += _rows(length, new, measured, seconds, caches, memory)
    return rows


def _check(
    model: PreTrainedModel, plans: Mapping[str, AttentionPlan], lengths: Sequence[int], repeats: int, beyond: int
) -> None:
    check_int("repeats", repeats, 1)
    if not lengths or not plans:
        raise MasformerError("nothing to measure: at least one plan and one length are needed")
    limit = position_limit(model.config)
    for length in lengths:
        check_int("length", length, 1)
        if limit is not None and length + beyond > limit:
            raise MasformerError(
                f"{length} tokens of prompt and {beyond} more are beyond the {limit} positions of the model; "
                f"allowed: prompts of up to {limit - beyond}, or extend the model with --max-positions"
            )
    for plan in plans.values():
        plan.for_layers(model.config.num_hidden_layers)


def _tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Random tokens: no time depends on what they are."""
    return torch.randint(0, model.config.vocab_size, (1, length), device=model.device)


def _rows(
    length: int,
    tokens: int,
    measured: Sequence[Variant],
    seconds: Mapping[str, Sequence[float]],
    caches: Mapping[str, int],
    memory: Mapping[str, int | None],
) -> list[dict[str, Any]]:
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return [
        {
            "length": length,
            "name": variant.name,
            "plan": None if variant.plan is None else str(variant.plan),
            "seconds": list(seconds[variant.name]),
            "median": medians[variant.name],
            "tokens_per_second": tokens / medians[variant.name],
            "speedup": medians[STOCK] / medians[variant.name],
            "cache_bytes": caches[variant.name],
            "peak_bytes": memory[variant.name],
        }
        for variant in measured
    ]


def generation_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for people to read; speed-ups are over transformers' default cache."""
    table = Table(title=title, title_justify="left")
    for column in ("prompt", "", "s", "tokens/s", "speed-up", "cache", "peak memory"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column))
    length = None
    for row in rows:
        if length is not None and row["length"] != length:
            table.add_section()
        table.add_row(
            "" if row["length"] == length else f"{row['length']:,}",
            row["name"],
            f"{row['median']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}",
            bytes_text(row["cache_bytes"]),
            "-" if row["peak_bytes"] is None else bytes_text(row["peak_bytes"]),
        )
        length = row["length"]
    return table
