"""Searching for a plan under a budget, by gradients or by measuring layers one at a time; and its controls."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from masformer.data.tokens import part_tokens
from masformer.errors import MasformerError, check_int, check_seed, shown
from masformer.evaluation.perplexity import prefix_token
from masformer.evaluation.room import dtype_name
from masformer.models.bridge import apply_plan
from masformer.models.positions import position_limit
from masformer.models.sealing import kv_heads
from masformer.models.wrappers import bare_model
from masformer.placement.budget import Budget, Purse
from masformer.placement.choice import DIGITS, greedy, joint, most_valued, shuffled, with_span
from masformer.placement.criteria import (
    POINTS,
    USUAL,
    check_criteria,
    larger,
    parse_criteria,
    placement_score,
    total_gains,
)
from masformer.placement.gradient import GainMeter
from masformer.placement.measure import Measurer
from masformer.placement.result import (
    FOUND,
    FULL,
    HELD_OUT,
    LOCAL,
    RANDOM,
    Completeness,
    Evidence,
    GradientWork,
    PlacementScore,
    SearchResult,
    Work,
)
from masformer.placement.texts import (
    Pair,
    Window,
    pair_windows,
    retrieval_probes,
    split_windows,
    take_windows,
    text_windows,
)
from masformer.plan import PLACEMENTS, AttentionPlan
from masformer.spans import FullSpan, Span

METHODS = ("gradient", "sensitivity", "greedy", "joint")
UNITS = ("layers", "heads")
ROUNDS = 1
"""Of the method gradient, where nothing is said."""
MOST_POINTS, MOST_ROUNDS = 100, 10
CHAT = "the form of probes (chat, --raw)"
RANDOM_PLACEMENTS, MOST_RANDOM = 20, 10_000


def search(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Iterable[str],
    budget: Budget | str | int,
    local: Span | str = "window:256+4",
    *,
    length: int = 2048,
    other_texts: Mapping[str, Iterable[str]] | None = None,
    **options: Any,
) -> SearchResult:
    """Chooses the layers or KV heads that need full attention, on texts: what `masformer search` does.

    Args:
        model: a causal language model in evaluation mode; it keeps the plan that is found.
        tokenizer: of transformers.
        texts: documents to choose by; a part of them is held out.
        budget: see `search_layers`.
        local: the span of units that are not full, or its text.
        length: input tokens of a window.
        other_texts: name -> documents to report on as well.
        **options: of `search_layers`.

    Raises:
        MasformerError: as `search_layers`.
    """

    def tokens(documents: Iterable[str]) -> list[list[int]]:
        return [part_tokens(tokenizer, document) for document in documents]

    return search_layers(
        model,
        tokens(texts),
        budget,
        local,
        length=length,
        prefix=prefix_token(tokenizer),
        tokenizer=tokenizer,
        other_texts={name: tokens(documents) for name, documents in (other_texts or {}).items()},
        **options,
    )


def search_layers(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    budget: Budget | str | int,
    local: Span | str,
    *,
    length: int,
    prefix: int | None,
    method: str = "gradient",
    by: str = "layers",
    criteria: Mapping[str, float] | str | None = None,
    spans: Sequence[Span | str] = (),
    rounds: int | None = None,
    points: int | None = None,
    ends: bool = False,
    windows: int = 8,
    held_out_windows: int = 8,
    other_texts: Mapping[str, Sequence[Sequence[int]]] | None = None,
    tokenizer: Any = None,
    probes: int | None = None,
    pairs: Sequence[Pair] | None = None,
    chat: bool | None = None,
    random_placements: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    precision: str = "auto",
    backend: str = "auto",
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> SearchResult:
    """Chooses the units that need full attention, and holds the plan against other placements on text not chosen by.

    `gradient` measures the gains of all units, layers or KV heads, in the same passes (`masformer.placement.gradient`)
    and gives the budget to the units whose gains are largest; with several spans, to those that gain most together. In
    further rounds gains are measured once more at the plan found before, and are means over the rounds.

    The others measure layers: `sensitivity` restricts one layer at a time, the others full, and keeps full those whose
    restriction hurts most. `greedy` starts with every layer local and makes full the layer that helps most, given those
    before it. `joint` measures like `sensitivity`, with each span of a list, and minimises the sum of the measured
    rises under the budget; that the rises of several layers add up is an assumption.

    All work on a few windows of the documents. The random placements put the found plan's spans at random units, so
    that their cost is the same.

    Args:
        model: a causal language model in evaluation mode; it keeps the plan that is found.
        documents: token ids of each document (`masformer.evaluation.perplexity.tokenize`).
        budget: a `Budget`, its text form, or a number of full layers, or of full KV heads.
        local: the span of units that are not full, or its text.
        length: input tokens of a window.
        prefix: put before each document (`prefix_token`); None: nothing is.
        method: one of `METHODS`.
        by: `layers`, or `heads` for a plan by KV heads (`gradient` alone).
        criteria: criterion -> weight, or its text form (`parse_criteria`). `tail`: loss of the second half of the
            windows. `kl`: KL(all-full || plan) there. `retrieval`: loss of the answers to `retrieval_probes`, or of the
            targets of `pairs`. `gradient` takes the gains by each criterion as shares of their sum, so that weights
            do not depend on how large losses are; by default tail and retrieval. The other methods weigh nats, and take
            the tail alone by default.
        spans: of `joint`: the spans to choose from, or their texts; by default full and `local`. Of `gradient`: what a
            unit may get in place of `local`; by default full.
        rounds: of `gradient`; 1 by default.
        points: of the path of `gradient`; by default 2 for the tail and 4 for other criteria.
        ends: of `gradient`: by the criterion retrieval a unit counts as the larger of its shares along the path and at
            its end, of question and answer alone. Heads that fetch show along the path, those that tell one thing from
            another once the others are there.
        windows: text windows to choose by; also what the probes are made of.
        held_out_windows: text windows to report on; 0: the plan is found, and held against nothing.
        other_texts: name -> token ids of documents to report on as well.
        tokenizer: needed for the criterion `retrieval`.
        probes: retrieval probes to choose by, and as many to report on; by default as many as windows, and of `pairs`
            half of them.
        pairs: prompts and targets for the criterion `retrieval`, in place of probes; the first ones to choose by, the
            last ones to report on.
        chat: whether the question of a probe is a message in the tokenizer's chat template; None: where there is one.
        random_placements: controls; fewer where there are not as many. By default 20.
        seed: of the random placements and the probes.
        batch_size: windows that run together; by default as many as fit on CUDA, else one. Passes for gradients take
            one at a time.
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
    gradient = method == "gradient"
    if criteria is None:
        criteria = USUAL if gradient else "tail"
    criteria = parse_criteria(criteria) if isinstance(criteria, str) else check_criteria(criteria)
    budget = Budget.parse(str(budget)) if not isinstance(budget, Budget) else budget
    if method not in METHODS:
        raise MasformerError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    if by not in UNITS:
        raise MasformerError(f"a search is by {' or '.join(UNITS)}, not by {shown(by)}")
    if not gradient:
        for name, given in {"rounds": rounds is not None, "points": points is not None, "ends": ends}.items():
            if given:
                raise MasformerError(f"{name} are of the method gradient; {method} has none")
        if by == "heads":
            raise MasformerError(f"{method} measures layers; a search by heads is one of the method gradient")
    if spans and method not in ("gradient", "joint"):
        raise MasformerError(f"a list of spans is for the methods gradient and joint; {method} has full and {local}")
    if "retrieval" in criteria and tokenizer is None:
        raise MasformerError("the criterion retrieval needs the model's tokenizer")
    asking = {"pairs do": pairs, "probes do": probes, f"{CHAT} does": chat, "ends do": ends or None}
    for what, option in asking.items():
        if option is not None and "retrieval" not in criteria:
            raise MasformerError(f"{what} nothing without the criterion retrieval")
    if pairs is not None and chat is not None:
        raise MasformerError(f"{CHAT} does nothing with pairs, which are taken as they are")
    probes = _probes(probes, windows, pairs)
    rounds = ROUNDS if rounds is None else rounds
    points_by = {name: POINTS[name] if points is None else points for name in criteria}
    check_int("rounds", rounds, 1, MOST_ROUNDS)
    if points is not None:
        check_int("points", points, 1, MOST_POINTS)
    counts = {"windows": (windows, 1), "held-out windows": (held_out_windows, 0), "probes": (probes, 1)}
    for name, (number, least) in {**counts, "length": (length, 2)}.items():
        check_int(name, number, least)
    other_texts = dict(other_texts or {})
    if held_out_windows == 0 and (other_texts or random_placements):
        what = "random placements" if random_placements else "other texts"
        raise MasformerError(f"without held-out windows nothing is reported on, so {what} would do nothing")
    random_placements = (
        (RANDOM_PLACEMENTS if held_out_windows else 0) if random_placements is None else random_placements
    )
    check_int("random placements", random_placements, 0, MOST_RANDOM)
    check_seed(seed)
    if (limit := position_limit(model.config)) is not None and length > limit:
        raise MasformerError(f"length {length} is beyond the {limit} positions of the model")
    if HELD_OUT in other_texts:
        raise MasformerError(f"a text cannot be named {HELD_OUT!r}: that is the part of the documents not chosen by")
    local = Span.parse(local)
    heads = None
    if by == "heads" and (heads := kv_heads(model.config)) is None:
        raise MasformerError(f"the KV heads of this {model.config.model_type} model are not alike in all layers")
    purse = Purse(budget, model, local, length, heads)
    choices = list(dict.fromkeys(map(Span.parse, spans or (FullSpan(), local))))
    if gradient:
        choices = [*_wider(choices, local, purse), local]
    purse.check(min(choices, key=purse.price))
    most = purse.most(FullSpan(), local)
    if most < 1 and (method in ("sensitivity", "greedy") or len(choices) == 2):
        raise MasformerError(
            f"a budget of {purse.text} allows no full {purse.what} beside {local}: there is nothing to choose"
        )

    def cut(text: Sequence[Sequence[int]]) -> list[list[Window]]:
        return [text_windows(document, prefix, length) for document in text]

    def with_probes(text: list[Window], later: bool) -> list[Window]:
        if "retrieval" not in criteria:
            return text
        if pairs is not None:
            return text + pair_windows(tokenizer, pairs[-probes:] if later else pairs[:probes], length)
        return text + retrieval_probes(tokenizer, text, length, probes, seed + later, chat)

    calibration, held_out, other_documents = split_windows(cut(documents), windows, held_out_windows)
    chosen_by = with_probes(calibration, later=False)
    if set(criteria) == {"retrieval"}:
        chosen_by = [window for window in chosen_by if window.probe]
    texts = {HELD_OUT: with_probes(held_out, later=True)} if held_out else {}
    for name, text in other_texts.items():
        taken = take_windows(cut(text), held_out_windows)
        if len(taken) < held_out_windows:
            raise MasformerError(f"text {name!r} holds {len(taken)} windows of {length} tokens of {held_out_windows}")
        texts[name] = with_probes(taken, later=True)

    measured_by = {name: [window for window in chosen_by if window.probe == (name == "retrieval")] for name in criteria}
    restricted = [span for span in choices if not isinstance(span, FullSpan)]
    steps = range(most) if method == "greedy" else ()
    plans = 1 + sum(layers - step for step in steps) if steps else 1 + layers * len(restricted)
    full_layers = most // (heads or 1)
    rules = [rule for rule in PLACEMENTS if full_layers >= 1]
    controls = 3 + len(rules) + random_placements
    total = controls * sum(map(len, texts.values()))
    total += 2 * len(chosen_by) if gradient else plans * len(chosen_by)
    if gradient:
        total += sum((points_by[name] + rounds - 1) * len(each) for name, each in measured_by.items())
        total += len(measured_by["retrieval"]) if ends else 0
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

    def scored(plans: Sequence[AttentionPlan]) -> list[PlacementScore]:
        rows = measurer.scores(plans, chosen_by)
        return [placement_score("", plan, chosen_by, row, criteria) for plan, row in zip(plans, rows, strict=True)]

    def criterion(plans: Sequence[AttentionPlan]) -> list[float]:
        return [score.criterion for score in scored(plans)]

    how = None
    if gradient:
        meter = GainMeter(measurer, local, choices[:-1])
        plan, evidence, sums = _by_gradient(meter, measured_by, criteria, purse, heads, rounds, points_by, ends)
        both = scored([AttentionPlan.uniform(layers, span) for span in (local, _widest(choices, length))])
        completeness = tuple(
            Completeness(name, each, both[0].figure(name) - both[1].figure(name)) for name, each in sums.items()
        )
        how = GradientWork(rounds, points_by, meter.passes, completeness, ends)
    elif method == "greedy":
        plan, evidence = greedy(layers, local, most, criterion)
    else:
        evidence = _sensitivities(layers, restricted, criterion)
        rises = {row.name: [value or 0.0 for value in row.values] for row in evidence}
        if method == "sensitivity":
            plan = most_valued(rises[str(local)], FullSpan(), local, most, layers)
        else:
            plan = joint([rises.get(str(span), [0.0] * layers) for span in choices], choices, purse)

    drawn = shuffled(plan, random_placements, seed, heads)
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
            placement_score(name, each, text_windows_, row, criteria)
            for (name, each), row in zip(named.items(), rows, strict=True)
        )
    apply_plan(model, plan, backend)
    return SearchResult(
        plan=plan,
        method=method,
        criteria=criteria,
        budget=purse.text,
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
        by=by,
        gradient=how,
    )


