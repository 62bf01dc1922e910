"""The model card: what a trained checkpoint is, made of the recipe and of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from masformer.data.report import report_text
from masformer.models.card import checkpoint_card, origin_of
from masformer.training.model import Prepared
from masformer.training.recipe import Recipe


def model_card(
    recipe: Recipe,
    prepared: Prepared,
    report: Mapping[str, Any],
    evaluations: Mapping[int, Mapping[str, float]],
    autocast: str | None = None,
) -> str:
    """Markdown.

    Args:
        recipe: the run.
        prepared: the model.
        report: of `report_rows`.
        evaluations: step -> figures.
        autocast: dtype of matrix products in evaluations, where it is not that of the weights.
    """
    config, training, source = prepared.causal.config, recipe.training, recipe.model.source
    origin = f"`{source}`" if source else "random weights"
    how = "full training" if recipe.lora is None else f"LoRA of rank {recipe.lora.rank}, merged"
    sources = ", ".join(
        f"{source['name']} ({source['documents']:,} documents, {source['tokens']:,} tokens)"
        for source in report["sources"]
    )
    rate = f"{training.learning_rate:g}, {training.schedule}, {training.warmup_steps} steps of warm-up"
    rows = [
        ("trained from", f"{origin}, with masformer; {how}"),
        ("data", sources),
        ("rows", report_text(dict(report))),
        ("steps", f"{max(evaluations, default=0) or training.steps or '-'} of {training.rows} rows"),
        ("learning rate", rate),
        ("precision", f"{training.precision}, weights {prepared.causal.dtype}".replace("torch.", "")),
        *([] if autocast is None else [("precision of evaluations", autocast)]),
        ("seed", str(training.seed)),
        ("versions", f"torch {torch.__version__}, transformers {transformers.__version__}"),
    ]
    name = f"{config.model_type} with mixed attention spans"
    lines = [checkpoint_card(name, origin_of(source), config, prepared.plan, rows).rstrip()]
    if evaluations:
        names = sorted({name for figures in evaluations.values() for name in figures})
        lines += ["", "| step | " + " | ".join(name.removeprefix("eval_") for name in names) + " |"]
        lines += ["|---" * (len(names) + 1) + "|"]
        for step, figures in sorted(evaluations.items()):
            values = (f"{figures[name]:.4f}" if name in figures else "-" for name in names)
            lines += [f"| {step} | " + " | ".join(values) + " |"]
    lines += ["", "The whole recipe is in `recipe.yaml` beside this file.", ""]
    return "\n".join(lines)
