"""The result of a search for people to read: a table of placements, and a heat map of the layers."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from masformer.cost import seconds_text
from masformer.placement.result import FOUND, FULL, RANDOM, SearchResult
from masformer.plots import FULL_COLOR, INK, new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def summary(result: SearchResult) -> str:
    """What was found, and what it took, in lines."""
    sums = "".join(
        f"\ngains by {each.criterion}: {each.gains:.3f} nats in all, measured {each.measured:.3f}"
        for each in (result.gradient.completeness if result.gradient else ())
    )
    places = [f"{result.rank(text)} of {len(result.random(text)) + 1} on {text}" for text in result.placements]
    ranks = f"rank among random placements: {', '.join(places)}\n" if places else ""
    work = result.work
    parts = [f"{work.measurements:,} measurements, {work.recalled:,} recalled"]
    if result.gradient is not None:
        parts.append(f"{result.gradient.passes:,} passes for gains")
    if (unshared := work.unshared_layer_evaluations) > work.layer_evaluations:
        saved = 1 - work.layer_evaluations / unshared
        parts.append(f"shared prefixes saved {saved:.0%} of {unshared:,} layer evaluations")
    parts.append(seconds_text(work.seconds))
    return f"found: {result.plan}\n{ranks}{'; '.join(parts)}{sums}"


def placement_table(result: SearchResult) -> Table:
    """The found plan among its controls on every text not chosen by; random placements as best, median and worst."""
    texts = list(result.placements)
    table = Table(
        title=f"Held-out text, windows of {result.length:,} tokens: perplexity of the second half",
        caption=summary(result),
        title_justify="left",
        caption_justify="left",
        min_width=72,
    )
    table.add_column("placement", no_wrap=True)
    retrieval = "retrieval" in result.criteria
    for text in texts:
        table.add_column(text, justify="right")
        if "kl" in result.criteria:
            table.add_column("KL", justify="right")
        if retrieval:
            table.add_column("retrieved", justify="right")

    rules = [score.name for score in result.placements[texts[0]] if not score.name.startswith(RANDOM)]
    rows = {name: [result.score(name, text) for text in texts] for name in rules}
    drawn = [result.random(text) for text in texts]
    if drawn[0]:
        for name, index in (("best", 0), ("median", (len(drawn[0]) - 1) // 2), ("worst", -1)):
            rows[f"{RANDOM}: {name}"] = [scores[index] for scores in drawn]
    for name, scores in rows.items():
        cells = []
        for score in scores:
            cells.append(f"{score.tail_perplexity:.2f}")
            if score.kl is not None:
                cells.append(f"{score.kl:.4f}")
            if score.retrieval_accuracy is not None:
                cells.append(f"{score.retrieval_accuracy:.0%}")
        table.add_row(name, *cells, style="bold" if name == FOUND else None)
    return table


def plot_search(result: SearchResult, path: str | os.PathLike[str]) -> None:
    """Draws what was measured layer by layer, and where the plan stands among its controls on each text.

    Args:
        result: of `search_layers`.
        path: file to write, whole or not at all; its suffix is one of `masformer.plots.SUFFIXES`.

    Raises:
        MasformerError: the suffix is unknown, or the folder does not exist.
    """
    write_figure(search_figure(result), path)


def _mark_units(axes: Any, result: SearchResult) -> None:
    """A dot in the cell of each unit whose span is that of the row."""
    heads = result.plan.kv_heads or 1
    for layer, spans in enumerate(result.plan.units(heads)):
        for head, span in enumerate(spans):
            for row, evidence in enumerate(result.evidence):
                if evidence.name == f"{span}, head {head}":
                    axes.plot(layer, row, ".", color=FULL_COLOR, markersize=5)


def search_figure(result: SearchResult) -> Figure:
    """What `plot_search` draws."""
    rows, layers, texts = len(result.evidence), len(result.plan), list(result.placements)
    width = max(7.0, 0.32 * layers + 2.2)
    heat = 0.34 * max(rows, 2)
    height = 1.55 + heat + 1.25 * len(texts)
    figure = new_figure(width, height)
    title = textwrap.shorten(f"{result.plan}", int(11 * width), placeholder=" …")
    figure.text(0.02, 1 - 0.12 / height, title, va="top", fontsize=12, color=INK)

    left, right = 1.3 / width, 0.85 / width
    axes = figure.add_axes((left, 1 - (0.5 + heat) / height, 1 - left - right, heat / height))
    values = np.array([[np.nan if value is None else value for value in row.values] for row in result.evidence], float)
    top = max(float(np.nanmax(values)), 1e-12)
    image = axes.imshow(values, cmap="YlOrRd", vmin=0, vmax=top, aspect="auto")
    axes.set_yticks(range(rows), [row.name for row in result.evidence], fontsize=8)
    axes.set_xticks(range(layers), [str(layer) for layer in range(layers)], fontsize=7)
    axes.set_xlabel("layer (0 next to the embedding); marked: in the plan", fontsize=8, color=INK)
    if result.by == "heads" and result.plan.kv_heads:
        _mark_units(axes, result)
    for layer in result.plan.full_layers:
        axes.get_xticklabels()[layer].set(color=FULL_COLOR, fontweight="bold")
        axes.plot(layer, -0.5, marker="v", color=FULL_COLOR, markersize=7, clip_on=False)
    bar = figure.add_axes((1 - right + 0.1 / width, 1 - (0.5 + heat) / height, 0.12 / width, heat / height))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
    bar.set_title("nats" if result.gradient is None or len(result.criteria) == 1 else "share", fontsize=8, color=INK)

    for index, text in enumerate(texts):
        bottom = 0.5 + 1.25 * (len(texts) - 1 - index)
        strip = figure.add_axes((left, bottom / height, 1 - left - right, 0.4 / height))
        drawn = [score.tail_perplexity for score in result.random(text)]
        strip.plot(drawn, [0] * len(drawn), "|", color=INK, alpha=0.5, markersize=14)
        named = [score for score in result.placements[text] if not score.name.startswith(RANDOM)]
        named.sort(key=lambda score: score.tail_perplexity)
        for place, score in enumerate(named):
            color = FULL_COLOR if score.name in (FOUND, FULL) else INK
            strip.plot(score.tail_perplexity, 0, "o", color=color, markersize=5)
            strip.annotate(
                score.name, (score.tail_perplexity, 0), (0, 12 + 9 * (place % 4)), textcoords="offset points",
                ha="center", fontsize=7, color=color,
            )  # fmt: skip
        strip.set_yticks([])
        strip.tick_params(labelsize=7)
        strip.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, color=INK)
        strip.spines[["left", "right", "top"]].set_visible(False)
    note = "Perplexity of the second half of the windows; bars: random placements of the same cost."
    if texts:
        figure.text(left, 0.1 / height, note, fontsize=8, color=INK, alpha=0.75)
    return figure
