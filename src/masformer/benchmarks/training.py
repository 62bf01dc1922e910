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
from masformer.benchmarks.timing import compare_times, peak_memory, prefixed
from masformer.defaults import LOSS_CHUNK
from masformer.errors import MasformerError
from masformer.models.compiling import compile_layers
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan
from masformer.training.loss import compile_loss, use_chunked_loss
from masformer.training.recipe import PRECISIONS


def bench_train(
    model: PreTrainedModel,
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    *,
    batch: int = 1,
    checkpointing: bool = False,
    precision: str = "float32",
    loss_chunk: int = LOSS_CHUNK,
    repeats: int = 3,
    cap: float | None = None,
    compiled: bool = False,
    backend: str = "auto",
    peers: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Times training steps on rows of random tokens: forward, loss, backward, and AdamW on all weights.

    Plans and full attention run as `masformer train` runs them, with the loss in chunks; transformers by itself makes
    all logits. The learning rate is 0, so that every step starts from the same weights.

    Args:
        model: a model with a plan.
        plans: name -> plan.
        lengths: tokens of a row.
        batch: rows of a step.
        checkpointing: make activations anew in the backward pass, in all variants.
        precision: `bfloat16` runs matrix products in 16 bits (autocast), as in a recipe's `training.precision`.
        loss_chunk: positions whose logits exist at the same time, as in a recipe.
        repeats: timed rounds, after one in which memory is measured.
        cap: seconds after which a variant takes no part in further rounds.
        compiled: compile the model's layers and its loss, as a recipe's `training.compile` does; transformers by itself
            runs as it is.
        backend: see `masformer.attend`.
        peers: measure transformers by itself as well; without it the baseline is full attention under masformer.
        progress: called with a line before each call.

    Returns:
        As `bench_prefill`, without `cache_bytes`; `peak_bytes` holds the
        gradients and the activations; the optimizer's state is there before.

    Raises:
        MasformerError: a value out of range, or a length beyond the model's positions.
    """
    model = bare_model(model)
    check_sizes(model, plans, lengths, repeats, batch, cap)
    if precision not in PRECISIONS:
        raise MasformerError(f"unknown precision {precision!r}; allowed: {', '.join(PRECISIONS)}")
    found, rates, measured = [], [], variants(model, plans, caches=False, peers=peers)
    use_chunked_loss(model, loss_chunk)
    optimizers = {}
    for variant in measured:
        variant.model.train()
        if checkpointing:
            variant.model.gradient_checkpointing_enable({"use_reentrant": False})
        if variant.model not in optimizers:
            optimizers[variant.model] = torch.optim.AdamW(
                variant.model.parameters(), lr=0.0, weight_decay=0.0, fused=True
            )
    if compiled:
        measured[0].apply(backend)
        compile_layers(model)
        compile_loss(model)
    mixed = precision == "bfloat16"
    probe, base = Probe(torch.bfloat16 if mixed else model.dtype, model.device), baseline(measured)
    prepare = {variant.name: partial(variant.apply, backend) for variant in measured}
    for length in lengths:
        tokens = random_tokens(model, length, batch)

        def step(variant: Variant, tokens: Tensor = tokens) -> None:
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=mixed):
                loss = variant.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizers[variant.model].step()
            optimizers[variant.model].zero_grad()

        memory = {}
        for variant in measured:
            progress(f"{length:,} tokens: {variant.name}, memory")
            gc.collect()
            variant.apply(backend)
            memory[variant.name] = peak_memory(partial(step, variant), model.device)
        calls = {variant.name: partial(step, variant) for variant in measured}
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
        works = {variant.name: _work(model, variant.visible, length, batch, checkpointing) for variant in measured}
        for variant in measured:
            name = variant.name
            row = model_row(length, variant, times[name], times[base], works[name], works[base], limits, batch * length)
            found.append(row | {"peak_bytes": memory[name]})
    return {"results": with_exponents(found, ["name"]), "limits": rates}


def _work(model: PreTrainedModel, plan: AttentionPlan, length: int, rows: int, checkpointing: bool) -> Work:
    """The backward pass costs twice the forward pass (see `Cost.training_flops`), and a forward pass again where
    activations are made anew; weights are read in each, gradients written, and AdamW reads and writes four tensors."""
    forward = forward_work(model, plan, length, length, rows)
    return Work(
        (4 if checkpointing else 3) * forward.flops,
        (4 if checkpointing else 3) * forward.bytes + 8 * model.num_parameters() * model.dtype.itemsize,
    )
