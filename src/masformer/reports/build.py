"""From records to a report: a section for each command, a section below it for each record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from masformer.errors import MasformerError
from masformer.evaluation.intervals import Interval
from masformer.placement.report import search_figure
from masformer.placement.result import SearchResult
from masformer.records import Record
from masformer.reports import figures as drawings
from masformer.reports.document import Code, Section, Table
from masformer.reports.kinds import KINDS, View
from masformer.reports.report import Report
from masformer.reports.rows import Column, Row, flat, keys_of, pivoted, row_sets, table, words
from masformer.reports.values import is_number, show

LONG = 100
"""Characters from which on a text is a paragraph rather than a fact."""
FEW, MOST_NAMED = 3, 6
"""Records whose outcomes stand in the first paragraph, and names that stand in a row."""
MOST_ROWS, MOST_COLUMNS = 60, 14
"""Of a table in a report; what is left out is said below it."""


def build_report(records: Sequence[Record], title: str, others: Sequence[Path] = ()) -> Report:
    """A report of records.

    Args:
        records: of `read_records`.
        title: of the report.
        others: files that are no records, to be named.
    """
    report = Report(title)
    report.text(*_about(records))
    kinds = list(dict.fromkeys(record.kind for record in sorted(records, key=lambda record: record.kind)))
    for kind in kinds:
        add_kind(report, [record for record in records if record.kind == kind])
    if others:
        report.text("Files that are no records, left out: ", listed([path.name for path in others]), small=True)
    return report


def listed(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def title_of(records: Sequence[Record]) -> str:
    """What records measured, on what."""
    kinds = [kind for kind in KINDS if any(record.kind == kind for record in records)]
    whats = [KINDS[kind].what for kind in kinds] or ["what was measured"]
    models = _models(records)
    named = _listed(whats[:3]) if len(whats) < 4 else f"{', '.join(whats[:2])} and more"
    return f"{named[0].upper()}{named[1:]}" + (f": {_listed(models[:3])}" if 0 < len(models) < 4 else "")


def _models(records: Sequence[Record]) -> list[str]:
    """The models of records, by the ends of their names."""
    found = (flat(record.figures) for record in records)
    named = (row.get("model") or row.get("recipe.model.source") for row in found)
    bare = (str(name).partition(" of the package ")[0].rstrip("/") for name in named if name)
    return list(dict.fromkeys(name.rpartition("/")[2] for name in bare))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _about(records: Sequence[Record]) -> list[str]:
    """What was measured on what, and what came out where records are few enough to say so."""
    kinds = {record.kind for record in records}
    models = _models(records)
    devices = list(dict.fromkeys(str(each) for record in records if (each := record.environment.get("device"))))
    parts = [f"{_count(len(records), 'record')} of {_count(len(kinds), 'command')}"]
    parts += [", of ", _listed(models)] if models else []
    parts += [", on ", _listed(devices)] if devices else []
    parts.append(".")
    for record in records if len(records) <= FEW else ():
        with figures_of([record]):
            said = _outcome(record, KINDS.get(record.kind, View()))
        parts += [" ", *said] if said else []
    return parts


def _outcome(record: Record, view: View) -> list[str]:
    """What came out, in a sentence: the plan that was found, or a figure of every name at the longest length."""
    if record.kind == "search" and isinstance(plan := record.figures.get("plan"), str):
        return ["Found: ", Code(plan), "."]
    if not view.outcome:
        return []
    path, text = view.outcome
    column, name = Column.parse(text), Column.of("name")
    rows = [row for row in view.rows(record.figures).get(path, ()) if row.get(column.key) is not None]
    rows = [row for row in rows if row.get("depth") is None and "name" in row and is_number(row.get("length"))]
    longest = max((row["length"] for row in rows), default=0)
    facets = [key for key in drawings.FACETS if len({row.get(key) for row in rows}) > 1]
    rows = [row for row in rows if row["length"] == longest]
    said: list[str] = []
    for row in rows[:MOST_NAMED]:
        where = "".join(f", {row[key]}" for key in facets if row.get(key) is not None)
        said += ["; " if said else "", name.cell(row), f"{where} ", column.cell(row)]
    if not said:
        return []
    more = f"; {len(rows) - MOST_NAMED} more below" if len(rows) > MOST_NAMED else ""
    return [f"{column.title[0].upper()}{column.title[1:]} at {show(longest)} tokens: ", *said, f"{more}."]


def add_kind(report: Section, records: Sequence[Record]) -> Section:
    """Adds a section with all records of one kind, and returns it."""
    view = KINDS.get(records[0].kind, View())
    section = report.section(records[0].kind)
    if view.intro:
        section.text(view.intro)
    with figures_of(records):
        _facts(section, records, view)
        if records[0].kind == "train":
            _training_curves(section, records)
    for record in records:
        add_record(section, record, view)
    return section


def add_record(section: Section, record: Record, view: View | None = None) -> Section:
    """Adds a section with a record's texts, tables and drawings, and how it was made; returns it."""
    view = view or KINDS.get(record.kind, View())
    own = section.section(record.name)
    with figures_of([record]):
        _add_figures(own, record, view)
    made = own.fold("How it was made")
    made.code(record.command)
    made.text(_environment(record.environment), small=True)
    return own


