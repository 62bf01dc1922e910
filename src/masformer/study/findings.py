"""What a stage found: rows, verdicts and drawings, made from the results of its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from masformer.evaluation.intervals import Interval
from masformer.study.verdicts import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, dict[str, Any]]
"""Name of a unit -> its result, of those that are done."""
Row = dict[str, Any]


@dataclass
class Findings:
    """What a stage found.

    Attributes:
        title: of its section.
        intro: what was done.
        rows: title -> rows of a table; values are numbers, text or `Interval`.
        verdicts: on the claims.
        drawings: (name, drawing, caption).
        short: a sentence for the first page, which is read in a minute; empty: none.
        opening: title of the rows and name of the drawing that the first page may show; empty: none.
    """

    title: str
    intro: str
    rows: dict[str, list[Row]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    drawings: list[tuple[str, Figure, str]] = field(default_factory=list)
    short: str = ""
    opening: tuple[str, str] = ("", "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        tables = {
            title: [
                {key: value.to_dict() if isinstance(value, Interval) else value for key, value in row.items()}
                for row in rows
            ]
            for title, rows in self.rows.items()
            if rows
        }
        return tables | {"verdicts": [verdict.to_dict() for verdict in self.verdicts]}

    def draw(self, name: str, drawn: tuple[Figure, str] | None) -> None:
        """Adds a drawing, if there is one."""
        if drawn is not None:
            self.drawings.append((name, *drawn))


def begun(results: Results, names: Sequence[str]) -> list[dict[str, Any]] | None:
    """Results of units up to the first that is missing; None where that is the first of all."""
    return [results[name] for name in takewhile(results.__contains__, names)] or None
