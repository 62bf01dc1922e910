"""The text that things are hidden in: sentences that say nothing, again and again, or text of your own."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from typing import Any

from masformer.data import read_documents
from masformer.errors import MasformerError
from masformer.evaluation.rouge import split_sentences

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
"""The filler of the pass key and of RULER's `niah_single_1` and `vt`."""


@dataclass(frozen=True)
class Haystack:
    """Sentences, used from the first on and again from the first where they do not suffice.

    Attributes:
        sentences: none is blank.
        name: what it is, for records.

    Raises:
        MasformerError: there is no sentence.
    """

    sentences: tuple[str, ...] = NOISE
    name: str = "noise"

    def __post_init__(self) -> None:
        if not any(sentence.split() for sentence in self.sentences):
            raise MasformerError("a haystack needs text; every sentence is blank")

    def fingerprint(self) -> str:
        """Changes with the text."""
        return hashlib.sha256(repr(self.sentences).encode()).hexdigest()[:16]

    def words(self, count: int, start: int = 0) -> list[str]:
        """So many words, as sentences; the last one may be cut.

        Args:
            count: of words.
            start: the first sentence.
        """
        found: list[str] = []
        for sentence in islice(cycle(self.sentences), start, None):
            if count <= 0:
                break
            parts = sentence.split()[:count]
            if parts:
                found.append(" ".join(parts))
            count -= len(parts)
        return found


def read_haystack(paths: Iterable[Any], field: str) -> Haystack:
    """The sentences of all documents, one document after the other.

    Args:
        paths: see `masformer.data.read_documents`.
        field: key of the text in JSON lines.

    Raises:
        MasformerError: as `read_documents`; a file without text is one.
    """
    texts = [split_sentences(document.text).splitlines() for document in read_documents(paths, field=field)]
    sentences = tuple(sentence for text in texts for sentence in text if sentence.strip())
    return Haystack(sentences, "text")


def insert(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The sentences with each needle at its place: one text.

    Args:
        sentences: of the haystack.
        needles: (depth, sentence): between sentences, as near as can be to that share of the haystack's words (0:
            before them all, 1: after them all). Needles of equal depth keep their order.
    """
    ends = list(accumulate((len(sentence.split()) for sentence in sentences), initial=0))
    places: dict[int, list[str]] = {}
    for depth, needle in sorted(needles, key=lambda each: each[0]):
        wanted = depth * ends[-1]
        after = bisect_left(ends, wanted)
        place = after - 1 if after and wanted - ends[after - 1] < ends[after] - wanted else after
        places.setdefault(place, []).append(needle)
    parts: list[str] = []
    for place in range(len(ends)):
        parts += places.get(place, [])
        parts += sentences[place : place + 1]
    return " ".join(parts)
