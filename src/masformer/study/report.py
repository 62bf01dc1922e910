"""The report of a study, and a record of each stage beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from masformer import __version__
from masformer.records import write_record
from masformer.reports import Code, Report, Section, Table
from masformer.reports.rows import Column, keys_of, pivoted, table, words
from masformer.study.findings import Findings, Row
from masformer.study.run import Stage, done_of
from masformer.study.scale import Scale
from masformer.study.units import Place
from masformer.study.verdicts import FAILS, Verdict

SPECS = {"attention": ":.1%", "full_bytes": ":.0%", "forward": ":.1%", "cache": ":.1%"}
ACROSS = ("position", "step")
"""Keys whose values become columns of perplexities."""
TITLES = {
    "name": "plan",
    "plan": "spans",
    "second_half": "second half",
    "over_full": "over all full",
    "full_bytes": "full bytes",
    "less_full": "less all full",
    "share": "attention operations",
    "spans": "exact spans",
    "over_first": "over the first",
    "training_flops": "training",
    "rougeL": "ROUGE-L",
    "median": "median, s",
    "speedup": "times as fast",
    "ideal": "by operations",
}


def write_report(
    scale: Scale,
    stages: Sequence[Stage],
    place: Place,
    title: str,
    command: Sequence[str],
) -> list[Verdict]:
    """Writes report.md, report.html and a record of each stage, of what is there.

    Args:
        scale: of the study.
        stages: all that are reported on.
        place: of the results.
        title: of the report.
        command: the words of the command line.

    Returns:
        The verdicts.

    Raises:
        MasformerError: a file cannot be written.
    """
    done, missing = done_of(stages, place)
    results = {name: kept["result"] for name, kept in done.items()}
    absent = {unit.name for unit in missing}
    found: list[tuple[Stage, Findings, list[str]]] = []
    for stage in stages:
        mine = stage.units(stage.settings, place)
        left = [unit.name for unit in mine if unit.name in absent and unit.stage == stage.name]
        if not mine or any(unit.name in results for unit in mine):
            found.append((stage, stage.findings(stage.settings, place, results), left))
    report = Report(title)
    report.text(scale.about)
    verdicts = [verdict for _, findings, _ in found for verdict in findings.verdicts]
    opening = _open(report, [findings for _, findings, _ in found], verdicts)
    if verdicts:
        report.section("Verdicts").table(_verdicts(verdicts))
    nothing = [stage.name for stage in stages if stage.name not in [each.name for each, _, _ in found]]
    for stage, findings, left in found:
        _add(report, findings, left, opening)
        record: dict[str, Any] = findings.to_dict() | {"stage": stage.name, "missing": left}
        write_record(place.folder / f"{stage.name}.json", command, __version__, **record)
    if nothing:
        report.text("Not run yet: ", ", ".join(nothing), ".")
    made = report.section("How it was made")
    made.code(" ".join(command))
    made.text(f"By masformer {__version__}.", small=True)
    for line in _machines(done.values()):
        made.text(line, small=True)
    made.text(
        "The records beside this file hold every row; ",
        Code("units"),
        " holds the raw result of each unit.",
        small=True,
    )
    report.write(place.folder)
    return verdicts


def _open(report: Report, found: Sequence[Findings], verdicts: Sequence[Verdict]) -> tuple[str, str]:
    """The first page: a sentence of each stage that has one, how many claims do not hold, a figure and a table.

    Returns:
        Title of the rows and name of the drawing that it shows: those of the last stage that has some.
    """
    short = [findings.short for findings in found if findings.short]
    if not short:
        return "", ""
    section = report.section("In short")
    failed = sum(verdict.answer == FAILS for verdict in verdicts)
    if failed:
        be = "does not hold, and is the first of" if failed == 1 else "do not hold, and come first among"
        short.append(f"Of {len(verdicts)} claims {failed} {be} the verdicts below.")
    for line in short:
        section.text(line)
    shown = next((findings for findings in reversed(found) if any(findings.opening)), None)
    if shown is None:
        return "", ""
    rows, drawing = shown.opening
    for name, figure, caption in shown.drawings:
        if name == drawing:
            section.figure(name, figure, caption)
    if shown.rows.get(rows):
        section.table(_table(rows, shown.rows[rows]))
    return shown.opening


def _add(report: Report, findings: Findings, left: Sequence[str], opening: tuple[str, str]) -> Section:
    section = report.section(findings.title)
    section.text(findings.intro)
    for title, rows in findings.rows.items():
        if rows and title != opening[0]:
            section.table(_table(title, rows))
    for name, figure, caption in findings.drawings:
        if name != opening[1]:
            section.figure(name, figure, caption)
    if left:
        section.text("Missing, not run yet: ", ", ".join(left), small=True)
    return section


def _table(title: str, rows: Sequence[Row]) -> Table:
    """Columns that hold something; positions and steps side by side; of rows with depths, the line of all depths."""
    note = ""
    if any(row.get("depth") is not None for row in rows):
        rows = [row for row in rows if row["depth"] is None]
        note = "over all depths"
    keys = [key for key in keys_of(rows) if any(row.get(key) is not None for row in rows)]
    columns = {key: Column.parse(f"{key}{SPECS.get(key, '')}={TITLES.get(key, words(key))}") for key in keys}
    title = "" if title == "results" else title
    across = next((key for key in ACROSS if key in columns), None)
    if across is None:
        return table(rows, list(columns.values()), title, note)
    values = columns.pop("perplexity")
    del columns[across]
    return pivoted(rows, list(columns.values()), [across], [values], title, f"perplexity by {across}")


def _verdicts(verdicts: Sequence[Verdict]) -> Table:
    """What does not hold comes first."""
    ordered = sorted(verdicts, key=lambda verdict: verdict.answer != FAILS)
    return Table(
        columns=("claim", "verdict", "why"),
        rows=tuple((verdict.claim, verdict.answer, verdict.why) for verdict in ordered),
        numeric=(False, False, False),
    )


def _machines(units: Iterable[Mapping[str, Any]]) -> list[str]:
    """What units were done with, and how long they took: a line for each set of versions, device and threads."""
    found: dict[str, list[float]] = {}
    for unit in units:
        facts = unit["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        found.setdefault(f"{versions}; {facts['device']}, threads: {facts['threads']}", []).append(unit["seconds"])
    return [f"{len(each)} units in {sum(each) / 60:.1f} minutes: {what}." for what, each in found.items()]


def report_files(place: Place) -> list[Path]:
    """What is meant to be read."""
    return [place.folder / "report.md", place.folder / "report.html"]
