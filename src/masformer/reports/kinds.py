"""What is shown of the records of each command; of a command that is not named here, everything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from masformer.reports.rows import Row, row_sets


@dataclass(frozen=True)
class View:
    """What is shown of the records of one kind.

    Attributes:
        intro: what the figures are, in a sentence or two.
        what: was measured, in words that can begin a title.
        outcome: path of rows and the column by which they are summed up in a sentence; empty: they are not.
        facts: settings that are shown, by their path in the record; None: all.
        tables: path of rows -> columns in the text form of `masformer.reports.rows.Column`, without those that no row
            has; rows that are not named are shown with all their columns, and not at all where there is no column here.
        titles: path of rows -> title of their table; by default the path in words.
        pivots: path of rows -> the columns whose values become columns, and the columns below them.
        metrics: path of rows -> columns that are drawn; by default every interval of `results`.
        rows: a record's rows by path, where they need more than `row_sets`.
    """

    intro: str = ""
    what: str = ""
    outcome: tuple[str, str] | tuple[()] = ()
    facts: tuple[str, ...] | None = None
    tables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    pivots: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Callable[[Mapping[str, Any]], dict[str, list[Row]]] = row_sets


def _perplexity_rows(figures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Without the second half of windows where only the last tokens of each are predicted."""
    found = row_sets(figures)
    for row in found.get("results", ()):
        if row.get("target_tokens") is not None:
            for key in [key for key in row if key.startswith("second_half")]:
                del row[key]
    return found


