"""Tables for people: what they compare is never shortened, whatever the width."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

NAMING = ("plan", "variant", "placement")
"""Headings of columns whose texts may be long: plans, and names that hold plans."""
FOLDED, LINES = 24, 3
"""A long text is folded into its column where that has so many characters, and takes so many lines; else it gets a
number, and stands below the table."""


def show_table(console: Console, table: Table) -> None:
    """Prints a table so that no cell is shortened.

    Where its names do not fit beside the figures, they are folded, or get numbers and stand below the table, each on a
    line of its own. Figures are neither folded nor cut: where they alone are wider than the console, so are the lines.
    """
    legend: list[str] = []
    column = next((each for each in table.columns if str(each.header) in NAMING), None)
    excess = _width(table) - console.width
    if column is not None and excess > 0:
        names = list(dict.fromkeys(map(str, column._cells)))
        place, longest = table.columns.index(column), max(map(len, names), default=0)
        room = longest - excess
        if room < FOLDED or longest > LINES * room:
            labels = {name: str(number) for number, name in enumerate(names, start=1)}
            cells: list[RenderableType] = [labels[str(cell)] for cell in column._cells]
            table.columns[place] = replace(column, no_wrap=True, _cells=cells)
            legend = [f"{label}: {name}" for name, label in labels.items()]
        else:
            table.columns[place] = replace(column, overflow="fold", no_wrap=False, width=room)
    width = max(console.width, _width(table))
    wide = console if width == console.width else Console(file=console.file, width=width, highlight=False)
    wide.print(table)
    for line in legend:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _width(table: Table) -> int:
    """Of the table with nothing folded, its title aside."""
    console = Console(width=100_000)
    return Measurement.get(console, console.options, table).maximum
