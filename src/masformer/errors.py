"""The one exception type that masformer raises for a wrong value, and what numbers and texts may be."""

from __future__ import annotations

import math
import sys

LARGEST = 2**53 - 1
"""Of whole numbers, unless something else is said: floats hold it exactly, and sums of many stay within a tensor."""
LARGEST_SEED = 2**32 - 1
"""What every generator of random numbers takes."""
_SHOWN = 60


class MasformerError(ValueError):
    """A value that cannot be used: says what was wrong, what is allowed and, where it helps, what to do.

    The command line prints its text as one line and exits with `exit_code`.
    """

    exit_code = 2


def shown(value: object) -> str:
    """A value in a message: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no whole number of thousands of digits
        text = "a number of thousands of digits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def check_int(name: str, value: object, minimum: int, maximum: int = LARGEST) -> None:
    """Raises MasformerError unless `value` is a whole number from `minimum` to `maximum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise MasformerError(f"{name} must be a whole number, got {shown(value)}")
    if value < minimum:
        raise MasformerError(f"{name} must be at least {minimum}, got {shown(value)}")
    if value > maximum:
        raise MasformerError(f"{name} must be at most {maximum}, got {shown(value)}")


def check_seed(value: object) -> None:
    """Raises MasformerError unless `value` is a seed."""
    check_int("seed", value, 0, LARGEST_SEED)


def read_int(name: str, text: str, minimum: int, maximum: int = LARGEST) -> int:
    """A whole number of a text that holds nothing but its digits and perhaps a sign.

    Raises:
        MasformerError: it is out of range.
    """
    try:
        value = int(text)
    except ValueError:
        raise MasformerError(f"{name} must be a whole number of at most {maximum}, got {shown(text)}") from None
    check_int(name, value, minimum, maximum)
    return value


def check_number(name: str, value: object, minimum: float, maximum: float = math.inf, *, above: bool = False) -> None:
    """Raises MasformerError unless `value` is a finite number from `minimum` (`above`: beyond it) to `maximum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MasformerError(f"{name} must be a number, got {shown(value)}")
    if not minimum <= value <= maximum or (above and value == minimum) or not abs(value) <= sys.float_info.max:
        bound = "finite" if minimum == -math.inf else f"{'above' if above else 'at least'} {minimum:g}"
        bound += "" if maximum == math.inf else f" and at most {maximum:g}"
        raise MasformerError(f"{name} must be {bound}, got {shown(value)}")


def check_text(name: str, value: str) -> None:
    """Raises MasformerError where a text holds what no file and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MasformerError(f"{name} is no UTF-8 text: {shown(value)!a}") from None
    if "\0" in value:
        raise MasformerError(f"{name} holds a zero byte: {shown(value)}")


def beyond_memory(error: BaseException) -> bool:
    """Whether an error of Python, numpy or torch says that there is not enough memory."""
    said = ("allocate memory", "out of memory", "Storage size calculation overflowed", "Invalid buffer size")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)
