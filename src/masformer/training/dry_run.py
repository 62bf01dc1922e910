"""What a run would be, without running it: shapes, steps, cost and memory. No hub is asked and no weights are read."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig

from masformer.cost import (
    Communication,
    Comparison,
    ModelShape,
    bytes_text,
    communication,
    compare,
    count_text,
    flops_text,
    seconds_text,
)
from masformer.data.chats import check_chat
from masformer.data.packing import make_rows
from masformer.data.report import report_rows, report_text
from masformer.data.store import token_store
from masformer.errors import MasformerError
from masformer.files import missing
from masformer.models.checkpoint import load_config
from masformer.parallel.slices import fetched, traffic
from masformer.plan import AttentionPlan
from masformer.plots import picture
from masformer.spans import FullSpan
from masformer.training.model import (
    add_adapters,
    byte_tokenizer,
    check_expected,
    recipe_config,
    recipe_plan,
    recipe_tokenizer,
    skeleton,
)
from masformer.training.recipe import BYTES, Recipe
from masformer.training.run import step_count
from masformer.training.trainer import check_trackers

TILE = 128
"""Queries of a tile in the tiled backend where gradients are needed."""
PRODUCT, ROUNDS = 1024, 5
"""The largest size of the product that is timed, and how often: a second at most on a slow CPU."""


@dataclass(frozen=True)
class Memory:
    """An estimate of what one process holds, in bytes.

    With `training.sharding fsdp` the processes share the first three. How many they are is known where they share rows:
    one row's devices at least.

    Attributes:
        weights: all weights.
        gradients: of the trained weights.
        optimizer: AdamW's two moments of the trained weights.
        activations: what the backward pass needs of the forward pass.
        logits: one chunk of logits, its gradient and its float32 copy.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Rate:
    """How fast a matrix product runs on this machine.

    Attributes:
        flops_per_second: of it.
        shape: rows, inner and outer size.
        dtype: of it.
        device: where it ran.
    """

    flops_per_second: float
    shape: tuple[int, int, int]
    dtype: str
    device: str

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"{flops_text(self.flops_per_second)}/s of a {self.dtype} matrix product ({size}) on {self.device}"


@dataclass(frozen=True)
class Forecast:
    """What a run would be.

    Attributes:
        kind: model type.
        parameters: all weights.
        trained: weights that are trained.
        plan: one span per layer.
        steps: optimizer steps; None where the data would have to be read to tell.
        rows: rows of a step.
        length: tokens of a row.
        comparison: cost of one row, against full attention.
        step_flops: of one step, recomputation included.
        flops: of the whole run; None as `steps`.
        memory: of one process.
        notes: what a reader should know about these figures.
        rate: of a matrix product on this machine; None where none was timed.
        sent: in a step, by the devices that share rows: under the plan, and under full attention; None: none do.
    """

    kind: str
    parameters: int
    trained: int
    plan: AttentionPlan
    steps: int | None
    rows: int
    length: int
    comparison: Comparison
    step_flops: float
    flops: float | None
    memory: Memory
    notes: tuple[str, ...]
    rate: Rate | None = None
    sent: tuple[Communication, Communication] | None = None

    def seconds(self, flops: float | None) -> float | None:
        """The least time of so many operations in one process; None where that is not known."""
        return None if flops is None or self.rate is None else flops / self.rate.flops_per_second

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: getattr(self, name) for name in ("kind", "parameters", "trained", "steps", "rows", "length")}
        memory = vars(self.memory) | {"total": self.memory.total}
        cost = self.comparison.to_dict()
        return plain | {
            "plan": str(self.plan),
            "cost": cost,
            "step_flops": self.step_flops,
            "flops": self.flops,
            "rate": None if self.rate is None else vars(self.rate),
            "step_seconds": self.seconds(self.step_flops),
            "seconds": self.seconds(self.flops),
            "memory": memory,
            "sent": None if self.sent is None else {"plan": self.sent[0].to_dict(), "full": self.sent[1].to_dict()},
            "notes": self.notes,
        }


def dry_run(recipe: Recipe, console: Console) -> Forecast:
    """Checks a recipe as far as that is possible without a network, and prints what it would do.

    A model on this machine gives its own config; one on the hub is not asked, `model.config` stands in for it. Local
    data is read (and the tokens kept) only where the steps depend on it.

    Raises:
        MasformerError: the recipe cannot be carried out.
    """
    check_trackers(recipe)
    for source in recipe.sources:
        source.check()
    found = forecast(recipe, timed=True)
    for line in forecast_lines(found, recipe):
        console.print(line, markup=False, soft_wrap=True)
    return found


