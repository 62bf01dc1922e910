"""A tokenizer with a token for each word that a task can hold: tiny models learn to retrieve with it in minutes."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from masformer.errors import MasformerError
from masformer.evaluation.retrieval.haystack import NOISE
from masformer.evaluation.retrieval.tasks import ADJECTIVES, NOUNS, TASKS, Task, check_digits

END, UNKNOWN = "<end>", "<unknown>"
MOST_DIGITS = 3
WORD = r"\w+|[^\w\s]"
"""A token is a run of letters and digits, or one other sign; white space goes."""


def word_tokenizer(tasks: Sequence[Task], digits: int) -> PreTrainedTokenizerFast:
    """A token for each word, number and sign of these tasks in their own haystack; others are `<unknown>`.

    Args:
        tasks: any but variable tracking, whose variables are too many.
        digits: of the numbers: each of the 9 * 10^(digits - 1) is a token, so 2 or 3.

    Raises:
        MasformerError: a task or a number of digits that is not allowed.
    """
    check_digits(digits)
    if digits > MOST_DIGITS:
        raise MasformerError(
            f"numbers of {digits} digits are too many for tokens of their own; allowed: 2, {MOST_DIGITS}"
        )
    if TASKS["variable_tracking"] in tasks:
        allowed = ", ".join(name for name in TASKS if name != "variable_tracking")
        raise MasformerError(f"a word tokenizer cannot hold the variables of variable_tracking; allowed: {allowed}")
    texts = [*NOISE, *ADJECTIVES, *NOUNS] if any("{query}" in task.question for task in tasks) else [*NOISE]
    for task in tasks:
        hidden = task.hide(random.Random(0), digits)
        texts += [*task.asked("", hidden), *hidden.needles, *hidden.distractors, task.answer(hidden)]
    known = {word for text in texts for word in re.findall(WORD, text) if not word.isdigit()}
    known |= set(map(str, range(10 ** (digits - 1), 10**digits)))
    vocabulary = {word: index for index, word in enumerate((END, UNKNOWN, *sorted(known)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
