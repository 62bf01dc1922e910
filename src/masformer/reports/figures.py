"""Drawings of a record's rows: a metric against the length, side by side, by length and depth; curves of training."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from masformer.evaluation.intervals import Interval
from masformer.plots import FULL_COLOR, INK, LOCAL_COLORS, new_figure
from masformer.reports.rows import Row
from masformer.reports.values import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FACETS = ("task", "pass", "text")
"""Keys whose values are drawn apart."""
COLORS = (FULL_COLOR, *LOCAL_COLORS)
MARKERS = "os^Dvp"
MOST = 18
"""Names in one drawing; more are unreadable."""


def mean(value: Any) -> float | None:
    """The number that is drawn; None where there is none, or none that is finite."""
    number = value.mean if isinstance(value, Interval) else value
    return float(number) if is_number(number) and math.isfinite(number) else None


def draw(rows: Sequence[Row], metric: str, what: str) -> tuple[Figure, str] | None:
    """A drawing of one metric with its intervals, and its caption; `what` is the metric in words.

    Against the length where rows have several, one line a name; else side by side. None where there is nothing to
    compare: fewer than two rows that have the metric, or more names than can be told apart.
    """
    rows = [row for row in rows if mean(row.get(metric)) is not None and row.get("depth") is None and "name" in row]
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    if len(rows) < 2 or len(names) > MOST:
        return None
    lengths = sorted({row["length"] for row in rows if is_number(row.get("length"))})
    facets = _facets(rows)
    wide = any(isinstance(row[metric], Interval) and row[metric].count > 1 for row in rows)
    caption = what + (" with 95% intervals" if wide else "")
    if len(lengths) > 1:
        return _lines(facets, metric, what, names, lengths), f"{caption}, by length"
    if len(names) < 2:
        return None
    return _dots(facets, metric, what, names), caption


def _facets(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Title -> the rows that are drawn together."""
    keys = [key for key in FACETS if len({row.get(key) for row in rows}) > 1]
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(", ".join(str(row.get(key)) for key in keys), []).append(row)
    return found


def _lines(
    facets: Mapping[str, Sequence[Row]], metric: str, what: str, names: Sequence[str], lengths: Sequence[int]
) -> Figure:
    columns = min(len(facets), 3)
    lines = -(-len(facets) // columns)
    legend = 0.17 * len(names) + 0.1
    height = 2.9 * lines + legend
    figure = new_figure(max(6.5, 3.6 * columns), height)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (title, rows) in zip(grid.flat, facets.items(), strict=False):
        for index, name in enumerate(names):
            here = sorted((row for row in rows if row["name"] == name), key=lambda row: row["length"])
            if not here:
                continue
            across, color = [row["length"] for row in here], COLORS[index % len(COLORS)]
            style = {"marker": MARKERS[index // len(COLORS) % len(MARKERS)], "color": color, "markersize": 4}
            axes.plot(across, [mean(row[metric]) for row in here], label=name, linewidth=1.5, **style)
            bands = [row[metric] for row in here]
            if all(isinstance(band, Interval) for band in bands):
                axes.fill_between(
                    across, [band.low for band in bands], [band.high for band in bands], color=color, alpha=0.15, lw=0
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens", fontsize=9, color=INK)
        _tidy(axes, title)
    for axes in list(grid.flat)[len(facets) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylabel(what, fontsize=9, color=INK)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        [_short(name) for name in handles],
        loc="lower left",
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    return figure


def _dots(facets: Mapping[str, Sequence[Row]], metric: str, what: str, names: Sequence[str]) -> Figure:
    height = 0.28 * len(names) + 0.95
    figure = new_figure(8, height * len(facets))
    grid = figure.subplots(len(facets), 1, squeeze=False, sharex=True)
    for axes, (title, rows) in zip(grid.flat, facets.items(), strict=True):
        for row in rows:
            place, value = names.index(str(row["name"])), row[metric]
            if isinstance(value, Interval):
                axes.plot([value.low, value.high], [place, place], color=LOCAL_COLORS[0], linewidth=1.5)
            axes.plot([mean(value)], [place], "o", color=FULL_COLOR, markersize=5)
        axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(what, fontsize=9, color=INK)
        _tidy(axes, title)
    figure.tight_layout()
    return figure


def heat_map(rows: Sequence[Row], metric: str) -> Figure | None:
    """Length by depth, a panel for each name and task; None where no row has a depth."""
    rows = [row for row in rows if is_number(row.get("depth")) and mean(row.get(metric)) is not None]
    rows = [row for row in rows if "name" in row and is_number(row.get("length"))]
    if not rows:
        return None
    names, tasks = (list(dict.fromkeys(str(row.get(key, "")) for row in rows)) for key in ("name", "task"))
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    values = [value for row in rows if (value := mean(row[metric])) is not None]
    top = next((top for top in (1, 100) if max(values) <= top), max(values))
    width, height = max(1.6, 0.5 * len(lengths)), max(1.0, 0.32 * len(depths))
    figure = new_figure(1.4 + (width + 0.3) * len(tasks) + 0.8, 0.2 + (height + 0.9) * len(names), layout="constrained")
    grid = figure.subplots(len(names), len(tasks), squeeze=False)
    image: Any = None
    for line, name in enumerate(names):
        for column, task in enumerate(tasks):
            axes, cells = grid[line, column], np.full((len(depths), len(lengths)), np.nan)
            for row in rows:
                if str(row["name"]) == name and str(row.get("task", "")) == task:
                    cells[depths.index(row["depth"]), lengths.index(row["length"])] = mean(row[metric])
            image = axes.imshow(cells, cmap="RdYlGn", vmin=min(0.0, *values), vmax=top, aspect="auto")
            for (y, x), value in np.ndenumerate(cells):
                if not math.isnan(value):
                    color = INK if 0.15 < image.norm(value) < 0.85 else "white"
                    text = f"{value:.0f}" if top == 100 else f"{value:.2g}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths] if not column else [], fontsize=7)
            axes.set_title(
                "\n".join(_short(part, int(12 * width)) for part in (name, task) if part), fontsize=8, color=INK
            )
    figure.supxlabel("tokens", fontsize=8, color=INK)
    figure.supylabel("depth", fontsize=8, color=INK)
    figure.colorbar(image, ax=list(grid.flat), fraction=0.05).ax.tick_params(labelsize=7)
    return figure


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> Figure:
    """Lines of name -> (x, y)."""
    figure = new_figure(6.5, 3.2)
    axes = figure.subplots()
    for index, (name, (across, up)) in enumerate(series.items()):
        axes.plot(across, up, label=_short(name), color=COLORS[index % len(COLORS)], linewidth=1.2)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    _tidy(axes, "")
    figure.tight_layout()
    return figure


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#e8ebef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)


def _short(text: str, width: int = 60) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
