"""Choosing a plan under a budget: one-layer sensitivity, greedy, or a joint choice of spans; and its controls."""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from masformer.cost import ModelShape, bytes_text, cost
from masformer.errors import MasformerError, check_int
from masformer.models.bridge import apply_plan
from masformer.models.positions import position_limit
from masformer.placement.measure import Measurer, Score
from masformer.placement.texts import Window, retrieval_probes, split_windows, take_windows, text_windows
from masformer.plan import PLACEMENTS, AttentionPlan
from masformer.spans import FullSpan, Span

METHODS = ("sensitivity", "greedy", "joint")
CRITERIA = ("tail", "kl", "retrieval")
BUDGET_FORMS = (
    "a number of full layers (8), a share of all-full's attention FLOPs (30%), or KV-cache bytes (64MiB); "
    "the last two may name a length in tokens (30%@8192)"
)
HELD_OUT = "held-out"
"""Name of the part of the documents that nothing was chosen by."""
FULL, LOCAL, FOUND, RANDOM = "all full", "all local", "found", "random"
"""Names of placements, beside the rules; random ones are numbered."""
DIGITS = 6
"""Losses that agree in so many decimals are taken as equal, so that rounding does not decide."""


@dataclass(frozen=True)
class Budget:
    """What a plan may cost: exactly one of the first three.

    Attributes:
        full_layers: full layers, the others local.
        flops_share: attention FLOPs, as a fraction of full attention in every layer; above 0, below 1.
        cache_bytes: KV-cache bytes of one sequence, with values of 2 bytes.
        length: tokens at which the cost is counted; None: those of the search.
    """

    full_layers: int | None = None
    flops_share: float | None = None
    cache_bytes: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if (self.full_layers, self.flops_share, self.cache_bytes).count(None) != 2:
            raise MasformerError(f"a budget is one of: {BUDGET_FORMS}")
        if self.full_layers is not None:
            check_int("number of full layers", self.full_layers, 0)
        if self.flops_share is not None and not 0 < self.flops_share < 1:
            raise MasformerError(f"a share of the FLOPs must lie between 0% and 100%, got {self.flops_share:.6g}")
        if self.cache_bytes is not None:
            check_int("KV-cache bytes", self.cache_bytes, 1)
        if self.length is not None:
            check_int("length of the budget", self.length, 1)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads `8`, `30%`, `64MiB`, `30%@8192` or `64MiB@8192`.

        Raises:
            MasformerError: it is none of the forms, or out of range.
        """
        match = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*(%|B|KiB|MiB|GiB)?\s*(?:@\s*(\d+))?\s*", text)
        if match is None or (match[2] is None and (match[3] or "." in match[1])):
            raise MasformerError(f"cannot read the budget {text!r}; allowed: {BUDGET_FORMS}")
        number, unit, length = match[1], match[2], int(match[3]) if match[3] else None
        if unit is None:
            return cls(full_layers=int(number))
        if unit == "%":
            return cls(flops_share=float(number) / 100, length=length)
        scale = 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)
        return cls(cache_bytes=int(float(number) * scale), length=length)

    def __str__(self) -> str:
        at = "" if self.length is None else f" at {self.length} tokens"
        if self.full_layers is not None:
            return f"{self.full_layers} full layers"
        if self.flops_share is not None:
            return f"{self.flops_share:.4g} of all-full's attention FLOPs{at}"
        return f"{bytes_text(self.cache_bytes or 0)} of KV cache{at}"


class _Purse:
    """A budget for one model: what a layer of each span costs, and what there is to spend."""

    def __init__(self, budget: Budget, model: PreTrainedModel, local: Span, length: int) -> None:
        self.layers = int(model.config.num_hidden_layers)
        self.length = budget.length or length
        self.shape = ModelShape.of(model.config)
        self.figure = "attention_flops" if budget.cache_bytes is None else "kv_cache_bytes"
        full = self.layers * self.price(FullSpan())
        if budget.full_layers is not None:
            if budget.full_layers > self.layers:
                raise MasformerError(f"{budget} are more than the model's {self.layers} layers")
            local_layers = self.layers - budget.full_layers
            self.limit = budget.full_layers * self.price(FullSpan()) + local_layers * self.price(local)
        elif budget.flops_share is not None:
            self.limit = math.floor(budget.flops_share * full)
        else:
            self.limit = budget.cache_bytes or 0
        if self.limit >= full:
            raise MasformerError(f"a budget of {budget} lets every layer be full: there is nothing to choose")
        if self.price(local) >= self.price(FullSpan()):
            raise MasformerError(f"{local} costs as much as full at {self.length} tokens: there is nothing to choose")
        self.budget = budget

    def price(self, span: Span) -> int:
        """Of one layer: FLOPs or bytes."""
        whole = getattr(cost(self.shape, AttentionPlan.uniform(self.layers, span), self.length), self.figure)
        return int(whole) // self.layers

    def check(self, cheapest: Span) -> None:
        """Raises MasformerError unless every layer can have this span."""
        if self.layers * self.price(cheapest) > self.limit:
            raise MasformerError(
                f"a budget of {self.budget} is less than {cheapest} in every layer needs; give more or a smaller span"
            )

    def full_layers(self, local: Span) -> int:
        """How many layers can be full when the others are local; below 0 where not even none can."""
        if self.budget.full_layers is not None:
            return self.budget.full_layers
        left = self.limit - self.layers * self.price(local)
        return left // (self.price(FullSpan()) - self.price(local))


@dataclass(frozen=True)
class Evidence:
    """One row of the heat map: what was measured layer by layer.

    Attributes:
        name: the span that one layer at a time was restricted to, or the step of the greedy search.
        values: the rise of the criterion above all-full when that layer alone is restricted, or its fall when that
            layer is made full in this step; in nats, larger for a layer that is needed more. None: not measured.
    """

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class PlacementScore:
    """One placement on one text.

    Attributes:
        name: `found`, `all full`, `all local`, a rule of `masformer.plan.PLACEMENTS`, or `random 1` and so on.
        plan: its text form.
        criterion: what was searched for: the weighted sum, in nats.
        tail_nll: mean negative log-likelihood of the second half of the windows, in nats per token.
        kl: mean KL(all-full || plan) there, in nats per token; None where it was not asked for.
        retrieval_nll: the same of the answers to the probes, in nats per token; None where it was not asked for.
        retrieval_accuracy: share of the probes answered right; None where it was not asked for.
    """

    name: str
    plan: str
    criterion: float
    tail_nll: float
    kl: float | None = None
    retrieval_nll: float | None = None
    retrieval_accuracy: float | None = None

    @property
    def tail_perplexity(self) -> float:
        """exp(tail_nll)."""
        return math.exp(self.tail_nll) if self.tail_nll < 709 else math.inf


@dataclass(frozen=True)
class Work:
    """What a search took; of a resumed one, the last run alone.

    Attributes:
        measurements: plans measured on a window each.
        recalled: measurements that were known already.
        layer_evaluations: times that one layer ran over one window.
        unshared_layer_evaluations: the same if no prefix were shared.
        seconds: wall-clock time.
    """

    measurements: int
    recalled: int
    layer_evaluations: int
    unshared_layer_evaluations: int
    seconds: float


@dataclass(frozen=True)
class SearchResult:
    """The plan found, with the evidence.

    Attributes:
        plan: the plan.
        method: one of `METHODS`.
        criteria: criterion -> weight.
        budget: in words.
        local: the local span.
        length: input tokens of a window.
        windows: text windows that the plan was chosen by.
        probes: retrieval probes that the plan was chosen by.
        held_out_windows: text windows of each text of `placements`.
        other_documents: whether the held-out windows are of other documents, or of other parts of the same.
        seed: of the random placements and the probes.
        evidence: rows of the heat map, from layer 0.
        placements: text -> the plan among its controls.
        work: what it took; not compared.
    """

    plan: AttentionPlan
    method: str
    criteria: dict[str, float]
    budget: str
    local: str
    length: int
    windows: int
    probes: int
    held_out_windows: int
    other_documents: bool
    seed: int
    evidence: tuple[Evidence, ...]
    placements: dict[str, tuple[PlacementScore, ...]]
    work: Work = field(compare=False)

    def score(self, name: str, text: str = HELD_OUT) -> PlacementScore:
        """The placement of that name on that text."""
        return next(score for score in self.placements[text] if score.name == name)

    def random(self, text: str = HELD_OUT) -> list[PlacementScore]:
        """The random placements on that text, best first by the criterion."""
        scores = [score for score in self.placements[text] if score.name.startswith(RANDOM)]
        return sorted(scores, key=lambda score: score.criterion)

    def rank(self, text: str = HELD_OUT) -> int:
        """Where the plan stands among the random placements by the criterion: 1 is best, their number + 1 worst."""
        found = self.score(FOUND, text).criterion
        return 1 + sum(score.criterion < found for score in self.random(text))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the attributes, with perplexities and ranks."""
        placements = {
            text: [asdict(score) | {"tail_perplexity": score.tail_perplexity} for score in scores]
            for text, scores in self.placements.items()
        }
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}
        evidence = [{"name": row.name, "values": list(row.values)} for row in self.evidence]
        ranks = {text: {"rank": self.rank(text), "of": len(self.random(text)) + 1} for text in self.placements}
        derived = {"evidence": evidence, "placements": placements, "ranks": ranks, "work": asdict(self.work)}
        return self.plan.to_dict() | own | derived

    def save(self, path: str | os.PathLike[str], **notes: Any) -> None:
        """Writes a plan file that also says how the plan was found; arguments and errors as `AttentionPlan.save`."""
        how = {key: value for key, value in self.to_dict().items() if key not in ("plan", "num_layers")}
        self.plan.save(path, found_by=how, **notes)


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
            raise MasformerError(f"the weight of criterion {name!r} must be a number, got {weight!r}") from None
    return _check_criteria(criteria)


