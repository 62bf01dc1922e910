"""From text to tokens, the same way for training, measuring, generating and serving.

A whole document is what the tokenizer makes of it, with the special tokens that it puts before and after a text. A text
that goes on (a prompt) has those before it alone: after a token that ends texts there is nothing to continue. A part of
a text has none.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any


def part_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a part of a text."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def token_rows(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Token ids of whole documents (`special`) or of parts of texts, many at a time."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return found


def opening_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on."""
    tokens, added = _marked(tokenizer, text)
    if not all(added):
        return tokens[: len(added) - added[::-1].index(0)]
    some, marks = _marked(tokenizer, "a")  # of no text, those before and after it look alike
    if not all(marks):
        return some[: marks.index(0)]
    while tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def _marked(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids, and 1 for each that the tokenizer adds to the text."""
    made = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    return list(made["input_ids"]), list(made["special_tokens_mask"])


def tokenize_around(tokenizer: Any, before: str, after: str, *, special: bool = True) -> tuple[list[int], list[int]]:
    """Token ids of what stands before and after the part of a prompt that may be cut, each tokenized by itself.

    Args:
        tokenizer: of transformers.
        before: the text before.
        after: the text after.
        special: whether the tokenizer's own special tokens come before; not so where the text holds them.
    """
    head = opening_tokens(tokenizer, before) if special else part_tokens(tokenizer, before)
    return head, part_tokens(tokenizer, after) if after else []


def open_ended(tokenizer: Any) -> Any:
    """A fast tokenizer whose every text goes on, for libraries that tokenize by themselves: see `opening_tokens`.

    Args:
        tokenizer: of transformers; it stays as it is.

    Returns:
        A copy that puts no special token after a text; the same tokenizer where it puts none.
    """
    processor = getattr(getattr(tokenizer, "backend_tokenizer", None), "post_processor", None)
    if processor is None:
        return tokenizer
    state = json.loads(processor.__getstate__())
    ends = False
    for part in state.get("processors", [state]):
        while part.get("single") and "SpecialToken" in part["single"][-1]:
            part["single"].pop()
            ends = True
    if not ends:
        return tokenizer
    processor.__setstate__(json.dumps(state).encode())
    found = copy.deepcopy(tokenizer)
    found.backend_tokenizer.post_processor = processor
    return found