def _train_rows(figures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The figures of `eval_TEXT_LENGTH_FIGURE`, one row for each text, length and step."""
    found = row_sets({key: value for key, value in figures.items() if key not in ("metrics", "recipe")})
    rows: dict[tuple[str, str, str], Row] = {}
    for evaluation in found.pop("evaluations", ()):
        step = f"step {evaluation.get('step')}"
        for key, value in evaluation.items():
            if match := re.fullmatch(r"eval_(.+)_(\d+)_(loss|perplexity|second_half_perplexity)", key):
                text, length, figure = match.groups()
                row = rows.setdefault((text, length, step), {"text": text, "length": int(length), "step": step})
                row[figure] = value
    return ({"evaluations": list(rows.values())} if rows else {}) | found


_PERPLEXITY = ("name=plan", "length", "perplexity", "second_half.perplexity=second half", "bits_per_byte", "documents")
_BENCH = (
    "name=variant", "length", "median=median, s", "tokens_per_second", "speedup=times as fast", "share:.0%=of ideal",
    "of_limit:.0%=of limit", "exponent:.2f=growth", "cache_bytes=cache", "peak_bytes=peak memory",
)  # fmt: skip
_DECODE = (*_BENCH[:6], "over_full=over all full", "ideal_bytes=predicted by bytes", *_BENCH[6:])
_COSTS = (
    "plan", "length", "plan.attention_flops=attention, plan", "full.attention_flops=attention, full",
    "plan.forward_flops=forward pass, plan", "full.forward_flops=forward pass, full",
    "plan.kv_cache_bytes=KV cache, plan", "full.kv_cache_bytes=KV cache, full",
)  # fmt: skip

KINDS: Mapping[str, View] = {
    "eval perplexity": View(
        what="perplexity",
        outcome=("results", "perplexity"),
        intro="Perplexity of text under plans; lower is better. Intervals are 95% over documents. Differences are of "
        "the mean loss in nats, paired by document; above 0 is worse than the plan compared with.",
        tables={
            "results": (*_PERPLEXITY, "tokens", "left_out"),
            "results.buckets": (),
            "differences": ("name=plan", "against", "length", "difference", "ratio=ratio of perplexities"),
        },
        metrics={"results": ("perplexity", "second_half.perplexity=perplexity of the second half")},
        rows=_perplexity_rows,
    ),
    "eval retrieval": View(
        what="retrieval",
        outcome=("results", "score=score, percent,"),
        intro="Finding what is hidden in long prompts, in percent of what should be in the generated answer (RULER's "
        "string match). Intervals are 95% over examples. The effective length is the longest up to which the score "
        "is above 85.6; 0: none.",
        tables={
            "results": ("name=plan", "task", "length", "score", "prompt_tokens=prompt", "seconds"),
            "effective_lengths": ("name=plan", "task", "effective_length"),
        },
        metrics={"results": ("score",)},
    ),
    "eval summarization": View(
        what="summaries",
        outcome=("results", "rougeL=ROUGE-L"),
        intro="Summaries of long documents against references; higher is better.",
    ),
    "demo": View(
        what="the tour",
        outcome=("perplexity", "second_half.perplexity=perplexity of the second half"),
        intro="The tour: quality, cost and speed of one model under several plans.",
        facts=("model", "length"),
        tables={"perplexity": _PERPLEXITY, "perplexity.buckets": (), "costs": _COSTS[1:]},
        titles={"forward.seconds": "seconds of a forward pass"},
        metrics={"perplexity": ("second_half.perplexity=perplexity of the second half",)},
    ),
    "plan": View(
        what="the cost of plans",
        intro="What plans cost, against full attention in every layer.",
        facts=("model", "cache_dtype"),
        tables={"plans": (), "plans.costs": _COSTS},
    ),
    "bench attention": View(
        what="times of attention",
        outcome=("results", "speedup=times as fast"),
        intro="Times of attention, as ratios to full causal attention in the same run; the ideal is the ratio of "
        "visible pairs, and direct means torch's FlashAttention called directly.",
        tables={"results": ("name=variant", "length", "ideal")},
        pivots={
            "results": (
                ("pass",),
                ("median=median, s", "speedup=times as fast", "share:.0%=of ideal", "of_direct:.0%=of direct"),
            )
        },
        metrics={"results": ("speedup=times as fast",)},
    ),
    "bench prefill": View(
        what="times of prompts",
        outcome=("results", "speedup=times as fast"),
        intro="Times of a prompt up to its first token, as ratios to transformers' default cache in the same run "
        "(to all full without it).",
        tables={"results": _BENCH},
        metrics={"results": ("speedup=times as fast",)},
    ),
    "bench decode": View(
        what="times of new tokens",
        outcome=("results", "speedup=times as fast"),
        intro="Times of new tokens after a prompt, as ratios to transformers' default cache in the same run "
        "(to all full without it).",
        tables={"results": _DECODE},
        metrics={"results": ("speedup=times as fast",)},
    ),
    "bench train": View(
        what="times of training steps",
        outcome=("results", "speedup=times as fast"),
        intro="Times of a training step, as ratios to transformers by itself in the same run (to all full without it).",
        tables={"results": _BENCH},
        metrics={"results": ("speedup=times as fast",)},
    ),
    "bench eval": View(
        what="times of evaluation",
        outcome=("results", "speedup=times as fast"),
        intro="Times of evaluation by perplexity, as ratios to all full in the same run.",
        tables={"results": _BENCH},
        metrics={"results": ("speedup=times as fast",)},
    ),
    "search": View(
        what="plans found by search",
        intro="Layers or KV heads that need full attention, and where the plan found stands among other placements of "
        "the same cost on text that nothing was chosen by: perplexity of the second half of the windows.",
        facts=(
            "plan", "method", "by", "criteria.tail", "criteria.kl", "criteria.retrieval", "budget", "local", "length",
            "windows", "probes", "gradient.rounds=rounds",
            "gradient.points.tail=points of the path (tail)", "gradient.points.kl=points of the path (KL)",
            "gradient.points.retrieval=points of the path (retrieval)",
            "work.layer_evaluations=layer evaluations", "work.seconds=seconds",
        ),
        tables={
            "placements": ("name=placement",),
            "gradient.completeness": ("criterion", "gains:.4f=sum of the gains", "measured:.4f=measured difference"),
            "evidence": (),
        },
        pivots={
            "placements": (("text",), ("tail_perplexity=perplexity", "kl:.4f=KL", "retrieval_accuracy:.0%=retrieved"))
        },
        titles={
            "ranks": "rank of the plan found among random placements",
            "gradient.completeness": "whether the gains add up, in nats",
        },
    ),
    "train": View(
        what="training",
        intro="Training by a recipe, with the perplexity of held-out text.",
        facts=(
            "recipe.model.source=model", "recipe.model.plan=plan", "recipe.data.length=length",
            "recipe.training.rows=rows of a step", "recipe.training.learning_rate=learning rate",
            "recipe.training.precision=precision", "recipe.training.seed=seed", "steps",
        ),
        tables={"evaluations": ("text", "length")},
        pivots={"evaluations": (("step",), ("perplexity", "second_half_perplexity=second half"))},
        rows=_train_rows,
    ),
    "export": View(
        what="exports",
        intro="Checkpoints run in the tools that they were written for: the largest difference between logits there "
        "and here, and how far full attention would be from them.",
        facts=(
            "model", "target", "plan", "verification.version=version", "verification.tokens=tokens",
            "verification.difference=difference", "verification.full_difference=with full attention",
        ),
    ),
}  # fmt: skip
