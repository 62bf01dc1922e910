"""Measured prefill and decoding of whole models: a plan, full attention, and transformers' own caches, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from masformer.benchmarks.limits import Probe
from masformer.benchmarks.models import (
    FULL,
    Variant,
    baseline,
    check_sizes,
    decode_work,
    filled_cache,
    forward_work,
    model_row,
    random_tokens,
    variants,
)
from masformer.benchmarks.rows import Row, with_exponents
from masformer.benchmarks.timing import compare_times, peak_memory, prefixed
from masformer.cache import SpanCache
from masformer.errors import check_int
from masformer.models.graphs import compile_tokens, graph_tokens_if_possible
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan


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
    batch: int = 1,
    repeats: int = 3,
    cap: float | None = None,
    backend: str = "auto",
    peers: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Times a prompt's forward pass into an empty cache, up to the first token.

    Args:
        model: a model with a plan, in evaluation mode.
        plans: name -> plan.
        lengths: prompt lengths in tokens.
        batch: prompts that run together.
        repeats: timed rounds, after one in which memory is measured.
        cap: seconds after which a variant takes no part in further rounds.
        backend: see `masformer.attend`.
        peers: measure transformers' own caches as well; without them the baseline is full attention under masformer.
        progress: called with a line before each call.

    Returns:
        `results`: one row per length and variant: `length`, `name`, `plan`, `seconds` (all rounds), `median`,
        `tokens_per_second`, `speedup` over the baseline, `ideal` and `share` (see `prediction`), the columns of
        `Limits.of`, `cache_bytes`, `peak_bytes` and `exponent`. `limits`: the rates of the machine per length.

    Raises:
        MasformerError: a value out of range, or a length beyond the model's positions.
    """
    model = bare_model(model)
    check_sizes(model, plans, lengths, repeats, batch, cap)
    found, rates, measured = [], [], variants(model, plans, peers=peers)
    probe, base = Probe(model.dtype, model.device), baseline(measured)
    prepare = {variant.name: partial(variant.apply, backend) for variant in measured}
    for length in lengths:
        tokens = random_tokens(model, length, batch)
        memory, caches = {}, {}
        for variant in measured:
            progress(f"{length:,} tokens: {variant.name}, memory")
            variant.apply(backend)
            cache = variant.make_cache(length + 1)
            memory[variant.name] = peak_memory(partial(variant.run, tokens, cache), model.device)
            caches[variant.name] = cache_bytes(cache)
            del cache

        def prefill(variant: Variant, tokens: Tensor = tokens) -> None:
            variant.run(tokens, variant.make_cache(tokens.shape[1] + 1))

        calls = {variant.name: partial(prefill, variant) for variant in measured}
        times = compare_times(
            probe.calls() | calls,
            repeats,
            prefixed(progress, length),
            warm_up=False,
            prepare=prepare,
            cap=cap,
            device=model.device,
        )
        limits = probe.limits(times)
        rates.append({"length": length} | limits.to_dict())
        works = {variant.name: forward_work(model, variant.visible, length, 1, batch) for variant in measured}
        for variant in measured:
            name = variant.name
            row = model_row(length, variant, times[name], times[base], works[name], works[base], limits, batch * length)
            found.append(row | {"cache_bytes": caches[name], "peak_bytes": memory[name]})
    return {"results": with_exponents(found, ["name"]), "limits": rates}


@torch.inference_mode()
def bench_decode(
    model: PreTrainedModel,
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    *,
    new: int = 32,
    batch: int = 1,
    repeats: int = 5,
    cap: float | None = None,
    compiled: bool = False,
    backend: str = "auto",
    peers: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Times greedy decoding after a prompt: `repeats` rounds of `new` tokens, each round going on where the last ended.

    On an NVIDIA GPU the tokens of masformer's variants are CUDA graphs (`graph_tokens`), as in `generate`.

    The prompt is not run: the caches are filled with random keys and values, on which no time depends.

    Args:
        model: a model with a plan, in evaluation mode.
        plans: name -> plan.
        lengths: prompt lengths in tokens.
        new: tokens of one round.
        batch: prompts that are continued together.
        repeats: timed rounds, after one for warming up.
        cap: seconds after which a variant takes no part in further rounds.
        compiled: compile the parts of layers beside attention, in the graphs of masformer's tokens.
        backend: see `masformer.attend`.
        peers: measure transformers' own caches as well; without them the baseline is full attention under masformer.
        progress: called with a line before each call.

    Returns:
        As `bench_prefill`; `cache_bytes` at the end. Decoding is bound by the bytes that it must read, the weights once
        a token and the visible cache: `over_full` is the speed-up over all full under masformer, `ideal_bytes` what the
        bytes predict, `share_bytes` their ratio. `graphs`: whether the tokens of masformer's variants are CUDA graphs.

    Raises:
        MasformerError: a value out of range, or a length beyond the model's positions.
    """
    model = bare_model(model)
    check_int("new tokens", new, 1)
    check_sizes(model, plans, lengths, repeats, batch, cap, new * (repeats + 1))
    found: list[Row] = []
    rates, measured = [], variants(model, plans, peers=peers)
    measured[0].apply(backend)
    graphs = graph_tokens_if_possible(model)
    if compiled:
        compile_tokens(model)
    probe, base = Probe(model.dtype, model.device), baseline(measured)
    prepare = {variant.name: partial(variant.apply, backend) for variant in measured}
    for length in lengths:
        room = length + new * (repeats + 1) + 1
        states: dict[str, tuple[Any, list[Tensor]]] = {}
        for variant in measured:
            progress(f"{length:,} tokens: {variant.name}, cache")
            states[variant.name] = filled_cache(variant, length, room, batch), [random_tokens(model, 1, batch)]

        def decode(variant: Variant, states: dict[str, tuple[Any, list[Tensor]]] = states) -> None:
            cache, last = states[variant.name]
            for _ in range(new):
                last[0] = variant.run(last[0], cache)

        calls = {variant.name: partial(decode, variant) for variant in measured}
        times = compare_times(
            probe.calls() | calls, repeats, prefixed(progress, length), prepare=prepare, cap=cap, device=model.device
        )
        limits = probe.limits(times)
        rates.append({"length": length} | limits.to_dict())
        works = {variant.name: decode_work(model, variant.visible, length, new, batch) for variant in measured}
        for variant in measured:
            name = variant.name
            cache, last = states[name]
            variant.apply(backend)
            row = model_row(length, variant, times[name], times[base], works[name], works[base], limits, batch * new)
            over, by_bytes = times[FULL].median / times[name].median, works[FULL].bytes / works[name].bytes
            row |= {"over_full": over, "ideal_bytes": by_bytes, "share_bytes": over / by_bytes}
            peak = peak_memory(partial(variant.run, last[0], cache), model.device)
            found.append(row | {"cache_bytes": cache_bytes(cache), "peak_bytes": peak})
    graphs = graphs and graph_tokens_if_possible(model)  # none may have come of it
    return {"results": with_exponents(found, ["name"]), "limits": rates, "graphs": graphs}
