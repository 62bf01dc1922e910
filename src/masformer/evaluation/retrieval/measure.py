"""Retrieval by plan, task, length and depth, and the length up to which a plan finds what is hidden."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from masformer.defaults import BATCH
from masformer.errors import MasformerError, check_int, read_int, shown
from masformer.evaluation.intervals import Interval, bootstrap
from masformer.evaluation.predictions import (
    Generated,
    Group,
    Predictions,
    Request,
    check_run,
    fingerprint,
    model_settings,
    predict,
)
from masformer.evaluation.retrieval.prompts import Prober
from masformer.evaluation.retrieval.tasks import Task, string_match_all
from masformer.models.fingerprint import model_fingerprint
from masformer.models.positions import position_limit
from masformer.models.sealing import kv_heads
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan, PlanSource, read_plans

THRESHOLD = 85.6
"""Percent that the score must exceed for a length to count as effective: Llama-2-7B's at 4k (RULER, section 4)."""
MOST_DEPTHS = 1001
ALL = "all"
"""In place of a task: the mean of all tasks."""


@dataclass(frozen=True)
class Retrieved(Generated):
    """One line of a file of predictions; `length` is that of prompt and answer together.

    Attributes:
        task: its name.
        depth: of the first needle, in percent.
        references: what should be in the prediction.
    """

    task: str
    depth: float
    references: list[str]

    @property
    def score(self) -> float:
        """Percent, see `string_match_all`."""
        return string_match_all(self.prediction, self.references)


@dataclass(frozen=True)
class RetrievalResult:
    """What is found under one plan, of one task, at one length.

    Attributes:
        name: the plan's name.
        plan: the plan's text form.
        task: its name.
        length: tokens of prompt and answer together.
        depth: of the first needle, in percent; None: over all depths.
        prompt_tokens: mean tokens of a prompt.
        new_tokens: mean tokens of what was generated.
        seconds: of generating, prefill included; a run that went on from a file counts what is there.
        score: percent of the references found (RULER's `string_match_all`), with an interval over the examples.
        by_example: `id` and `score`: names of the prompts, and their scores.
    """

    name: str
    plan: str
    task: str
    length: int
    depth: float | None
    prompt_tokens: float
    new_tokens: float
    seconds: float
    score: Interval
    by_example: Mapping[str, Sequence[Any]]

    @classmethod
    def of(
        cls, name: str, plan: str, task: str, length: int, depth: float | None, lines: Sequence[Retrieved]
    ) -> RetrievalResult:
        """Of its predictions."""
        return cls(
            name=name,
            plan=plan,
            task=task,
            length=length,
            depth=depth,
            prompt_tokens=fmean(line.prompt_tokens for line in lines),
            new_tokens=fmean(line.new_tokens for line in lines),
            seconds=round(sum(line.prefill_seconds + line.decode_seconds for line in lines), 3),
            score=bootstrap([line.score for line in lines]),
            by_example={"id": [line.id for line in lines], "score": [line.score for line in lines]},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"score": self.score.to_dict()}


