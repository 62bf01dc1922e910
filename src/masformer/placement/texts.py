"""What plans are measured on: windows cut from documents, retrieval probes made of them, and pairs of your own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from masformer.data.tokens import opening_tokens, part_tokens
from masformer.errors import MasformerError
from masformer.evaluation.retrieval import TASKS, Haystack, Prober
from masformer.evaluation.retrieval.prompts import TRAINING
from masformer.evaluation.rouge import split_sentences

Pair = tuple[str, str]
"""A prompt and its target."""
PROBES = ("niah_single", "niah_multikey")
"""Tasks of retrieval probes, in turn."""
DEEPEST = 75
"""Of a probe: where its needle lies at most, in percent of the haystack."""
ROOM = 16
"""Tokens of a probe's length that its answer may take."""


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


def retrieval_probes(
    tokenizer: Any, fillers: Sequence[Window], length: int, count: int, seed: int, chat: bool | None = None
) -> list[Window]:
    """Prompts of `masformer.evaluation.retrieval`, hidden in the windows' own text; the answers' tokens are scored.

    They are of the stream that is trained on, so none is drawn as one that is tested. Single keys and several take
    turns, at depths that are evenly spread.

    Args:
        tokenizer: of transformers.
        fillers: windows that give the text around the needles.
        length: the most tokens of prompt and answer.
        count: probes.
        seed: of all that is drawn.
        chat: whether the question is a message in the chat template; None: where there is one.

    Raises:
        MasformerError: a chat template that is missing, or the length is too short for what is hidden and the question.
    """
    text = "\n".join(tokenizer.decode(list(filler.tokens), skip_special_tokens=True) for filler in fillers)
    sentences = tuple(sentence for sentence in split_sentences(text).splitlines() if sentence.strip())
    prober = Prober(tokenizer, chat=chat, haystack=Haystack(sentences, "text"), seed=seed, max_new_tokens=ROOM)
    probes = []
    for index in range(count):
        depth = DEEPEST * (index + 0.5) / count
        probe = prober.probe(TASKS[PROBES[index % len(PROBES)]], length, depth, index, TRAINING)
        answer = part_tokens(tokenizer, f" {probe.answers[0]}")
        probes.append(Window((*probe.tokens, *answer), len(answer), probe=True))
    return probes


def pair_windows(tokenizer: Any, pairs: Sequence[Pair], length: int) -> list[Window]:
    """A window of each prompt with its target, whose tokens are scored; tokenized as in training on pairs.

    Args:
        tokenizer: of transformers.
        pairs: prompts and targets.
        length: the most input tokens.

    Raises:
        MasformerError: a prompt or a target is blank, or a pair too long.
    """
    windows = []
    for number, (prompt, target) in enumerate(pairs, start=1):
        if not prompt.strip() or not target.strip():
            raise MasformerError(f"pair {number} has a blank prompt or target; both must hold text")
        answer = part_tokens(tokenizer, target)
        tokens = (*opening_tokens(tokenizer, prompt), *answer)
        if len(tokens) - 1 > length:
            raise MasformerError(f"pair {number} takes {len(tokens) - 1} tokens; allowed: the length, {length}")
        windows.append(Window(tokens, len(answer), probe=True))
    return windows
