"""Perplexity on held-out texts while training: as `masformer eval perplexity` has it, on any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from masformer.data.packing import cut_rows, make_rows
from masformer.data.pairs import IGNORED
from masformer.data.store import token_store
from masformer.errors import MasformerError
from masformer.evaluation.perplexity import exp_or_inf, prefix_token, rolling_windows, tokenize
from masformer.evaluation.room import Room, autocast, autocast_on, padded, room_of
from masformer.training.recipe import Recipe

Figures = dict[str, float]
FILLING = {"input_ids": 0, "shift_labels": IGNORED, "position_ids": 0}
"""What stands after a window that is too short."""


@dataclass(frozen=True)
class Task:
    """One figure: a set of windows and the length that they are cut to.

    Attributes:
        name: of the figure, for example `pubmed_2048`.
        length: the most input tokens.
        windows: (inputs, targets), of equal length; -100 predicts nothing.
        positions: positions of separate documents; None where each window is one.
    """

    name: str
    length: int
    windows: Sequence[tuple[list[int], list[int]]]
    positions: Sequence[list[int]] | None = None


def evaluation_tasks(recipe: Recipe, tokenizer: Any) -> list[Task]:
    """Reads and tokenizes the texts of `evaluation.sources`.

    Raises:
        MasformerError: they cannot be read, or hold nothing to predict.
    """
    tasks = []
    for name, source in recipe.evaluation.sources.items():
        if source.kind != "texts":
            tasks.append(_separate(recipe, name, tokenizer))
            continue
        tokens, _ = tokenize(tokenizer, source.documents(), max_tokens=recipe.evaluation.max_tokens)
        for length in recipe.evaluation_lengths:
            windows = [
                (inputs, [IGNORED] * (len(inputs) - len(targets)) + targets)
                for document in tokens
                for inputs, targets in rolling_windows(document, prefix_token(tokenizer), length)
            ]
            tasks.append(Task(f"{name}_{length}", length, windows))
    for task in tasks:
        if not any(target != IGNORED for _, targets in task.windows for target in targets):
            raise MasformerError(f"evaluation source {task.name} holds no token to predict")
    return tasks


def _separate(recipe: Recipe, name: str, tokenizer: Any) -> Task:
    data = recipe.data
    source = recipe.evaluation.sources[name]
    store = token_store(name, source, tokenizer, data.cache, template=data.template)
    rows = make_rows([store], data.length, None, data.cut, data.max_target)
    examples = [rows[index] for index in range(len(rows))]
    windows = [(example["input_ids"].tolist(), example["shift_labels"].tolist()) for example in examples]
    positions = [example["position_ids"].tolist() for example in examples]
    return Task(f"{name}_{data.length}", data.length, windows, positions)


def evaluation_room(model: Any) -> Room:
    """What runs together, alike in every process.

    Args:
        model: as it is trained, perhaps wrapped; `use_chunked_loss` was called on it.
    """
    causal = causal_of(model)
    loss = causal.masformer_loss
    room = room_of(causal, positions=None if causal.device.type == "cuda" else loss.chunk)
    if not loss.is_chunked:
        room.tokens = 1
    if _processes()[1] > 1:
        least = torch.tensor([room.tokens, room.positions], device=causal.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        room.tokens, room.positions = least.tolist()
    return room


def causal_of(model: Any) -> Any:
    """The causal language model that adapters, or processes, are wrapped around."""
    return next(module for module in model.modules() if "masformer_loss" in vars(module))


def evaluate(
    model: Any,
    tasks: Sequence[Task],
    device: Any,
    stop: Callable[[], bool],
    advance: Callable[[int, int], None],
    precision: str | None = None,
    devices: int = 1,
) -> Figures | None:
    """The figures of every task: loss, perplexity, and perplexity of the second half of the context.

    None where it was stopped.

    Every process takes its share of the windows, and all get the same figures.

    Args:
        model: as it is trained, perhaps wrapped; `use_chunked_loss` was called on it.
        tasks: what to measure.
        device: where the inputs go.
        stop: asked between passes: True gives up.
        advance: called with (windows done, windows in all) of this process.
        precision: see `masformer.evaluation.perplexity.perplexity`; None: auto.
        devices: that share each window, see `masformer.models.across.across_devices`.
    """
    rank, world = _processes()
    dtype, room = autocast_on(device, causal_of(model).dtype, precision), evaluation_room(model)
    shares = [_share(task, room, rank // devices, world // devices) for task in tasks]
    done, total = 0, sum(len(batch) for share in shares for batch, _ in share)
    figures: Figures = {}
    model.eval()
    try:
        for task, share in zip(tasks, shares, strict=True):
            sums = torch.zeros(2, task.length, dtype=torch.float64)

            def losses_of(part: Sequence[int], task: Task = task) -> tuple[Tensor, Tensor]:
                with autocast(device, dtype):
                    inputs = _inputs(task, part, device)
                    if devices > 1:
                        inputs = cut_rows(inputs, FILLING, devices, rank % devices)
                    return _token_losses(model, inputs, room.positions)

            for batch, real in share:
                if stop():
                    return None
                length = len(task.windows[batch[0]][0])
                # where processes must keep step, one of them cannot run its batch in more parts than the others
                parts = room.run(batch, length, losses_of) if world == 1 else [(batch, losses_of(batch))]
                for part, (losses, there) in parts:
                    if real:
                        start = rank % devices * losses.shape[1]
                        here = sums[:, start : start + losses.shape[1]]
                        here += torch.stack([losses.sum(0), there.sum(0)])[:, : here.shape[1]]
                    done += len(part)
                    advance(done, total)
            if world > 1:
                shared = sums.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
                dist.all_reduce(shared)
                sums = shared.cpu().double()
            figures |= _figures(task, sums)
    finally:
        model.train()
    return figures


def _processes() -> tuple[int, int]:
    """The number of this one, and of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _share(task: Task, room: Room, rank: int, world: int) -> list[tuple[list[int], bool]]:
    """This process's batches; as many in every process, so some come again and do not count."""
    batches = list(room.batches([len(inputs) for inputs, _ in task.windows]))
    starts = range(rank, rank + len(batches), world)
    return [(batches[min(start, len(batches) - 1)], start < len(batches)) for start in starts]


