"""Choosing a plan under a budget: one-layer sensitivity, greedy, or a joint choice of spans; and its controls."""

from __future__ import annotations

import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from masformer.errors import MasformerError, check_int, check_seed, shown
from masformer.evaluation.room import dtype_name
from masformer.models.bridge import apply_plan
from masformer.models.positions import position_limit
from masformer.models.wrappers import bare_model
from masformer.placement.budget import Budget, Purse
from masformer.placement.measure import Measurer, Score
from masformer.placement.result import (
    FOUND,
    FULL,
    HELD_OUT,
    LOCAL,
    RANDOM,
    Evidence,
    PlacementScore,
    SearchResult,
    Work,
)
from masformer.placement.texts import Window, retrieval_probes, split_windows, take_windows, text_windows
from masformer.plan import PLACEMENTS, AttentionPlan
from masformer.spans import FullSpan, Span

METHODS = ("sensitivity", "greedy", "joint")
CRITERIA = ("tail", "kl", "retrieval")
MOST_RANDOM = 10_000
DIGITS = 6
"""Losses that agree in so many decimals are taken as equal, so that rounding does not decide."""


def parse_criteria(text: str) -> dict[str, float]:
    """Reads `tail`, or a weighted mix such as `tail:1,retrieval:0.5`; a weight left out is 1.

    Raises:
        MasformerError: an unknown criterion, one named twice, or a weight that is no positive number.
    """
    criteria: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = (piece.strip() for piece in part.partition(":"))
        if name in criteria:
            raise MasformerError(f"criterion {name!r} is named twice")
        try:
            criteria[name] = float(weight or 1)
        except ValueError:
            raise MasformerError(f"the weight of criterion {name!r} must be a number, got {shown(weight)}") from None
    return _check_criteria(criteria)


def _check_criteria(criteria: Mapping[str, float]) -> dict[str, float]:
    if not criteria or not set(criteria) <= set(CRITERIA):
        unknown = ", ".join(sorted(set(criteria) - set(CRITERIA))) or "none at all"
        raise MasformerError(f"unknown criterion: {unknown}; allowed: {', '.join(CRITERIA)}, or a mix (tail:1,kl:0.5)")
    for name, weight in criteria.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise MasformerError(f"the weight of criterion {name!r} must be a positive number, got {shown(weight)}")
    return dict(criteria)


