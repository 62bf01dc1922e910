"""What several commands share: options, and how they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from masformer import benchmarks
from masformer.errors import MasformerError, read_int, shown
from masformer.models.checkpoint import load_model
from masformer.models.positions import parse_max_positions
from masformer.plan import AttentionPlan, read_plans

Figures = dict[str, Any]
"""What a command measured, as plain values: such a command takes --json FILE."""
LINE = "line"
"""Of `Figures`: a line of JSON that the command prints last, and that no record holds."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Backend = Literal["auto", "tiled", "flex", "reference"]
console = Console(highlight=False, soft_wrap=False)


def say(text: str) -> None:
    """Prints lines as they are: a path is never broken where a terminal or a pipe is narrow."""
    console.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class PlanOptions:
    """The options that name plans, the same everywhere; a command that takes them has a parameter of this type."""

    plan: list[str] | None = None
    full: int | None = None
    placement: str | None = None
    local: str | None = None

    @property
    def are_given(self) -> bool:
        """Whether any of them is."""
        return (self.plan, self.full, self.placement, self.local) != (None,) * 4

    def named(self, own: AttentionPlan) -> dict[str, AttentionPlan]:
        """The plans that the options name, by their text; the model's own plan where they name none."""
        if self.full is not None or self.placement is not None or self.local is not None:
            if self.plan is not None:
                raise MasformerError("give either --plan or --full/--placement/--local")
            mixed = AttentionPlan.from_options(len(own), self.full, self.placement, self.local, dashes="--")
            return {str(mixed): mixed}
        return read_plans(self.plan or [own], len(own), own.kv_heads, what="--plan")

    def one(self, own: AttentionPlan, what: str) -> AttentionPlan:
        """The same where there can be one only; `what` says of what, as in "a server"."""
        plans = self.named(own)
        if len(plans) > 1:
            raise MasformerError(f"{what} has one plan; give one --plan")
        return next(iter(plans.values()))


@dataclass(frozen=True)
class ModelOptions(PlanOptions):
    """The options of commands that load a model: its plan, its positions and the dtype of its weights."""

    max_positions: str | None = None
    dtype: Dtype = "auto"

    def load(self, model: str, plan: AttentionPlan) -> tuple[Any, Any]:
        """The model on the default device, and its tokenizer or None."""
        extended = None if self.max_positions is None else parse_max_positions(self.max_positions)
        positions, method = extended or (None, None)
        weights = self.dtype if self.dtype == "auto" else benchmarks.DTYPES[self.dtype]
        loaded, tokenizer = load_model(model, plan, max_positions=positions, position_method=method, dtype=weights)
        return loaded.to(benchmarks.default_device()), tokenizer

    @property
    def precision(self) -> str:
        """Of an evaluation's matrix products: weights asked for in float32 are computed with in float32."""
        return "float32" if self.dtype == "float32" else "auto"

    def load_both(self, model: str, plan: AttentionPlan) -> tuple[Any, Any]:
        """The same, for work that is nothing without a tokenizer."""
        loaded, tokenizer = self.load(model, plan)
        if tokenizer is None:
            raise MasformerError(f"{model} has no tokenizer")
        return loaded, tokenizer


def lengths_of(option: str, text: str) -> list[int]:
    """`2048,8192` -> [2048, 8192]."""
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
        raise MasformerError(
            f"{option} {shown(text)} is not allowed; allowed: whole numbers from 1, separated by commas"
        )
    return [read_int(option, part, 1) for part in text.split(",")]