def _probes(probes: int | None, windows: int, pairs: Sequence[Pair] | None) -> int:
    """How many prompts the criterion retrieval has to choose by, and as many to report on."""
    if pairs is None:
        return windows if probes is None else probes
    if len(pairs) < 2:
        raise MasformerError("pairs must be at least 2: some to choose by, others to report on")
    if probes is not None and 2 * probes > len(pairs):
        raise MasformerError(f"{probes} pairs to choose by and as many to report on are asked for, of {len(pairs)}")
    return len(pairs) // 2 if probes is None else probes


def _wider(choices: Sequence[Span], local: Span, purse: Purse) -> list[Span]:
    """What a unit may get in place of local."""
    found = [span for span in choices if span != local]
    for span in found:
        if purse.price(span) <= purse.price(local):
            raise MasformerError(f"{span} is not wider than {local}; a search widens the local span")
    if not found:
        raise MasformerError(f"there is no span wider than {local} to choose; name one, or none for full")
    return found


def _widest(spans: Sequence[Span], length: int) -> Span:
    return max(spans, key=lambda span: span.visible_pairs(length))


def _by_gradient(
    meter: GainMeter,
    measured_by: Mapping[str, Sequence[Window]],
    criteria: Mapping[str, float],
    purse: Purse,
    heads: int | None,
    rounds: int,
    points: Mapping[str, int],
    ends: bool,
) -> tuple[AttentionPlan, tuple[Evidence, ...], dict[str, float]]:
    """The plan, the gains that it was chosen by, and the sums of the first round's gains by each criterion."""
    wider, local = meter.wider, meter.local
    widest = _widest(wider, purse.length)
    plan = AttentionPlan.uniform(purse.layers, widest)
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in criteria}
    sums: dict[str, float] = {}

    def gains_of(name: str, points: int | None, asked: bool = False) -> NDArray[np.float64]:
        each = meter.gains(name, measured_by[name], plan, points, asked=asked)
        return each if heads else each.sum(-1, keepdims=True)

    for number in range(rounds):
        for name in measured_by:
            each = gains_of(name, None if number else points[name])
            if not number:
                sums[name] = float(each[wider.index(widest)].sum())
                if ends and name == "retrieval":
                    each = larger(each, gains_of(name, None, asked=True), wider.index(widest))
            found[name].append(each)
        gains = total_gains({name: np.mean(each, 0) for name, each in found.items()}, criteria, wider.index(widest))
        units = gains.reshape(len(wider), -1)
        if len(wider) == 1:
            plan = most_valued(units[0], widest, local, purse.most(widest, local), purse.layers)
        else:
            plan = joint(np.concatenate([-units, np.zeros_like(units[:1])]), [*wider, local], purse)
    evidence = tuple(
        Evidence(
            str(span) if heads is None else f"{span}, head {head}",
            tuple(round(float(gain), DIGITS) for gain in gains[index, :, head]),
        )
        for index, span in enumerate(wider)
        for head in range(heads or 1)
    )
    return plan, evidence, sums


def _sensitivities(
    layers: int, spans: Sequence[Span], criterion: Callable[[Sequence[AttentionPlan]], list[float]]
) -> tuple[Evidence, ...]:
    """One row for each span that is not full."""
    full = AttentionPlan.uniform(layers, FullSpan())
    base, *restricted = criterion([full, *(with_span(full, layer, span) for span in spans for layer in range(layers))])
    rises = [round(value - base, DIGITS) for value in restricted]
    return tuple(
        Evidence(str(span), tuple(rises[index * layers : (index + 1) * layers])) for index, span in enumerate(spans)
    )
