"""Language modelling: from the same weights, trained on under each plan; and what continual training gives.

Two stages of one kind: `language`, which may begin from nothing with short sequences, and `pretrained`, which begins
with a model that is there. `training` says more of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from masformer.cost import ModelShape, cost
from masformer.evaluation.intervals import Interval
from masformer.evaluation.perplexity.measure import exp_interval
from masformer.reports.figures import curves, draw
from masformer.study.asked import add_answers, asking
from masformer.study.figures import pareto
from masformer.study.findings import Findings, Results, Row, done
from masformer.study.losses import Losses, over_each_other
from masformer.study.models import attention_share, config_of, model_of, plan_of, recipe_of
from masformer.study.scale import FULL, LOCAL, FindPart, LanguageStage
from masformer.study.units import DATA, Place, Unit
from masformer.study.verdicts import OPEN, Nearness, Verdict, comes_close, interval, is_no_worse
from masformer.study.works import Perplexity, Train, Vocabulary
from masformer.training.recipe import Recipe

LANGUAGE, TRAINING, PRETRAINED = "language", "training", "pretrained"
TITLES = {LANGUAGE: "Language modelling", PRETRAINED: "Language modelling, from a pretrained model"}
CLAIM = "A few full layers come close to full attention at a quarter of the attention cost"
CHEAP = 0.3
"""Share of the attention operations up to which a mix counts as one at a quarter of the cost."""


def units(stage: LanguageStage, place: Place, group: str = LANGUAGE) -> list[Unit]:
    """For each seed a start and, for each plan, a model that goes on from it and its perplexity; then long runs.

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
    for turn, seed in enumerate(stage.seeds):
        before = needs
        if stage.start is not None:
            start = Unit(_start(seed), LANGUAGE, Train(_start_recipe(stage, place, seed)), needs, turn)
            found.append(start)
            before = (start.name,)
        runs = [(group, "train", name) for name in stage.plans] + [(TRAINING, "long", name) for name in stage.long]
        for belongs, kind, name in runs:
            made = _name(belongs, kind, name, seed)
            recipe = (
                _recipe(stage, place, name, seed, group) if kind == "train" else _long_recipe(stage, place, name, seed)
            )
            work = Perplexity(model_of(recipe), stage.plans[name], stage.text, tuple(stage.lengths), stage.max_tokens)
            when = turn if kind == "train" else turn + len(stage.seeds)  # long runs take longest, and come last
            found.append(Unit(made, belongs, Train(recipe), before if kind == "train" else needs, when))
            found.append(Unit(f"{made}/perplexity", belongs, work, (made,), when))
            if stage.retrieval is not None:
                for task in stage.retrieval.tasks:
                    asks = asking(stage.retrieval, model_of(recipe), stage.plans[name], task, max(stage.lengths))
                    found.append(Unit(f"{made}/{task}", belongs, asks, (made,), when))
    return found


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
    model: dict[str, Any] = {"plan": stage.plans[name], **_tokenizer(stage, place)}
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
        "plan": stage.plans[name],
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
    losses = _losses(stage, results, group, "train", stage.plans)
    rows: list[Row] = []
    positions: list[Row] = []

    def share(name: str) -> float:
        return attention_share(model, stage.plans[name], length)

    for name, each in losses.items():
        for size in stage.lengths:
            row = {"name": name, "plan": stage.plans[name], "length": size}
            rows.append(row | each.row(size, over_full=losses.get(FULL)) | {"attention": share(name)})
        positions += [{"name": name, "length": length, **row} for row in each.positions(length)]
    made = Findings(
        TITLES[group],
        f"Perplexity of held-out text after {_what(stage)}, by context length and position; attention is the share of "
        f"the attention operations of all full at {length:,} tokens. Intervals are 95% over documents, and wide enough "
        "to hold every seed; what a plan is over all full is the difference of the loss in the second half of the "
        "context, in nats, paired by seed and document.",
        {"results": rows, "positions": positions},
    )
    if FULL in losses and LOCAL in losses:
        cheap = {
            name: Nearness.of(
                losses[FULL].late(length), losses[LOCAL].late(length), each.late(length), each.weights(length)
            )
            for name, each in losses.items()
            if name not in (FULL, LOCAL) and share(name) <= CHEAP
        }
        claim = f"{CLAIM}{' (a pretrained model)' if group == PRETRAINED else ''}."
        made.verdicts.append(_known(comes_close(claim, cheap, "nats"), stage))
    if stage.equal:
        claim = "Blocks, which the paper takes, are as good as windows of equal cost (trained under each)."
        found = over_each_other(losses, stage.equal, length, share)
        made.verdicts.append(_known(is_no_worse(claim, found), stage))
    if (asked := stage.retrieval) is not None:
        _add_retrieval(made, stage, asked, results, group)
    ratios = [
        (str(row["name"]), float(row["attention"]), row.get("over_full") or Interval(0, 0, 0, 1))
        for row in rows
        if row["length"] == length and FULL in losses
    ]
    if len(ratios) > 1:
        caption = "what plans lose against all full, by attention operations"
        made.draw("pareto" if group == LANGUAGE else f"pareto {group}", (pareto(ratios), caption))
    if len(stage.lengths) > 1:
        made.draw(group, draw(rows, "perplexity", "perplexity"))
    return made


def _add_retrieval(made: Findings, stage: LanguageStage, asked: FindPart, results: Results, group: str) -> None:
    """What the trained models find, where all seeds of a plan were asked; and whether the mixes come close."""
    here: dict[str, dict[str, list[dict[str, Any]]]] = {task: {} for task in asked.tasks}
    for task, by_plan in here.items():
        for name in stage.plans:
            parts = done(results, [f"{_name(group, 'train', name, seed)}/{task}" for seed in stage.seeds])
            if parts is not None:
                by_plan[name] = parts
    for task, scores in add_answers(made, f"{group} retrieval", here, asked.length or max(stage.lengths)).items():
        if FULL in scores and LOCAL in scores:
            mixes = [name for name in scores if name not in (FULL, LOCAL)]
            near = {name: Nearness.of(scores[FULL], scores[LOCAL], scores[name]) for name in mixes}
            claim = f"Of {task}, a mix comes close to full attention (trained under each)."
            made.verdicts.append(_known(comes_close(claim, near, "points"), stage))


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
        made.verdicts.append(_known(is_no_worse(claim, named), stage))
    return made


def _add_curves(made: Findings, stage: LanguageStage, results: Results, group: str) -> None:
    """Perplexity at the longest length while training."""
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    rows: list[Row] = []
    for name in stage.plans:
        parts = done(results, [_name(group, "train", name, seed) for seed in stage.seeds])
        if parts is None:
            continue
        curve = _curve(parts, max(stage.lengths))
        rows += [{"name": name, "step": step, "perplexity": value, "seeds": len(parts)} for step, value in curve]
        if len(curve) > 1:
            series[name] = [step for step, _ in curve], [value.mean for _, value in curve]
    made.rows["curves"] = rows
    if series:
        drawn = curves(series, "step", "perplexity"), "perplexity while training"
        made.draw("curves" if group == LANGUAGE else f"curves {group}", drawn)


def _known(verdict: Verdict, stage: LanguageStage) -> Verdict:
    """With one seed it is said that nothing is known of others."""
    if len(stage.seeds) > 1 or verdict.answer == OPEN:
        return verdict
    return replace(verdict, why=f"{verdict.why} (one seed: the intervals know documents alone)")


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
        parts = done(results, [f"{_name(group, kind, name, seed)}/perplexity" for seed in stage.seeds])
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
