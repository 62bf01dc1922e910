"""Pictures: a plan as a sketch for the terminal and as attention patterns layer by layer, and measured times."""

from __future__ import annotations

import io
import os
import string
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from masformer.errors import MasformerError, check_int
from masformer.extras import need
from masformer.files import write_whole
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan, Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".webp")

WIDTH = 80
SKETCH = 16
"""Of the picture: columns of text; cells along a sketch, as many columns and half as many lines."""

FULL_COLOR, LOCAL_COLORS = "#c8553d", ("#33658a", "#3a8f7b", "#8a5a9e", "#a3872b", "#5c6b73")
HIDDEN_COLOR, INK = "#e8ebef", "#22303c"
MARGIN, PANEL, GAP = 0.3, 1.0, 0.12
"""Of the figure, in inches: at its left and right, along a panel, between two panels."""
CELL = 0.22
"""Of the map of a plan by heads, in inches: a unit."""
CELLS, DPI = 100, 200
"""Of the figure: cells along a panel, and pixels per inch: two for a cell."""


def pattern(span: Span, length: int, cells: int) -> npt.NDArray[np.bool_]:
    """The attention pattern of a span, made coarse: a cell is True if any (query, key) pair inside it is visible.

    Args:
        span: the span.
        length: tokens; time and memory do not grow with it.
        cells: the positions are cut into so many ranges of nearly equal size, or into `length` where that is less.

    Returns:
        Bool array [cells, cells], queries by keys.
    """
    cells = min(cells, length)
    edges = np.arange(cells + 1) * length // cells
    starts, stops = edges[:-1], edges[1:]
    # Each query sees all keys from the oldest up to its own, so the queries of one range see one unbroken stretch; the
    # oldest key never moves back from query to query.
    oldest = span.first_visible(torch.from_numpy(starts)).numpy()
    seen = (stops > oldest[:, None]) | (starts < span.sinks)
    return seen & (starts < stops[:, None])


def _kinds(plan: AttentionPlan) -> list[Span]:
    """The distinct spans of a plan, from those that see most to those that see least."""
    return sorted(plan.kinds, key=lambda span: (span.max_visible is not None, -(span.max_visible or 0), str(span)))


def _marks(kinds: list[Span]) -> dict[Span, str]:
    """Span -> the character of its layers: bars that rise with what they see; letters where there are too many."""
    local = [span for span in reversed(kinds) if not isinstance(span, FullSpan)]
    bars = next((bars for bars in ("▂▄▆", "▁▂▃▄▅▆▇") if len(local) <= len(bars)), string.ascii_letters)
    return {FullSpan(): "█"} | {span: bars[rank % len(bars)] for rank, span in enumerate(local)}


def picture(plan: AttentionPlan, length: int | None = None) -> str:
    """The layers of a plan and their spans at a glance: plain text within 80 columns, readable without colour.

    Three parts: one character per layer, from the embedding at the left to the output at the right, in a plan by heads
    one row of them per KV head; one line per distinct span with its number of layers (or of units: KV heads of all
    layers) and the keys that a query sees; and, where they fit side by side (up to
    four usually do), a sketch of the attention pattern of each.

    Args:
        plan: the plan.
        length: tokens of the sketch, and of the average number of keys that a query sees. By default there is no
            average, and the sketch is long enough to show the largest local span.

    Raises:
        MasformerError: the length is below 1.
    """
    if length is not None:
        check_int("length", length, 1)
    kinds = _kinds(plan)
    marks = _marks(kinds)
    lines = [*_strip([[marks[span] for span in row] for row in _units(plan)]), "", *_legend(plan, kinds, marks, length)]
    headings = [f"{marks[span]} {span}" for span in kinds]
    width = 2 + max(SKETCH, *map(len, headings))
    if len(kinds) * width <= WIDTH + 2:
        tokens = length or 4 * max(span.max_visible or SKETCH for span in kinds)
        sketches = [[heading, *_sketch(span, tokens)] for heading, span in zip(headings, kinds, strict=True)]
        lines += ["", *("".join(f"{part:{width}}" for part in row) for row in zip(*sketches, strict=True))]
        lines += [f"queries downwards, keys rightwards, {tokens:,} tokens; · hidden"]
    return "\n".join(line.rstrip() for line in lines)


