"""Standard output and error as they come: of an encoding that lacks characters, or closed by whoever read them."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator

READER_GONE = 1
"""Exit code where nobody reads standard output any more."""
PLAIN = dict(zip("█▀▄·…▁▂▃▅▆▇", "#',.~123567", strict=True))
"""Characters of drawings -> as wide ones where an encoding lacks them; other characters are written as numbers."""
BRAILLE = range(0x2800, 0x2900)
"""Of a turning sign."""


def _plainer(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = []
    for letter in error.object[error.start : error.end]:
        escaped = "*" if ord(letter) in BRAILLE else letter.encode("ascii", "backslashreplace").decode()
        found.append(PLAIN.get(letter, escaped))
    return "".join(found), error.end


codecs.register_error("masformer.plainer", _plainer)


def _streams() -> Iterator[io.TextIOWrapper]:
    return (each for each in (sys.stdout, sys.stderr) if isinstance(each, io.TextIOWrapper) and not each.closed)


def guarded(work: Callable[[], int]) -> int:
    """Runs a program whose output reaches people, or ends without a traceback.

    Args:
        work: the program; gives its exit code.

    Returns:
        The exit code: the program's, `READER_GONE`, or 2, with one line on standard error, where the system refused.
    """
    for stream in _streams():
        stream.reconfigure(errors="masformer.plainer")
    try:
        try:
            return work()
        finally:
            for stream in _streams():
                stream.flush()
    except BrokenPipeError:
        _drop()
        return READER_GONE
    except OSError as error:
        _drop()
        print(f"masformer: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _drop() -> None:
    """What can no longer be written is forgotten, so that the interpreter does not try again at its end."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
