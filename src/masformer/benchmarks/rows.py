"""What all benches do with their rows: growth with length, a table, a picture, one line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from masformer.cost import bytes_text

Row = dict[str, Any]


def with_exponents(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Adds `exponent` to each row: the e in time ~ length^e between the next shorter length and this one.

    Args:
        rows: with `length` and `median`.
        keys: what tells variants apart.

    Returns:
        The rows, in their order; `exponent` is None at a variant's shortest length.
    """
    found = []
    for row in rows:
        same = [each for each in rows if all(each[key] == row[key] for key in keys) and each["length"] < row["length"]]
        last = max(same, key=lambda each: each["length"], default=None)
        growth = None
        if last is not None:
            growth = math.log(row["median"] / last["median"]) / math.log(row["length"] / last["length"])
        found.append(row | {"exponent": growth})
    return found


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "length": ("tokens", lambda value: f"{value:,}"),
    "name": ("variant", str),
    "median": ("time", _seconds),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:,.1f}"),
    "speedup": ("speed-up", lambda value: f"{value:.2f}"),
    "share": ("of ideal", lambda value: f"{value:.0%}"),
    "of_direct": ("of direct", lambda value: f"{value:.0%}"),
    "over_full": ("over full", lambda value: f"{value:.2f}"),
    "ideal_bytes": ("by bytes", lambda value: f"{value:.2f}"),
    "share_bytes": ("of bytes", lambda value: f"{value:.0%}"),
    "of_limit": ("of limit", lambda value: f"{value:.0%}"),
    "exponent": ("growth", lambda value: f"N^{value:.2f}"),
    "cache_bytes": ("cache", bytes_text),
    "peak_bytes": ("peak memory", bytes_text),
}
"""Of the tables: figure -> heading, and how it is written. A column is left out where no row has its figure."""


def bench_tables(title: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The rows for people to read: a table per pass, a section per length."""
    for pass_ in dict.fromkeys(row.get("pass") for row in rows):
        here = [row for row in rows if row.get("pass") == pass_]
        shown = [name for name in COLUMNS if any(row.get(name) is not None for row in here)]
        table = Table(
            title=f"{title}; {pass_}" if pass_ else title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
        )
        for name in shown:
            table.add_column(
                COLUMNS[name][0], justify="left" if name == "name" else "right", overflow="fold", no_wrap=name != "name"
            )
        last = None
        for row in here:
            cells = ["" if row.get(name) is None else COLUMNS[name][1](row[name]) for name in shown]
            if row["length"] == last:
                cells[0] = ""
            elif last is not None:
                table.add_section()
            table.add_row(*cells)
            last = row["length"]
        yield table


def summary_line(bench: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One line of JSON for scripts: the rows without the times of single rounds."""
    return json.dumps({"bench": bench, "results": [{k: v for k, v in row.items() if k != "seconds"} for row in rows]})