def _check_criteria(criteria: Mapping[str, float]) -> dict[str, float]:
    if not criteria or not set(criteria) <= set(CRITERIA):
        unknown = ", ".join(sorted(set(criteria) - set(CRITERIA))) or "none at all"
        raise MasformerError(f"unknown criterion: {unknown}; allowed: {', '.join(CRITERIA)}, or a mix (tail:1,kl:0.5)")
    for name, weight in criteria.items():
        if not 0 < weight < math.inf:
            raise MasformerError(f"the weight of criterion {name!r} must be a positive number, got {weight}")
    return dict(criteria)


def search_layers(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    budget: Budget | str | int,
    local: Span,
    *,
    length: int,
    prefix: int | None,
    method: str = "sensitivity",
    criteria: Mapping[str, float] | str = "tail",
    spans: Sequence[Span] = (),
    windows: int = 8,
    held_out_windows: int = 8,
    other_texts: Mapping[str, Sequence[Sequence[int]]] | None = None,
    tokenizer: Any = None,
    probes: int = 16,
    random_placements: int = 20,
    seed: int = 0,
    batch_size: int = 1,
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
        local: the span of layers that are not full.
        length: input tokens of a window.
        prefix: put before each document (`prefix_token`); None: nothing is.
        method: one of `METHODS`.
        criteria: criterion -> weight, or its text form (`parse_criteria`). `tail`: loss of the second half of the
            windows. `kl`: KL(all-full || plan) there. `retrieval`: loss of the answers to `retrieval_probes`.
        spans: of `joint`: the spans to choose from; by default full and `local`.
        windows: text windows to choose by; also what the probes are made of.
        held_out_windows: text windows to report on.
        other_texts: name -> token ids of documents to report on as well.
        tokenizer: needed for the criterion `retrieval`.
        probes: retrieval probes to choose by, and as many to report on.
        random_placements: controls; fewer where there are not as many.
        seed: of the random placements and the probes.
        batch_size: windows that run together.
        backend: see `masformer.attend`.
        journal: file that keeps finished measurements. An interrupted search goes on from there when it is called
            again; it may serve several searches, models and texts.
        progress: called with (stage, measurements done, measurements in all).

    Raises:
        MasformerError: a value out of range or unknown, too little text, a budget that allows nothing to choose, a
            model that cannot take a plan or whose layers cannot run one by one, or a loss that is not finite.
    """
    began = time.perf_counter()
    layers: int = model.config.num_hidden_layers
    criteria = parse_criteria(criteria) if isinstance(criteria, str) else _check_criteria(criteria)
    budget = Budget.parse(str(budget)) if not isinstance(budget, Budget) else budget
    counts = {"windows": windows, "held-out windows": held_out_windows, "probes": probes, "length": length}
    for name, number in counts.items():
        check_int(name, number, 2 if name == "length" else 1)
    check_int("random placements", random_placements, 0)
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
    choices = list(dict.fromkeys(spans or (FullSpan(), local)))
    purse = _Purse(budget, model, local, length)
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
        model, backend=backend, batch_size=batch_size, kl="kl" in criteria, journal=journal, advance=advance
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


def _joint(evidence: Sequence[Evidence], choices: Sequence[Span], purse: _Purse) -> AttentionPlan:
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
