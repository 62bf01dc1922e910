"""Measured evaluation of whole models: perplexity under a plan, and under full attention, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from masformer.benchmarks.models import (
    FULL,
    Variant,
    check_sizes,
    forward_work,
    prediction,
    random_tokens,
    variants,
)
from masformer.benchmarks.rows import Row, with_exponents
from masformer.benchmarks.timing import compare_times, prefixed
from masformer.errors import check_int
from masformer.evaluation.perplexity import perplexity
from masformer.models.compiling import compile_layers
from masformer.plan import AttentionPlan


def bench_eval(
    model: PreTrainedModel,
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    *,
    tokens: int = 65536,
    repeats: int = 3,
    cap: float | None = None,
    compiled: bool = False,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Times perplexity as `masformer eval perplexity` measures it, on documents of random tokens.

    Args:
        model: a model with a plan, in evaluation mode.
        plans: name -> plan.
        lengths: tokens of a window; each document is one.
        tokens: of all documents together, one document at least.
        repeats: timed rounds, after one for warming up.
        cap: seconds after which a variant takes no part in further rounds.
        compiled: compile the layers (`masformer.models.compiling`).
        backend: see `masformer.attend`.
        progress: called with a line before each call.

    Returns:
        `results`: one row per length and variant: `length`, `name`, `plan`, `documents`, `seconds` (all rounds),
        `median`, `tokens_per_second`, `speedup` over full attention, `ideal` (what the cost model predicts from
        operations alone), `share` (their ratio) and `exponent`.

    Raises:
        MasformerError: a value out of range, or a length beyond the model's positions.
    """
    check_int("tokens", tokens, 1)
    check_sizes(model, plans, lengths, repeats, 1, cap)
    found: list[Row] = []
    measured = variants(model, plans, caches=False, peers=False)
    if compiled:
        measured[0].apply(backend)
        compile_layers(model)
    prepare = {variant.name: partial(variant.apply, backend) for variant in measured}
    for length in lengths:
        count = max(1, tokens // length)
        documents = random_tokens(model, length, count).tolist()

        def evaluate(variant: Variant, length: int = length, documents: list[list[int]] = documents) -> None:
            perplexity(variant.model, documents, length, prefix=0)

        calls = {variant.name: partial(evaluate, variant) for variant in measured}
        times = compare_times(calls, repeats, prefixed(progress, length), prepare=prepare, cap=cap, device=model.device)
        works = {variant.name: forward_work(model, variant.visible, length, length, count) for variant in measured}
        for variant in measured:
            name = variant.name
            row = prediction(length, variant, times[name], times[FULL], works[name], works[FULL], count * length)
            found.append(row | {"documents": count})
    return {"results": with_exponents(found, ["name"])}
