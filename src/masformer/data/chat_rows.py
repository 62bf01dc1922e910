"""Conversations in rows of the training length: only the assistant's turns are predicted, long ones lose their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from masformer.data.pairs import WholeRows
from masformer.data.store import Ints, TokenStore
from masformer.errors import MasformerError, check_int


@dataclass(frozen=True)
class ChatCut:
    """What did not fit.

    Attributes:
        chats: conversations that lost their end.
        tokens: that they lost.
        dropped: conversations that were left out, since their first answer begins beyond a row's end.
    """

    chats: int = 0
    tokens: int = 0
    dropped: int = 0


class ChatRows(WholeRows):
    """Conversations packed into rows, in order; none is split, and each sees only itself.

    Of an over-long conversation the end is cut off.

    Args:
        stores: conversations, one store after the other.
        length: the most tokens of a row.

    Raises:
        MasformerError: a number out of range, or no answer fits.
    """

    rule = "tail"

    def __init__(self, stores: Sequence[TokenStore], length: int) -> None:
        check_int("length of a row", length, 2)
        lengths = np.concatenate([store.lengths for store in stores])
        self._kept = np.flatnonzero(
            [bool(store.own(index)[1:length].any()) for store in stores for index in range(len(store))]
        )
        if not len(self._kept):
            raise MasformerError(f"rows of {length} tokens are too short: no answer of a conversation begins in one")
        chosen = lengths[self._kept]
        over = np.maximum(chosen - length, 0)
        self.cut = ChatCut(int((over > 0).sum()), int(over.sum()), len(lengths) - len(chosen))
        super().__init__(stores, length, chosen - over)
        self.predicted = sum(int(self.document(index)[1][1:].sum()) for index in range(len(chosen)))

    def document(self, index: int) -> tuple[Ints, NDArray[np.bool_]]:
        store, place = self.place(int(self._kept[index]))
        return store.document(place)[: self.length], store.own(place)[: self.length]
