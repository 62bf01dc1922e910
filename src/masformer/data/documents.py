"""Reading documents: plain text (one document a file), JSON lines and Parquet (one a row), compressed or not.

>>> import tempfile
>>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
...     print('{"text": "one"}', '{"text": "two"}', sep="\\n", file=file, flush=True)
...     [document.text for document in read_documents([file.name], limit=1)]
['one']
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from masformer.errors import MasformerError, check_int
from masformer.extras import need
from masformer.files import COMPRESSED, decode_text, missing, open_content, parse_json

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
NOT_TEXT = (".json", PARQUET, ".arrow", ".csv", ".tsv", ".zip", ".tar", ".zst", ".7z", ".pdf", ".docx", ".gguf")
DATA_FORMS = (
    f"text files and JSON lines ({', '.join(JSON_LINES)}), either also as {', '.join(COMPRESSED)}, and {PARQUET}"
)
PARQUET_ROWS = 16
"""Rows of a Parquet file that are in memory at the same time."""
TEXT = "text"
"""The one field of a plain text file."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: where it was read: the file, and for JSON lines the line (`meetings.jsonl:17`).
        text: its text, never blank.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Row:
    """Some fields of one line, one row, or one text file.

    Attributes:
        name: where it was read, as in `Document`; of an entry of a list, its number follows (`meetings.jsonl:17#2`).
        texts: field -> its text, in the order in which the fields were asked for.
    """

    name: str
    texts: Mapping[str, str]


def read_documents(
    paths: Iterable[str | os.PathLike[str]], *, field: str = TEXT, limit: int | None = None
) -> Iterator[Document]:
    """Reads documents in the order of the files, lazily: no file is opened before its first document is asked for.

    Blank lines of JSON lines and documents whose text is blank are left out.

    Args:
        paths: UTF-8 files, or Parquet. `.jsonl` and `.ndjson` hold one JSON object a line; any other text file is one
            document. Each text file may be compressed (`.gz`, `.xz`, `.bz2`).
        field: the key of the text in JSON lines and Parquet.
        limit: at most that many documents in all.

    Raises:
        MasformerError: at once: no file given, a file is missing, a folder, or of another kind, a limit below 1. While
            reading: not UTF-8, damaged compression, JSON or Parquet, a line without the field, a file without a
            document.
    """
    files = check_files(paths)
    if limit is not None:
        check_int("limit of documents", limit, 1)
    return islice((document for path in files for document in _documents(path, field)), limit)


def _documents(path: Path, field: str) -> Iterator[Document]:
    found = False
    for row in _read(path, (field,), {}):
        if row.texts[field].strip():
            found = True
            yield Document(row.name, row.texts[field])
    if not found:
        raise MasformerError(f"data file {path} holds no document: it is empty, or every text in it is blank")


def read_rows(
    paths: Iterable[str | os.PathLike[str]],
    fields: Iterable[str],
    where: Mapping[str, str] | None = None,
    *,
    lists: bool = False,
) -> Iterator[Row]:
    """Reads several fields of each row, of the rows that `where` selects, lazily and in order; blank ones as well.

    A plain text file is one row with the field `text`, whatever field is asked for, if only one is; it has no field
    to select by.

    `meta.kind` is the field `kind` of the object `meta`. Where `queries` is a list of objects, `queries.answer` is that
    field of each of them: the row counts as one row for each entry of the list.

    Args:
        paths: as for `read_documents`.
        fields: the fields to read, each of them text.
        where: field -> the value it must have, as text.
        lists: the fields hold lists of objects, conversations for example; a row has each of them as JSON.

    Raises:
        MasformerError: as `read_documents`, but a file without a row is none; a row lacks a field of `where`, or fields
            lead into two lists.
    """
    files, fields, where = check_files(paths), tuple(fields), dict(where or {})
    for path in files:
        if _kind(path) not in (*JSON_LINES, PARQUET) and (where or len(fields) > 1 or lists):
            wanted = ", ".join([*where, *(fields if lists else fields[1:])])
            raise MasformerError(f"data file {path} is plain text, it has no fields (asked for: {wanted})")
    return (row for path in files for row in _read(path, fields, where, lists))


def check_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files, all of which are there and of a kind that can be read.

    Raises:
        MasformerError: no file given, or one is missing, a folder, or of another kind.
    """
    files = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    if not files:
        raise MasformerError(f"no data file given; allowed: {DATA_FORMS}")
    for path in files:
        if path.is_dir():
            raise MasformerError(f"data file {path} is a folder; allowed: {DATA_FORMS}")
        if not path.exists():
            raise missing("data file", path)
        if _kind(path) in NOT_TEXT and path.suffix.lower() != PARQUET:
            raise MasformerError(f"data file {path} is of the kind {_kind(path)}; allowed: {DATA_FORMS}")
    return files


def _kind(path: Path) -> str:
    """The suffix that says what is inside, lower-cased."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def _read(path: Path, fields: tuple[str, ...], where: Mapping[str, str], lists: bool = False) -> Iterator[Row]:
    with open_content(path) as file:
        if _kind(path) == PARQUET:
            yield from _parquet(path, file, fields, where, lists)
        elif _kind(path) in JSON_LINES:
            yield from _json_lines(path, file, fields, where, lists)
        else:
            yield Row(str(path), {fields[0]: decode_text(file.read(), str(path))})


def _json_lines(
    path: Path, file: BinaryIO, fields: tuple[str, ...], where: Mapping[str, str], lists: bool
) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        place = f"{path}, line {number}"
        try:
            content = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not content:
                continue
        except UnicodeDecodeError as error:
            raise MasformerError(f"{place}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
        row = parse_json(content, place)
        if not isinstance(row, dict):
            raise MasformerError(f"{place}: holds a {type(row).__name__}; each line must be one object {{...}}")
        yield from selected_rows(row, fields, where, f"{path}:{number}", place, lists)


def _parquet(
    path: Path, file: BinaryIO, fields: tuple[str, ...], where: Mapping[str, str], lists: bool
) -> Iterator[Row]:
    need("datasets", f"{path}, a Parquet file,", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
            names = table.schema_arrow.names
            columns = dict.fromkeys(field if field in names else field.split(".")[0] for field in (*fields, *where))
            for batch in table.iter_batches(PARQUET_ROWS, columns=[name for name in columns if name in names]):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{path}, row {number}"
                    if not set(columns) <= set(names):
                        row |= {name: None for name in names if name not in row}
                    yield from selected_rows(row, fields, where, f"{path}:{number}", place, lists)
            if number != table.metadata.num_rows:
                raise MasformerError(f"cannot read {path}: it holds {number} of {table.metadata.num_rows} rows")
    except MasformerError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter two: a value of a row
        raise MasformerError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def selected_rows(
    row: Mapping[str, Any],
    fields: Iterable[str],
    where: Mapping[str, str],
    name: str,
    place: str,
    lists: bool = False,
) -> Iterator[Row]:
    """The rows that one object stands for (`read_rows`), of those that `where` selects.

    Args:
        row: the object.
        fields: the fields to read.
        where: field -> the value it must have.
        name: the row's name.
        place: where it was read, for people.
        lists: see `read_rows`.

    Raises:
        MasformerError: a field is missing or holds no text (no list), or fields lead into two lists.
    """
    inner = dict.fromkeys(field.split(".")[0] for field in (*fields, *where) if field not in row and "." in field)
    many = [field for field in inner if isinstance(row.get(field), list)]
    if len(many) > 1:
        raise MasformerError(f"{place}: {' and '.join(many)} are both lists; allowed: fields of one list")
    if not many:
        if _is_selected(row, where, place):
            yield Row(name, _texts(row, fields, place, lists))
        return
    for number, entry in enumerate(row[many[0]], start=1):
        one, here = {**row, many[0]: entry}, f"{place}, entry {number} of {many[0]}"
        if _is_selected(one, where, here):
            yield Row(f"{name}#{number}", _texts(one, fields, here, lists))


def _value(row: Mapping[str, Any], field: str, place: str, purpose: str = "") -> Any:
    """What a field holds, `meta.kind` being the field `kind` of the object `meta`."""
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            inner = isinstance(value, Mapping) and value is not row
            found = ", ".join(value if inner else row) or "none at all"
            raise MasformerError(f"{place}: no field {field!r}{purpose}; the fields there are: {found}")
        value = value[part]
    return value


def _is_selected(row: Mapping[str, Any], where: Mapping[str, str], place: str) -> bool:
    return all(str(_value(row, field, place, " to select by")) == wanted for field, wanted in where.items())


def _texts(row: Mapping[str, Any], fields: Iterable[str], place: str, lists: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for field in fields:
        text = _value(row, field, place)
        if lists:
            text = [] if text is None and found else text  # the tools of a conversation that has none
            if not isinstance(text, list):
                raise MasformerError(f"{place}: field {field!r} holds a {type(text).__name__}, it must hold a list")
            text = json.dumps(text, ensure_ascii=False, default=str)
        if not isinstance(text, str):
            raise MasformerError(f"{place}: field {field!r} holds a {type(text).__name__}, it must hold a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise MasformerError(f"{place}: field {field!r} holds half a surrogate pair, which is no text") from None
        found[field] = text
    return found
