"""What is hidden and asked for: the pass key of Mohtashami & Jaggi (arXiv 2305.16300), and five tasks of RULER (Hsieh
et al., arXiv 2404.06654) in RULER's own words.

| task | hidden | asked for |
|---|---|---|
| `passkey` | one number, told twice | the number |
| `niah_single` | the number of one key | it |
| `niah_multikey` | the numbers of 4 keys, one each | that of one key |
| `niah_multivalue` | 4 numbers of one key | all 4 |
| `niah_multiquery` | the numbers of 4 keys, one each | all 4 |
| `variable_tracking` | a number given to a variable, this one to another, 4 times | all 5 variables |
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from masformer.errors import MasformerError, check_int

KEYS = VALUES = 4
"""Of the tasks with several: RULER's numbers (`niah_multikey_1`, `niah_multivalue`, `niah_multiquery`)."""
HOPS = 4
"""Of variable tracking: assignments of one variable to the next, as in RULER."""
MOST_DIGITS = 100
LETTERS = 5
"""Of a variable's name; of those in the worked example 3, as in RULER."""
ADJECTIVES = (
    "ancient", "bold", "brave", "bright", "calm", "clever", "cold", "curious", "dark", "eager", "fancy", "gentle",
    "grand", "happy", "hollow", "humble", "jolly", "kind", "lively", "lonely", "lucky", "mellow", "mighty", "narrow",
    "noble", "patient", "plain", "proud", "quick", "quiet", "rapid", "rare", "rough", "shiny", "silent", "simple",
    "steady", "swift", "tiny", "warm",
)  # fmt: skip
NOUNS = (
    "anchor", "apple", "basket", "beacon", "bridge", "button", "cabin", "candle", "castle", "comet", "copper", "desert",
    "dolphin", "engine", "falcon", "feather", "forest", "garden", "hammer", "harbor", "island", "jacket", "kettle",
    "ladder", "lantern", "marble", "meadow", "mirror", "needle", "orchard", "pebble", "pencil", "quarry", "ribbon",
    "river", "saddle", "temple", "tunnel", "valley", "window",
)  # fmt: skip
"""A key is one of each, as in `brave-falcon`."""


@dataclass(frozen=True)
class Hidden:
    """What one example hides.

    Attributes:
        needles: sentences in the order in which they stand in the text; all of them are needed for the answer.
        distractors: sentences of the same form that are not asked for.
        query: what is asked for.
        answers: the references; none is part of another.
    """

    needles: tuple[str, ...]
    distractors: tuple[str, ...]
    query: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: of it.
        question: the text around the haystack, with `{context}` and perhaps `{query}`.
        begun: how the answer begins, which the prompt ends with; perhaps with `{query}`.
        room: the most tokens to generate; those of RULER.
        digits: of the numbers that are hidden.
        hide: makes what is hidden, with so many digits.
        separator: between the answers in a written answer.
        worked: whether a worked example comes first.
    """

    name: str
    question: str
    begun: str
    room: int
    digits: int
    hide: Callable[[random.Random, int], Hidden]
    separator: str = ", "
    worked: bool = False

    def asked(self, context: str, hidden: Hidden) -> tuple[str, str]:
        """The question around a text, and how its answer begins."""
        return self.question.format(context=context, query=hidden.query), self.begun.format(query=hidden.query)

    def answer(self, hidden: Hidden) -> str:
        """What a right answer goes on with."""
        return f" {self.separator.join(hidden.answers)}."


def number(choose: random.Random, digits: int) -> str:
    """A number of exactly so many digits, so that none is part of another."""
    return str(choose.randrange(10 ** (digits - 1), 10**digits))


def numbers(choose: random.Random, digits: int, count: int) -> list[str]:
    """Different numbers of exactly so many digits."""
    return [str(each) for each in choose.sample(range(10 ** (digits - 1), 10**digits), count)]


def _keys(choose: random.Random, count: int) -> list[str]:
    places = choose.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[place // len(NOUNS)]}-{NOUNS[place % len(NOUNS)]}" for place in places]


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _passkey(choose: random.Random, digits: int) -> Hidden:
    key = number(choose, digits)
    return Hidden((f"The pass key is {key}. Remember it. {key} is the pass key.",), (), "", (key,))


def _single(choose: random.Random, digits: int) -> Hidden:
    (key,), value = _keys(choose, 1), number(choose, digits)
    return Hidden((_needle(key, value),), (), key, (value,))


def _multikey(choose: random.Random, digits: int) -> Hidden:
    keys, values = _keys(choose, KEYS), numbers(choose, digits, KEYS)
    first, *rest = map(_needle, keys, values)
    return Hidden((first,), tuple(rest), keys[0], (values[0],))


def _multivalue(choose: random.Random, digits: int) -> Hidden:
    (key,), values = _keys(choose, 1), numbers(choose, digits, VALUES)
    return Hidden(tuple(_needle(key, value) for value in values), (), key, tuple(values))


def _multiquery(choose: random.Random, digits: int) -> Hidden:
    keys, values = _keys(choose, KEYS), numbers(choose, digits, KEYS)
    query = f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return Hidden(tuple(map(_needle, keys, values)), (), query, tuple(values))


def chain(choose: random.Random, digits: int, letters: int = LETTERS) -> Hidden:
    """A chain of assignments with variables of so many letters."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(choose.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = number(choose, digits)
    sources = [value, *(f"VAR {name}" for name in names)]
    needles = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
    return Hidden(tuple(needles), (), value, tuple(names))


_PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n{context}\nWhat is the pass key?"
)
_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n{context}\n"
    "What is the special magic number for {query} mentioned in the provided text?"
)
_ONE_BEGUN = "The special magic number for {query} mentioned in the provided text is"
_ALL = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n{context}\n"
    "What are all the special magic numbers for {query} mentioned in the provided text?"
)
_ALL_BEGUN = "The special magic numbers for {query} mentioned in the provided text are"
_TRACK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
_TRACK_BEGUN = (  # the misspelling is RULER's
    "Answer: According to the chain(s) of variable assignment in the text above, "
    f"{HOPS + 1} variables are assgined the value {{query}}, they are:"
)
TASKS = {
    task.name: task
    for task in (
        Task("passkey", _PASSKEY, "The pass key is", 16, 5, _passkey),
        Task("niah_single", _ONE, _ONE_BEGUN, 128, 7, _single),
        Task("niah_multikey", _ONE, _ONE_BEGUN, 128, 7, _multikey),
        Task("niah_multivalue", _ALL, _ALL_BEGUN, 128, 7, _multivalue),
        Task("niah_multiquery", _ALL, _ALL_BEGUN, 128, 7, _multiquery),
        Task("variable_tracking", _TRACK, _TRACK_BEGUN, 30, 5, chain, separator=" ", worked=True),
    )
}
"""Name -> task."""


def tasks_of(names: str) -> list[Task]:
    """`passkey,niah_single` -> the tasks.

    Raises:
        MasformerError: an unknown name, or one given twice.
    """
    found: list[Task] = []
    for name in (part.strip() for part in names.split(",")):
        if name not in TASKS:
            raise MasformerError(f"unknown task {name!r}; allowed: {', '.join(TASKS)}")
        if TASKS[name] in found:
            raise MasformerError(f"task {name} is given twice")
        found.append(TASKS[name])
    return found


def check_digits(digits: int) -> None:
    """Raises MasformerError where numbers of so many digits are too few to be told apart, or too long to be drawn."""
    check_int("digits", digits, 2, MOST_DIGITS)


def string_match_all(text: str, references: Sequence[str]) -> float:
    """RULER's score of one example: the share of references that the text holds, in percent, whatever their case.

    Args:
        text: what was generated.
        references: at least one.
    """
    return 100 * sum(each.lower() in text.lower() for each in references) / len(references)
