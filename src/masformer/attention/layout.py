"""Where the documents of a batch lie: what padding masks and document numbers mean for attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from masformer.errors import MasformerError


@dataclass(frozen=True)
class Segment:
    """The stretch of one row that holds one document.

    Attributes:
        start: index of its first token, where positions are 0.
        stop: index after its last token.
        keep: [stop - start] bool, False where padding lies inside the document; None where there is none.
    """

    start: int
    stop: int
    keep: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """Documents of a batch of rows, cut into segments once and used by every layer.

    Attributes:
        documents: [batch, key_len] int64, the document each token belongs to, -1 for padding.
        rows: the segments of each row, from left to right.
        skipped: for keys out of a cache, with one document a row: how many positions of each row's document are missing
            among the keys, all of them between the span's sinks and the rest. None: none are missing.
    """

    documents: Tensor
    rows: tuple[tuple[Segment, ...], ...]
    skipped: tuple[int, ...] | None = None

    @classmethod
    def of(cls, padding_mask: Tensor | None, document_ids: Tensor | None) -> Layout | None:
        """None where every row is one document without padding.

        Args:
            padding_mask: [batch, key_len], 1 = real.
            document_ids: [batch, key_len] integers.

        Raises:
            MasformerError: the tokens of one document lie on both sides of another.
        """
        if padding_mask is not None and bool(padding_mask.bool().all()):
            padding_mask = None
        documents = cls.numbered(padding_mask, document_ids)
        return None if documents is None else cls.known(documents)

    @staticmethod
    def numbered(padding_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
        """`documents`, from what `of` takes; None where there is neither."""
        if document_ids is None:
            if padding_mask is None:
                return None
            document_ids = torch.zeros_like(padding_mask, dtype=torch.long)
        documents = document_ids.long()
        documents = documents - documents.min()
        return documents if padding_mask is None else documents.masked_fill(~padding_mask.bool(), -1)

    @classmethod
    def known(cls, documents: Tensor, skipped: tuple[int, ...] | None = None) -> Layout:
        """The layout of `documents`, cut into segments once for each tensor: that reads it from the device.

        Raises:
            MasformerError: the tokens of one document lie on both sides of another.
        """
        if documents not in _rows:
            _rows[documents] = tuple(tuple(_segments(row)) for row in documents.cpu())
        return cls(documents, _rows[documents], skipped)

    @classmethod
    def within(cls, documents: Tensor) -> Layout | None:
        """Of some tokens' `documents`; None where every row is one document without padding."""
        alike = (documents == documents[:, :1]) & (documents >= 0)
        return None if bool(alike.all()) else cls.known(documents)

    @property
    def has_holes(self) -> bool:
        """Whether padding lies between the tokens of a document."""
        return any(segment.keep is not None for segments in self.rows for segment in segments)


_rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Documents -> `Layout.rows`, which hold no reference to them."""


def _segments(row: Tensor) -> list[Segment]:
    found: list[Segment] = []
    names, counts = torch.unique_consecutive(row, return_counts=True)
    start, last = 0, -1
    seen: set[int] = set()
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        stop = start + count
        if name >= 0 and name == last:
            first = found.pop().start
            found.append(Segment(first, stop, row[first:stop] == name))
        elif name >= 0:
            if name in seen:
                raise MasformerError("document_ids must keep the tokens of a document together in the row")
            seen.add(name)
            found.append(Segment(start, stop))
            last = name
        start = stop
    return found