def forecast(recipe: Recipe, *, timed: bool = False) -> Forecast:
    """What a recipe would do; files of texts need not be there unless the steps depend on them.

    Args:
        recipe: the run.
        timed: also time a matrix product here, the widest one of a layer, to reckon the run's time by.

    Raises:
        MasformerError: the model cannot be what the recipe makes of it.
    """
    notes: list[str] = []
    config, own = _config(recipe, notes)
    plan = recipe_plan(recipe.model, own)
    model = skeleton(recipe, config, plan)
    shape = ModelShape.of(config)
    trained, total = _counts(recipe, model)
    for source in recipe.sources:
        if source.hub:
            notes.append(f"dataset {source.hub} was not asked for")
    tokenizer = _local_tokenizer(recipe)
    if tokenizer is not None and any(source.kind == "chats" for source in recipe.sources):
        check_chat(tokenizer)
    steps = recipe.training.steps or _steps(recipe, tokenizer, notes)
    (comparison,) = compare(shape, plan, [recipe.data.length])
    per_row = comparison.plan.training_flops + comparison.plan.forward_flops * recipe.training.checkpointing
    return Forecast(
        kind=config.model_type,
        parameters=total,
        trained=trained,
        plan=plan,
        steps=steps,
        rows=recipe.training.rows,
        length=recipe.data.length,
        comparison=comparison,
        step_flops=float(recipe.training.rows * per_row),
        flops=None if steps is None else float(steps * recipe.training.rows * per_row),
        memory=estimate_memory(recipe, model.config, shape, plan, total, trained),
        notes=tuple(notes),
        rate=_rate(recipe, shape) if timed else None,
        sent=_sent(recipe, shape, plan) if recipe.training.sharing > 1 else None,
    )


def forecast_lines(forecast: Forecast, recipe: Recipe) -> Iterator[str]:
    """The forecast for people to read."""
    training, memory = recipe.training, forecast.memory
    yield f"{recipe.model.source or 'from scratch'}: {forecast.kind}, {forecast.parameters:,} weights"
    yield f"trained: {forecast.trained:,} weights" + (f", LoRA of rank {recipe.lora.rank}" if recipe.lora else "")
    yield f"\n{picture(forecast.plan)}\n"
    steps = "as many steps as the data gives" if forecast.steps is None else count_text(forecast.steps, "step")
    yield (
        f"{steps} of {count_text(forecast.rows, 'row')} of {forecast.length:,} tokens "
        f"({forecast.rows * forecast.length:,} tokens), {count_text(training.device_rows, 'row')} at a time on a device"
    )
    plan, fractions = forecast.comparison.plan, forecast.comparison.fractions
    step = plan.training_flops * forecast.rows
    yield (
        f"a step: {flops_text(step)}, {fractions['training_flops']:.1%} of all full "
        f"(attention {fractions['attention_flops']:.1%})"
        + (", and a forward pass more for checkpointing" if training.checkpointing else "")
    )
    if forecast.flops is not None:
        yield f"the run: {flops_text(forecast.flops)}"
    if forecast.rate is not None:
        spent = [f"{seconds_text(forecast.seconds(forecast.step_flops) or 0)} a step"]
        spent += (
            [] if forecast.flops is None else [f"{seconds_text(forecast.seconds(forecast.flops) or 0)} for the run"]
        )
        yield (
            f"time of one process, estimated: at least {' and '.join(spent)}, at the {forecast.rate} here; "
            "runs stay below that rate, and evaluations come on top"
        )
    parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in vars(memory).items())
    yield f"memory of one process, estimated: {bytes_text(memory.total)} ({parts})"
    if forecast.sent is not None:
        yield from sent_lines(*forecast.sent)
    if training.sharding == "fsdp":
        counted = f"; here by {training.sharing}, beside what is whole while a layer runs" * (training.sharing > 1)
        yield f"weights, gradients and optimizer are shared by the processes{counted}"
    for note in forecast.notes:
        yield f"note: {note}"


def sent_lines(sent: Communication, full: Communication) -> Iterator[str]:
    """What devices that share rows send each other, for people to read."""
    yield (
        f"{sent.devices} devices share each row; for attention they send {bytes_text(sent.total)} in a step, "
        f"{sent.total / full.total:.1%} of all full ({bytes_text(full.total)}), {sent.total / sent.gathered:.1%} of "
        f"all-gather ({bytes_text(sent.gathered)}), {sent.total / sent.ring:.1%} of a ring ({bytes_text(sent.ring)}); "
        f"the busiest device {bytes_text(sent.busiest)}"
    )
    yield "of that " + ", ".join(f"{span} ({sent.ways[span]}) {bytes_text(size)}" for span, size in sent.spans.items())


def _sent(recipe: Recipe, shape: ModelShape, plan: AttentionPlan) -> tuple[Communication, Communication]:
    """Under the plan, and under full attention."""
    training = recipe.training
    options: dict[str, Any] = {
        "rows": training.rows,
        "bytes_per_value": _width(recipe),
        "recompute": training.checkpointing,
    }
    full = AttentionPlan.uniform(shape.num_layers, FullSpan())
    plans, length, devices = (plan, full), recipe.data.length, training.sharing
    return tuple(communication(shape, each, length, devices, **options) for each in plans)  # type: ignore[return-value]


def _width(recipe: Recipe) -> int:
    """Bytes of a value of the activations."""
    wide = recipe.training.precision != "bfloat16" and recipe.model.dtype in ("auto", "float32")
    return 4 if wide else 2


