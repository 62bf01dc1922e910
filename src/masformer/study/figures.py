"""Drawings that only a study has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from masformer.evaluation.intervals import Interval
from masformer.plots import FULL_COLOR, INK, LOCAL_COLORS, new_figure
from masformer.reports.figures import COLORS, MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, Interval]
"""(share of the attention operations, or of what is full; loss over that of full attention in nats)."""


def pareto(points: Sequence[tuple[str, float, Interval]]) -> Figure:
    """What plans lose against what they cost; the line joins plans that no other beats in both.

    Args:
        points: (name, share of the attention operations, loss over that of full attention in nats).
    """
    figure = new_figure(6.5, 4.0, layout="constrained")
    axes = figure.subplots()
    best: list[tuple[float, float]] = []
    for name, share, over in sorted(points, key=lambda point: (point[1], point[2].mean)):
        mean, low, high = (100 * math.expm1(value) for value in (over.mean, over.low, over.high))
        axes.plot([100 * share] * 2, [low, high], color=LOCAL_COLORS[0], linewidth=1.2)
        axes.plot(100 * share, mean, "o", color=FULL_COLOR, markersize=5)
        axes.annotate(name, (100 * share, mean), (6, 4), textcoords="offset points", fontsize=8, color=INK)
        if not best or mean < best[-1][1]:
            best.append((100 * share, mean))
    axes.plot(*zip(*best, strict=True), color=FULL_COLOR, alpha=0.5, linewidth=1)
    axes.axhline(0, color=INK, linewidth=0.6, linestyle=":")
    axes.set_xlabel("attention operations, percent of all full", fontsize=9, color=INK)
    axes.set_ylabel("perplexity over all full, percent (second half)", fontsize=9, color=INK)
    axes.set_xlim(left=0, right=115)
    axes.tick_params(labelsize=8)
    axes.spines[["right", "top"]].set_visible(False)
    return figure


def by_budget(lines: Mapping[str, Sequence[Point]], clouds: Mapping[str, Sequence[Point]]) -> Figure:
    """What plans lose against how much of them is full.

    Args:
        lines: name -> (share of the units, loss over that of full attention in nats), joined with bands.
        clouds: the same of what is drawn as single points.
    """
    figure = new_figure(6.5, 4.0, layout="constrained")
    axes = figure.subplots()
    for name, points in clouds.items():
        shares, losses = [100 * share for share, _ in points], [over.mean for _, over in points]
        axes.plot(shares, losses, "_", color=INK, alpha=0.45, markersize=9, label=name)
    for index, (name, points) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        shares = [100 * share for share, _ in points]
        axes.plot(shares, [over.mean for _, over in points], "o-", color=color, markersize=4, linewidth=1.5, label=name)
        lows, highs = [over.low for _, over in points], [over.high for _, over in points]
        axes.fill_between(shares, lows, highs, color=color, alpha=0.12, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.6, linestyle=":")
    axes.set_xlabel("full units, percent", fontsize=9, color=INK)
    axes.set_ylabel("loss over all full, nats (second half)", fontsize=9, color=INK)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    axes.tick_params(labelsize=8)
    axes.spines[["right", "top"]].set_visible(False)
    return figure


def by_cost(panels: Mapping[str, Mapping[str, Sequence[Point]]]) -> Figure:
    """What lines of plans lose against what they cost, on a scale of shares that each double.

    Args:
        panels: title -> name of a line -> its points; a panel or a line without points is left out.
    """
    drawn = {title: {name: points for name, points in lines.items() if points} for title, lines in panels.items()}
    panels = {title: lines for title, lines in drawn.items() if lines}
    figure = new_figure(1.5 + 4.0 * len(panels), 4.0, layout="constrained")
    every = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (title, lines) in zip(every, panels.items(), strict=True):
        for name, points in lines.items():
            index = names.index(name)
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            points = sorted(points, key=lambda point: point[0])
            shares, means = [100 * share for share, _ in points], [over.mean for _, over in points]
            axes.plot(shares, means, "-", color=color, marker=marker, markersize=4, linewidth=1.3, label=name)
            lows, highs = [over.low for _, over in points], [over.high for _, over in points]
            axes.vlines(shares, lows, highs, color=color, linewidth=0.8)
        axes.axhline(0, color=INK, linewidth=0.6, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}%")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_xlabel("attention operations, of all full", fontsize=9, color=INK)
        axes.tick_params(labelsize=8)
        axes.spines[["right", "top"]].set_visible(False)
    every[0].set_ylabel("loss over all full, nats (second half)", fontsize=9, color=INK)
    every[-1].legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure
