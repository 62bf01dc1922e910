"""Which layers are full: rules, a search, and random placements of equal cost, without training."""

from __future__ import annotations

import random

from masformer.plan import PLACEMENTS, AttentionPlan
from masformer.reports.figures import draw
from masformer.spans import Span
from masformer.study.findings import Findings, Results, attention_share
from masformer.study.losses import Losses
from masformer.study.models import layers_of
from masformer.study.scale import FULL, LOCAL, WhereStage
from masformer.study.units import Place, Unit
from masformer.study.verdicts import is_better, is_different
from masformer.study.works import Perplexity, Search

STAGE = "where"
FOUND = "found by search"
SEARCH = f"{STAGE}/search"


def plans(stage: WhereStage) -> dict[str, str]:
    """Name -> plan, but for what is found."""
    layers, local = layers_of(stage.model), Span.parse(stage.local)
    found = {FULL: "full", LOCAL: stage.local}
    for rule in PLACEMENTS:
        found[rule] = str(AttentionPlan.mixed(layers, stage.budget, rule, local=local))
    choose = random.Random(stage.seed)
    for number in range(1, stage.random + 1):
        chosen = sorted(choose.sample(range(layers), stage.budget))
        found[f"random {number}"] = str(AttentionPlan.mixed(layers, placement=chosen, local=local))
    return found


def units(stage: WhereStage, place: Place) -> list[Unit]:
    """The search, then the perplexity of every placement on other text."""
    search = Search(
        stage.model,
        stage.choose,
        stage.budget,
        stage.local,
        stage.length,
        stage.windows,
        0,
        stage.seed,
    )
    found = [Unit(SEARCH, STAGE, search)]
    for name, plan in plans(stage).items():
        found.append(Unit(_name(name), STAGE, Perplexity(stage.model, plan, stage.text, (stage.length,), stage.length)))
    chosen = Perplexity(stage.model, None, stage.text, (stage.length,), stage.length, found_by=SEARCH)
    return [*found, Unit(_name(FOUND), STAGE, chosen, (SEARCH,))]


def _name(plan: str) -> str:
    return f"{STAGE}/{plan}/perplexity"


def findings(stage: WhereStage, place: Place, results: Results) -> Findings:
    """Perplexity of each placement, whether placement matters, and whether measuring it pays."""
    length, layers = stage.length, layers_of(stage.model)
    names = [name for name in (*plans(stage), FOUND) if _name(name) in results]
    losses = {name: Losses([results[_name(name)]]) for name in names}
    rows = [
        {"name": name, "plan": results[_name(name)]["plan"], "length": length}
        | each.row(length, over_full=losses.get(FULL))
        | {"attention": attention_share(results[_name(name)]["plan"], layers, length)}
        for name, each in losses.items()
    ]
    made = Findings(
        "Where",
        f"Perplexity of {stage.text.place} with {stage.budget} of {layers} layers full and {stage.local} at the "
        f"others, without any training; the search chose on {stage.choose.place}. Intervals are 95% over documents; "
        "what a plan is over all full is the difference of the loss in the second half, in nats, paired by document.",
        {"results": rows},
    )
    made.draw("where", draw(rows, "over_full", "loss over all full, second half, nats"))
    rules = [name for name in PLACEMENTS if name in losses]
    if len(rules) > 1:
        ordered = sorted(rules, key=lambda name: losses[name].over(losses[rules[0]], length).mean)
        best, worst = losses[ordered[0]], losses[ordered[-1]]
        apart = worst.over(best, length)
        made.verdicts.append(
            is_different("It matters which layers are full.", apart, f"{ordered[-1]} less {ordered[0]}")
        )
        if FOUND in losses:
            claim = "Layers that a search finds are better than every rule."
            made.verdicts.append(is_better(claim, losses[FOUND].over(best, length), f"found less {ordered[0]}"))
    return made
