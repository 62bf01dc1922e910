"""Rows of the training length, made of stores of tokens: no token lost, none repeated.

Texts are one long stream, document after document, cut every `length` tokens. A row of inputs comes with the token that
follows each of them, also across the end of the row: every token of the stream is predicted once. With `separate`, each
document sees only itself: positions start again with it, and no document predicts the first token of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from masformer.data.chat_rows import ChatRows
from masformer.data.pairs import CUTS, IGNORED, PairRows, WholeRows
from masformer.data.sources import KINDS
from masformer.data.store import Ints, TokenStore
from masformer.errors import MasformerError, check_int

PACKINGS = ("across", "separate")
Example = dict[str, Tensor]
"""`input_ids`, `shift_labels` and, where documents are separate, `position_ids`: each int64 [tokens]."""


class PackedRows(Dataset[Example]):
    """Texts packed into rows.

    Args:
        stores: plain texts, one after the other.
        length: tokens of a row; the last row may be shorter.
        separate: each document sees only itself.

    Raises:
        MasformerError: the length is below 2.
    """

    def __init__(self, stores: Sequence[TokenStore], length: int, separate: bool = False) -> None:
        check_int("length of a row", length, 2)
        self.stores, self.length, self.separate = list(stores), length, separate
        self._ends = np.cumsum([len(store.tokens) for store in stores])
        self._starts = np.concatenate(
            [store.offsets[:-1] + end - len(store.tokens) for store, end in zip(stores, self._ends, strict=True)]
        )
        self.tokens = int(self._ends[-1])

    def __len__(self) -> int:
        return -(-self.tokens // self.length)

    def stream(self, start: int, stop: int) -> Ints:
        """Tokens start..stop-1 of the stream, fewer at its end: [tokens] int64."""
        pieces: list[NDArray[np.int64]] = []
        first = int(np.searchsorted(self._ends, start, side="right"))
        for store, end in zip(self.stores[first:], self._ends[first:], strict=True):
            begin = int(end) - len(store.tokens)
            if begin >= stop:
                break
            pieces.append(store.tokens[max(0, start - begin) : stop - begin].astype(np.int64))
        return np.concatenate(pieces)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        start = row * self.length
        tokens = self.stream(start, start + self.length + 1)
        inputs, targets = tokens[: self.length], tokens[1:]
        targets = np.pad(targets, (0, len(inputs) - len(targets)), constant_values=IGNORED)
        example = {"input_ids": inputs, "shift_labels": targets}
        if self.separate:
            low, high = np.searchsorted(self._starts, [start + 1, start + len(inputs) + 1])
            starts = self._starts[low:high] - start  # of the documents that begin in this row, after its first token
            targets = targets.copy()
            targets[starts - 1] = IGNORED
            starts = starts[starts < len(inputs)]
            index = np.arange(len(inputs))
            begun = np.concatenate([[0], starts])[np.searchsorted(starts, index, side="right")]
            example |= {"shift_labels": targets, "position_ids": index - begun}
        return {name: torch.from_numpy(values) for name, values in example.items()}


class Schedule(Dataset[Example]):
    """The rows of a whole training run: every row once, in an order drawn from the seed, then again in another.

    Which row comes at which place depends on the seed and the place alone, so a run resumes exactly, on any number of
    devices.

    Args:
        rows: the rows.
        count: rows of the run.
        seed: of the order.
        shuffle: False: in their own order.
    """

    def __init__(self, rows: PackedRows | WholeRows, count: int, seed: int, shuffle: bool = True) -> None:
        self.rows, self.count, self.seed, self.shuffle = rows, count, seed, shuffle
        self._order: tuple[int, Ints] | None = None

    def __len__(self) -> int:
        return self.count

    def row(self, place: int) -> int:
        """Which of the rows comes at a place."""
        epoch, index = divmod(place, len(self.rows))
        if not self.shuffle:
            return index
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return int(self._order[1][index])

    def __getitem__(self, place: int) -> Example:
        return self.rows[self.row(place)]


class Slices(Dataset[Example]):
    """The rows of a schedule for devices that share them: each batch comes once for each, to be cut by `collate`.

    Args:
        schedule: the rows.
        together: rows of a batch.
        devices: that share a row.
    """

    def __init__(self, schedule: Schedule, together: int, devices: int) -> None:
        self.schedule, self.together, self.devices = schedule, together, devices

    def __len__(self) -> int:
        return len(self.schedule) * self.devices

    def __getitem__(self, place: int) -> Example:
        batch, row = divmod(place, self.together)
        batch, device = divmod(batch, self.devices)
        return self.schedule[batch * self.together + row] | {"device": torch.tensor(device)}


def make_rows(
    stores: Sequence[TokenStore], length: int, packing: str | None, cut: str, max_target: int | None = None
) -> PackedRows | WholeRows:
    """Rows of texts, of pairs or of conversations.

    Args:
        stores: all plain texts, all pairs, or all conversations.
        length: tokens of a row.
        packing: `across` documents or `separate`; None: across for texts. Pairs and conversations are
            always separate.
        cut: of pairs, the part of an over-long prompt that is cut out: `tail`, `head` or `middle`.
        max_target: of pairs, the most tokens of a target.

    Raises:
        MasformerError: several kinds together, or an option that does not fit.
    """
    if packing not in (None, *PACKINGS):
        raise MasformerError(f"unknown packing {packing!r}; allowed: {', '.join(PACKINGS)}")
    if cut not in CUTS:
        raise MasformerError(f"unknown cut {cut!r}; allowed: {', '.join(CUTS)}")
    kinds = {store.kind for store in stores}
    if len(kinds) > 1:
        named = " and ".join(KINDS[kind] for kind in KINDS if kind in kinds)
        raise MasformerError(f"the sources mix {named}; give one kind")
    (kind,) = kinds
    if kind != "texts" and packing == "across":
        raise MasformerError(f"{kind} cannot be packed across documents: one must not see another; use separate")
    if kind == "pairs":
        return PairRows(stores, length, cut, max_target)
    if kind == "chats":
        return ChatRows(stores, length)
    return PackedRows(stores, length, packing == "separate")


def collate(examples: Sequence[Example], pad: int, devices: int = 1) -> Example:
    """A batch [rows, longest]: shorter rows are filled up on the right, where causal attention hides the filling.

    `labels` equals `shift_labels`; transformers counts what is predicted only where it is there. Of rows that several
    `devices` share, it is the slice of one.
    """
    device = {int(example["device"]) for example in examples if "device" in example}
    examples = [{name: values for name, values in example.items() if name != "device"} for example in examples]
    longest = max(len(example["input_ids"]) for example in examples)
    filling = {"input_ids": pad, "shift_labels": IGNORED, "position_ids": 0}
    batch = {
        name: torch.stack(
            [
                torch.nn.functional.pad(example[name], (0, longest - len(example[name])), value=filling[name])
                for example in examples
            ]
        )
        for name in examples[0]
    }
    if "position_ids" in batch:  # the filling is a document of its own
        for row, example in zip(batch["position_ids"], examples, strict=True):
            row[len(example["input_ids"]) :] = torch.arange(longest - len(example["input_ids"]))
    if devices > 1:
        batch = cut_rows(batch, filling, devices, *device)
    return batch | {"labels": batch["shift_labels"]}


def cut_rows(batch: Example, filling: Mapping[str, int], devices: int, number: int) -> Example:
    """The slice of a batch that one of several devices has, with its positions.

    Rows that do not divide are filled up on the right, with a document of its own.

    Args:
        batch: [rows, length].
        filling: what fills up the values of each name, but the positions.
        devices: that share the rows.
        number: of the device.
    """
    rows, length = batch["input_ids"].shape
    positions = batch.get("position_ids", torch.arange(length, device=batch["input_ids"].device).expand(rows, -1))
    extra = -length % devices
    part = slice(number * (length + extra) // devices, (number + 1) * (length + extra) // devices)
    filled = {name: torch.nn.functional.pad(values, (0, extra), value=filling[name]) for name, values in batch.items()}
    end = torch.arange(extra, device=positions.device).expand(rows, -1)
    filled["position_ids"] = torch.cat([positions, end], 1)
    return {name: values[:, part] for name, values in filled.items()}
