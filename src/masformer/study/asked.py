"""What is hidden in text and asked for under several plans: units of work, and the rows of their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from masformer.evaluation.intervals import Interval
from masformer.reports.figures import draw
from masformer.study.findings import Findings, Row
from masformer.study.losses import prompt_scores, turned
from masformer.study.settings import FULL, FindPart
from masformer.study.verdicts import Values, difference, interval
from masformer.study.works import Retrieval
from masformer.training.recipe import ModelRecipe

Scores = dict[str, Values]
"""Name of a plan -> [seeds][prompts], the sign turned."""


def asking(
    asked: FindPart, model: ModelRecipe, plan: str | None, task: str, length: int, found_by: str | None = None
) -> Retrieval:
    """The work of one task under one plan; `length` is that of the prompts where the scale says none."""
    return Retrieval(
        model,
        plan,
        task,
        (asked.length or length,),
        tuple(asked.depths),
        asked.examples,
        room=asked.room,
        chat=asked.chat,
        found_by=found_by,
    )


def add_answers(
    made: Findings,
    name: str,
    results: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]],
    length: int,
    title: str = "retrieval",
) -> dict[str, Scores]:
    """Adds a table and a drawing of what was found.

    Args:
        made: gets them.
        name: of the drawing.
        results: task -> name of a plan -> its results, one a seed.
        length: of the prompts.
        title: of the table.

    Returns:
        Task -> scores by plan.
    """
    rows: list[Row] = []
    scores: dict[str, Scores] = {}
    for task, here in results.items():
        mine: Scores = {
            plan: [prompt_scores(each, length, "score")[0] for each in parts] for plan, parts in here.items()
        }
        for plan, parts in here.items():
            whole = next(row for row in parts[0]["results"] if row["depth"] is None)["score"]
            found = Interval(**whole) if len(parts) == 1 else interval(turned(mine[plan]))
            row: Row = {"name": plan, "task": task, "length": length, "found": found}
            if plan != FULL and FULL in mine:
                row["less_full"] = difference(turned(mine[plan]), turned(mine[FULL]))
            rows.append(row)
        scores[task] = mine
    made.rows[title] = rows
    made.draw(name, draw(rows, "found", "percent found"))
    return scores
