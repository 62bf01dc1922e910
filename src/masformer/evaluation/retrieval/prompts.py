"""Prompts of a given length that hide something at a given depth, and pairs to train on that look the same."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from masformer.data.tokens import tokenize_around
from masformer.errors import MasformerError, check_int, check_seed
from masformer.evaluation.retrieval.haystack import Haystack, insert
from masformer.evaluation.retrieval.tasks import Hidden, Task, chain, check_digits
from masformer.generation import chat_text, uses_chat

LONGEST = 1 << 24
WORKED_WORDS = 100
"""Words of the haystack in a worked example."""
WORKED_LETTERS = 3
GUESSES = 4
"""Steps by the tokens of a word so far, before the search for the length halves what is left."""
TESTING, TRAINING = "test", "train"
"""Streams of random numbers: what is trained on is never drawn as what is tested."""


@dataclass(frozen=True)
class Probe:
    """A prompt and what should follow it.

    Attributes:
        name: `TASK at LENGTH, depth DEPTH, number INDEX`.
        text: the whole prompt, chat template and the beginning of the answer included.
        tokens: its token ids.
        answers: the references.
        target: a right answer as text, from where the prompt ends.
    """

    name: str
    text: str
    tokens: tuple[int, ...]
    answers: tuple[str, ...]
    target: str


class Prober:
    """Makes prompts; the same arguments give the same prompt, everywhere.

    Args:
        tokenizer: of transformers.
        chat: whether the question is a message in the tokenizer's chat template; None: where there is one. The answer
            begins with the same words either way.
        haystack: what things are hidden in.
        seed: of all that is drawn.
        digits: of the numbers; by default those of the task.
        max_new_tokens: the most tokens to generate, in place of the task's.

    Raises:
        MasformerError: a number out of range, or a chat template that is missing.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool | None = None,
        haystack: Haystack | None = None,
        seed: int = 0,
        digits: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        if digits is not None:
            check_digits(digits)
        check_seed(seed)
        if max_new_tokens is not None:
            check_int("max_new_tokens", max_new_tokens, 1)
        self.tokenizer, self.seed, self.digits = tokenizer, seed, digits
        self.haystack = Haystack() if haystack is None else haystack
        self.chat = uses_chat(tokenizer, chat)
        self.max_new_tokens = max_new_tokens

    def room(self, task: Task) -> int:
        """The most tokens to generate."""
        return task.room if self.max_new_tokens is None else self.max_new_tokens

    def probe(self, task: Task, length: int, depth: float, index: int, stream: str = TESTING) -> Probe:
        """A prompt that, with room for the answer, takes as much of `length` as it can, and never more.

        The first needle stands at the depth; further ones of the same answer stand at random places after it, those
        that are not asked for anywhere.

        Args:
            task: what is hidden and asked for.
            length: tokens of prompt and answer together.
            depth: in percent of the haystack: 0 before it, 100 after it.
            index: the example's number.
            stream: `TESTING` or `TRAINING`.

        Raises:
            MasformerError: there is no room for anything but the question and what is hidden.
        """
        check_int("length", length, 1, LONGEST)
        name = f"{task.name} at {length}, depth {depth:g}, number {index}"
        choose = random.Random(f"{stream} {self.seed} {name}")
        digits = task.digits if self.digits is None else self.digits
        hidden = task.hide(choose, digits)
        first = depth / 100
        depths = [first, *sorted(choose.uniform(first, 1) for _ in hidden.needles[1:])]
        depths += [choose.random() for _ in hidden.distractors]
        needles = list(zip(depths, hidden.needles + hidden.distractors, strict=True))
        worked = _worked(task, choose, digits)
        start = choose.randrange(len(self.haystack.sentences)) if self.haystack != Haystack() else 0

        def made(words: int) -> tuple[str, list[int]]:
            text = self._text(task, insert(self.haystack.words(words, start), needles), hidden, worked)
            return text, self._tokens(text)

        wanted = length - self.room(task)
        text, tokens = made(0)
        alone = len(tokens)
        if alone >= wanted:
            raise MasformerError(
                f"{task.name}: a length of {length} tokens has no room for a haystack: the question, what is hidden "
                f"and {self.room(task)} tokens of an answer take {alone + self.room(task)}; give a greater length"
            )
        fits, beyond = 0, wanted - alone + 1  # in words, each of a token or more
        guess = beyond // 2
        for turn in count():
            if beyond - fits <= 1:
                break
            found = made(guess)
            if len(found[1]) <= wanted:
                fits, (text, tokens) = guess, found
            else:
                beyond = guess
            likely = guess * (wanted - alone) // max(1, len(found[1]) - alone)
            guess = min(max(likely, fits + 1), beyond - 1) if turn < GUESSES else (fits + beyond) // 2
        return Probe(name, text, tuple(tokens), hidden.answers, task.answer(hidden))

    def _text(self, task: Task, context: str, hidden: Hidden, worked: str) -> str:
        question, begun = task.asked(context, hidden)
        if not self.chat:
            return f"{worked}{question} {begun}"
        return chat_text(self.tokenizer, [{"role": "user", "content": worked + question}]) + begun

    def _tokens(self, text: str) -> list[int]:
        return tokenize_around(self.tokenizer, text, "", special=not self.chat)[0]


