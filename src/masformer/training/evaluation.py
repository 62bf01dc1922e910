"""Perplexity on held-out texts while training: as `masformer eval perplexity` has it, on any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from masformer.data.documents import Document
from masformer.data.pairs import IGNORED, PairRows
from masformer.data.store import token_store
from masformer.errors import MasformerError
from masformer.evaluation.perplexity import exp_or_inf, prefix_token, rolling_windows, tokenize
from masformer.training.recipe import Recipe

Figures = dict[str, float]


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
        if source.is_pairs:
            tasks.append(_pairs(recipe, name, tokenizer))
            continue
        documents = [Document(row.name, text) for row in source.rows() if (text := row.texts[source.field]).strip()]
        tokens, _ = tokenize(tokenizer, documents, max_tokens=recipe.evaluation.max_tokens)
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


def _pairs(recipe: Recipe, name: str, tokenizer: Any) -> Task:
    data = recipe.data
    source = recipe.evaluation.sources[name]
    store = token_store(name, source, tokenizer, data.cache, template=data.template)
    rows = PairRows([store], data.length, data.cut, data.max_target)
    examples = [rows[index] for index in range(len(rows))]
    windows = [(example["input_ids"].tolist(), example["shift_labels"].tolist()) for example in examples]
    positions = [example["position_ids"].tolist() for example in examples]
    return Task(f"{name}_{data.length}", data.length, windows, positions)


def evaluate(
    model: Any, tasks: Sequence[Task], device: Any, stop: Callable[[], bool], advance: Callable[[int, int], None]
) -> Figures | None:
    """The figures of every task: loss, perplexity, and perplexity of the second half of the context.

    None where it was stopped.

    Every process takes its share of the windows, and all get the same figures.

    Args:
        model: as it is trained, perhaps wrapped; `use_chunked_loss` was called on it.
        tasks: what to measure.
        device: where the inputs go.
        stop: asked between windows: True gives up.
        advance: called with (windows done, windows in all).
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    total = sum(-(-len(task.windows) // world) for task in tasks)
    done = 0
    figures: Figures = {}
    model.eval()
    try:
        for task in tasks:
            sums = torch.zeros(2, task.length, dtype=torch.float64)
            for inputs, real in _share(task, rank, world, device):
                if stop():
                    return None
                losses = _token_losses(model, inputs)
                if real:
                    here = inputs["shift_labels"][0].cpu() != IGNORED
                    sums[0, : len(here)] += losses
                    sums[1, : len(here)] += here
                done += 1
                advance(done, total)
            if world > 1:
                shared = sums.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
                dist.all_reduce(shared)
                sums = shared.cpu().double()
            figures |= _figures(task, sums)
    finally:
        model.train()
    return figures


def _share(task: Task, rank: int, world: int, device: Any) -> Iterator[tuple[Mapping[str, Tensor], bool]]:
    """This process's windows; as many in every process, so some come again and do not count."""
    for start in range(0, len(task.windows), world):
        index = min(start + rank, len(task.windows) - 1)
        inputs, targets = task.windows[index]
        batch = {"input_ids": inputs, "shift_labels": targets}
        if task.positions is not None:
            batch["position_ids"] = task.positions[index]
        yield {name: torch.tensor([values], device=device) for name, values in batch.items()}, start + rank == index


@torch.no_grad()
def _token_losses(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[length] float64 on the CPU."""
    losses: Tensor = model(**inputs, use_cache=False, per_token=True).loss
    return losses[0].double().cpu()


def _figures(task: Task, sums: Tensor) -> Figures:
    def mean(part: Tensor) -> float | None:
        return float(part[0].sum() / part[1].sum()) if part[1].sum() else None

    loss, half = mean(sums), mean(sums[:, task.length // 2 :])
    assert loss is not None
    found = {"loss": loss, "perplexity": exp_or_inf(loss)}
    if half is not None and task.positions is None:
        found["second_half_perplexity"] = exp_or_inf(half)
    return {f"eval_{task.name}_{figure}": value for figure, value in found.items()}
