"""Summaries of long documents under several plans and at several lengths of the prompt, scored against references.

Predictions are kept as they are made, so that a run that was stopped goes on where it was. Cut prompts are of one
length, so that most batches need no padding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from masformer.defaults import BATCH
from masformer.errors import MasformerError, check_int
from masformer.evaluation.intervals import Interval, bootstrap
from masformer.evaluation.predictions import (
    METRICS,
    Group,
    Prediction,
    Predictions,
    Request,
    check_run,
    fingerprint,
    model_settings,
    predict,
)
from masformer.evaluation.prompts import Example, Prompter
from masformer.evaluation.rouge import LONGBENCH, ROUGE
from masformer.extras import need
from masformer.models.fingerprint import model_fingerprint
from masformer.models.positions import position_limit
from masformer.models.sealing import kv_heads
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan, PlanSource, read_plans

COLUMNS = ("prompt", "R-1", "R-2", "R-L", "R-Lsum", "R-L*")


@dataclass(frozen=True)
class SummarizationResult:
    """How good the summaries are under one plan at one length.

    Attributes:
        name: the plan's name.
        plan: the plan's text form.
        length: the most tokens of a prompt.
        examples: predictions.
        prompt_tokens: mean tokens of a prompt.
        truncated: examples whose document was cut.
        reference_words: mean words of a reference.
        seconds: of generating, prefill included; a run that went on from a file counts what is there.
        metrics: `METRICS` -> mean over the examples, with an interval over the documents.
        by_example: `id` and `METRICS`: names of the examples, and the values of each.
    """

    name: str
    plan: str
    length: int
    examples: int
    prompt_tokens: float
    truncated: int
    reference_words: float
    seconds: float
    metrics: Mapping[str, Interval]
    by_example: Mapping[str, Sequence[Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the metrics among the other attributes."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "metrics"}
        return own | {name: interval.to_dict() for name, interval in self.metrics.items()}


@dataclass(frozen=True)
class Difference:
    """One plan against the first one, on the same examples.

    Attributes:
        name: the plan's name.
        baseline: the first plan's name.
        length: the most tokens of a prompt.
        metrics: `METRICS` -> mean difference (plan less baseline), with an interval over the documents.
    """

    name: str
    baseline: str
    length: int
    metrics: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = {"name": self.name, "baseline": self.baseline, "length": self.length}
        return own | {name: interval.to_dict() for name, interval in self.metrics.items()}


def summarize(
    model: PreTrainedModel,
    prompter: Prompter,
    examples: Sequence[Example],
    plans: Mapping[str, PlanSource] | Iterable[PlanSource],
    lengths: Sequence[int],
    out: str | os.PathLike[str],
    *,
    max_new_tokens: int = 256,
    beams: int = 1,
    batch: int = BATCH,
    backend: str = "auto",
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int, int], None] | None = None,
) -> tuple[list[SummarizationResult], list[Difference]]:
    """Generates and scores; the model keeps the last plan.

    Args:
        model: a causal language model in evaluation mode.
        prompter: makes the prompts.
        examples: what is asked, each with its reference.
        plans: name -> plan, or plans alone, each named by its text; a plan may be given as text or file. The others are
            compared with the first.
        lengths: the most tokens of a prompt, everything included; the generated ones come on top.
        out: the file of predictions, see `Predictions`.
        max_new_tokens: the most tokens to generate.
        beams: 1: the most likely token each time (greedy); above: beam search with so many beams.
        batch: prompts that are continued together; results do not depend on it, beyond the rounding of other shapes.
        backend: see `masformer.attend`.
        settings: what else the predictions depend on, for the second file of `Predictions`.
        progress: called with (name of the plan, length, prompt tokens done so far, prompt tokens in all): before
            each pair of plan and length, and after each batch.

    Returns:
        A result for each plan and length: all lengths of the first plan, then the second; and the differences of the
        other plans to the first one in the same order.

    Raises:
        MasformerError: a value out of range, nothing to do, a prompt without room for its document, prompt and new
            tokens beyond the model's positions, or predictions in `out` that were made in another way.
    """
    need("rouge", "summarization")
    model = bare_model(model)
    plans = read_plans(plans, model.config.num_hidden_layers, kv_heads(model.config))
    _check(model, examples, plans, lengths, max_new_tokens, beams, batch)
    common = _settings(model, prompter, max_new_tokens, beams, backend) | dict(settings or {})
    kept = Predictions(out, common, Prediction)
    weights = model_fingerprint(model)
    groups = [
        Group(length, [_request(prompter, example, length, weights, common) for example in examples], max_new_tokens)
        for length in lengths
    ]
    found = predict(
        model, prompter.tokenizer, plans, groups, kept, beams=beams, batch=batch, backend=backend, progress=progress
    )
    lines = {(name, group.length): each for name in plans for group, each in zip(groups, found[name], strict=True)}
    return _scored(lines, plans, examples, lengths)


def _request(prompter: Prompter, example: Example, length: int, weights: str, settings: Mapping[str, Any]) -> Request:
    prompt = prompter.prompt(example, length)
    return Request(
        example.name,
        prompt.tokens,
        fingerprint(weights, settings, prompt.tokens, example.target),
        {"reference": example.target, "cut_tokens": prompt.cut},
    )


def _scored(
    found: Mapping[tuple[str, int], list[Prediction]],
    plans: Mapping[str, AttentionPlan],
    examples: Sequence[Example],
    lengths: Sequence[int],
) -> tuple[list[SummarizationResult], list[Difference]]:
    documents: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        documents.setdefault(example.document, []).append(index)
    groups = list(documents.values())
    scores = {key: [line.scores() for line in lines] for key, lines in found.items()}

    def intervals(values: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
        """Over documents: queries about one document are not independent."""
        sizes = [len(group) for group in groups]
        means = {name: [fmean(values[index][name] for index in group) for group in groups] for name in METRICS}
        return {name: bootstrap(each, sizes) for name, each in means.items()}

    results = [
        SummarizationResult(
            name=name,
            plan=str(plans[name]),
            length=length,
            examples=len(lines),
            prompt_tokens=fmean(line.prompt_tokens for line in lines),
            truncated=sum(line.cut_tokens > 0 for line in lines),
            reference_words=fmean(len(line.reference.split()) for line in lines),
            seconds=round(sum(line.prefill_seconds + line.decode_seconds for line in lines), 3),
            metrics=intervals(scores[name, length]),
            by_example={"id": [line.id for line in lines]}
            | {metric: [each[metric] for each in scores[name, length]] for metric in METRICS},
        )
        for (name, length), lines in found.items()
    ]
    first = next(iter(plans))
    differences = [
        Difference(
            name,
            first,
            length,
            intervals(
                [
                    {metric: one[metric] - base[metric] for metric in METRICS}
                    for one, base in zip(scores[name, length], scores[first, length], strict=True)
                ]
            ),
        )
        for name in plans
        if name != first
        for length in lengths
    ]
    return results, differences


def summarization_tables(results: Sequence[SummarizationResult], differences: Sequence[Difference]) -> list[Table]:
    """The results, and the differences in ROUGE to the first plan if there are other plans."""
    table = Table(title="ROUGE with 95% intervals over documents; R-L*: of the package rouge, as in LongBench")
    table.add_column("plan")
    for column in (*COLUMNS, "words", "rep."):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        values = (result.metrics[name] for name in (*ROUGE, LONGBENCH))
        cells = [f"{value.mean:.1f}\n{value.low:.1f}-{value.high:.1f}" for value in values]
        words, repeated = result.metrics["words"].mean, result.metrics["repetition"].mean
        table.add_row(result.name, f"{result.length:,}", *cells, f"{words:.0f}", f"{repeated:.0f}%")
    if not differences:
        return [table]
    paired = Table(title=f"Difference to {differences[0].baseline} on the same documents")
    paired.add_column("plan")
    for column in COLUMNS:
        paired.add_column(column, justify="right", no_wrap=True)
    for row in differences:
        values = (row.metrics[name] for name in (*ROUGE, LONGBENCH))
        cells = [f"{value.mean:+.1f}\n{value.low:+.1f} {value.high:+.1f}" for value in values]
        paired.add_row(row.name, f"{row.length:,}", *cells)
    return [table, paired]


def _settings(
    model: PreTrainedModel, prompter: Prompter, max_new_tokens: int, beams: int, backend: str
) -> dict[str, Any]:
    """Everything that all predictions of a file have in common, but for the model's weights."""
    return model_settings(model, backend) | {
        "max_new_tokens": max_new_tokens,
        "beams": beams,
        "cut": prompter.cut,
        "chat": prompter.chat,
        "template": prompter.template.text,
        "shots": [shot.name for shot in prompter.shots],
        "shot_tokens": prompter.shot_tokens if prompter.shots else None,
    }


def _check(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    max_new_tokens: int,
    beams: int,
    batch: int,
) -> None:
    for name, number in {"max_new_tokens": max_new_tokens, "beams": beams}.items():
        check_int(name, number, 1)
    if not examples or not plans or not lengths:
        raise MasformerError("nothing to summarize: at least one example, one plan and one length are needed")
    if len({example.name for example in examples}) != len(examples):
        raise MasformerError("two examples have the same name")
    check_run(model, lengths, batch)
    limit = position_limit(model.config)
    for length in lengths:
        if limit is not None and length + max_new_tokens > limit:
            raise MasformerError(
                f"prompts of {length} tokens and {max_new_tokens} new ones are beyond the {limit} positions of the "
                f"model; allowed: up to {limit} together, or extend them with --max-positions {length + max_new_tokens}"
            )