def _worked(task: Task, choose: random.Random, digits: int) -> str:
    """A worked example and an empty line; empty where the task has none."""
    if not task.worked:
        return ""
    hidden = chain(choose, digits, WORKED_LETTERS)
    depths = sorted(choose.random() for _ in hidden.needles)
    context = insert(Haystack().words(WORKED_WORDS), list(zip(depths, hidden.needles, strict=True)))
    question, begun = task.asked(context, hidden)
    return f"{question} {begun}{task.answer(hidden)}\n\n"


def graded_lengths(shortest: int, longest: int) -> list[int]:
    """Lengths for `training_pairs` of a model that knows nothing yet: 100 from the shortest to the longest, most short.

    A short prompt holds little but what is asked for, so that a model learns what to look for there and the rest from
    longer ones; from long ones alone a plan with one full layer learns nothing in the same time.

    Args:
        shortest: tokens of prompt and answer together.
        longest: likewise.

    Raises:
        MasformerError: they are not in this order.
    """
    check_int("shortest length", shortest, 1)
    check_int("longest length", longest, shortest)
    return [shortest + round((longest - shortest) * (step / 99) ** 3) for step in range(100)]


def training_pairs(
    tokenizer: Any,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    pairs: int,
    *,
    haystack: Haystack | None = None,
    seed: int = 0,
    digits: int | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Pairs for `masformer train` with `prompt` and `target`: the prompts of `Prober` without chat template.

    Task, length and depth are drawn at random for each; numbers, keys and places are of another stream than those that
    are tested. With numbers of two digits, a tested prompt may still come up by chance.

    Args:
        tokenizer: of transformers.
        tasks: to draw from.
        lengths: to draw from: tokens of prompt and answer together.
        pairs: how many.
        haystack: as in `Prober`, like the following.
        seed: of all that is drawn.
        digits: of the numbers.
        max_new_tokens: the most tokens of an answer.

    Yields:
        `prompt` and `target`, and the `task`, `length` and `depth`.

    Raises:
        MasformerError: a number out of range, nothing to draw from, or as `Prober.probe`.
    """
    check_int("pairs", pairs, 1)
    if not tasks or not lengths:
        raise MasformerError("pairs need at least one task and one length")
    prober = Prober(tokenizer, chat=False, haystack=haystack, seed=seed, digits=digits, max_new_tokens=max_new_tokens)
    choose = random.Random(f"{TRAINING} {seed}")
    for index in range(pairs):
        task, length, depth = choose.choice(tasks), choose.choice(lengths), choose.uniform(0, 100)
        probe = prober.probe(task, length, depth, index, TRAINING)
        yield {"prompt": probe.text, "target": probe.target, "task": task.name, "length": length, "depth": depth}