@dataclass(frozen=True)
class EffectiveLength:
    """Up to which length a plan retrieves.

    Attributes:
        name: the plan's name.
        task: a task's name, or `all`: the mean of all tasks counts.
        effective_length: see `effective_length`.
    """

    name: str
    task: str
    effective_length: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; 0 where no length is effective."""
        return {"name": self.name, "task": self.task, "effective_length": self.effective_length or 0}


def effective_length(scores: Mapping[int, float]) -> int | None:
    """RULER's effective length (arXiv 2404.06654, section 4): the longest up to which every score exceeds `THRESHOLD`.

    Args:
        scores: length -> score in percent.

    Returns:
        One of the lengths, or None where the score of the shortest does not exceed it.
    """
    found = None
    for length in sorted(scores):
        if scores[length] <= THRESHOLD:
            break
        found = length
    return found


def retrieve(
    model: PreTrainedModel,
    prober: Prober,
    tasks: Sequence[Task],
    plans: Mapping[str, PlanSource] | Iterable[PlanSource],
    lengths: Sequence[int],
    depths: Sequence[float],
    examples: int,
    out: str | os.PathLike[str] | None = None,
    *,
    batch: int = BATCH,
    backend: str = "auto",
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int, int], None] | None = None,
) -> tuple[list[RetrievalResult], list[EffectiveLength]]:
    """Generates answers greedily and scores them; the model keeps the last plan.

    Args:
        model: a causal language model in evaluation mode.
        prober: makes the prompts, the same for every plan.
        tasks: of `TASKS`.
        plans: name -> plan, or plans alone, each named by its text; a plan may be given as text or file.
        lengths: tokens of prompt and answer together.
        depths: in percent.
        examples: prompts for each task, length and depth.
        out: the file of predictions, see `Predictions`; None: they are not kept.
        batch: prompts that are continued together; results do not depend on it, beyond the rounding of other shapes.
        backend: see `masformer.attend`.
        settings: what else the predictions depend on, for the second file of `Predictions`.
        progress: see `predict`.

    Returns:
        For each plan, task and length a result over all depths and one for each depth; and for each plan the effective
        length of each task and, where there are several, of all.

    Raises:
        MasformerError: a value out of range, nothing to do, a length beyond the model's positions or too short for what
            is hidden, or predictions in `out` that were made in another way.
    """
    model = bare_model(model)
    plans = read_plans(plans, model.config.num_hidden_layers, kv_heads(model.config))
    _check(model, tasks, plans, lengths, depths, examples, batch)
    common = _settings(model, prober, backend) | dict(settings or {})
    kept = Predictions(out, common, Retrieved)
    weights = model_fingerprint(model)

    def request(task: Task, length: int, depth: float, index: int) -> Request:
        probe = prober.probe(task, length, depth, index)
        references = list(probe.answers)
        return Request(
            probe.name,
            probe.tokens,
            fingerprint(weights, common, probe.tokens, references),
            {"task": task.name, "depth": depth, "references": references},
        )

    groups = [
        Group(
            length,
            [request(task, length, depth, index) for depth in depths for index in range(examples)],
            prober.room(task),
        )
        for task in tasks
        for length in lengths
    ]
    found = predict(model, prober.tokenizer, plans, groups, kept, batch=batch, backend=backend, progress=progress)
    results: list[RetrievalResult] = []
    for name, made in found.items():
        for lines in made:
            first = lines[0]
            for depth in (None, *depths):
                here = [line for line in lines if depth is None or line.depth == depth]
                results.append(RetrievalResult.of(name, first.plan, first.task, first.length, depth, here))
    return results, effective_lengths(results)


def effective_lengths(results: Sequence[RetrievalResult]) -> list[EffectiveLength]:
    """For each plan, that of each task and, where there are several, of all."""
    whole = [result for result in results if result.depth is None]
    tasks = list(dict.fromkeys(result.task for result in whole))
    found = []
    for name in dict.fromkeys(result.name for result in whole):
        for task in [*tasks, ALL] if len(tasks) > 1 else tasks:
            scores: dict[int, list[float]] = {}
            for result in whole:
                if result.name == name and task in (result.task, ALL):
                    scores.setdefault(result.length, []).append(result.score.mean)
            means = {length: fmean(each) for length, each in scores.items()}
            found.append(EffectiveLength(name, task, effective_length(means)))
    return found


def retrieval_tables(results: Sequence[RetrievalResult], lengths: Sequence[EffectiveLength]) -> list[Table]:
    """Scores by depth, and effective lengths."""
    depths = [depth for depth in dict.fromkeys(result.depth for result in results) if depth is not None]
    table = Table(title="Found, in percent: over all depths with 95% intervals over examples, and at each depth")
    table.add_column("plan")
    table.add_column("task")
    for column in ("tokens", "score", *(f"{depth:g}%" for depth in depths)):
        table.add_column(column, justify="right", no_wrap=True)
    cells = {(each.name, each.task, each.length, each.depth): each.score for each in results}
    for name, task, length, depth in cells:
        if depth is None:
            score = cells[name, task, length, None]
            parts = [f"{cells[name, task, length, each].mean:.0f}" for each in depths]
            table.add_row(name, task, f"{length:,}", f"{score.mean:.1f}\n{score.low:.0f}-{score.high:.0f}", *parts)
    tasks = list(dict.fromkeys(each.task for each in lengths))
    reach = Table(title=f"Effective length: the longest up to which the score is above {THRESHOLD}")
    reach.add_column("plan")
    for task in tasks:
        reach.add_column(task.replace("_", "_\n"), justify="right")
    values = {(each.name, each.task): each.effective_length for each in lengths}
    for name in dict.fromkeys(each.name for each in lengths):
        found = (values[name, task] for task in tasks)
        reach.add_row(name, *("none" if length is None else f"{length:,}" for length in found))
    return [table, reach]


def parse_depths(text: str) -> list[float]:
    """`5` -> 0, 25, 50, 75, 100 percent; `0,10,50` -> these.

    Raises:
        MasformerError: it is neither a whole number from 2 to `MOST_DEPTHS`, nor several numbers from 0 to 100.
    """
    wrong = MasformerError(
        f"depths {shown(text)} are not allowed; allowed: a whole number from 2 to {MOST_DEPTHS}, how many from 0 to "
        f"100%, or several percentages separated by commas, as in 0,10,50"
    )
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        raise wrong
    if len(parts) == 1:
        if not parts[0].isdecimal() or not 2 <= (number := read_int("number of depths", parts[0], 0)) <= MOST_DEPTHS:
            raise wrong
        return [100 * index / (number - 1) for index in range(number)]
    return [float(part) for part in parts]


def _settings(model: PreTrainedModel, prober: Prober, backend: str) -> dict[str, Any]:
    return model_settings(model, backend) | {
        "chat": prober.chat,
        "haystack": prober.haystack.fingerprint(),
        "seed": prober.seed,
        "digits": prober.digits,
        "max_new_tokens": prober.max_new_tokens,
    }


def _check(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    depths: Sequence[float],
    examples: int,
    batch: int,
) -> None:
    check_int("examples", examples, 1)
    if not tasks or not plans or not lengths or not depths:
        raise MasformerError("nothing to retrieve: at least one task, plan, length and depth are needed")
    check_run(model, lengths, batch)
    for depth in depths:
        if not 0 <= depth <= 100:
            raise MasformerError(f"depth {depth:g} is not allowed; allowed: 0 to 100 percent")
    if len({f"{depth:g}" for depth in depths}) != len(depths):
        raise MasformerError(f"a depth is given twice: {', '.join(f'{depth:g}' for depth in depths)}")
    limit = position_limit(model.config)
    for length in lengths:
        if limit is not None and length > limit:
            raise MasformerError(
                f"a length of {length} tokens is beyond the {limit} positions of the model; allowed: up to {limit}, or "
                f"extend them with --max-positions {length}"
            )
