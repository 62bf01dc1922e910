"""Language modelling: from the same weights, trained on under each plan; and what continual training gives.

Two stages of one kind: `language`, which may begin from nothing with short sequences, and `pretrained`, which begins
with a model that is there. `training` says more of the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from masformer.cost import ModelShape, cost
from masformer.evaluation.intervals import Interval
from masformer.evaluation.perplexity.measure import exp_interval
from masformer.reports.document import slug
from masformer.reports.figures import curves, draw
from masformer.study.asked import add_answers, asking
from masformer.study.figures import by_cost, pareto
from masformer.study.findings import Findings, Results, Row, begun
from masformer.study.losses import Losses, near_full, over_each_other
from masformer.study.models import attention_share, config_of, model_of, plan_of, recipe_of
from masformer.study.settings import FULL, LOCAL, FindPart, LanguageStage
from masformer.study.units import DATA, Place, Unit
from masformer.study.verdicts import (
    HOLDS,
    OPEN,
    Nearness,
    Verdict,
    are_better,
    comes_close,
    decisive,
    interval,
    is_no_worse,
    nearness,
    writes_as_well,
)
from masformer.study.works import Perplexity, Train, Vocabulary
from masformer.training.recipe import ModelRecipe, Recipe

LANGUAGE, TRAINING, PRETRAINED = "language", "training", "pretrained"
TITLES = {LANGUAGE: "Language modelling", PRETRAINED: "Language modelling, from a pretrained model"}
CLAIM = "A few full layers come close to full attention at a quarter of the attention cost"
CHEAP = 0.3
"""Share of the attention operations up to which a mix counts as one at a quarter of the cost."""
BEFORE, AFTER = "before", "after"
BY_COST = "lost by cost"


def units(stage: LanguageStage, place: Place, group: str = LANGUAGE) -> list[Unit]:
    """What is measured before training; for each seed a start and, for each plan, a model that goes on from it and what
    is measured of it; then long runs.

    Args:
        stage: its settings.
        place: where results are kept.
        group: `LANGUAGE` or `PRETRAINED`.
    """
    found = []
    needs: tuple[str, ...] = ()
    if stage.vocabulary is not None and stage.vocabulary_text is not None:
        folder = place.folder / DATA / f"{LANGUAGE}-tokenizer"
        vocabulary = Unit(
            f"{LANGUAGE}/tokenizer", LANGUAGE, Vocabulary(stage.vocabulary_text, stage.vocabulary, folder)
        )
        found.append(vocabulary)
        needs = (vocabulary.name,)
    if stage.untrained:
        model = replace(_recipe(stage, place, FULL, stage.seeds[0], group).model, plan=None)
        found += [Unit(_untrained(group, name), group, _measured(stage, model, name), needs) for name in stage.every]
    for turn, seed in enumerate(stage.seeds):
        before = needs
        if stage.start is not None:
            start = Unit(_start(seed), LANGUAGE, Train(_start_recipe(stage, place, seed)), needs, turn)
            found.append(start)
            before = (start.name,)
        runs = [(group, "train", name) for name in stage.trained if seed in stage.seeds_of(name)]
        runs += [(TRAINING, "long", name) for name in stage.long if seed in stage.seeds_of(name)]
        for belongs, kind, name in runs:
            made = _name(belongs, kind, name, seed)
            recipe = (
                _recipe(stage, place, name, seed, group) if kind == "train" else _long_recipe(stage, place, name, seed)
            )
            work = _measured(stage, model_of(recipe), name)
            when = turn if kind == "train" else turn + len(stage.seeds)  # long runs take longest, and come last
            trains = Train(recipe, stage.models_stay)
            found.append(Unit(made, belongs, trains, before if kind == "train" else needs, when))
            found.append(Unit(f"{made}/perplexity", belongs, work, (made,), when))
            if (asked := stage.retrieval) is not None and seed in stage.asked_seeds(name):
                for task in asked.tasks:
                    asks = asking(asked, model_of(recipe), stage.every[name], task, max(stage.lengths))
                    found.append(Unit(f"{made}/{task}", belongs, asks, (made,), when))
    return found


def _measured(stage: LanguageStage, model: ModelRecipe, name: str) -> Perplexity:
    return Perplexity(model, stage.every[name], stage.text, tuple(stage.lengths), stage.max_tokens)


def _untrained(group: str, plan: str) -> str:
    return f"{group}/untrained/{plan}/perplexity"


def _name(group: str, kind: str, plan: str, seed: int) -> str:
    return f"{group}/{kind}/{plan}/seed {seed}"


def _start(seed: int) -> str:
    return f"{LANGUAGE}/start/seed {seed}"


def _tokenizer(stage: LanguageStage, place: Place) -> dict[str, str]:
    return {} if stage.vocabulary is None else {"tokenizer": str(place.folder / DATA / f"{LANGUAGE}-tokenizer")}


def _start_recipe(stage: LanguageStage, place: Place, seed: int) -> Recipe:
    assert stage.start is not None
    model = {"plan": "full", **_tokenizer(stage, place)}
    return recipe_of(stage.start, place, _start(seed), model=model, training={"seed": seed})


def _recipe(stage: LanguageStage, place: Place, name: str, seed: int, group: str = LANGUAGE) -> Recipe:
    model: dict[str, Any] = {"plan": stage.every[name], **_tokenizer(stage, place)}
    if stage.start is not None:
        start = _start_recipe(stage, place, seed)
        model |= {"source": f"{start.output}/model", "config": start.model.config}
    made = _name(group, "train", name, seed)
    return recipe_of(stage.recipe, place, made, model=model, training={"seed": seed})


def _long_recipe(stage: LanguageStage, place: Place, name: str, seed: int) -> Recipe:
    """From scratch at the long length, for as many tokens as the start and what follows it have together."""
    start, then = _start_recipe(stage, place, seed), _recipe(stage, place, name, seed)
    config = dict(start.model.config or {}) | {"max_position_embeddings": then.data.length}
    steps = (then.training.steps or 0) + -(-_tokens(start) // (then.training.rows * then.data.length))
    training = {"seed": seed, "steps": steps, "learning_rate": start.training.learning_rate}
    model = {
        **(stage.start or {}).get("model", {}),
        "config": config,
        "plan": stage.every[name],
        **_tokenizer(stage, place),
    }
    parts = {key: value for key, value in stage.recipe.items() if key != "model"}
    return recipe_of(parts, place, _name(TRAINING, "long", name, seed), model=model, training=training)


def _tokens(recipe: Recipe) -> int:
    return (recipe.training.steps or 0) * recipe.training.rows * recipe.data.length


def language_findings(stage: LanguageStage, place: Place, results: Results, group: str = LANGUAGE) -> Findings:
    """Perplexity by plan, length and position, against attention operations; and whether the cheap mixes come close."""
    length = max(stage.lengths)
    model = _recipe(stage, place, FULL, stage.seeds[0], group).model
    losses = _losses(stage, results, group, "train", stage.trained)
    before = {
        name: Losses([results[_untrained(group, name)]]) for name in stage.every if _untrained(group, name) in results
    }
    measured = {BEFORE: before, AFTER: losses}
    near = {when: near_full(here, length) for when, here in measured.items()}
    over = {
        when: {name: each.over(here[FULL], length) for name, each in here.items() if FULL in here}
        for when, here in measured.items()
    }
    shares = {name: attention_share(model, plan, length) for name, plan in stage.every.items()}
    made = Findings(
        TITLES[group],
        f"Perplexity of held-out text after {_what(stage)}, by context length and position; attention is the share of "
        f"the attention operations of all full at {length:,} tokens. Intervals are 95% over documents, and wide enough "
        "to hold every seed; what a plan is over all full is the difference of the loss in the second half of the "
        "context, in nats, paired by seed and document."
        + (" Before training every plan is measured with the weights as they are." if stage.untrained else ""),
        {"results": _rows(stage, losses, shares), "before training": _rows(stage, before, shares)},
    )
    made.rows["positions"] = [
        {"name": name, "length": length, **row} for name, each in losses.items() for row in each.positions(length)
    ]
    seeds = {name: each.seeds for name, each in losses.items()}
    cheap = [name for name, share in shares.items() if name not in (FULL, LOCAL) and share <= CHEAP]
    of = " (a pretrained model)" if group == PRETRAINED else ""
    for when, said in ((AFTER, of), (BEFORE, " (a pretrained model, before training)")):
        if FULL in measured[when] and LOCAL in measured[when]:
            mixes = {name: each for name, each in near[when].items() if name in cheap}
            verdict = comes_close(f"{CLAIM}{said}.", mixes, "nats")
            made.verdicts.append(_known(verdict, seeds, decisive(mixes), when == AFTER))
    if stage.equal:
        claim = "Blocks, which the paper takes, are as good as windows of equal cost (trained under each)."
        found = over_each_other(losses, stage.equal, length, lambda name: shares[name])
        names = [name for pair in stage.equal for name in pair]
        made.verdicts.append(_known(is_no_worse(claim, found), seeds, names))
    if stage.curves:
        _add_curves_by_cost(made, stage, measured, over, shares, seeds)
    if group == PRETRAINED:
        made.short = _in_short(near, over, shares)
    if (asked := stage.retrieval) is not None:
        _add_retrieval(made, stage, asked, results, group, near[AFTER])
    ratios = [(name, shares[name], each) for name, each in over[AFTER].items() if name in stage.plans]
    if len(ratios) > 1:
        caption = "what plans lose against all full, by attention operations"
        made.draw("pareto" if group == LANGUAGE else f"pareto {group}", (pareto(ratios), caption))
    if len(stage.lengths) > 1:
        made.draw(group, draw(made.rows["results"], "perplexity", "perplexity"))
    return made


def _rows(stage: LanguageStage, losses: Mapping[str, Losses], shares: Mapping[str, float]) -> list[Row]:
    return [
        {"name": name, "plan": stage.every[name], "length": size}
        | each.row(size, over_full=losses.get(FULL))
        | {"attention": shares[name]}
        for name, each in losses.items()
        for size in stage.lengths
    ]


def _add_curves_by_cost(
    made: Findings,
    stage: LanguageStage,
    measured: Mapping[str, Mapping[str, Losses]],
    over: Mapping[str, Mapping[str, Interval]],
    shares: Mapping[str, float],
    seeds: Mapping[str, int],
) -> None:
    """What lines of plans lose by their cost, and which of them loses less; a table and a drawing open the report."""
    every = list(dict.fromkeys(share for points in stage.curves.values() for share in points))
    rows: list[Row] = []
    for share in every:
        row: Row = {"share": share}
        for line, points in stage.curves.items():
            found = [over[when].get(f"{line}, {share}") for when in (BEFORE, AFTER)]
            if share in points and any(found):
                row[slug(line).replace("-", "_")] = " \u2192 ".join(
                    "-" if each is None else f"{each.mean:.3f}" for each in found
                )
        rows.append(row)
    made.rows[BY_COST] = [row for row in rows if len(row) > 1]
    lines = {
        f"{when} training": {
            line: [(shares[name], here[name]) for share in points if (name := f"{line}, {share}") in here]
            for line, points in stage.curves.items()
        }
        for when, here in over.items()
    }
    if any(points for here in lines.values() for points in here.values()):
        made.draw(BY_COST, (by_cost(lines), "what is lost against all full, by attention operations"))
        made.opening = (BY_COST, BY_COST)
    for one, other in stage.better:
        for when, here in measured.items():
            pairs = {share: (f"{one}, {share}", f"{other}, {share}") for share in stage.curves[one]}
            pairs = {share: pair for share, pair in pairs.items() if here.keys() >= set(pair)}
            apart = {
                f"at {share}": here[mine].over(here[theirs], max(stage.lengths))
                for share, (mine, theirs) in pairs.items()
            }
            if apart:
                verdict = are_better(f"At equal cost, {one} lose less than {other} ({when} training).", apart)
                names = [name for pair in pairs.values() for name in pair]
                made.verdicts.append(_known(verdict, seeds, names, when == AFTER))


def _in_short(
    near: Mapping[str, Mapping[str, Nearness]],
    over: Mapping[str, Mapping[str, Interval]],
    shares: Mapping[str, float],
) -> str:
    """How cheap a plan may be that comes close to full attention, before training and after it."""
    said: list[str] = []
    for when, here in over.items():
        if LOCAL not in here:
            continue
        gap = here[LOCAL].mean
        good = sorted((shares[name], name) for name, each in near[when].items() if each.answer == HOLDS)
        if good:
            share, name = good[0]
            lost = f"{here[name].mean:.3f} of {gap:.2f} nats"
            said.append(f"{when} training {name} ({share:.0%} of the attention operations, {lost} lost)")
        else:
            said.append(f"{when} training none")
    if not said:
        return ""
    return (
        f"The cheapest plan that leaves at most a quarter of what local attention everywhere loses: {'; '.join(said)}."
    )


def _add_retrieval(
    made: Findings,
    stage: LanguageStage,
    asked: FindPart,
    results: Results,
    group: str,
    likely: dict[str, Nearness],
) -> None:
    """What the trained models find, and whether the mixes come close, above all those that do by the loss of text."""
    here: dict[str, dict[str, list[dict[str, Any]]]] = {task: {} for task in asked.tasks}
    for task, by_plan in here.items():
        for name in stage.trained:
            parts = begun(results, [f"{_name(group, 'train', name, seed)}/{task}" for seed in stage.asked_seeds(name)])
            if parts is not None:
                by_plan[name] = parts
    for task, scores in add_answers(made, f"{group} retrieval", here, asked.length or max(stage.lengths)).items():
        near, seeds = nearness(scores), {name: len(each) for name, each in scores.items()}
        if near:
            claim = f"Of {task}, a mix comes close to full attention (trained under each)."
            made.verdicts.append(_known(comes_close(claim, near, "points"), seeds, near))
            claim = f"What comes close by the loss of text does so at {task} (trained under each)."
            made.verdicts.append(_known(writes_as_well(claim, likely, near, "points"), seeds, near))


def pretrained_findings(stage: LanguageStage, place: Place, results: Results) -> Findings:
    """The same of a pretrained model, and its perplexity while training."""
    made = language_findings(stage, place, results, PRETRAINED)
    _add_curves(made, stage, results, PRETRAINED)
    return made


def training_findings(stage: LanguageStage, place: Place, results: Results) -> Findings:
    """Perplexity while training, and training long at once against training short and then converting."""
    length = max(stage.lengths)
    made = Findings(
        "Continual training",
        f"Perplexity at {length:,} tokens while the plans are trained on from the same weights, by optimizer step; "
        "intervals over seeds. Below: trained at the long length from the beginning, with as many tokens in all.",
    )
    _add_curves(made, stage, results, LANGUAGE)
    short = _losses(stage, results, LANGUAGE, "train", stage.long)
    long = _losses(stage, results, TRAINING, "long", stage.long)
    compared: list[Row] = []
    differences: dict[str, Interval] = {}
    for name in long:
        if name in short:
            differences[name] = short[name].over(long[name], length)
            for way, each, recipe in (
                ("short, then converted", short[name], None),
                ("long from the beginning", long[name], _long_recipe(stage, place, name, stage.seeds[0])),
            ):
                flops = (
                    _flops(recipe)
                    if recipe
                    else _flops(_recipe(stage, place, name, stage.seeds[0]))
                    + _flops(_start_recipe(stage, place, stage.seeds[0]))
                )
                compared.append(
                    {"name": name, "way": way, "training_flops": flops, "length": length, **each.row(length)}
                )
    made.rows["ways"] = compared
    if stage.long:
        claim = "Training short and then converting is as good as training long from the beginning."
        named = {f"{name}, converted less long": each for name, each in differences.items()}
        made.verdicts.append(_known(is_no_worse(claim, named), {name: each.seeds for name, each in long.items()}, long))
    return made


def _add_curves(made: Findings, stage: LanguageStage, results: Results, group: str) -> None:
    """Perplexity at the longest length while training."""
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    rows: list[Row] = []
    for name in stage.trained:
        parts = begun(results, [_name(group, "train", name, seed) for seed in stage.seeds_of(name)])
        if parts is None:
            continue
        curve = _curve(parts, max(stage.lengths))
        rows += [{"name": name, "step": step, "perplexity": value, "seeds": len(parts)} for step, value in curve]
        if len(curve) > 1 and name in stage.plans:  # with those of the lines it would be unreadable
            series[name] = [step for step, _ in curve], [value.mean for _, value in curve]
    made.rows["curves"] = rows
    if series:
        drawn = curves(series, "step", "perplexity"), "perplexity while training"
        made.draw("curves" if group == LANGUAGE else f"curves {group}", drawn)


def _known(verdict: Verdict, seeds: Mapping[str, int], names: Iterable[str], trained: bool = True) -> Verdict:
    """Says of which of these plans one seed alone is known, and so nothing of others."""
    alone = [name for name in names if seeds.get(name) == 1]
    if not trained or not alone or verdict.answer == OPEN:
        return verdict
    whose = f" of {', '.join(alone)}" if max(seeds.values()) > 1 else ""
    return replace(verdict, why=f"{verdict.why} (one seed{whose}: the intervals know documents alone)")


def _what(stage: LanguageStage) -> str:
    steps = stage.recipe.get("training", {}).get("steps")
    if stage.start is None:
        return f"{steps:,} steps of training under each plan, from the same pretrained weights"
    short = stage.start.get("training", {}).get("steps")
    return f"{short:,} steps with short sequences and full attention, and {steps:,} more with long ones under each plan"


def _losses(
    stage: LanguageStage, results: Results, group: str, kind: str, plans: Mapping[str, str] | Sequence[str]
) -> dict[str, Losses]:
    found = {}
    for name in plans:
        parts = begun(results, [f"{_name(group, kind, name, seed)}/perplexity" for seed in stage.seeds_of(name)])
        if parts is not None:
            found[name] = Losses(parts)
    return found


def _curve(parts: Sequence[Mapping[str, Any]], length: int) -> list[tuple[int, Interval]]:
    """(step, perplexity over seeds), of the first text."""
    found: dict[int, list[list[float]]] = {}
    for part in parts:
        for row in part["evaluations"]:
            key = next((key for key in row if key.endswith(f"_{length}_loss")), None)
            if key is not None:
                found.setdefault(row["step"], []).append([row[key]])
    return [(step, exp_interval(interval(values))) for step, values in found.items() if len(values) == len(parts)]


def _flops(recipe: Recipe) -> float:
    """Of a training run."""
    shape = ModelShape.of(config_of(recipe.model))
    plan = plan_of(recipe.model, recipe.model.plan or "full")
    rows = (recipe.training.steps or 0) * recipe.training.rows
    return float(np.multiply(cost(shape, plan, recipe.data.length).training_flops, rows))
