"""Long work kept as it goes, one JSON object a line: what is in the file when a run is stopped is not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from masformer.errors import MasformerError
from masformer.files import parse_json

Entry = TypeVar("Entry")


def recover_lines(path: str | os.PathLike[str], read: Callable[[dict[str, Any]], Entry], what: str) -> list[Entry]:
    """The entries of a journal, made if missing; a last line whose writing was interrupted is cut off the file.

    A file that holds anything else stays as it is.

    Args:
        path: the file.
        read: makes an entry of an object; a TypeError or KeyError says that it is none.
        what: what an entry is called in messages, for example "a measurement".

    Raises:
        MasformerError: the file cannot be read or written, or holds something else.
    """

    def entry(number: int, line: bytes) -> Entry:
        try:
            row = parse_json(line, str(path))
            if isinstance(row, dict):
                return read(row)
        except (ValueError, TypeError, KeyError):  # a MasformerError is a ValueError
            pass
        raise MasformerError(f"{path}, line {number}: not {what}; name another file, or delete this one")

    try:
        with Path(path).open("a+b") as file:
            file.seek(0)
            content = file.read()
            *lines, last = content.split(b"\n")
            found = [entry(number, line) for number, line in enumerate(lines, start=1)]
            if last:
                if _is_json(last):  # a text file whose last line has no end, or the end alone is missing
                    found.append(entry(len(lines) + 1, last))
                    file.write(b"\n")
                elif last.startswith(b"{"):
                    file.truncate(len(content) - len(last))
                else:
                    raise MasformerError(f"{path}, line {len(lines) + 1}: not {what}; name another file")
    except OSError as error:
        raise MasformerError(f"cannot use the journal {path}: {error.strerror}") from None
    return found


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line, "a line")
    except MasformerError:
        return False
    return True


def append_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds objects to a journal; they are in the file when this returns.

    Raises:
        MasformerError: the file cannot be written.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with Path(path).open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MasformerError(f"cannot write the journal {path}: {error.strerror}") from None
