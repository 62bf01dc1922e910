"""Reading documents: plain text (one document a file) and JSON lines (one a line), compressed or not.

>>> import tempfile
>>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
...     print('{"text": "one"}', '{"text": "two"}', sep="\\n", file=file, flush=True)
...     [document.text for document in read_documents([file.name], limit=1)]
['one']
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from masformer.errors import MasformerError, check_int

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
JSON_LINES = (".jsonl", ".ndjson")
NOT_TEXT = (".json", ".parquet", ".arrow", ".csv", ".tsv", ".zip", ".tar", ".zst", ".7z", ".pdf", ".docx", ".gguf")
DATA_FORMS = f"text files and JSON lines ({', '.join(JSON_LINES)}), either also as {', '.join(COMPRESSED)}"


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: where it was read: the file, and for JSON lines the line (`meetings.jsonl:17`).
        text: its text, never blank.
    """

    name: str
    text: str


def read_documents(
    paths: Iterable[str | os.PathLike[str]], *, field: str = "text", limit: int | None = None
) -> Iterator[Document]:
    """Reads documents in the order of the files, lazily: no file is opened before its first document is asked for.

    Blank lines of JSON lines and documents whose text is blank are left out.

    Args:
        paths: UTF-8 files. `.jsonl` and `.ndjson` hold one JSON object a line; any other file is one document. Each may
            be compressed (`.gz`, `.xz`, `.bz2`).
        field: the key of the text in JSON lines.
        limit: at most that many documents in all.

    Raises:
        MasformerError: at once: no file given, a file is missing, a folder, or of another kind, a limit below 1. While
            reading: not UTF-8, damaged compression or JSON, a line without the field, a file without a document.
    """
    files = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    if not files:
        raise MasformerError(f"no data file given; allowed: {DATA_FORMS}")
    if limit is not None:
        check_int("limit of documents", limit, 1)
    for path in files:
        if path.is_dir():
            raise MasformerError(f"data file {path} is a folder; allowed: {DATA_FORMS}")
        if not path.exists():
            raise MasformerError(f"data file {path} does not exist")
        if _kind(path) in NOT_TEXT:
            raise MasformerError(f"data file {path} is of the kind {_kind(path)}; allowed: {DATA_FORMS}")
    return islice((document for path in files for document in _read(path, field)), limit)


def _kind(path: Path) -> str:
    """The suffix that says what is inside, lower-cased."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def _read(path: Path, field: str) -> Iterator[Document]:
    opener: Callable[..., Any] = COMPRESSED.get(path.suffix.lower(), open)
    found = False
    try:
        with opener(path, "rb") as file:
            for document in _json_lines(path, file, field) if _kind(path) in JSON_LINES else _plain(path, file):
                found = True
                yield document
    except OSError as error:
        raise MasformerError(f"cannot read {path}: {error.strerror or error}") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise MasformerError(f"cannot read {path}: {error}; the file is damaged or cut short") from None
    if not found:
        raise MasformerError(f"data file {path} holds no document: it is empty, or every text in it is blank")


def _plain(path: Path, file: BinaryIO) -> Iterator[Document]:
    data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MasformerError(f"{path}, line {line}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    if text.strip():
        yield Document(str(path), text)


def _json_lines(path: Path, file: BinaryIO, field: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        try:
            content = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not content:
                continue
            row = json.loads(content)
        except UnicodeDecodeError as error:
            raise MasformerError(f"{where}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise MasformerError(
                f"{where}: not JSON ({getattr(error, 'msg', error)}); each line must be one object"
            ) from None
        if not isinstance(row, dict):
            raise MasformerError(f"{where}: holds a {type(row).__name__}; each line must be one object {{...}}")
        if field not in row:
            fields = ", ".join(row) or "none at all"
            raise MasformerError(f"{where}: no field {field!r}; the fields there are: {fields} (choose with --field)")
        text = row[field]
        if not isinstance(text, str):
            raise MasformerError(f"{where}: field {field!r} holds a {type(text).__name__}, it must hold a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise MasformerError(f"{where}: field {field!r} holds half a surrogate pair, which is no text") from None
        if text.strip():
            yield Document(f"{path}:{number}", text)
