"""Generation: what is found and answered beside the loss of text, retrieval by depth, and fine-tuned summaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masformer.evaluation.intervals import Interval
from masformer.evaluation.rouge import SPANS
from masformer.reports.figures import draw, heat_map
from masformer.study.asked import add_answers, asking
from masformer.study.findings import Findings, Results, Row
from masformer.study.losses import Losses, document_scores, near_full, prompt_scores, turned
from masformer.study.models import attention_share, model_of, recipe_of
from masformer.study.settings import FULL, BesidePart, GenerationStage, RetrievalPart, SummarizationPart
from masformer.study.units import Place, Unit
from masformer.study.verdicts import FAILS, HOLDS, Nearness, comes_close, difference, nearness, writes_as_well
from masformer.study.works import Perplexity, Retrieval, Summaries, Train
from masformer.training.recipe import Recipe

STAGE = "generation"
METRIC = "rougeL"
LOSS, ANSWERED = "perplexity", "answers"
FOUND = "found as it is"
"""Title of what is found beside the loss of text."""
SHOWN = ("rouge1", "rouge2", METRIC, "words", "repetition")
ANSWERS = ("rouge1", METRIC, SPANS, "words")
SCORED = {METRIC: "ROUGE-L of answers", SPANS: "exact spans of answers"}
"""What verdicts on answers are about."""


def units(stage: GenerationStage, place: Place) -> list[Unit]:
    """Each plan by the loss of text, by what it finds and answers, then a fine-tuned model and its summaries."""
    found = [] if stage.beside is None else _beside_units(stage.beside)
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


def _beside_units(part: BesidePart) -> list[Unit]:
    found = []
    for name, plan in part.plans.items():
        loss = Perplexity(part.model, plan, part.text, (part.length,), part.length)
        found.append(Unit(_beside(name, LOSS), STAGE, loss))
        for task in part.retrieval.tasks:
            found.append(Unit(_beside(name, task), STAGE, asking(part.retrieval, part.model, plan, task, part.length)))
        if (asked := part.answers) is not None:
            lengths = (asked.length,)
            answers = Summaries(
                part.model, plan, asked.text, asked.template, lengths, asked.max_new_tokens, asked.query
            )
            found.append(Unit(_beside(name, ANSWERED), STAGE, answers))
    return found


def _beside(plan: str, what: str) -> str:
    return f"{STAGE}/beside/{plan}/{what}"


def _retrieval(plan: str) -> str:
    return f"{STAGE}/retrieval/{plan}"


def _summaries(plan: str) -> str:
    return f"{STAGE}/summaries/{plan}"


def _recipe(part: SummarizationPart, place: Place, name: str) -> Recipe:
    model = {**part.recipe.get("model", {}), "plan": part.plans[name]}
    return recipe_of(part.recipe, place, f"{STAGE}/train/{name}", model=model, training={"seed": part.seed})


def findings(stage: GenerationStage, place: Place, results: Results) -> Findings:
    """What plans find, answer and summarize, and whether mixes come close to full attention in that as well."""
    parts = {
        "beside the loss of text, what each plan finds and answers, as the model is": stage.beside,
        "retrieval by depth, as the model is": stage.retrieval,
        "summaries by models fine-tuned under each plan, ROUGE by the length of the prompt": stage.summarization,
    }
    what = "; ".join(text for text, part in parts.items() if part is not None)
    made = Findings("Generation", f"{what[0].upper()}{what[1:]}. Intervals are 95% over documents or prompts.")
    if stage.beside is not None:
        _add_beside(made, stage.beside, results)
    if stage.summarization is not None:
        _add_summaries(made, stage.summarization, place, results)
    if stage.retrieval is not None:
        _add_retrieval(made, stage.retrieval, results)
    return made


def _add_beside(made: Findings, part: BesidePart, results: Results) -> None:
    """What is lost by the loss of text and by what is written, and whether the second follows the first."""
    losses = {name: Losses([results[_beside(name, LOSS)]]) for name in part.plans if _beside(name, LOSS) in results}
    length = part.length
    rows: list[Row] = []
    for name, each in losses.items():
        row: Row = {"name": name, "plan": part.plans[name], "length": length}
        row |= each.row(length, over_full=losses.get(FULL))
        rows.append(row | {"attention": attention_share(part.model, part.plans[name], length)})
    made.rows["loss of text"] = rows
    likely = near_full(losses, length)
    here = {
        task: {name: [results[_beside(name, task)]] for name in part.plans if _beside(name, task) in results}
        for task in part.retrieval.tasks
    }
    written: dict[str, dict[str, Nearness]] = {}
    asked = add_answers(made, FOUND, here, part.retrieval.length or length, FOUND)
    for task, scores in asked.items():
        written[task] = nearness(scores)
    answered = {name: results[_beside(name, ANSWERED)] for name in part.plans if _beside(name, ANSWERED) in results}
    made.rows["answers"] = _answer_rows(answered)
    for metric, what in SCORED.items():
        by_plan = {name: document_scores(result, metric) for name, result in answered.items()}
        if by_plan:
            counts = next(iter(by_plan.values()))[1]
            written[what] = nearness({name: found for name, (found, _) in by_plan.items()}, counts)
    for what, near in written.items():
        if near:
            made.verdicts.append(
                comes_close(f"Untrained, a mix comes close to full attention: {what}.", near, "points")
            )
            claim = f"What comes close by the loss of text does so by what it writes: {what}."
            made.verdicts.append(writes_as_well(claim, likely, near, "points"))
    made.short = _in_short(likely, written)


def _answer_rows(answered: Mapping[str, dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for name, result in answered.items():
        (found,) = result["results"]
        row: Row = {"name": name, "length": found["length"], "answers": found["examples"]}
        row["blank"] = sum(not words for words in found["by_example"]["words"])
        row |= {metric: Interval(**found[metric]) for metric in ANSWERS}
        if name != FULL and FULL in answered:
            mine, counts = document_scores(result, METRIC)
            row["less_full"] = difference(turned(mine), turned(document_scores(answered[FULL], METRIC)[0]), counts)
        rows.append(row)
    return rows


def _in_short(likely: Mapping[str, Nearness], written: Mapping[str, Mapping[str, Nearness]]) -> str:
    good = [name for name, near in likely.items() if near.answer == HOLDS]
    asked = {what: near for what, near in written.items() if any(name in near for name in good)}
    if not asked:
        return ""

    def those(what: str, answer: str) -> list[str]:
        return [name for name in good if name in asked[what] and asked[what][name].answer == answer]

    lost = [what for what, near in asked.items() if any(each.gap.low > 0 for each in near.values())]
    nothing = [what for what in asked if what not in lost]
    said = []
    if lost:
        counts = ", ".join(f"{what} {len(those(what, HOLDS))}" for what in lost)
        said.append(f"of {len(good)} plans that come close by the loss of text, so many write as well: {counts}")
    worse: dict[str, list[str]] = {}
    for what in nothing:
        worse.setdefault(", ".join(those(what, FAILS)), []).append(what)
    for names, whats in worse.items():
        lose = f", and {names} lose" if names else ""
        said.append(f"at {' and '.join(whats)} local attention loses nothing for certain{lose}")
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."


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
    made.verdicts.append(
        comes_close(claim, nearness({name: each[longest] for name, each in scores.items()}), "points of ROUGE-L")
    )


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
    made.verdicts.append(comes_close(claim, nearness(scores), "points"))
