"""Carries a recipe out: reads the data, trains, and leaves a masformer checkpoint with its card and its recipe."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import TrainingArguments

from masformer.cost import count_text
from masformer.data.chats import check_chat
from masformer.data.packing import PackedRows, Schedule, make_rows
from masformer.data.pairs import WholeRows
from masformer.data.report import report_rows, report_table, report_text
from masformer.data.store import token_store
from masformer.errors import LARGEST, MasformerError, check_number
from masformer.evaluation.room import autocast_on, dtype_name
from masformer.files import make_folder, write_whole
from masformer.models.across import across_devices
from masformer.models.card import write_card
from masformer.models.checkpoint import load_config
from masformer.models.saving import model_folder
from masformer.models.weights import load_trained
from masformer.parallel.forward import sequence_mesh
from masformer.progress import progress_bar
from masformer.settings import parse_yaml, read_settings
from masformer.training import state
from masformer.training.card import model_card
from masformer.training.checkpoints import Found, newest, remove_partial, steps_saved
from masformer.training.evaluation import evaluation_tasks
from masformer.training.model import (
    Prepared,
    add_adapters,
    check_expected,
    prepare_model,
    recipe_config,
    recipe_plan,
    recipe_tokenizer,
    skeleton,
)
from masformer.training.recipe import Recipe, warmup_fault
from masformer.training.trainer import (
    METRICS,
    RECIPE,
    SpanTrainer,
    Stopped,
    Watch,
    autocast_by_step,
    check_trackers,
    clock,
    read_evaluations,
    training_arguments,
)

REPORT = "data.json"
FIXED = ("model", "data", "lora")
"""Parts of a recipe that must not change when a run is resumed."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        model: folder of the trained model; None where the run was interrupted.
        steps: optimizer steps done.
        signal: the signal that interrupted it, if one did.
        evaluations: step -> figures.
    """

    model: Path | None
    steps: int
    signal: int | None
    evaluations: Mapping[int, Mapping[str, float]]


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None, quiet: bool = False) -> Outcome:
    """Trains what a recipe says.

    Args:
        recipe: the run.
        resume: go on from the newest whole checkpoint of the output folder, if there is one.
        console: where lines for people go.
        quiet: say what is trained and what was written, and nothing in between.

    Raises:
        MasformerError: something in the recipe cannot be done, or cannot be written.
    """
    output = Path(recipe.output)
    check_trackers(recipe)
    arguments = training_arguments(recipe, 1, False)  # starts the processes' group, if there are several
    first = arguments.process_index == 0
    console = console or Console(highlight=False)
    if not first:
        console = Console(quiet=True)
    for source in recipe.sources:
        source.check()
    if recipe.training.sharding == "fsdp" and arguments.world_size == 1:
        _say(console, "training.sharding fsdp does nothing in one process; start several with torchrun")
    _check_model(recipe)
    found = _start(recipe, output, resume, first, console)
    if resume and _is_finished(recipe, output / "model"):
        _say(console, f"{output / 'model'} is there already: the run is finished; more training.steps go on from it")
        return Outcome(output / "model", 0, None, {})
    PartialState().wait_for_everyone()
    rows, report = _read(recipe, arguments, console, quiet)
    steps = recipe.training.steps or step_count(recipe, len(rows))
    _check_done(found, steps)
    schedule = Schedule(rows, steps * recipe.training.rows, recipe.training.seed, recipe.data.shuffle)
    console.print(
        f"{count_text(steps, 'step')} of {count_text(recipe.training.rows, 'row')}: "
        f"{len(schedule) / len(rows):.2f} times all rows",
        markup=False,
    )
    prepared = prepare_model(recipe, None if found is None else found.path)
    tasks = evaluation_tasks(recipe, prepared.tokenizer)
    count = sum(weight.numel() for weight in prepared.model.parameters() if weight.requires_grad)
    _say(console, f"{count:,} weights are trained; plan: {prepared.plan}")
    begun = 0 if found is None else found.step
    evaluations = {step: row for step, row in read_evaluations(output / METRICS).items() if step <= begun}

    autocast = _autocast(recipe, prepared, arguments.device, console, output / METRICS, begun)

    def is_missing(step: int) -> bool:
        return recipe.evaluation.is_due(step, steps) and step not in evaluations

    arguments = training_arguments(recipe, steps, is_missing(begun))
    with progress_bar(console, quiet=quiet) as bar:
        task = bar.add_task("", total=steps)
        watch = Watch(
            recipe,
            evaluations,
            autocast,
            lambda head, figures: None if quiet else _say(bar.console, f"{head}  {figures_text(figures)}"),
            lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )
        trainer = SpanTrainer(recipe, prepared, schedule, tasks, arguments, watch)
        if trainer.is_fsdp_enabled:
            _say(bar.console, f"weights and optimizer are shared by {arguments.world_size} processes (FSDP2)")
        if (sharing := recipe.training.sharing) > 1:
            _say(bar.console, f"each row is shared by {sharing} of {arguments.world_size} processes")
            shared: Any = across_devices(prepared.causal, sequence_mesh(sharing, arguments.device.type))
        else:
            shared = nullcontext()
        with _signals(watch, bar.console), suppress(Stopped), shared:
            trainer.train(resume_from_checkpoint=None if found is None else str(found.path))
    done = int(trainer.state.global_step)
    if watch.is_stopped() and (done < steps or is_missing(done)):
        _say(console, f"stopped after step {done}; --resume goes on from there")
        return Outcome(None, done, watch.stopped_by, evaluations)
    weights = state.trained_weights(trainer.model, prepared.trainable, first)
    if first:
        _write_model(
            recipe, prepared, weights, output / "model", model_card(recipe, prepared, report, evaluations, autocast)
        )
        _say(console, f"{output / 'model'}: {prepared.plan}")
    PartialState().wait_for_everyone()
    return Outcome(output / "model", done, None, evaluations)


def _autocast(
    recipe: Recipe, prepared: Prepared, device: torch.device, console: Console, metrics: Path, begun: int
) -> str | None:
    """The dtype of matrix products in evaluations; says where those up to the step that was done had another."""
    if not recipe.evaluation.sources:
        return None
    name = dtype_name(autocast_on(device, prepared.causal.dtype, recipe.evaluation.precision))
    before = {each for step, each in autocast_by_step(metrics).items() if step <= begun}
    if before - {name}:
        each = ", ".join(sorted(was or "the precision of the weights" for was in before))
        _say(
            console,
            f"evaluations up to step {begun} were in {each}, from now on they are in "
            f"{name or 'the precision of the weights'}: evaluation.precision says in which",
        )
    return name


def _check_model(recipe: Recipe) -> None:
    """Before anything is read or written: whether the model can be what the recipe makes of it."""
    if any(source.kind == "chats" for source in recipe.sources):
        check_chat(recipe_tokenizer(recipe.model))
    if recipe.model.source is None:
        config, own = recipe_config(recipe.model, recipe_tokenizer(recipe.model))
    else:
        config, own = load_config(recipe.model.source)
        check_expected(recipe.model, config)
    causal = skeleton(recipe, config, recipe_plan(recipe.model, own))
    if recipe.lora is not None:
        with torch.device("meta"):
            add_adapters(causal, recipe.lora)


def step_count(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of `training.epochs` times all rows, the last one filled up."""
    assert recipe.training.epochs is not None
    wanted = rows * recipe.training.epochs
    check_number("training.epochs times all rows", wanted, 0, LARGEST)
    steps = max(1, -(-round(wanted) // recipe.training.rows))
    if recipe.training.warmup_steps > steps:
        raise MasformerError(warmup_fault(recipe.training.warmup_steps, steps))
    return steps


def figures_text(figures: Mapping[str, float]) -> str:
    """For people: the figures of one line of metrics."""
    named = {"loss": "loss {:.4f}", "learning_rate": "rate {:.2e}", "grad_norm": "gradient {:.2f}"}
    named |= {"tokens_per_second": "{:,.0f} tokens/s"}
    parts = [text.format(figures[name]) for name, text in named.items() if name in figures]
    ends = "_perplexity"  # the other figures of an evaluation are in the file
    perplexities = {name.removesuffix(ends): value for name, value in figures.items() if name.endswith(ends)}
    shown = {name: value for name, value in perplexities.items() if not name.endswith("_second_half")}
    parts += ["perplexity"] * bool(shown)
    parts += [f"{name.removeprefix('eval_')} {value:.2f}" for name, value in shown.items()]
    if "seconds_left" in figures:
        parts.append(f"{clock(figures['seconds_left'])} left")
    return "  ".join(parts)


def _start(recipe: Recipe, output: Path, resume: bool, first: bool, console: Console) -> Found | None:
    """The checkpoint to go on from; makes the output folder ready."""
    make_folder(output)
    if not resume:
        if steps_saved(output) or (output / "model").exists():
            raise MasformerError(f"{output} holds a run already; go on with --resume, or name another output")
    elif (output / RECIPE).exists():
        _check_same(recipe, output / RECIPE, console)
    if resume and _is_finished(recipe, output / "model"):
        return None
    found, faulty = newest(output) if resume else (None, [])
    for each in faulty:
        _say(console, f"{each.path} is not used: {each.fault}")
    if faulty and found is None:
        raise MasformerError(
            f"no checkpoint in {output} can be used ({faulty[0].path.name}: {faulty[0].fault}); "
            "remove its folder checkpoints to start again"
        )
    if found is None and resume and (output / "model").exists():
        raise MasformerError(
            f"{output} has no checkpoint to go on from, so its optimizer is lost; start a new run from its model: "
            f"--model.source {output / 'model'} --output FOLDER"
        )
    _check_done(found, recipe.training.steps)
    if found is not None:
        _say(console, f"going on from {found.path}")
    elif resume:
        _say(console, f"{output} holds no checkpoint yet: starting from the beginning")
    if first:
        remove_partial(output)
        write_whole(output / RECIPE, recipe.to_yaml())
        if found is None:
            (output / METRICS).unlink(missing_ok=True)
    return found


def _check_done(found: Found | None, steps: int | None) -> None:
    if found is not None and steps is not None and found.step > steps:
        raise MasformerError(
            f"the run has done {count_text(found.step, 'step')} already, more than the {steps} asked for"
        )


def _is_finished(recipe: Recipe, model: Path) -> bool:
    """Whether the model of a run is that of as many steps as the recipe asks for now."""
    if not model.exists():
        return False
    before = read_settings(model / RECIPE, "recipe").get("training", {}) if (model / RECIPE).exists() else {}
    now = {"steps": recipe.training.steps, "epochs": recipe.training.epochs}
    return not before or all(before.get(name) == value for name, value in now.items())


def _check_same(recipe: Recipe, path: Path, console: Console) -> None:
    """Raises MasformerError where a resumed run would be another one; says what else changed."""
    before = read_settings(path, "recipe")
    now = parse_yaml(recipe.to_yaml())
    for name in sorted({*before, *now}):
        was, is_ = _flat(name, before.get(name)), _flat(name, now.get(name))
        for setting in sorted({*was, *is_}):
            if was.get(setting) == is_.get(setting) or setting in ("output", "data.cache"):
                continue
            change = f"{setting} was {was.get(setting)!r} and is {is_.get(setting)!r}"
            if name in FIXED or setting in ("training.rows", "training.seed"):
                raise MasformerError(f"this run cannot be resumed with another recipe: {change}")
            _say(console, f"the recipe has changed: {change}")


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {path: each for key, part in value.items() for path, each in _flat(f"{name}.{key}", part).items()}


def _read(
    recipe: Recipe, arguments: TrainingArguments, console: Console, quiet: bool
) -> tuple[PackedRows | WholeRows, dict[str, Any]]:
    """Tokenizes in one process, the others open what it wrote."""
    data = recipe.data
    with arguments.main_process_first(local=True, desc="tokenizing"), progress_bar(console, quiet=quiet) as bar:
        tokenizer = recipe_tokenizer(recipe.model)
        stores = []
        for name, source in data.sources.items():
            task = bar.add_task(f"reading {name}", total=None)

            def advance(documents: int, tokens: int, name: str = name, task: Any = task) -> None:
                bar.update(task, description=f"reading {name}: {documents:,} documents, {tokens:,} tokens")

            stores.append(token_store(name, source, tokenizer, data.cache, template=data.template, progress=advance))
    rows = make_rows(stores, data.length, data.packing, data.cut, data.max_target)
    report = report_rows(stores, rows)
    console.print(report_table(report))
    _say(console, report_text(report))
    if arguments.process_index == 0:
        write_whole(Path(recipe.output) / REPORT, json.dumps(report, indent=2) + "\n")
    return rows, report


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


@contextmanager
def _signals(watch: Watch, console: Console) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C ends the run after its step, the second one at once."""

    def handle(number: int, frame: Any) -> None:
        if watch.is_stopped():
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
            return
        watch.stopped_by = number
        _say(console, "stopping after this step, with a checkpoint; once more stops at once")

    try:
        numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_model(recipe: Recipe, prepared: Prepared, weights: Any, folder: Path, card: str) -> None:
    """The final checkpoint, with its card and recipe, whole or not at all."""
    if prepared.model is prepared.causal:
        model = state.whole_model(prepared, weights)
    else:
        adapted = prepared.model
        if state.is_sharded(adapted):
            again = prepare_model(recipe)
            adapted = again.model
            load_trained(adapted, weights, again.trainable, "the gathered state")
        model = adapted.merge_and_unload()
    with model_folder(folder, overwrite=True) as whole:
        model.save_pretrained(whole)
        prepared.tokenizer.save_pretrained(whole)
        write_card(whole, folder, card)
        (whole / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