def estimate_memory(
    recipe: Recipe, config: PretrainedConfig, shape: ModelShape, plan: AttentionPlan, total: int, trained: int
) -> Memory:
    """From the shape alone; real runs lie around it, since kernels and allocators differ.

    Per layer and token the backward pass needs the inputs of both norms, of the projections and of the residual sums (6
    times the hidden size), queries, keys, values and the output of attention, and three times the inner size of the
    feed-forward part. Local spans with sinks keep a copy of the keys and values of each tile. With checkpointing it
    needs the input of each layer, and all of this for one layer at a time. Devices that share rows hold a slice of
    each, and beside it the keys and values that they fetch, the last device the most; those that pass by in a ring are
    held for one layer at a time.
    """
    training = recipe.training
    bits = 4 if recipe.model.dtype in ("auto", "float32") else 2
    width = _width(recipe)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    keys = shape.kv_heads * (shape.head_dim + shape.value_dim)
    queries = shape.query_heads * (shape.head_dim + shape.value_dim)
    devices = training.sharing
    length = -(-recipe.data.length // devices)
    layers, passing = [], 0.0
    for units in plan.units(shape.kv_heads):
        copies = sum((span.max_visible or 0) / TILE + 1 if span.sinks else 1.0 for span in units) / len(units)
        for span, heads in Counter(units).items():
            given = span, heads * shape.query_heads // shape.kv_heads, heads, devices, length
            held = heads / len(units) * fetched(*given) / length
            if traffic(*given).way == "ring":
                passing = max(passing, held)
            else:
                copies += held
        layers.append(6 * hidden + queries + keys * copies + 3 * inner)
    tokens = training.device_rows * length
    kept = len(layers) * hidden + max(layers) if training.checkpointing else sum(layers)
    positions = min(training.loss_chunk, tokens)
    shards = devices if training.sharding == "fsdp" else 1
    return Memory(
        weights=total * bits // shards,
        gradients=trained * bits // shards,
        optimizer=2 * trained * bits // shards,
        activations=int(tokens * (kept + 2 * hidden + keys * passing) * width),
        logits=positions * config.vocab_size * (width + 8),
    )


def matrix_rate(rows: int, inner: int, outer: int, dtype: torch.dtype = torch.float32) -> Rate:
    """Times a matrix product, each size at most `PRODUCT`, on the accelerator if there is one: the best of a few."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    shape = (min(rows, PRODUCT), min(inner, PRODUCT), min(outer, PRODUCT))
    left = torch.ones(shape[:2], dtype=dtype, device=device)
    right = torch.ones(shape[1:], dtype=dtype, device=device)
    best = math.inf
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        left @ right
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - begun)
    flops = 2 * math.prod(shape) / max(best, 1e-9)
    return Rate(flops, shape, str(dtype).removeprefix("torch."), device.type)


def _rate(recipe: Recipe, shape: ModelShape) -> Rate:
    """Of the widest product of a layer, in the run's precision."""
    dtype = torch.float32 if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    if recipe.training.precision == "bfloat16":
        dtype = torch.bfloat16
    tokens = recipe.training.device_rows * recipe.data.length
    return matrix_rate(tokens, shape.query_heads * shape.head_dim, shape.widest, dtype)


def _config(recipe: Recipe, notes: list[str]) -> tuple[PretrainedConfig, AttentionPlan]:
    source = recipe.model.source
    if source is None:
        return recipe_config(recipe.model, byte_tokenizer() if recipe.model.tokenizer == BYTES else None)
    if Path(source).exists():
        config, own = load_config(source)
        check_expected(recipe.model, config)
        return config, own
    if source.endswith((".gguf", ".json")):
        raise missing("model file", source)
    if recipe.model.config is None:
        raise MasformerError(
            f"a dry run does not ask for {source}: give model.config, its model type and sizes, or name a folder"
        )
    notes.append(f"{source} was not asked for: the shape is that of model.config")
    return recipe_config(recipe.model)


def _counts(recipe: Recipe, model: Any) -> tuple[int, int]:
    """Trained weights, and all weights."""
    if recipe.lora is not None:
        with torch.device("meta"):
            model = add_adapters(model, recipe.lora)
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _local_tokenizer(recipe: Recipe) -> Any:
    """None where it is not needed, or not on this machine."""
    settings = recipe.model
    if recipe.training.steps is not None and all(source.kind != "chats" for source in recipe.sources):
        return None
    if settings.tokenizer == BYTES or Path(settings.tokenizer or settings.source or "").exists():
        with suppress(MasformerError):
            return recipe_tokenizer(settings)
    return None


def _steps(recipe: Recipe, tokenizer: Any, notes: list[str]) -> int | None:
    """From the data, where it and the tokenizer are on this machine."""
    data = recipe.data
    if tokenizer is None or any(source.hub for source in data.sources.values()):
        notes.append("training.epochs: the number of steps is known when the data has been read")
        return None
    stores = [
        token_store(name, source, tokenizer, data.cache, template=data.template)
        for name, source in data.sources.items()
    ]
    rows = make_rows(stores, data.length, data.packing, data.cut, data.max_target)
    notes.append(report_text(report_rows(stores, rows)))
    return step_count(recipe, len(rows))
