"""Prompt/target pairs in rows of the training length: only targets are predicted, long prompts are cut by a rule.

Of an over-long pair, the part of the prompt inside the template is shortened; the template's own words and the target
stay. A target is cut at its end only where it is longer than `max_target`, or would leave no room for any prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from masformer.data.store import Ints, TokenStore
from masformer.errors import MasformerError, check_int

IGNORED = -100
"""The target of a position that predicts nothing."""
CUTS = ("tail", "head", "middle")
"""Which part of an over-long prompt is cut out."""


def cut_tokens(tokens: Ints, room: int, cut: str) -> Ints:
    """At most `room` of the tokens.

    Args:
        tokens: [tokens].
        room: how many may stay; at least 0.
        cut: what goes: the `tail`, the `head`, or the `middle` (LongBench's rule, arXiv 2308.14508: the first and the
            last half of the room stay).
    """
    over = len(tokens) - room
    if over <= 0:
        return tokens
    if cut == "tail":
        return tokens[:room]
    if cut == "head":
        return tokens[over:]
    first = (room + 1) // 2
    return np.concatenate([tokens[:first], tokens[first + over :]])


@dataclass(frozen=True)
class Cut:
    """What did not fit.

    Attributes:
        prompts: pairs whose prompt was cut.
        prompt_tokens: tokens cut from prompts.
        targets: pairs whose target was cut.
        target_tokens: tokens cut from targets.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    targets: int = 0
    target_tokens: int = 0


class WholeRows(Dataset[dict[str, Tensor]], ABC):
    """Documents packed into rows, in order; none is split, and each sees only itself.

    Args:
        stores: one after the other.
        length: the most tokens of a row.
        lengths: [documents] tokens of each document as it is trained on.
    """

    def __init__(self, stores: Sequence[TokenStore], length: int, lengths: Ints) -> None:
        self.stores, self.length, self.lengths = list(stores), length, lengths
        self.tokens = int(lengths.sum())
        self._rows = _next_fit(lengths, length)
        self._firsts = np.cumsum([0, *(len(store) for store in stores)])

    def __len__(self) -> int:
        return len(self._rows) - 1

    def place(self, index: int) -> tuple[TokenStore, int]:
        """The store of one of all documents, and the document's number there."""
        which = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.stores[which], index - int(self._firsts[which])

    @abstractmethod
    def document(self, index: int) -> tuple[Ints, NDArray[np.bool_]]:
        """Tokens of one document as it is trained on, and whether each of them is predicted."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        inputs, targets, positions = [], [], []
        for index in range(int(self._rows[row]), int(self._rows[row + 1])):
            tokens, wanted = self.document(index)
            inputs.append(tokens)
            targets.append(np.append(np.where(wanted, tokens, IGNORED)[1:], IGNORED))
            positions.append(np.arange(len(tokens)))
        parts = {"input_ids": inputs, "shift_labels": targets, "position_ids": positions}
        return {name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items()}


class PairRows(WholeRows):
    """Pairs packed into rows, in order; no pair is split, and each sees only itself.

    Args:
        stores: pairs, one store after the other.
        length: the most tokens of a row.
        cut: see `cut_tokens`.
        max_target: the most tokens of a target, its end-of-sequence token included; None: what fits.

    Raises:
        MasformerError: a number out of range, or the template's own words leave no room for a target.
    """

    def __init__(self, stores: Sequence[TokenStore], length: int, cut: str, max_target: int | None = None) -> None:
        check_int("length of a row", length, 2)
        if max_target is not None:
            check_int("max_target", max_target, 1)
            if max_target >= length:
                raise MasformerError(f"max_target {max_target} leaves no room for a prompt in rows of {length} tokens")
        self.rule = cut
        before, prompt, after, target = np.concatenate([_parts(store) for store in stores]).T
        fixed = before + after
        if (least := int(fixed.max()) + 2) > length:
            raise MasformerError(f"rows of {length} tokens are too short: the template alone takes {least - 2}")
        room = length - fixed - np.minimum(prompt, 1)
        self._targets = np.minimum(target, room if max_target is None else np.minimum(room, max_target))
        self._prompts = np.minimum(prompt, length - fixed - self._targets)
        self.cut = Cut(
            int((self._prompts < prompt).sum()),
            int((prompt - self._prompts).sum()),
            int((self._targets < target).sum()),
            int((target - self._targets).sum()),
        )
        super().__init__(stores, length, fixed + self._prompts + self._targets)

    def pair(self, index: int) -> tuple[Ints, int]:
        """Tokens of one pair as it is trained on, and how many of them are its target."""
        store, place = self.place(index)
        tokens = store.document(place)
        assert store.parts is not None
        start, stop, target = store.parts[place]
        wanted = int(self._targets[index])
        prompt = cut_tokens(tokens[start:stop], int(self._prompts[index]), self.rule)
        answer = tokens[target:]
        if wanted < len(answer) and store.end_token is not None:
            answer = np.append(answer[: wanted - 1], store.end_token)
        return np.concatenate([tokens[:start], prompt, tokens[stop:target], answer[:wanted]]), wanted

    def document(self, index: int) -> tuple[Ints, NDArray[np.bool_]]:
        tokens, wanted = self.pair(index)
        return tokens, np.arange(len(tokens)) >= len(tokens) - wanted


def _parts(store: TokenStore) -> Ints:
    """[pairs, 4]: tokens before the prompt, of it, after it, and of the target."""
    assert store.parts is not None
    edges = np.concatenate([np.zeros((len(store), 1), np.int64), store.parts, store.lengths[:, None]], axis=1)
    return np.diff(edges, axis=1)


def _next_fit(lengths: Ints, room: int) -> Ints:
    """[rows + 1]: the first pair of each row, and the number of pairs."""
    firsts, used = [0], 0
    for index, length in enumerate(lengths.tolist()):
        if used + length > room:
            firsts.append(index)
            used = 0
        used += length
    return np.asarray([*firsts, len(lengths)], dtype=np.int64)
