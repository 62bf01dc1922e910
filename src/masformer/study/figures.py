"""Drawings that only a study has."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from masformer.evaluation.intervals import Interval
from masformer.plots import FULL_COLOR, INK, LOCAL_COLORS


def pareto(points: Sequence[tuple[str, float, Interval]], what: str) -> Figure:
    """Quality against cost; the line joins plans that no other beats in both.

    Args:
        points: (name, share of the attention operations, a figure of which lower is better).
        what: the figure in words.
    """
    figure = Figure(figsize=(6.5, 4.0), facecolor="white", layout="constrained")
    axes = figure.subplots()
    best: list[tuple[float, float]] = []
    for name, share, value in sorted(points, key=lambda point: (point[1], point[2].mean)):
        axes.plot([100 * share] * 2, [value.low, value.high], color=LOCAL_COLORS[0], linewidth=1.2)
        axes.plot(100 * share, value.mean, "o", color=FULL_COLOR, markersize=5)
        axes.annotate(name, (100 * share, value.mean), (5, 4), textcoords="offset points", fontsize=8, color=INK)
        if not best or value.mean < best[-1][1]:
            best.append((100 * share, value.mean))
    axes.plot(*zip(*best, strict=True), color=FULL_COLOR, alpha=0.5, linewidth=1)
    axes.set_xlabel("attention operations, percent of all full", fontsize=9, color=INK)
    axes.set_ylabel(what, fontsize=9, color=INK)
    axes.set_xlim(left=0, right=115)
    axes.tick_params(labelsize=8)
    axes.spines[["right", "top"]].set_visible(False)
    return figure
