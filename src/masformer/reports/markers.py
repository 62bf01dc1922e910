"""Tables of figures in a text file, between two comments, made from the records again by a command.

    <!-- table: attention-cpu.json columns="name=span,ideal:.1f" pivot=pass values=speedup:.1f
         where="name!=full causal SDPA" -->
    <!-- end -->

What stands between the comments is replaced by the table. After `table:` come records (files below the folder of
records), then options: `rows=PATH` says which rows of the records (`results` by default), `columns=` which columns in
which order (`masformer.reports.rows.Column`), `where=KEY=VALUE` or `where=KEY!=VALUE` which rows (may be repeated;
`VALUE|VALUE` for several), `call=NAME=TEXT` only rows of these names, in this order, with another text for each (may be
repeated), `pivot=KEY` a key whose values become columns, which hold `values=`, and `title=OLD=NEW` another heading (may
be repeated). Every row also has the key `record`, the name of its record.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from masformer.errors import MasformerError
from masformer.files import write_whole
from masformer.records import read_record
from masformer.reports.build import figures_of
from masformer.reports.document import Table
from masformer.reports.kinds import KINDS, View
from masformer.reports.markdown import markdown_table
from masformer.reports.rows import Column, Row, keys_of, pivoted, table

START, END = "<!-- table:", "<!-- end -->"
ONCE, OFTEN = ("rows", "columns", "pivot", "values"), ("where", "call", "title")


class OutOfDateError(MasformerError):
    """A file whose tables differ from the records."""

    exit_code = 1


@dataclass(frozen=True)
class _Marker:
    """A comment that asks for a table, and the lines of the file that it is about.

    Attributes:
        text: of the comment, without its frame.
        line: where the comment starts, from 1.
        first: index of the first line after the comment.
        end: index of the line of the comment that ends the table.
    """

    text: str
    line: int
    first: int
    end: int


def update_tables(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, check: bool = False) -> bool:
    """Makes the tables of a text file again from records.

    Args:
        path: the file, Markdown; its other lines stay as they are.
        folder: where the records are.
        check: write nothing.

    Returns:
        Whether the file was changed.

    Raises:
        OutOfDateError: with `check`, a table differs from its records.
        MasformerError: the file cannot be read or written, holds no such comment or a wrong one, or a record is
            missing.
    """
    path, folder = Path(path), Path(folder)
    try:
        old = path.read_bytes().decode()
    except OSError as error:
        raise MasformerError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MasformerError(f"{path} is no UTF-8 text: byte {error.start}") from None
    newline = "\r\n" if "\r\n" in old else "\n"
    lines = old.split(newline)
    markers = _markers(lines, path)
    if not markers:
        raise MasformerError(f"{path} has no comment {START} RECORD ... -->, so there is no table to write")
    changed = None
    for marker in reversed(markers):
        try:
            made = markdown_table(marked_table(marker.text, folder))
        except MasformerError as error:
            raise MasformerError(f"{path}, line {marker.line}: {error}") from None
        between = ["", *made.split("\n"), ""]
        if lines[marker.first : marker.end] != between:
            changed = marker.line
            lines[marker.first : marker.end] = between
    if changed is None:
        return False
    if check:
        raise OutOfDateError(
            f"{path} is out of date: the table at line {changed} differs from {folder}; "
            f"`masformer report {folder} --into {path}` writes it"
        )
    write_whole(path, newline.join(lines).encode())
    return True


def _markers(lines: Sequence[str], path: Path) -> list[_Marker]:
    """The comments of a file that are not inside of a block of code."""
    found: list[_Marker] = []
    fence, index = "", 0
    while index < len(lines):
        line = lines[index]
        if match := re.match(r" {0,3}(`{3,}|~{3,})", line):
            if not fence:
                fence = match[1]
            elif match[1].startswith(fence) and not line.strip(" " + fence[0]):
                fence = ""
        elif not fence and line.startswith(START):
            start, text = index, line
            while not text.rstrip().endswith("-->"):
                index += 1
                if index == len(lines):
                    raise MasformerError(f"{path}, line {start + 1}: the comment {START} has no end, -->")
                text += f" {lines[index]}"
            first = index + 1
            end = next((at for at in range(first, len(lines)) if lines[at].startswith((END, START))), None)
            if end is None or not lines[end].startswith(END):
                raise MasformerError(f"{path}, line {start + 1}: no {END} after this table")
            found.append(_Marker(text.strip()[len(START) : -len("-->")], start + 1, first, end))
            index = end
        index += 1
    return found


def marked_table(text: str, folder: Path) -> Table:
    """The table that a comment asks for; `text` is what stands after `table:`.

    Raises:
        MasformerError: the text cannot be read, or the records, rows or columns that it names are not there.
    """
    names, options, conditions, calls, titles = _parse(text)
    rows = [row for name in names for row in _rows(folder, name, options.get("rows", "results"))]
    for condition in conditions:
        key, unlike, wanted = _condition(condition)
        _check_key(key, rows)
        rows = [row for row in rows if (_plain(row, key) in wanted.split("|")) != unlike]
    if not rows:
        raise MasformerError("no row is left by where")
    if calls:
        rows = _called(rows, calls)
    columns = _columns(options["columns"], rows) if "columns" in options else _all_columns(rows)
    if ("pivot" in options) != ("values" in options):
        raise MasformerError("pivot and values need each other")
    if "pivot" in options:
        across, values = options["pivot"].split(","), _columns(options["values"], rows)
        for key in across:
            _check_key(key, rows)
        if "columns" not in options:
            used = {*across, *(column.key for column in values)}
            columns = [column for column in columns if column.key not in used]
        made = pivoted(rows, columns, across, values)
    else:
        made = table(rows, columns)
    for old in titles:
        if old not in made.columns:
            raise MasformerError(f"no column {old!r} to rename; allowed: {', '.join(made.columns)}")
    return replace(made, columns=tuple(titles.get(title, title) for title in made.columns))


def _called(rows: Sequence[Row], calls: dict[str, str]) -> list[Row]:
    """The rows of these names, in their order, under other names."""
    _check_key("name", rows)
    there = [_plain(row, "name") for row in rows]
    for name in calls:
        if name not in there:
            raise MasformerError(f"no row {name!r} to call otherwise; allowed: {', '.join(dict.fromkeys(there))}")
    return [row | {"name": text} for name, text in calls.items() for row in rows if _plain(row, "name") == name]


def _parse(text: str) -> tuple[list[str], dict[str, str], list[str], dict[str, str], dict[str, str]]:
    """The records, the options that are given once, the conditions, name -> text, and old -> new titles."""
    try:
        tokens = shlex.split(text)
    except ValueError as error:
        raise MasformerError(f"cannot read this comment: {error}") from None
    names: list[str] = []
    options: dict[str, str] = {}
    conditions: list[str] = []
    calls: dict[str, str] = {}
    titles: dict[str, str] = {}
    for token in tokens:
        key, separator, value = token.partition("=")
        if not separator and not (options or conditions or calls or titles):
            names.append(token)
        elif key not in (*ONCE, *OFTEN) or not value:
            allowed = ", ".join(f"{name}=" for name in (*ONCE, *OFTEN))
            raise MasformerError(f"cannot read {token!r}; allowed: records, then {allowed}")
        elif key == "where":
            conditions.append(value)
        elif key in ("call", "title"):
            old, separator, new = value.partition("=")
            if not separator:
                raise MasformerError(f"cannot read {key} {value!r}; allowed: OLD=NEW")
            (calls if key == "call" else titles)[old] = new
        elif key in options:
            raise MasformerError(f"{key}= is given twice")
        else:
            options[key] = value
    if not names:
        raise MasformerError("the comment names no record")
    return names, options, conditions, calls, titles


def _condition(text: str) -> tuple[str, bool, str]:
    match = re.fullmatch(r"([^!=]+)(!?=)(.*)", text, re.DOTALL)
    if match is None:
        raise MasformerError(f"cannot read where {text!r}; allowed: KEY=VALUE, KEY!=VALUE, with | between values")
    return match[1], match[2] == "!=", match[3]


def _rows(folder: Path, name: str, path: str) -> list[Row]:
    file = folder / (name if name.endswith(".json") else f"{name}.json")
    record = read_record(file)
    if record is None:
        raise MasformerError(f"{file} is no record of masformer")
    with figures_of([record]):
        sets = KINDS.get(record.kind, View()).rows(record.figures)
    if path not in sets:
        allowed = f"allowed: {', '.join(sets)}" if sets else "it has no rows"
        raise MasformerError(f"no rows {path!r} in {file}; {allowed}")
    return [{"record": name.removesuffix(".json")} | row for row in sets[path]]


def _columns(text: str, rows: Sequence[Row]) -> list[Column]:
    columns = [Column.parse(part) for part in text.split(",")]
    for column in columns:
        _check_key(column.key, rows)
    return columns


def _all_columns(rows: Sequence[Row]) -> list[Column]:
    keys = [key for key in keys_of(rows) if any(row.get(key) is not None for row in rows)]
    several = len({row["record"] for row in rows}) > 1
    return [Column.of(key) for key in keys if key != "record" or several]


def _check_key(key: str, rows: Sequence[Row]) -> None:
    keys = keys_of(rows)
    if key not in keys:
        raise MasformerError(f"no column {key!r}; allowed: {', '.join(keys)}")


def _plain(row: Row, key: str) -> str:
    return "" if row.get(key) is None else str(row[key])
