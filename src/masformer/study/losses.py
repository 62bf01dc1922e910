"""Losses of one plan, by seed and document, and scores of prompts, from the results of units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from masformer.evaluation.intervals import Interval
from masformer.evaluation.perplexity import exp_or_inf
from masformer.evaluation.perplexity.measure import exp_interval
from masformer.study.findings import Row
from masformer.study.settings import FULL
from masformer.study.verdicts import Nearness, Values, alike, difference, interval, nearness


class Losses:
    """What `masformer.study.works.Perplexity` measured of one plan.

    Args:
        parts: its results, one a seed.
    """

    def __init__(self, parts: Sequence[dict[str, Any]]) -> None:
        self._by_length = [{row["length"]: row for row in part["results"]} for part in parts]

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self._by_length)

    def _documents(self, length: int, key: str) -> list[dict[str, Any]]:
        return [rows[length][key] for rows in self._by_length]

    def late(self, length: int) -> Values:
        """[seeds][documents] mean loss in the second half of windows of that length, in nats."""
        return _means(self._documents(length, "second_half_by_document"))

    def weights(self, length: int) -> list[float]:
        """Predicted tokens of each document in the second half."""
        found: list[float] = self._documents(length, "second_half_by_document")[0]["tokens"]
        return found

    def over(self, base: Losses, length: int) -> Interval:
        """The loss in the second half less that of another plan, in nats, paired by seed and document.

        Where one was measured with the first seeds, or on the first documents, alone: of these.
        """
        mine, theirs, weights = self.late(length), base.late(length), self.weights(length)
        count = min(len(mine[0]), len(theirs[0]))
        mine, theirs = alike([row[:count] for row in each] for each in (mine, theirs))
        return difference(mine, theirs, weights[:count])

    def row(self, length: int, **bases: Losses | None) -> Row:
        """Perplexity of all tokens and of the second half, with intervals, and how many seeds and documents.

        Args:
            length: of the windows.
            **bases: key -> another plan that this one is held against, see `over`; None, or itself: not at all.
        """
        whole = self._documents(length, "by_document")
        found: Row = {"perplexity": exp_interval(interval(_means(whole), whole[0]["tokens"]))}
        found["second_half"] = exp_interval(interval(self.late(length), self.weights(length)))
        found |= {"seeds": self.seeds, "documents": len(whole[0]["tokens"])}
        others = {key: base for key, base in bases.items() if base is not None and base is not self}
        return found | {key: self.over(base, length) for key, base in others.items()}

    def positions(self, length: int) -> list[Row]:
        """Perplexity by position in the window, the mean over seeds."""
        found = []
        for buckets in zip(*(rows[length]["buckets"] for rows in self._by_length), strict=True):
            losses = [bucket["nll"] for bucket in buckets if bucket["nll"] is not None]
            if losses:
                first = buckets[0]
                place = f"{first['start']}-{first['end'] - 1}"
                found.append({"position": place, "perplexity": exp_or_inf(sum(losses) / len(losses))})
        return found


def over_each_other(
    losses: Mapping[str, Losses], pairs: Iterable[Sequence[str]], length: int, share: Callable[[str], float]
) -> dict[str, Interval]:
    """Of pairs of names, as far as both were measured: what is compared -> the loss of the first over the second.

    Args:
        losses: by name.
        pairs: of names.
        length: of the windows.
        share: of the attention operations of full attention, by name.
    """
    return {
        f"{one} less {other} ({share(one):.1%} and {share(other):.1%} of the operations)": losses[one].over(
            losses[other], length
        )
        for one, other in pairs
        if one in losses and other in losses
    }


def near_full(losses: Mapping[str, Losses], length: int) -> dict[str, Nearness]:
    """How near every plan comes to full attention in the second half of windows, see `nearness`."""
    values = {name: each.late(length) for name, each in losses.items()}
    return nearness(values, losses[FULL].weights(length)) if FULL in losses else {}


def _means(documents: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [[nll / tokens for nll, tokens in zip(each["nll"], each["tokens"], strict=True)] for each in documents]


def prompt_scores(result: dict[str, Any], length: int, metric: str) -> Values:
    """[1][prompts] at a length, over all depths, in the order of their names; the sign turned: higher is worse."""
    row = next(row for row in result["results"] if row["length"] == length and row.get("depth") is None)
    each = row["by_example"]
    return [[-score for _, score in sorted(zip(each["id"], each[metric], strict=True))]]


def document_scores(result: dict[str, Any], metric: str) -> tuple[Values, list[int]]:
    """([1][documents] the mean over the queries about each, the sign turned; how many queries), of the only length."""
    (row,) = result["results"]
    found: dict[str, list[float]] = {}
    for name, score in zip(row["by_example"]["id"], row["by_example"][metric], strict=True):
        found.setdefault(name.partition("#")[0], []).append(-score)
    return [[fmean(scores) for scores in found.values()]], [len(scores) for scores in found.values()]


def turned(values: Values) -> Values:
    """With the sign turned."""
    return [[-value for value in row] for row in values]