@contextmanager
def figures_of(records: Sequence[Record]) -> Iterator[None]:
    """While figures are shown: says of what files they are where they are not what their kind has."""
    where = ", ".join(str(record.path) for record in records)
    try:
        yield
    except MasformerError as error:
        raise MasformerError(f"{where}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise MasformerError(f"{where}: cannot show its figures ({reason})") from error


def _add_figures(own: Section, record: Record, view: View) -> None:
    for key, value in flat(record.figures).items():
        if isinstance(value, str) and len(value) > LONG and (view.facts is None or key not in view.facts):
            own.text(value)
    if said := _outcome(record, view):
        own.text(*said)
    sets = {path: rows for path, rows in view.rows(record.figures).items() if view.tables.get(path) != ()}
    for path, rows in sets.items():
        own.table(_table(path, rows, view))
    for path, rows in sets.items():
        _draw(own, record, path, rows, view)
    if record.kind == "search" and "evidence" in record.figures:
        result = SearchResult.from_dict(record.figures | {"seed": record.environment.get("seed", 0)})
        what = (
            "what restricting each layer costs" if result.gradient is None else "what full attention is worth to each"
        )
        caption = f"{what}, and the plan found among other placements"
        own.figure(f"{record.name} layers", search_figure(result), caption)


def _facts(section: Section, records: Sequence[Record], view: View) -> None:
    """What the records are of: what they share line by line, what differs in a table; folded, unless it is chosen."""
    columns = None if view.facts is None else [Column.parse(text) for text in view.facts]
    rows: list[Row] = []
    for record in records:
        every = flat(record.figures, lists=True)
        if columns is None:
            every = {key: value for key, value in every.items() if not isinstance(value, str) or len(value) <= LONG}
        rows.append(every)
    columns = columns or [Column.of(key) for key in keys_of(rows) if _is_fact(key, records)]
    columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    same = [column for column in columns if _constant(rows, column)]
    varying = [column for column in columns if column not in same]
    folded = section.fold("Settings") if same or (varying and view.facts is None) else section
    if same:
        folded.code("\n".join(" ".join(f"{column.title}: {column.cell(rows[0])}".split()) for column in same))
    if varying:
        named = [{"record": record.name} | row for record, row in zip(records, rows, strict=True)]
        place = folded if view.facts is None else section
        place.table(table(named, [Column("record", None, "record"), *varying]))


def _is_fact(key: str, records: Sequence[Record]) -> bool:
    """Whether it is a setting or a summary, rather than one of many figures of a mapping."""
    return key.count(".") < 2 and not any(isinstance(flat(record.figures).get(key), Interval) for record in records)


def _constant(rows: Sequence[Row], column: Column) -> bool:
    return len({column.cell(row) for row in rows}) == 1


def _table(path: str, rows: Sequence[Row], view: View) -> Table:
    title = view.titles.get(path, "" if path == "results" else words(path))
    notes = []
    keys = keys_of(rows)
    if path in view.tables:
        columns = [column for text in view.tables[path] if (column := Column.parse(text)).key in keys]
    else:
        columns = [Column.of(key) for key in keys if _shown(rows, key)]
    if path in view.pivots:
        across, below = view.pivots[path]
        values = [column for text in below if _has((column := Column.parse(text)).key, rows)]
        return pivoted(rows, columns, across, values, title)
    if any(row.get("depth") is not None for row in rows) and any(row.get("depth", 0) is None for row in rows):
        rows = [row for row in rows if row.get("depth") is None]
        notes.append("over all depths")
    columns = [column for column in columns if _has(column.key, rows)]
    if all(row.get("plan") == row.get("name") for row in rows):
        columns = [column for column in columns if column.key != "plan" or "name" not in keys]
    if len(rows) > 1:
        same = [column for column in columns if _is_setting(rows, column)]
        rest = [column for column in columns if column not in same]
        if same and any(column.key not in ("name", "text") for column in rest):
            columns = rest
            notes.append("in every row " + ", ".join(f"{column.title} {column.cell(rows[0])}" for column in same))
    if len(columns) > MOST_COLUMNS:
        notes.append("columns left out: " + ", ".join(column.title for column in columns[MOST_COLUMNS:]))
        columns = columns[:MOST_COLUMNS]
    if len(rows) > MOST_ROWS:
        notes.append(f"the first {MOST_ROWS} of {len(rows)} rows")
        rows = rows[:MOST_ROWS]
    made = table(rows, columns, title)
    return replace(made, note="; ".join(notes))


def _is_setting(rows: Sequence[Row], column: Column) -> bool:
    """Whether all rows have the same there, which is no measurement."""
    measured = any(isinstance(row.get(column.key), Interval) for row in rows)
    return column.key not in ("name", "text") and not measured and _constant(rows, column)


def _shown(rows: Sequence[Row], key: str) -> bool:
    return not any(isinstance(row.get(key), str) and len(row[key]) > LONG for row in rows)


def _has(key: str, rows: Sequence[Row]) -> bool:
    return any(row.get(key) is not None for row in rows)


def _draw(section: Section, record: Record, path: str, rows: Sequence[Row], view: View) -> None:
    metrics = [Column.parse(text) for text in view.metrics.get(path, ())]
    if path not in view.metrics and path == "results":
        metrics = [Column.of(key) for key in keys_of(rows) if any(isinstance(row.get(key), Interval) for row in rows)]
    for metric in metrics:
        drawn = drawings.draw(rows, metric.key, metric.title)
        if drawn is not None:
            section.figure(f"{record.name} {path} {metric.key}", *drawn)
        heat = drawings.heat_map(rows, metric.key)
        if heat is not None:
            section.figure(f"{record.name} {path} {metric.key} depth", heat, f"{metric.title}, by length and depth")


def _training_curves(section: Section, records: Sequence[Record]) -> None:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        steps = [row for row in row_sets(record.figures).get("metrics", ()) if is_number(row.get("loss"))]
        steps = [row for row in steps if is_number(row.get("step"))]
        if len(steps) > 1:
            series[record.name] = [row["step"] for row in steps], [row["loss"] for row in steps]
    if series:
        section.figure("train loss", drawings.curves(series, "step", "loss, nats"), "training loss")


def _environment(found: Mapping[str, Any]) -> str:
    parts = [f"masformer {found.get('masformer', '?')}"]
    versions = found.get("versions")
    parts += [f"{name} {version}" for name, version in (versions.items() if isinstance(versions, Mapping) else ())]
    if "device" in found:
        parts.append(str(found["device"]))
    for key in ("cores", "threads"):
        if is_number(found.get(key)):
            parts.append(_count(found[key], key[:-1]))
    if "seed" in found:
        parts.append(f"seed {found['seed']}")
    return "; ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{show(number)} {what}{'' if number == 1 else 's'}"
