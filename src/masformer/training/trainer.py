"""transformers' Trainer with rows in a fixed order, whole checkpoints, and perplexity as its evaluation."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from masformer.data.packing import Schedule, Slices, collate
from masformer.errors import MasformerError
from masformer.extras import need
from masformer.files import parse_json, write_whole
from masformer.models.sinks import is_sink
from masformer.training import state
from masformer.training.checkpoints import write_checkpoint
from masformer.training.evaluation import Task, evaluate
from masformer.training.model import Prepared
from masformer.training.recipe import TENSORBOARD, Recipe

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
AUTOCAST = "autocast"
"""Key of an evaluation's line of metrics."""
SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup", "linear": "linear"}
TIMEOUT = 6 * 3600
"""Seconds that a process waits for another: reading and tokenizing may take long."""


def training_arguments(recipe: Recipe, steps: int, evaluate_first: bool) -> TrainingArguments:
    """The Trainer's settings.

    Raises:
        MasformerError: the rows of a step cannot be shared evenly, or the processes by the rows.
    """
    settings = recipe.training
    accelerator = torch.accelerator.is_available()
    sharded = settings.sharding == "fsdp" and int(os.environ.get("WORLD_SIZE", 1)) > 1
    options: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if sharded else {}
    try:
        arguments = TrainingArguments(
            output_dir=str(Path(recipe.output)),
            max_steps=steps,
            per_device_train_batch_size=settings.device_rows,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=SCHEDULES[settings.schedule],
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
            max_grad_norm=settings.clip,
            bf16=settings.precision == "bfloat16",
            seed=settings.seed,
            use_cpu=not accelerator,
            eval_strategy="no",
            eval_on_start=evaluate_first,
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=recipe.logging.every,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            report_to=[tracker for tracker in recipe.trackers if tracker != TENSORBOARD] or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=accelerator,
            ddp_find_unused_parameters=False,
            ddp_timeout=TIMEOUT,
            average_tokens_across_devices=True,
            **options,
        )
    except (ValueError, RuntimeError) as error:
        raise MasformerError(f"training cannot start: {' '.join(str(error).split())}") from error
    world, sharing = arguments.world_size, settings.sharing
    if world % sharing:
        raise MasformerError(
            f"training.sequence_devices {sharing} needs a multiple of {sharing} processes, not {world}; start them "
            f"with torchrun --nproc-per-node {sharing}"
        )
    together = settings.device_rows * world // sharing
    if settings.rows % together:
        among = f"{world // sharing} times {sharing}" if sharing > 1 else str(world)
        raise MasformerError(
            f"training.rows {settings.rows} cannot be shared by {among} processes of "
            f"{settings.device_rows} rows at a time; give a multiple of {together}"
        )
    arguments.gradient_accumulation_steps = settings.rows // together
    return arguments


