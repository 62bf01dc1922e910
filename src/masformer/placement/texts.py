"""What plans are measured on: windows cut from documents, and retrieval probes made of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

from masformer.data.tokens import part_tokens
from masformer.errors import MasformerError

NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jonas", "Karen", "Louis")
NEEDLES = 3
"""Of a probe: pairs of a name and a number, one of which is asked for."""
DEPTHS = (0.05, 0.45)
"""Of a probe: where its needles lie, as fractions of the filler text."""


@dataclass(frozen=True)
class Window:
    """A sequence and the predictions in it that count.

    Attributes:
        tokens: token ids; all but the last are the inputs.
        scored: the predictions of the last `scored` tokens count.
        probe: the scored tokens are the answer to a question.
    """

    tokens: tuple[int, ...]
    scored: int
    probe: bool = False


def text_windows(document: Sequence[int], prefix: int | None, length: int) -> list[Window]:
    """Cuts a document into windows of `length` inputs that predict no token twice; a shorter rest is left out.

    What counts are the predictions at positions `length // 2` and later, as in `PerplexityResult.second_half`.

    Args:
        document: token ids.
        prefix: put before the document's first token; None: nothing is.
        length: input tokens of a window.
    """
    stream = tuple(document) if prefix is None else (prefix, *document)
    starts = range(0, len(stream) - length, length)
    return [Window(stream[start : start + length + 1], length - length // 2) for start in starts]


def take_windows(documents: Sequence[Sequence[Window]], count: int) -> list[Window]:
    """The first window of each document, then the second of each, and so on: `count` of them, or all there are."""
    return [window for turn in zip_longest(*documents) for window in turn if window is not None][:count]


def split_windows(
    documents: Sequence[Sequence[Window]], count: int, held_out: int
) -> tuple[list[Window], list[Window], bool]:
    """Windows to choose by and windows to report on.

    The latter are of other, later documents, in the proportion of the counts where that is possible. Where it is
    impossible (one document only, for example), they are later parts of the documents.

    Args:
        documents: windows of each document.
        count: windows to choose by.
        held_out: windows to report on.

    Returns:
        The two lists, and whether the second is of other documents.

    Raises:
        MasformerError: there are fewer windows than asked for.
    """
    documents = [windows for windows in documents if windows]
    flat = [window for windows in documents for window in windows]
    if len(flat) < count + held_out:
        raise MasformerError(
            f"the documents hold {len(flat)} windows of the length of the search, {count} + {held_out} held-out ones "
            f"are asked for; give more or longer documents, ask for fewer windows, or for a smaller length"
        )
    wanted = len(documents) * count / (count + held_out)
    for split in sorted(range(1, len(documents)), key=lambda split: abs(split - wanted)):
        first, second = take_windows(documents[:split], count), take_windows(documents[split:], held_out)
        if (len(first), len(second)) == (count, held_out):
            return first, second, True
    return flat[:count], flat[len(flat) - held_out :], False


def retrieval_probes(tokenizer: Any, fillers: Sequence[Window], count: int, seed: int) -> list[Window]:
    """Key-value needles far back in filler text, and a question at the end; the answer's tokens are scored.

    A probe tells the pass keys of several people, each somewhere in the first half of the filler, and ends by asking
    for one of them with the very words that told it.

    Args:
        tokenizer: of transformers.
        fillers: windows that give the text around the needles, and the length.
        count: probes.
        seed: of the names, numbers and places.

    Raises:
        MasformerError: the windows are too short to hold the needles in their first half.
    """
    choose = random.Random(seed)

    def encode(text: str) -> list[int]:
        return part_tokens(tokenizer, text)

    probes = []
    for index in range(count):
        filler = fillers[index % len(fillers)].tokens
        names = choose.sample(NAMES, NEEDLES)
        questions = [encode(f"\nThe pass key of {name} is") for name in names]
        answers = [encode(f" {choose.randrange(10_000, 100_000)}") for _ in names]
        end = encode(".\n")
        asked = choose.randrange(NEEDLES)
        needles = [question + answer + end for question, answer in zip(questions, answers, strict=True)]
        inserted = sum(map(len, needles))
        room = len(filler) - inserted - len(questions[asked]) - len(answers[asked])
        if inserted + DEPTHS[1] * room > len(filler) / 2:
            raise MasformerError(
                f"a length of {len(filler) - 1} is too short for retrieval probes, whose needles take {inserted} "
                f"tokens; allowed: about {12 * inserted} or more"
            )
        places = [0, *sorted(int(choose.uniform(*DEPTHS) * room) for _ in names), room]
        tokens: list[int] = []
        for (start, stop), needle in zip(pairwise(places), [*needles, questions[asked] + answers[asked]], strict=True):
            tokens += [*filler[start:stop], *needle]
        probes.append(Window(tuple(tokens), len(answers[asked]), probe=True))
    return probes
