"""What several commands share: options, and how they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from rich.console import Console
from rich.table import Table

from masformer.errors import MasformerError, read_int, shown
from masformer.tables import show_table

if TYPE_CHECKING:
    import torch

    from masformer.plan import AttentionPlan

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


def show(table: Table) -> None:
    """Prints a table, as `show_table` does."""
    show_table(console, table)


@dataclass(frozen=True)
class Options:
    """A dataclass of options that several commands have alike; a command that has them has a parameter of its type."""


@dataclass(frozen=True)
class RuleOptions(Options):
    """A plan by rule."""

    full: int | None = None
    placement: str | None = None
    local: str | None = None

    def ruled(self, own: AttentionPlan, plan: object) -> AttentionPlan | None:
        """The plan by rule for a model with this one, if the options give a rule, and no `plan` beside it."""
        if (self.full, self.placement, self.local) == (None,) * 3:
            return None
        if plan is not None:
            raise MasformerError("give either --plan or --full/--placement/--local")
        from masformer.plan import AttentionPlan

        return AttentionPlan.from_options(len(own), self.full, self.placement, self.local, dashes="--")


@dataclass(frozen=True)
class PlanOptions(RuleOptions):
    """The options that name plans, the same everywhere."""

    plan: list[str] | None = None

    def named(self, own: AttentionPlan) -> dict[str, AttentionPlan]:
        """The plans that the options name, by their text; the model's own plan where they name none."""
        from masformer.plan import PLAN_SUFFIXES, read_plans

        ruled = self.ruled(own, self.plan)
        if ruled is not None:
            return {str(ruled): ruled}
        plans = read_plans(self.plan or [own], len(own), own.kv_heads, what="--plan")
        for name, plan in plans.items():
            if Path(name).suffix.lower() in PLAN_SUFFIXES:
                say(f"{name}: {plan}")
        return plans


@dataclass(frozen=True)
class OnePlanOptions(RuleOptions):
    """The same where there can be one plan only."""

    plan: str | None = None

    @property
    def are_given(self) -> bool:
        """Whether any of them is."""
        return (self.plan, self.full, self.placement, self.local) != (None,) * 4

    def one(self, own: AttentionPlan) -> AttentionPlan:
        """The plan that the options name, or else the model's own."""
        from masformer.plan import read_plans

        ruled = self.ruled(own, self.plan)
        if ruled is not None:
            return ruled
        plans = read_plans([own if self.plan is None else self.plan], len(own), own.kv_heads, what="--plan")
        return next(iter(plans.values()))


Writing = TypeVar("Writing", bound="WeightOptions")


@dataclass(frozen=True)
class WeightOptions(Options):
    """The options of commands that load a model: its positions and the dtype of its weights."""

    max_positions: str | None = None
    dtype: Dtype = "auto"

    @property
    def place(self) -> torch.device:
        """Where the model is put: nothing runs it."""
        import torch

        return torch.device("cpu")

    def load(self, model: str, plan: AttentionPlan) -> tuple[Any, Any]:
        """The model in its place, and its tokenizer or None."""
        from masformer.benchmarks import DTYPES
        from masformer.models.checkpoint import load_model
        from masformer.models.positions import parse_max_positions

        extended = None if self.max_positions is None else parse_max_positions(self.max_positions)
        positions, method = extended or (None, None)
        weights = self.dtype if self.dtype == "auto" else DTYPES[self.dtype]
        place = self.place
        loaded, tokenizer = load_model(model, plan, max_positions=positions, position_method=method, dtype=weights)
        return loaded.to(place), tokenizer

    def to_write(self: Writing, model: str) -> Writing:
        """The same for a checkpoint to be written: weights that a .gguf file has in a few bits become no float32."""
        path = Path(model)
        if self.dtype != "auto" or path.suffix != ".gguf" or not path.is_file():
            return self
        from masformer.models.gguf_files import written_dtype

        return replace(self, dtype=cast(Dtype, str(written_dtype(path)).removeprefix("torch.")))

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


@dataclass(frozen=True)
class RunningOptions(WeightOptions):
    """The options of commands that run a model on a device of choice."""

    device: str | None = None

    @property
    def place(self) -> torch.device:
        """Where the model is put: as asked, else where `default_device` says."""
        return device_of(self.device)


@dataclass(frozen=True)
class ModelOptions(RunningOptions, PlanOptions):
    """Several plans of one model."""


@dataclass(frozen=True)
class OneModelOptions(RunningOptions, OnePlanOptions):
    """One plan of one model."""


@dataclass(frozen=True)
class StoredModelOptions(WeightOptions, OnePlanOptions):
    """One plan of a model that is written and not run."""


def device_of(text: str | None) -> torch.device:
    """`cuda:1` as a device that is there; None: CUDA where there is one, else the CPU.

    Raises:
        MasformerError: it is none, or this machine has none such.
    """
    import torch

    from masformer import benchmarks

    if text is None:
        return benchmarks.default_device()
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", text):
        raise MasformerError(f"--device {shown(text)} is not allowed; allowed: cpu, cuda, cuda:1, mps")
    device = torch.device(text)
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= there:
        raise MasformerError(
            f"--device {text}: torch sees {there or 'no'} {device.type} device{'s' * (there != 1)} here"
        )
    return device


def lengths_of(option: str, text: str) -> list[int]:
    """`2048,8192` -> [2048, 8192]."""
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
        raise MasformerError(
            f"{option} {shown(text)} is not allowed; allowed: whole numbers from 1, separated by commas, as in "
            "2048,8192"
        )
    return [read_int(option, part, 1) for part in text.split(",")]
