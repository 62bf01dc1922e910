"""The rows of a record, and tables of some of their columns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from masformer.errors import MasformerError
from masformer.evaluation.intervals import Interval
from masformer.plan import PLAN_SUFFIXES
from masformer.reports.document import Table
from masformer.reports.values import NOTHING, as_interval, is_number, show

Row = dict[str, Any]
"""Key -> number, text, truth value, None or `Interval`; keys of what was nested are joined by points."""
GROUP = {"placements": "text", "ranks": "text", "evaluations": "step"}
"""Where rows stand in a mapping: what its keys are."""


def flat(values: Mapping[str, Any], lists: bool = False) -> Row:
    """What a mapping holds, without lists of figures.

    An `interval` goes to its neighbour of the same mean, so that a perplexity and its interval are one value.

    Args:
        values: plain values.
        lists: keep lists of 1 to 8 numbers or texts.
    """
    found: Row = {}
    for key, value in values.items():
        interval = as_interval(value)
        if interval is not None:
            found[key] = interval
        elif isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in flat(value, lists).items()}
        elif isinstance(value, (list, tuple)):
            if lists and 1 <= len(value) <= 8 and all(isinstance(each, str) or is_number(each) for each in value):
                found[key] = value
        else:
            found[key] = value
    for key in [key for key, value in found.items() if isinstance(value, Interval) and _leaf(key) == "interval"]:
        stem, interval = key[: -len("interval")], found[key]
        for name, value in found.items():
            alike = name.startswith(stem) and "." not in name[len(stem) :] and is_number(value)
            if alike and math.isclose(value, interval.mean, rel_tol=1e-9):
                found[name] = found.pop(key)
                break
    return found


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def row_sets(figures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Path -> rows, of everything in a record that is rows.

    Rows are lists of mappings (`results`); of mappings that each hold such a list (`plans.costs`), where every row also
    gets the texts and numbers beside the list; mappings of names to such lists (`placements`) or to mappings of equal
    keys (`ranks`), where the name is a column; and mappings of names to raw timings (`forward.seconds`), of which the
    median is shown. Where a plan file names a row, its plan takes the place of the file's name.
    """
    found = {path: rows for path, rows in _row_sets(figures, "") if rows}
    every = [row for rows in found.values() for row in rows]
    named = [(str(row["name"]), row["plan"]) for row in every if {"name", "plan"} <= set(row)]
    files = {name: plan for name, plan in named if name.lower().endswith(PLAN_SUFFIXES)}
    for row in every:
        row |= {key: files[name] for key in ("name", "against") if (name := str(row.get(key))) in files}
    return found


def _row_sets(values: Mapping[str, Any], stem: str) -> Iterator[tuple[str, list[Row]]]:
    for key, value in values.items():
        path = f"{stem}{key}"
        if _is_rows(value):
            own = [flat(row) for row in value]
            nested = {name for row in value for name, inner in row.items() if _is_rows(inner)}
            if any(set(row) - {"name", "plan"} for row in own):
                yield path, own
            for name in sorted(nested):
                yield (
                    f"{path}.{name}",
                    [
                        {key: each for key, each in outer.items() if "." not in key} | flat(inner)
                        for outer, row in zip(own, value, strict=True)
                        for inner in row.get(name) or ()
                    ],
                )
        elif isinstance(value, Mapping) and value and as_interval(value) is None:
            column, inner = GROUP.get(key, "name"), list(value.values())
            if all(map(_is_rows, inner)):
                yield path, [{column: name} | flat(row) for name, rows in value.items() for row in rows]
            elif all(isinstance(each, list) and each and all(map(is_number, each)) for each in inner):
                rows = [{column: name, "median": _median(each), "runs": len(each)} for name, each in value.items()]
                yield path, rows
            elif _alike(inner) and (len(inner) > 1 or key in GROUP):
                yield path, [{column: name} | flat(each) for name, each in value.items()]
            else:
                yield from _row_sets(value, f"{path}.")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _alike(values: Sequence[Any]) -> bool:
    mappings = all(isinstance(each, Mapping) and each and as_interval(each) is None for each in values)
    return mappings and len({frozenset(each) for each in values}) == 1


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def keys_of(rows: Sequence[Row]) -> list[str]:
    """The columns that rows have, in the order in which they appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the rows.
        spec: how its numbers are written, see `masformer.reports.values.show`; None for the default.
        title: its heading.
    """

    key: str
    spec: str | None
    title: str

    @classmethod
    def parse(cls, text: str) -> Column:
        """Reads `KEY`, `KEY:FORMAT`, `KEY=TITLE` or `KEY:FORMAT=TITLE`; the title is else the key in words.

        Raises:
            MasformerError: it is none of these.
        """
        match = re.fullmatch(r"\s*([^:=\s]+)(?::([^=]*[^=\s]))?\s*(?:=\s*(.*?))?\s*", text)
        if match is None:
            raise MasformerError(
                f"cannot read the column {text!r}; allowed: KEY, KEY:FORMAT, KEY=TITLE, KEY:FORMAT=TITLE"
            )
        key, spec, title = match.groups()
        return cls(key, spec, words(key) if title is None else title)

    @classmethod
    def of(cls, key: str) -> Column:
        """A key with its words as title."""
        return cls(key, None, words(key))

    def cell(self, row: Row) -> str:
        """The value of a row as text."""
        return show(row.get(self.key), self.key, self.spec)


def words(key: str) -> str:
    """`second_half.perplexity` -> `second half perplexity`, `settings.samples` -> `samples`."""
    return re.sub(r"[._]", " ", key.removeprefix("settings."))


def table(rows: Sequence[Row], columns: Sequence[Column], title: str = "", note: str = "") -> Table:
    """A table of rows, one line each."""
    return Table(
        columns=tuple(column.title for column in columns),
        rows=tuple(tuple(column.cell(row) for column in columns) for row in rows),
        numeric=tuple(_numeric(rows, column.key) for column in columns),
        title=title,
        note=note,
    )


def _numeric(rows: Sequence[Row], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return bool(values) and all(is_number(value) or isinstance(value, Interval) for value in values)


def pivoted(
    rows: Sequence[Row],
    columns: Sequence[Column],
    pivot: Sequence[str],
    values: Sequence[Column],
    title: str = "",
    note: str = "",
) -> Table:
    """A table with a line for each combination of `columns`, and for each of `pivot` the `values` of their row.

    Raises:
        MasformerError: two rows would stand in one place.
    """
    lines: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = {}
    heads: dict[tuple[str, ...], None] = {}
    for row in rows:
        line = tuple(column.cell(row) for column in columns)
        head = tuple(str(show(row.get(key), key)) for key in pivot)
        if head in lines.setdefault(line, {}):
            place = ", ".join((*line, *head))
            raise MasformerError(f"several rows for {place}: name another column, or take fewer rows")
        lines[line][head] = row
        heads[head] = None
    across = [(head, column) for head in heads for column in values]
    several = len(values) > 1
    return Table(
        columns=tuple(column.title for column in columns)
        + tuple(f"{', '.join(head)}: {column.title}" if several else ", ".join(head) for head, column in across),
        rows=tuple(
            line + tuple(column.cell(cells[head]) if head in cells else NOTHING for head, column in across)
            for line, cells in lines.items()
        ),
        numeric=tuple(_numeric(rows, column.key) for column in (*columns, *(column for _, column in across))),
        title=title,
        note=note,
    )