def _inputs(task: Task, part: Sequence[int], device: Any) -> dict[str, Tensor]:
    """Some windows, the shorter ones padded at their end; [windows, length]."""
    inputs, targets = zip(*(task.windows[index] for index in part), strict=True)
    found = {name: padded(each, FILLING[name]) for name, each in (("input_ids", inputs), ("shift_labels", targets))}
    if task.positions is not None:
        length = max(map(len, inputs))
        rows = [task.positions[index] for index in part]
        found["position_ids"] = padded(
            [row + list(range(row[-1] + 1, row[-1] + 1 + length - len(row))) for row in rows], 0
        )
    return {name: values.to(device) for name, values in found.items()}


@torch.no_grad()
def _token_losses(model: Any, inputs: Mapping[str, Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """[windows, length] float64, 0 where nothing is predicted, and bool, where something is; on the CPU."""
    losses: Tensor = model(**inputs, use_cache=False, per_token=True, loss_chunk=chunk).loss
    return losses.cpu().double(), inputs["shift_labels"].cpu() != IGNORED


def _figures(task: Task, sums: Tensor) -> Figures:
    def mean(part: Tensor) -> float | None:
        return float(part[0].sum() / part[1].sum()) if part[1].sum() else None

    loss, half = mean(sums), mean(sums[:, task.length // 2 :])
    assert loss is not None
    found = {"loss": loss, "perplexity": exp_or_inf(loss)}
    if half is not None and task.positions is None:
        found["second_half_perplexity"] = exp_or_inf(half)
    return {f"eval_{task.name}_{figure}": value for figure, value in found.items()}
