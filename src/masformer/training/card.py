"""The model card: what a trained checkpoint is, made of the recipe and of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from masformer.data.report import report_text
from masformer.models.positions import position_limit
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
    on_hub = source is not None and not Path(source).exists()
    origin = f"`{source}`" if source else "random weights"
    how = "full training" if recipe.lora is None else f"LoRA of rank {recipe.lora.rank}, merged"
    sources = ", ".join(
        f"{source['name']} ({source['documents']:,} documents, {source['tokens']:,} tokens)"
        for source in report["sources"]
    )
    rate = f"{training.learning_rate:g}, {training.schedule}, {training.warmup_steps} steps of warm-up"
    lines = [
        "---",
        "library_name: masformer",
        "tags: [masformer, mixed-attention-spans]",
        *([f"base_model: {source}"] if on_hub else []),
        "---",
        "",
        f"# {config.model_type} with mixed attention spans",
        "",
        f"Trained from {origin} with masformer (MASFormer, arXiv 2310.12442); {how}. Load it with",
        "`masformer.load_model(folder)`, or transformers' `AutoModelForCausalLM` after `import masformer`. Without",
        "masformer transformers refuses it, for it would run full attention everywhere.",
        "",
        "| | |",
        "|---|---|",
        f"| plan | `{prepared.plan}` |",
        f"| positions | {position_limit(config)} |",
        f"| data | {sources} |",
        f"| rows | {report_text(dict(report))} |",
        f"| steps | {max(evaluations, default=0) or training.steps or '-'} of {training.rows} rows |",
        f"| learning rate | {rate} |",
        f"| precision | {training.precision}, weights {prepared.causal.dtype} |".replace("torch.", ""),
        *([] if autocast is None else [f"| precision of evaluations | {autocast} |"]),
        f"| seed | {training.seed} |",
        f"| versions | torch {torch.__version__}, transformers {transformers.__version__} |",
    ]
    if evaluations:
        names = sorted({name for figures in evaluations.values() for name in figures})
        lines += ["", "| step | " + " | ".join(name.removeprefix("eval_") for name in names) + " |"]
        lines += ["|---" * (len(names) + 1) + "|"]
        for step, figures in sorted(evaluations.items()):
            values = (f"{figures[name]:.4f}" if name in figures else "-" for name in names)
            lines += [f"| {step} | " + " | ".join(values) + " |"]
    lines += ["", "The whole recipe is in `recipe.yaml` beside this file.", ""]
    return "\n".join(lines)