def search_layers(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    budget: Budget | str | int,
    local: Span | str,
    *,
    length: int,
    prefix: int | None,
    method: str = "sensitivity",
    criteria: Mapping[str, float] | str = "tail",
    spans: Sequence[Span | str] = (),
    windows: int = 8,
    held_out_windows: int = 8,
    other_texts: Mapping[str, Sequence[Sequence[int]]] | None = None,
    tokenizer: Any = None,
    probes: int = 16,
    random_placements: int = 20,
    seed: int = 0,
    batch_size: int | None = None,
    precision: str = "auto",
    backend: str = "auto",
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> SearchResult:
    """Chooses the layers that need full attention, and holds them against other placements on text not chosen by.

    `sensitivity` restricts one layer at a time, the others full, and keeps full those whose restriction hurts most.
    `greedy` starts with every layer local and makes full the layer that helps most, given those before it. `joint`
    measures like `sensitivity`, with each span of a list, and minimises the sum of the measured rises under the budget
    exactly; that the rises of several layers add up is an assumption.

    All three work on a few windows of the documents. The random placements put the found plan's spans at random
    layers, so that their cost is the same.

    Args:
        model: a causal language model in evaluation mode; it keeps the plan that is found.
        documents: token ids of each document (`masformer.evaluation.perplexity.tokenize`).
        budget: a `Budget`, its text form, or a number of full layers.
        local: the span of layers that are not full, or its text.
        length: input tokens of a window.
        prefix: put before each document (`prefix_token`); None: nothing is.
        method: one of `METHODS`.
        criteria: criterion -> weight, or its text form (`parse_criteria`). `tail`: loss of the second half of the
            windows. `kl`: KL(all-full || plan) there. `retrieval`: loss of the answers to `retrieval_probes`.
        spans: of `joint`: the spans to choose from, or their texts; by default full and `local`.
        windows: text windows to choose by; also what the probes are made of.
        held_out_windows: text windows to report on.
        other_texts: name -> token ids of documents to report on as well.
        tokenizer: needed for the criterion `retrieval`.
        probes: retrieval probes to choose by, and as many to report on.
        random_placements: controls; fewer where there are not as many.
        seed: of the random placements and the probes.
        batch_size: windows that run together; by default as many as fit on CUDA, else one.
        precision: of matrix products, see `masformer.evaluation.perplexity.perplexity`.
        backend: see `masformer.attend`.
        journal: file that keeps finished measurements. An interrupted search goes on from there when it is called
            again; it may serve several searches, models and texts.
        progress: called with (stage, measurements done, measurements in all).

    Raises:
        MasformerError: a value out of range or unknown, too little text, a budget that allows nothing to choose, a
            model that cannot take a plan or whose layers cannot run one by one, or a loss that is not finite.
    """
    model = bare_model(model)
    began = time.perf_counter()
    layers: int = model.config.num_hidden_layers
    criteria = parse_criteria(criteria) if isinstance(criteria, str) else _check_criteria(criteria)
    budget = Budget.parse(str(budget)) if not isinstance(budget, Budget) else budget
    counts = {"windows": windows, "held-out windows": held_out_windows, "probes": probes, "length": length}
    for name, number in counts.items():
        check_int(name, number, 2 if name == "length" else 1)
    check_int("random placements", random_placements, 0, MOST_RANDOM)
    check_seed(seed)
    if (limit := position_limit(model.config)) is not None and length > limit:
        raise MasformerError(f"length {length} is beyond the {limit} positions of the model")
    if method not in METHODS:
        raise MasformerError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    if spans and method != "joint":
        raise MasformerError(f"a list of spans is for the method joint; {method} has full and {local}")
    if "retrieval" in criteria and tokenizer is None:
        raise MasformerError("the criterion retrieval needs the model's tokenizer")
    other_texts = dict(other_texts or {})
    if HELD_OUT in other_texts:
        raise MasformerError(f"a text cannot be named {HELD_OUT!r}: that is the part of the documents not chosen by")
    local = Span.parse(local)
    choices = list(dict.fromkeys(map(Span.parse, spans or (FullSpan(), local))))
    purse = Purse(budget, model, local, length)
    purse.check(min(choices, key=purse.price))
    full_layers = purse.full_layers(local)
    if full_layers < 1 and method != "joint":
        raise MasformerError(f"a budget of {budget} allows no full layer beside {local}: there is nothing to choose")

    def cut(text: Sequence[Sequence[int]]) -> list[list[Window]]:
        return [text_windows(document, prefix, length) for document in text]

    def with_probes(text: list[Window], seed: int) -> list[Window]:
        return text + (retrieval_probes(tokenizer, text, probes, seed) if "retrieval" in criteria else [])

    calibration, held_out, other_documents = split_windows(cut(documents), windows, held_out_windows)
    chosen_by = with_probes(calibration, seed)
    if set(criteria) == {"retrieval"}:
        chosen_by = [window for window in chosen_by if window.probe]
    texts = {HELD_OUT: with_probes(held_out, seed + 1)}
    for name, text in other_texts.items():
        taken = take_windows(cut(text), held_out_windows)
        if len(taken) < held_out_windows:
            raise MasformerError(f"text {name!r} holds {len(taken)} windows of {length} tokens of {held_out_windows}")
        texts[name] = with_probes(taken, seed + 1)

    restricted = [span for span in choices if not isinstance(span, FullSpan)]
    steps = range(full_layers) if method == "greedy" else ()
    plans = 1 + sum(layers - step for step in steps) if steps else 1 + layers * len(restricted)
    rules = [rule for rule in PLACEMENTS if full_layers >= 1]
    controls = 3 + len(rules) + random_placements
    total = plans * len(chosen_by) + controls * sum(map(len, texts.values()))
    stage, done = "choosing", 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(stage, done, total)

    measurer = Measurer(
        model,
        backend=backend,
        batch_size=batch_size,
        precision=precision,
        kl="kl" in criteria,
        journal=journal,
        advance=advance,
    )

    def criterion(plans: Sequence[AttentionPlan]) -> list[float]:
        rows = measurer.scores(plans, chosen_by)
        return [_weigh("", plan, chosen_by, row, criteria).criterion for plan, row in zip(plans, rows, strict=True)]

    if method == "greedy":
        plan, evidence = _greedy(layers, local, full_layers, criterion)
    else:
        evidence = _sensitivities(layers, restricted, criterion)
        if method == "sensitivity":
            plan = _keep_most_sensitive(evidence[0], local, full_layers)
        else:
            plan = _joint(evidence, choices, purse)

    drawn = _shuffled(plan, random_placements, seed)
    total -= (random_placements - len(drawn)) * sum(map(len, texts.values()))
    named = {
        FOUND: plan,
        FULL: AttentionPlan.uniform(layers, FullSpan()),
        LOCAL: AttentionPlan.uniform(layers, local),
        **{rule: AttentionPlan.mixed(layers, full_layers, rule, local=local) for rule in rules},
        **{f"{RANDOM} {number}": each for number, each in enumerate(drawn, start=1)},
    }
    placements = {}
    for text_name, text_windows_ in texts.items():
        stage = text_name
        rows = measurer.scores(list(named.values()), text_windows_)
        placements[text_name] = tuple(
            _weigh(name, each, text_windows_, row, criteria)
            for (name, each), row in zip(named.items(), rows, strict=True)
        )
    apply_plan(model, plan, backend)
    return SearchResult(
        plan=plan,
        method=method,
        criteria=criteria,
        budget=str(budget),
        local=str(local),
        length=length,
        windows=windows,
        probes=probes if "retrieval" in criteria else 0,
        held_out_windows=held_out_windows,
        other_documents=other_documents,
        seed=seed,
        evidence=evidence,
        placements=placements,
        work=Work(
            measurements=measurer.measured,
            recalled=measurer.recalled,
            layer_evaluations=measurer.passes.layers_run,
            unshared_layer_evaluations=measurer.unshared,
            seconds=time.perf_counter() - began,
        ),
        autocast=dtype_name(measurer.autocast),
    )


def _weigh(
    name: str, plan: AttentionPlan, windows: Sequence[Window], scores: Sequence[Score], criteria: Mapping[str, float]
) -> PlacementScore:
    """Means over the windows, and their weighted sum."""
    text = [score for window, score in zip(windows, scores, strict=True) if not window.probe]
    answers = [score for window, score in zip(windows, scores, strict=True) if window.probe]
    figures = {
        "tail": _mean([score.nll for score in text]),
        "kl": _mean([score.kl for score in text if score.kl is not None]) if "kl" in criteria else None,
        "retrieval": _mean([score.nll for score in answers]),
    }
    return PlacementScore(
        name=name,
        plan=str(plan),
        criterion=math.fsum(weight * (figures[each] or 0.0) for each, weight in criteria.items()),
        tail_nll=math.nan if figures["tail"] is None else figures["tail"],
        kl=figures["kl"],
        retrieval_nll=figures["retrieval"],
        retrieval_accuracy=_mean([float(score.right) for score in answers]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _with(plan: AttentionPlan, layer: int, span: Span) -> AttentionPlan:
    return AttentionPlan((*plan.spans[:layer], span, *plan.spans[layer + 1 :]))


def _sensitivities(
    layers: int, spans: Sequence[Span], criterion: Callable[[Sequence[AttentionPlan]], list[float]]
) -> tuple[Evidence, ...]:
    """One row for each span that is not full."""
    full = AttentionPlan.uniform(layers, FullSpan())
    base, *restricted = criterion([full, *(_with(full, layer, span) for span in spans for layer in range(layers))])
    rises = [round(value - base, DIGITS) for value in restricted]
    return tuple(
        Evidence(str(span), tuple(rises[index * layers : (index + 1) * layers])) for index, span in enumerate(spans)
    )


def _keep_most_sensitive(evidence: Evidence, local: Span, full_layers: int) -> AttentionPlan:
    order = sorted(range(len(evidence.values)), key=lambda layer: -(evidence.values[layer] or 0.0))
    return AttentionPlan.mixed(len(order), placement=order[:full_layers], local=local)


def _greedy(
    layers: int, local: Span, full_layers: int, criterion: Callable[[Sequence[AttentionPlan]], list[float]]
) -> tuple[AttentionPlan, tuple[Evidence, ...]]:
    plan, evidence = AttentionPlan.uniform(layers, local), []
    (value,) = criterion([plan])
    for step in range(1, full_layers + 1):
        candidates = [layer for layer in range(layers) if layer not in plan.full_layers]
        values = criterion([_with(plan, layer, FullSpan()) for layer in candidates])
        falls = {layer: round(value - each, DIGITS) for layer, each in zip(candidates, values, strict=True)}
        best = max(candidates, key=lambda layer: falls[layer])
        evidence.append(Evidence(f"step {step}", tuple(falls.get(layer) for layer in range(layers))))
        plan, value = _with(plan, best, FullSpan()), values[candidates.index(best)]
    return plan, tuple(evidence)


def _joint(evidence: Sequence[Evidence], choices: Sequence[Span], purse: Purse) -> AttentionPlan:
    """The multiple-choice knapsack, by dynamic programming over the layers; dominated partial choices are dropped."""
    rises = {row.name: row.values for row in evidence}
    prices = {span: purse.price(span) for span in choices}
    left = min(prices.values())
    partial: list[tuple[int, float, tuple[Span, ...]]] = [(0, 0.0, ())]
    for layer in range(purse.layers):
        grown = [
            (
                price + prices[span],
                loss + (rises[str(span)][layer] or 0.0 if str(span) in rises else 0.0),
                (*taken, span),
            )
            for price, loss, taken in partial
            for span in choices
            if price + prices[span] + (purse.layers - layer - 1) * left <= purse.limit
        ]
        partial = []
        for option in sorted(grown, key=lambda option: option[:2]):
            if not partial or round(option[1], DIGITS) < round(partial[-1][1], DIGITS):
                partial.append(option)
    return AttentionPlan(partial[-1][2])


def _shuffled(plan: AttentionPlan, count: int, seed: int) -> list[AttentionPlan]:
    """Distinct plans with the same spans at other layers: `count` of them, or all there are."""
    kinds = Counter(plan)
    others = math.factorial(len(plan)) // math.prod(map(math.factorial, kinds.values())) - 1
    choose, drawn = random.Random(seed), dict[AttentionPlan, None]()
    while len(drawn) < min(count, others):
        each = AttentionPlan(tuple(choose.sample(plan.spans, len(plan))))
        if each != plan:
            drawn[each] = None
    return list(drawn)
