"""How windows run through a model: in what precision, how many together, and how many logits exist at once.

On CUDA a window at a time in float32 leaves most of the device idle: there windows run together as memory allows, and
matrix products of float32 weights in bfloat16 (autocast). On other devices windows run one by one, in the precision of
the weights: on a CPU more at once gains nothing (docs/evaluation.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from masformer.defaults import LOSS_CHUNK
from masformer.errors import MasformerError, check_int
from masformer.models.rotary import depends_on_length
from masformer.settings import check_choice

PRECISIONS = ("auto", "float32", "bfloat16")
"""Of matrix products where the weights are float32; `auto`: bfloat16 on CUDA, else float32."""
MOST_TOKENS = 2**16
"""Of windows that run together: more of them are no faster."""
MOST_LOGITS = 4 * 2**30
"""Bytes of logits and what is made of them at the same time: more are no faster."""
PADDED = 8
"""Windows run together where the shortest lacks at most one token in so many of the longest."""

Item = TypeVar("Item")
Found = TypeVar("Found")


def autocast_dtype(precision: str, device: str, weights: torch.dtype, bfloat16: bool = True) -> torch.dtype | None:
    """The dtype of matrix products; None: that of the weights.

    Args:
        precision: of `PRECISIONS`.
        device: type of the device, for example "cuda".
        weights: their dtype.
        bfloat16: whether the device computes in it.

    Raises:
        MasformerError: an unknown precision, or one that does nothing for these weights.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision not in ("auto", str(weights).removeprefix("torch.")) and weights != torch.float32:
        raise MasformerError(f"precision {precision} does nothing for weights in {weights}; allowed: auto")
    chosen = precision == "bfloat16" or (precision == "auto" and device == "cuda" and bfloat16)
    return torch.bfloat16 if chosen and weights == torch.float32 else None


def autocast_on(device: torch.device, weights: torch.dtype, precision: str | None = None) -> torch.dtype | None:
    """`autocast_dtype` on a device of this machine."""
    able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return autocast_dtype(precision or "auto", device.type, weights, able)


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """A context in which matrix products are of that dtype; None leaves everything as it is."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """`bfloat16`, for records."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """[rows, longest] int64, each filled up at its end."""
    found = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(found)  # from lists torch takes ten times as long


@dataclass
class Room:
    """How much runs at once; less from then on where the device's memory was not enough.

    Attributes:
        tokens: the most of windows that run together; a single window may be longer.
        positions: whose logits exist at the same time.
        rows: windows that run together, whatever their length; None: as many as `tokens` allow.
        pads: whether windows of nearly equal length run together, the shorter ones padded at their end. Causal
            attention gives real tokens the same there, if nothing else depends on the length.
    """

    tokens: int = 1
    positions: int = LOSS_CHUNK
    rows: int | None = None
    pads: bool = False

    def windows(self, length: int) -> int:
        """How many windows of a length run together."""
        return max(1, self.tokens // length) if self.rows is None else self.rows

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of windows that run together, the longest first, each once.

        What is not yet given follows where the room is less.
        """
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        start = 0
        while start < len(order):
            longest = lengths[order[start]]
            least = longest - longest // PADDED if self.pads else longest
            end = start + 1
            while end < min(start + self.windows(longest), len(order)) and lengths[order[end]] >= least:
                end += 1
            yield order[start:end]
            start = end

    def run(
        self, items: Sequence[Item], length: int, work: Callable[[Sequence[Item]], Found]
    ) -> Iterator[tuple[Sequence[Item], Found]]:
        """Runs windows together, in parts where they do not fit: half of them, and half the logits, after each failure.

        Args:
            items: the windows.
            length: of the longest.
            work: runs some of them.

        Yields:
            (some of them, what `work` gave).

        Raises:
            MasformerError: a single window does not fit.
        """
        start = 0
        while start < len(items):
            part = items[start : start + self.windows(length)]
            try:
                found = work(part)
            except torch.OutOfMemoryError as error:
                if len(part) == 1 and self.positions <= LOSS_CHUNK:
                    raise MasformerError(
                        f"a window of {length} tokens does not fit into the device's memory"
                    ) from error
                fewer = max(1, len(part) // 2)
                self.tokens = fewer * length
                self.rows = None if self.rows is None else fewer
                self.positions = max(min(LOSS_CHUNK, self.positions), self.positions // 2)
            else:
                start += len(part)
                yield part, found


def room_of(model: PreTrainedModel, *, rows: int | None = None, positions: int | None = None, kept: int = 0) -> Room:
    """The room that a model has where it is.

    Args:
        model: a causal language model, on its device.
        rows: windows that run together; None: as many as fit, on CUDA, else one.
        positions: whose logits exist at the same time; None: as many as fit, on CUDA, else `LOSS_CHUNK`.
        kept: float32 values that the caller keeps of each token beside the pass.

    Raises:
        MasformerError: a number below 1.
    """
    for name, value in (("batch_size", rows), ("chunk", positions)):
        if value is not None:
            check_int(name, value, 1)
    room = fitting(model, free_memory(model.device), kept)
    # a plan says that attention is causal; of other models we do not know
    room.pads = hasattr(model.config, "masformer") and not depends_on_length(model.config)
    room.rows = rows
    room.positions = room.positions if positions is None else positions
    return room


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device, those that torch holds without use included; None of other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def fitting(model: PreTrainedModel, free: int | None, kept: int = 0) -> Room:
    """What fits into so many bytes: half of them for windows, an eighth for logits.

    A token takes eight times the hidden size (the residual stream, norms, queries, keys, values, attention's output)
    and four times the widest linear map (the parts of a gated MLP) in float32, in one layer at a time. A position of
    the logits takes six values of four bytes for each word: in the model's dtype, in float32, their logarithms, and
    the same of what they are compared with.

    Args:
        model: the model.
        free: bytes; None: windows run one by one.
        kept: see `room_of`.
    """
    if free is None:
        return Room()
    config: PretrainedConfig = model.config
    values = 8 * config.hidden_size + 4 * _widest(model) + kept
    tokens = min(free // 2 // (4 * values), MOST_TOKENS)
    positions = min(free // 8, MOST_LOGITS) // (24 * config.vocab_size)
    return Room(max(1, tokens), max(1, positions))


def _widest(model: PreTrainedModel) -> int:
    """The wider side of the widest map in the base, tables left out."""
    maps = [
        weight
        for module in model.base_model.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim >= 2
    ]
    return max((max(weight.shape[-2:]) for weight in maps), default=int(model.config.hidden_size))