def _units(plan: AttentionPlan) -> tuple[tuple[Span, ...], ...]:
    """For each layer the spans of its KV heads; of a plan by layers, its span alone."""
    return plan.units(plan.kv_heads or 1) if plan.by_heads else tuple((span,) for span in plan)


def _strip(marks: list[list[str]]) -> Iterator[str]:
    """Up to 35 layers side by side, under a ruler with a number at every fifth layer and at the last.

    Args:
        marks: for each layer the marks of its KV heads, or one.
    """
    rows = -(-len(marks) // 35)
    width = 5 * -(-len(marks) // (5 * rows))
    for first in range(0, len(marks), width):
        layers = range(first, min(first + width, len(marks)))
        ruler = ""
        for layer in layers:
            if layer % 5 == 0 or (layer == layers[-1] and len(ruler) < 2 * (layer - first)):
                ruler = f"{ruler:{2 * (layer - first)}}{layer}"
        yield f"layer  {ruler}"
        heads = len(marks[0])
        for head in range(heads):
            name = f"head {head}" if heads > 1 else ""
            yield f"{name:6} {' '.join(marks[layer][head] for layer in layers)}"


def _legend(plan: AttentionPlan, kinds: list[Span], marks: dict[Span, str], length: int | None) -> Iterator[str]:
    layers = Counter(span for row in _units(plan) for span in row)
    what = "units" if plan.by_heads else "layers"
    width = max(len(str(span)) for span in kinds)
    yield f"  {'span':{width}}  {what:>6}  most keys" + (f"  mean at {length:,} tokens" if length else "")
    for span in kinds:
        most = "all" if span.max_visible is None else f"{span.max_visible:,}"
        line = f"{marks[span]} {span!s:{width}}  {layers[span]:>6}  {most:>9}"
        if length:
            pairs, full = span.visible_pairs(length), FullSpan().visible_pairs(length)
            line += f"  {pairs / length:>9,.1f}  {pairs / full:>6.1%} of full"
        yield line


def _sketch(span: Span, length: int) -> Iterator[str]:
    """The pattern in half blocks: two queries share a line."""
    cells = pattern(span, length, SKETCH)
    for first in range(0, len(cells), 2):
        upper, lower = (cells[row] if row < len(cells) else np.zeros(len(cells), bool) for row in (first, first + 1))
        yield "".join("·▀▄█"[kind] for kind in (upper + 2 * lower)[: first + 2])


def plot_plan(plan: AttentionPlan, path: str | os.PathLike[str], length: int = 8192) -> None:
    """Draws the attention pattern of every layer, as in figure 1 of the MASFormer paper (arXiv 2310.12442).

    Queries run downwards and keys rightwards. A cell is coloured if any pair inside it is visible, so that a few
    sinks stay in sight at any length. Of a plan by heads it draws a map instead, layers by KV heads.

    Args:
        plan: the plan.
        path: file to write, whole or not at all; its suffix is one of `SUFFIXES`.
        length: tokens.

    Raises:
        MasformerError: the suffix is unknown, the folder does not exist, or the length is below 1.
    """
    check_int("length", length, 1)
    write_figure(_figure(plan, length), path)


def plot_times(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws median times against length, both axes logarithmic: one panel per pass, one line per variant.

    Args:
        rows: of `masformer bench`: `length`, `name`, `median` and, where there are several, `pass`.
        path: file to write, whole or not at all; its suffix is one of `SUFFIXES`.

    Raises:
        MasformerError: the suffix is unknown or the folder does not exist.
    """
    checked_figure(path)
    passes = list(dict.fromkeys(row.get("pass") for row in rows))
    figure = new_figure(6.2 * len(passes), 4.6, layout="constrained")
    for axes, pass_ in zip(np.atleast_1d(figure.subplots(1, len(passes))), passes, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            here = sorted(
                (row["length"], row["median"]) for row in rows if (row["name"], row.get("pass")) == (name, pass_)
            )
            if here:
                axes.plot(*zip(*here, strict=True), marker="o", markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title=pass_ or "")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    write_figure(figure, path)


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """A figure to draw in: white, of so many inches; options are those of matplotlib.

    Raises:
        MasformerError: matplotlib is not installed.
    """
    need("plots", "a drawing")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", **options)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure, whole or not at all.

    Raises:
        MasformerError: the suffix is none of `SUFFIXES`, or the folder does not exist.
    """
    path = checked_figure(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=DPI)
    write_whole(path, buffer.getvalue())


def checked_figure(path: str | os.PathLike[str]) -> Path:
    """The path, if its suffix says how to draw.

    Raises:
        MasformerError: it does not, or matplotlib is not installed.
    """
    need("plots", "a drawing")
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise MasformerError(f"cannot tell the format of figure {path}; allowed: {', '.join(SUFFIXES)}")
    return path


def _figure(plan: AttentionPlan, length: int) -> Figure:
    need("plots", "a drawing")
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    kinds = _kinds(plan)
    local = [span for span in kinds if not isinstance(span, FullSpan)]
    colors = {span: LOCAL_COLORS[rank % len(LOCAL_COLORS)] for rank, span in enumerate(local)}
    colors[FullSpan()] = FULL_COLOR

    units = _units(plan)
    rows = max(1, round((len(plan) / 3.3) ** 0.5))
    columns = -(-len(plan) // rows)
    pitch = PANEL + GAP
    across, down = columns * pitch - GAP, rows * pitch
    if plan.by_heads:
        across, down = max(CELL * len(plan), 5.5), CELL * len(units[0]) + 0.5
    width = max(2 * MARGIN + across, 5.5)
    title = textwrap.wrap(str(plan).replace(",", ", "), int(9 * width), max_lines=3, placeholder=" …")
    entries = int(width / 2.4)  # of the legend, side by side
    head = MARGIN + 0.25 * len(title)
    foot = 0.45 + 0.22 * -(-(len(kinds) + 1) // entries)
    height = head + down + foot

    figure = new_figure(width, height)
    left = MARGIN / width
    figure.text(left, 1 - 0.18 / height, "\n".join(title), va="top", fontsize=13, color=INK, linespacing=1.3)
    patterns = {span: pattern(span, length, CELLS) for span in kinds}
    if plan.by_heads:
        share = across / width, (down - 0.5) / height
        axes = figure.add_axes((left, 1 - (head + down - 0.5) / height, *share))
        image = np.array([[kinds.index(row[number]) for row in units] for number in range(len(units[0]))])
        axes.imshow(
            image, cmap=ListedColormap([colors[span] for span in kinds]), vmin=0, vmax=len(kinds), aspect="auto"
        )
        axes.set(xlabel="layer", ylabel="KV head", yticks=range(len(units[0])))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xticks(np.arange(len(plan) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(units[0]) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
    for layer, span in enumerate(() if plan.by_heads else plan):
        row, column = divmod(layer, columns)
        bottom = height - head - row * pitch - PANEL
        axes = figure.add_axes((left + column * pitch / width, bottom / height, PANEL / width, PANEL / height))
        image = np.where(patterns[span], 2, np.tri(len(patterns[span]), dtype=int))
        axes.imshow(image, cmap=ListedColormap(["white", HIDDEN_COLOR, colors[span]]), vmin=0, vmax=2)
        axes.text(0.94, 0.92, str(layer), transform=axes.transAxes, ha="right", va="top", fontsize=11, color=INK)
        axes.set_axis_off()

    layers = Counter(span for row in units for span in row)
    what = "unit" if plan.by_heads else "layer"
    labels = {f"{span}: {layers[span]} {what}{'s' * (layers[span] != 1)}": colors[span] for span in kinds}
    labels |= {} if plan.by_heads else {"hidden": HIDDEN_COLOR}
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in labels.items()],
        loc="lower left",
        bbox_to_anchor=(left, 0.42 / height),
        ncols=entries,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        labelcolor=INK,
        handlelength=1,
        handleheight=1,
    )
    note = f"One panel per layer, {length:,} tokens: queries downwards, keys rightwards."
    if plan.by_heads:
        note = "One unit per cell: a KV head together with its query heads."
    figure.text(left, 0.16 / height, note, fontsize=9, color=INK, alpha=0.75)
    return figure
