"""Generation: fine-tuned summaries by length of the prompt, and retrieval by depth."""

from __future__ import annotations

from collections.abc import Mapping

from masformer.evaluation.intervals import Interval
from masformer.reports.figures import draw, heat_map
from masformer.study.findings import Findings, Results, Row
from masformer.study.losses import prompt_scores, turned
from masformer.study.models import attention_share, model_of, recipe_of
from masformer.study.scale import FULL, LOCAL, GenerationStage, RetrievalPart, SummarizationPart
from masformer.study.units import Place, Unit
from masformer.study.verdicts import Nearness, Values, Verdict, comes_close, difference
from masformer.study.works import Retrieval, Summaries, Train
from masformer.training.recipe import Recipe

STAGE = "generation"
METRIC = "rougeL"
SHOWN = ("rouge1", "rouge2", METRIC, "words", "repetition")


def units(stage: GenerationStage, place: Place) -> list[Unit]:
    """Retrieval of each plan, then a fine-tuned model and its summaries."""
    found = []
    if (asked := stage.retrieval) is not None:
        for name, plan in asked.plans.items():
            work = Retrieval(
                asked.model,
                plan,
                asked.task,
                tuple(asked.lengths),
                tuple(asked.depths),
                asked.examples,
                room=asked.room,
                chat=asked.chat,
            )
            found.append(Unit(_retrieval(name), STAGE, work))
    if (part := stage.summarization) is not None:
        for name, plan in part.plans.items():
            recipe = _recipe(part, place, name)
            trained = Unit(f"{STAGE}/train/{name}", STAGE, Train(recipe))
            summaries = Summaries(
                model_of(recipe), plan, part.text, part.template, tuple(part.lengths), part.max_new_tokens
            )
            found += [trained, Unit(_summaries(name), STAGE, summaries, (trained.name,))]
    return found


def _retrieval(plan: str) -> str:
    return f"{STAGE}/retrieval/{plan}"


def _summaries(plan: str) -> str:
    return f"{STAGE}/summaries/{plan}"


def _recipe(part: SummarizationPart, place: Place, name: str) -> Recipe:
    model = {**part.recipe.get("model", {}), "plan": part.plans[name]}
    return recipe_of(part.recipe, place, f"{STAGE}/train/{name}", model=model, training={"seed": part.seed})


def findings(stage: GenerationStage, place: Place, results: Results) -> Findings:
    """ROUGE by plan and length, retrieval by plan, length and depth, and whether mixes come close to full attention."""
    made = Findings(
        "Generation",
        "Summaries by models fine-tuned under each plan, ROUGE by the length of the prompt; and retrieval by depth, as "
        "the model is. Intervals are 95% over documents or prompts.",
    )
    if stage.summarization is not None:
        _add_summaries(made, stage.summarization, place, results)
    if stage.retrieval is not None:
        _add_retrieval(made, stage.retrieval, results)
    return made


def _add_summaries(made: Findings, part: SummarizationPart, place: Place, results: Results) -> None:
    here = {name: results[_summaries(name)] for name in part.plans if _summaries(name) in results}
    rows: list[Row] = []
    model = _recipe(part, place, FULL).model
    for name, result in here.items():
        for row in result["results"]:
            found: Row = {"name": name, "plan": result["plan"], "length": row["length"], "documents": row["examples"]}
            found |= {metric: Interval(**row[metric]) for metric in SHOWN}
            rows.append(found | {"seeds": 1, "attention": attention_share(model, result["plan"], row["length"])})
    made.rows["summaries"] = rows
    made.draw("summaries", draw(rows, METRIC, "ROUGE-L"))
    scores = {
        name: {length: prompt_scores(result, length, METRIC) for length in part.lengths}
        for name, result in here.items()
    }
    if FULL in scores:
        made.rows["differences of summaries"] = [
            {
                "name": name,
                "against": FULL,
                "length": length,
                METRIC: difference(turned(each), turned(scores[FULL][length])),
            }
            for name, by_length in scores.items()
            if name != FULL
            for length, each in by_length.items()
        ]
    longest = max(part.lengths)
    claim = "Fine-tuned summaries under a mix come close to those under full attention."
    made.verdicts.append(_near(claim, {name: each[longest] for name, each in scores.items()}, "points of ROUGE-L"))


def _add_retrieval(made: Findings, part: RetrievalPart, results: Results) -> None:
    here = {name: results[_retrieval(name)] for name in part.plans if _retrieval(name) in results}
    rows = [
        {"name": name, "plan": row["plan"], "task": row["task"], "length": row["length"], "depth": row["depth"]}
        | {"score": Interval(**row["score"]), "prompts": row["score"]["count"]}
        for name, result in here.items()
        for row in result["results"]
    ]
    made.rows["retrieval"] = rows
    made.rows["effective length"] = [
        {"name": name, "effective_length": result["effective_length"]} for name, result in here.items()
    ]
    figure = heat_map(rows, "score")
    made.draw("retrieval", None if figure is None else (figure, "percent found, by length and depth"))
    longest = max(part.lengths)
    scores = {name: prompt_scores(result, longest, "score") for name, result in here.items()}
    claim = "Retrieval under a mix comes close to that under full attention, without training for it."
    made.verdicts.append(_near(claim, scores, "points"))


def _near(claim: str, scores: Mapping[str, Values], unit: str) -> Verdict:
    """Of scores with the sign turned."""
    near = {}
    if FULL in scores and LOCAL in scores:
        near = {
            name: Nearness.of(scores[FULL], scores[LOCAL], each)
            for name, each in scores.items()
            if name not in (FULL, LOCAL)
        }
    return comes_close(claim, near, unit)
