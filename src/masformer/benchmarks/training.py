"""Measured training steps of whole models: a plan, full attention, and transformers by itself, in one run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from masformer.benchmarks.limits import Probe
from masformer.benchmarks.models import (
    Variant,
    Work,
    baseline,
    check_sizes,
    forward_work,
    model_row,
    random_tokens,
    variants,
)
from masformer.benchmarks.rows import with_exponents
from masformer.benchmarks.timing import compare_times, peak_memory
from masformer.plan import AttentionPlan
from masformer.training.loss import use_chunked_loss


def bench_train(
    model: PreTrainedModel,
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    *,
    checkpointing: bool = False,
    repeats: int = 3,
    backend: str = "auto",
    peers: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Times training steps on one row of random tokens: forward, loss, backward, and AdamW on all weights.

    Plans and full attention run as `masformer train` runs them, with the loss in chunks; transformers by itself makes
    all logits. The learning rate is 0, so that every step starts from the same weights.

    Args:
        model: a model with a plan.
        plans: name -> plan.
        lengths: tokens of a row.
        checkpointing: make activations anew in the backward pass, in all variants.
        repeats: timed rounds, after one in which memory is measured.
        backend: see `masformer.attend`.
        peers: measure transformers by itself as well; without it the baseline is full attention under masformer.
        progress: called with a line before each call.

    Returns:
        As `bench_prefill`, without `cache_bytes`; `peak_bytes` holds the
        gradients and the activations; the optimizer's state is there before.

    Raises:
        MasformerError: a value out of range, or a length beyond the model's positions.
    """
    check_sizes(model, plans, lengths, repeats)
    rows, rates, measured = [], [], variants(model, plans, caches=False, peers=peers)
    use_chunked_loss(model)
    optimizers = {}
    for variant in measured:
        variant.model.train()
        if checkpointing:
            variant.model.gradient_checkpointing_enable({"use_reentrant": False})
        if variant.model not in optimizers:
            optimizers[variant.model] = torch.optim.AdamW(
                variant.model.parameters(), lr=0.0, weight_decay=0.0, fused=True
            )
    probe, base = Probe(model.dtype, model.device), baseline(measured)
    for length in lengths:
        tokens = random_tokens(model, length)

        def step(variant: Variant, tokens: Tensor = tokens) -> None:
            variant.apply(backend)
            variant.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizers[variant.model].step()
            optimizers[variant.model].zero_grad()

        memory = {}
        for variant in measured:
            progress(f"{length}: {variant.name}, memory")
            gc.collect()
            memory[variant.name] = peak_memory(partial(step, variant))
        calls = {variant.name: partial(step, variant) for variant in measured}
        times = compare_times(probe.calls() | calls, repeats, progress, warm_up=False)
        limits = probe.limits(times)
        rates.append({"length": length} | limits.to_dict())
        works = {variant.name: _work(model, variant.visible, length, checkpointing) for variant in measured}
        for variant in measured:
            name = variant.name
            row = model_row(length, variant, times[name], times[base], works[name], works[base], limits, length)
            rows.append(row | {"peak_bytes": memory[name]})
    return {"results": with_exponents(rows, ["name"]), "limits": rates}


def _work(model: PreTrainedModel, plan: AttentionPlan, length: int, checkpointing: bool) -> Work:
    """The backward pass costs twice the forward pass (see `Cost.training_flops`), and a forward pass again where
    activations are made anew; weights are read in each, gradients written, and AdamW reads and writes four tensors."""
    forward = forward_work(model, plan, length, length)
    return Work(
        (4 if checkpointing else 3) * forward.flops,
        (4 if checkpointing else 3) * forward.bytes + 8 * model.num_parameters() * model.dtype.itemsize,
    )