class SpanTrainer(Trainer):  # type: ignore[misc]
    """Trains a prepared model on a schedule of rows.

    Args:
        recipe: the run.
        prepared: the model.
        schedule: the rows, as many as steps times rows of a step.
        tasks: what to evaluate.
        arguments: of the Trainer.
        watch: what looks on.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        schedule: Schedule,
        tasks: Sequence[Task],
        arguments: TrainingArguments,
        watch: Watch,
    ) -> None:
        eos, config = prepared.tokenizer.eos_token_id, prepared.causal.config
        use_cache, devices = getattr(config, "use_cache", None), recipe.training.sharing
        super().__init__(
            model=prepared.model,
            args=arguments,
            train_dataset=schedule if devices == 1 else Slices(schedule, recipe.training.device_rows, devices),
            data_collator=partial(collate, pad=0 if eos is None else eos, devices=devices),
            callbacks=[watch],
        )
        if use_cache is not None:
            config.use_cache = use_cache  # the Trainer turned it off, and every checkpoint would say so
        self.remove_callback(PrinterCallback)
        self.recipe, self.prepared, self.tasks, self.watch = recipe, prepared, tasks, watch
        self.output = Path(recipe.output)
        if self.is_deepspeed_enabled:
            raise MasformerError("DeepSpeed is not supported; use DDP, or FSDP2 (training.sharding fsdp)")
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise MasformerError("FSDP1 is not supported; use FSDP2 (fsdp_version 2, or training.sharding fsdp)")

        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
            raise MasformerError(
                "accelerate's sequence and tensor parallelism know no spans; use training.sequence_devices, and FSDP2"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Also on CPUs, where accelerate would train unsharded in silence, though what it does works there."""
        super().create_accelerator_and_postprocess()
        shared = self.accelerator.state
        asked = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if asked and shared.distributed_type == DistributedType.MULTI_CPU:
            shared.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            shared.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Of the matrices alone: the sinks of a layer are no matrix, whoever made them."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not is_sink(name) and not name.endswith(".sinks")]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """What the Trainer measured and what was counted here, to all trackers alike."""
        super().log(logs | self.watch.counted(self.state) if "loss" in logs else logs, *args)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.watch.saw(inputs["input_ids"].numel() * self.args.world_size)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Perplexities by the name of the source and the length.

        Stopped before it is through, it leaves a checkpoint of its step, from which it can be made again.

        Raises:
            Stopped: it was stopped, and no step was done since the checkpoint.
        """
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        stop = self.watch.is_stopped if self.args.world_size == 1 else lambda: False
        precision = self.recipe.evaluation.precision
        devices = self.recipe.training.sharing
        figures = evaluate(model, self.tasks, self.args.device, stop, self.watch.evaluated, precision, devices)
        if figures is None:
            if self.watch.steps_done == 0:
                raise Stopped
            self.control.should_save = self.control.should_training_stop = True
            return {}
        self.log(dict(figures))
        return figures

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        if not bool(torch.isfinite(self._tr_loss)):
            raise MasformerError(f"the loss is not finite at step {self.state.global_step}; no checkpoint is written")
        names, first = self.prepared.trainable, self.args.should_save
        weights = state.trained_weights(self.model, names, first)
        moments = state.optimizer_state(self.model, self.optimizer, names, first)
        random = state.random_states(self.args.world_size, self.args.process_index)
        if first:

            def write(folder: Path) -> None:
                state.write_weights(self.prepared, weights, folder)
                save_file(moments, folder / state.OPTIMIZER)
                state.write_schedule(self.lr_scheduler, folder / state.SCHEDULE)
                self.state.save_to_json(str(folder / "trainer_state.json"))
                (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")
                save_file(random, folder / state.RANDOM)

            write_checkpoint(self.output, self.state.global_step, write, self.recipe.checkpoints.keep)
        if self.args.world_size > 1:
            dist.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights were read before the model was wrapped."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        state.read_optimizer(self.model, inner, self.prepared.trainable, folder)
        state.read_schedule(self.lr_scheduler, inner, folder / state.SCHEDULE)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.read_random(Path(checkpoint), self.args.process_index)


class Stopped(Exception):
    """Training is to end, and there is nothing to save."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Says when to save, to evaluate and to stop, and writes down what happens.

    Args:
        recipe: the run.
        evaluations: step -> figures; every evaluation is added.
        autocast: dtype of matrix products in evaluations, where it is not that of the weights; metrics hold it.
        show: called with a line for people, and the figures it is made of, on the first process.
        advance: called with (steps done, steps in all, what is being done).
    """

    def __init__(
        self,
        recipe: Recipe,
        evaluations: dict[int, dict[str, float]],
        autocast: str | None,
        show: Callable[[str, dict[str, float]], None],
        advance: Callable[[int, int, str], None],
    ) -> None:
        self.recipe, self.evaluations, self.show, self.advance = recipe, evaluations, show, advance
        self.autocast = autocast
        self.output = Path(recipe.output)
        self.stopped_by: int | None = None
        self._tokens = 0
        self._seconds = self._all_seconds = self._begun = 0.0
        self._step = self._steps = self.steps_done = 0
        self._board: Any = None

    def is_stopped(self) -> bool:
        """Whether a signal asked for the end."""
        return self.stopped_by is not None

    def saw(self, tokens: int) -> None:
        """Counts tokens that are trained on, over all processes."""
        self._tokens += tokens

    def counted(self, state: Any) -> dict[str, float]:
        """Tokens and speed since this was asked for before."""
        figures: dict[str, float] = {"tokens": self._tokens}
        if self._seconds:
            figures["tokens_per_second"] = round(self._tokens / self._seconds, 1)
            left = self._all_seconds / self.steps_done * (state.max_steps - state.global_step)
            figures["seconds_left"] = round(left)
        self._tokens, self._seconds = 0, 0.0
        return figures

    def evaluated(self, done: int, total: int) -> None:
        """Shows how far an evaluation is."""
        self.advance(self._step, self._steps, f"evaluating, window {done} of {total}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step, self._steps = state.global_step, state.max_steps
        if state.is_world_process_zero:
            cut_metrics(self.output / METRICS, state.global_step)
            if TENSORBOARD in self.recipe.trackers:
                self._board = summary_writer(self.output / "tensorboard", state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spent = time.monotonic() - self._begun
        self._seconds, self._all_seconds = self._seconds + spent, self._all_seconds + spent
        self.steps_done += 1
        step = self._step = state.global_step
        self._agree(args)
        last = step >= state.max_steps
        control.should_log |= last
        every = self.recipe.checkpoints.every
        control.should_save = (every is not None and (step % every == 0 or last)) or self.is_stopped()
        control.should_evaluate = self.recipe.evaluation.is_due(step, state.max_steps) and not self.is_stopped()
        control.should_training_stop |= self.is_stopped()
        self.advance(step, state.max_steps, "training")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer asks once more here, after the last step."""
        control.should_log = control.should_save = control.should_evaluate = False

    def _agree(self, args: Any) -> None:
        """All processes stop at the same step."""
        if args.world_size > 1:
            asked = torch.tensor(self.stopped_by or 0, device=args.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self.stopped_by = int(asked) or None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        figures: dict[str, float] = {name: value for name, value in (logs or {}).items() if name != "epoch"}
        if "train_runtime" in figures:
            return
        step = state.global_step
        if "loss" in figures:
            if not math.isfinite(figures["loss"]):
                raise MasformerError(
                    f"the loss is not finite at step {step}; try a smaller training.learning_rate or more warm-up"
                )
        else:
            self.evaluations[step] = figures
        if not state.is_world_process_zero:
            return
        with (self.output / METRICS).open("a", encoding="utf-8") as file:
            how = {AUTOCAST: self.autocast} if "loss" not in figures and self.autocast is not None else {}
            file.write(json.dumps({"step": step} | figures | how) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        self.show(f"step {step}/{state.max_steps}", figures)


def clock(seconds: float) -> str:
    """3723 -> `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def cut_metrics(path: Path, step: int) -> None:
    """Leaves the lines up to a step: what comes after them will be done, and written, again."""
    if path.exists():
        write_whole(path, "".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics; none where there is no file, and not one that a killed process wrote half."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = parse_json(line, str(path))
        except MasformerError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def read_evaluations(path: Path) -> dict[int, dict[str, float]]:
    """Step -> the figures of its evaluation, from the lines of metrics."""
    rows = [row for row in read_metrics(path) if "loss" not in row]
    return {row["step"]: {name: row[name] for name in row if name not in ("step", AUTOCAST)} for row in rows}


def autocast_by_step(path: Path) -> dict[int, str | None]:
    """Step -> dtype of matrix products in its evaluation, where it was not that of the weights."""
    return {row["step"]: row.get(AUTOCAST) for row in read_metrics(path) if "loss" not in row}


def check_trackers(recipe: Recipe) -> None:
    """Raises MasformerError where the package of a tracker is not installed."""
    for tracker in recipe.trackers:
        if tracker == TENSORBOARD:
            need("train", f"training.report_to {tracker}", tracker)
        elif importlib.util.find_spec(tracker) is None:
            raise MasformerError(f"training.report_to {tracker} needs {tracker}: pip install {tracker}")


def summary_writer(folder: Path, step: int) -> Any:
    """Of TensorBoard; steps after this one are written anew."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step or None)
