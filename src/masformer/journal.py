"""Long work kept as it goes, one JSON object a line: what is in the file when a run is stopped is not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from masformer.errors import MasformerError


def recover_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a journal, made if missing; a last line whose writing was interrupted is cut off the file.

    Raises:
        MasformerError: the file cannot be read or written, or is no journal.
    """
    rows = []
    try:
        with Path(path).open("a+b") as file:
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].splitlines(), start=1):
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise MasformerError(
                        f"{path}, line {number}: not a JSON object; name another file, or delete this one"
                    )
                rows.append(row)
            if whole < len(content):
                if not content[whole:].startswith(b"{"):
                    raise MasformerError(f"{path} is no journal; name another file")
                file.truncate(whole)
    except OSError as error:
        raise MasformerError(f"cannot use the journal {path}: {error.strerror}") from None
    return rows


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
