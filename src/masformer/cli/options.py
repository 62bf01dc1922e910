"""What several commands share: options, and how they are read."""

from __future__ import annotations

import re
from typing import Any, Literal

from rich.console import Console

from masformer import benchmarks
from masformer.errors import MasformerError
from masformer.models.checkpoint import load_model
from masformer.models.positions import parse_max_positions
from masformer.plan import AttentionPlan
from masformer.spans import Span

Figures = dict[str, Any]
"""What a command measured, as plain values: such a command takes --json FILE."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
console = Console(highlight=False, soft_wrap=False)


def named_plans(
    own: AttentionPlan, plan: list[str] | None, full: int | None, placement: str | None, local: str | None
) -> dict[str, AttentionPlan]:
    """The plans that the options name, by their text; the model's own plan where they name none."""
    if full is not None or placement is not None or local is not None:
        if plan is not None:
            raise MasformerError("give either --plan or --full/--placement/--local")
        if local is None:
            raise MasformerError("--full and --placement need --local SPAN, the span of the other layers")
        if full is None and placement is None:
            raise MasformerError("--local needs --full N or --placement LAYERS, the layers that stay full")
        mixed = AttentionPlan.mixed(len(own), full, placement or "middle", local=Span.parse(local))
        return {str(mixed): mixed}
    found: dict[str, AttentionPlan] = {}
    for text in plan or ():
        if text in found:
            raise MasformerError(f"--plan {text!r} is given twice")
        found[text] = AttentionPlan.load(text, len(own))
    return found or {str(own): own}


def lengths_of(option: str, text: str) -> list[int]:
    """`2048,8192` -> [2048, 8192]."""
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
        raise MasformerError(f"{option} {text!r} is not allowed; allowed: whole numbers from 1, separated by commas")
    return [int(part) for part in text.split(",")]


def load_for(model: str, plan: AttentionPlan, max_positions: str | None, dtype: str) -> tuple[Any, Any]:
    """The model on the default device and its tokenizer, as the options ask."""
    positions, method = (None, None) if max_positions is None else parse_max_positions(max_positions)
    weights = dtype if dtype == "auto" else benchmarks.DTYPES[dtype]
    loaded, tokenizer = load_model(model, plan, max_positions=positions, position_method=method, dtype=weights)
    return loaded.to(benchmarks.default_device()), tokenizer
