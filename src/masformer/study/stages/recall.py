"""Recall: values planted far back among other tokens and asked for at the end, learnt from nothing under each plan."""

from __future__ import annotations

from masformer.reports.figures import heat_map
from masformer.study.findings import Findings, Results, Row, begun
from masformer.study.models import attention_share, layers_of, model_of, recipe_of
from masformer.study.settings import RecallStage
from masformer.study.units import DATA, Place, Unit
from masformer.study.verdicts import Values, comes_close, interval, nearness
from masformer.study.works import Pairs, Retrieval, Train

STAGE = "recall"


def units(stage: RecallStage, place: Place) -> list[Unit]:
    """For each seed pairs, and for each plan a model and its test."""
    found = []
    for turn, seed in enumerate(stage.seeds):
        file, folder = (place.folder / DATA / f"{STAGE}-{seed}{end}" for end in (".jsonl", "-tokenizer"))
        shortest, longest = stage.train_lengths
        work = Pairs(stage.task, stage.digits, stage.room, (shortest, longest), stage.pairs, seed, file, folder)
        pairs = Unit(f"{STAGE}/pairs/seed {seed}", STAGE, work, turn=turn)
        found.append(pairs)
        for name, plan in stage.plans.items():
            trained = f"{STAGE}/train/{name}/seed {seed}"
            recipe = recipe_of(
                stage.recipe,
                place,
                trained,
                model={**stage.recipe.get("model", {}), "plan": plan, "tokenizer": str(folder)},
                data={"sources": {STAGE: {"files": [str(file)], "prompt": "prompt", "target": "target"}}},
                training={"seed": seed},
            )
            test = Retrieval(
                model_of(recipe),
                plan,
                stage.task,
                (stage.length,),
                tuple(stage.depths),
                stage.examples,
                seed,
                stage.digits,
                stage.room,
            )
            found.append(Unit(trained, STAGE, Train(recipe), (pairs.name,), turn))
            found.append(Unit(_test(name, seed), STAGE, test, (trained,), turn))
    return found


def _test(plan: str, seed: int) -> str:
    return f"{STAGE}/test/{plan}/seed {seed}"


def findings(stage: RecallStage, place: Place, results: Results) -> Findings:
    """Shares found by plan and depth, and whether the mixes come close to full attention."""
    model = next(unit.work.model for unit in units(stage, place) if isinstance(unit.work, Retrieval))
    layers = layers_of(model)
    rows: list[Row] = []
    scores: dict[str, Values] = {}
    for name, plan in stage.plans.items():
        parts = begun(results, [_test(name, seed) for seed in stage.seeds])
        if parts is None:
            continue
        share = attention_share(model, plan, stage.length)
        for depth in (None, *stage.depths):
            here = [[row["score"]["mean"]] for part in parts for row in part["results"] if row["depth"] == depth]
            row = {"name": name, "plan": plan, "length": stage.length, "depth": depth, "score": interval(here)}
            rows.append(row | {"seeds": len(parts), "prompts": len(parts) * stage.examples, "attention": share})
        scores[name] = [[-part["results"][0]["score"]["mean"]] for part in parts]
    made = Findings(
        "Recall",
        f"Models of {layers} layers, trained from nothing to find a number ({stage.task}) in text of up to "
        f"{stage.train_lengths[1]} tokens and asked at {stage.length}, by how deep the number lies: 0 is the "
        "beginning. Percent found, with 95% intervals over seeds, each with a model, pairs and prompts of its own.",
        {"results": rows},
    )
    if near := nearness(scores):
        claim = "Where long range is needed, a few full layers do what full attention does everywhere."
        made.verdicts.append(comes_close(claim, near, "points"))
    figure = heat_map([row for row in rows if row["depth"] is not None], "score")
    made.draw("recall", None if figure is None else (figure, "percent found, by depth"))
    return made
