"""Criteria of a search: what must not suffer under a plan, and how losses and gains by several of them are weighed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from masformer.errors import MasformerError, shown
from masformer.placement.measure import Score
from masformer.placement.result import PlacementScore
from masformer.placement.texts import Window
from masformer.plan import AttentionPlan

CRITERIA = ("tail", "kl", "retrieval")
USUAL = "tail,retrieval"
"""Criteria of the method gradient, where nothing is said."""
POINTS = {"tail": 2, "kl": 4, "retrieval": 4}
"""Of the path, where nothing is said. The loss of running text falls evenly along it, that of answers in one place."""


def parse_criteria(text: str) -> dict[str, float]:
    """Reads `tail`, or a weighted mix such as `tail:1,retrieval:0.5`; a weight left out is 1.

    Raises:
        MasformerError: an unknown criterion, one named twice, or a weight that is no positive number.
    """
    criteria: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = (piece.strip() for piece in part.partition(":"))
        if name in criteria:
            raise MasformerError(f"criterion {name!r} is named twice")
        try:
            criteria[name] = float(weight or 1)
        except ValueError:
            raise MasformerError(f"the weight of criterion {name!r} must be a number, got {shown(weight)}") from None
    return check_criteria(criteria)


def check_criteria(criteria: Mapping[str, float]) -> dict[str, float]:
    """The criteria and their weights, as they are.

    Raises:
        MasformerError: none, an unknown criterion, or a weight that is no positive number.
    """
    if not criteria or not set(criteria) <= set(CRITERIA):
        unknown = ", ".join(sorted(set(criteria) - set(CRITERIA))) or "none at all"
        raise MasformerError(f"unknown criterion: {unknown}; allowed: {', '.join(CRITERIA)}, or a mix (tail:1,kl:0.5)")
    for name, weight in criteria.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise MasformerError(f"the weight of criterion {name!r} must be a positive number, got {shown(weight)}")
    return dict(criteria)


def larger(path: NDArray[np.float64], end: NDArray[np.float64], widest: int) -> NDArray[np.float64]:
    """The larger of the shares that units have along a path and at its end, in nats of the path."""
    whole, last = _whole(path, widest), _whole(end, widest)
    return np.maximum(path, end * (whole / last)) if last > 0 else path


def _whole(gains: NDArray[np.float64], widest: int) -> float:
    """What shares are of: the sum of what units gain by the widest span, without those that lose."""
    return float(gains[widest].clip(min=0).sum())


def total_gains(
    gains: Mapping[str, NDArray[np.float64]], criteria: Mapping[str, float], widest: int
) -> NDArray[np.float64]:
    """One criterion's gains as they are; of several, each as shares of the sum of what the widest span gains."""
    if len(gains) == 1:
        return next(iter(gains.values()))
    shares = []
    for name, each in gains.items():
        whole = _whole(each, widest)
        shares.append(criteria[name] * each / whole if whole > 0 else np.zeros_like(each))
    total: NDArray[np.float64] = np.sum(shares, axis=0)
    return total


def placement_score(
    name: str, plan: AttentionPlan, windows: Sequence[Window], scores: Sequence[Score], criteria: Mapping[str, float]
) -> PlacementScore:
    """Means over the windows, and their weighted sum."""
    text = [score for window, score in zip(windows, scores, strict=True) if not window.probe]
    answers = [score for window, score in zip(windows, scores, strict=True) if window.probe]
    figures = {
        "tail": _mean([score.nll for score in text]),
        "kl": _mean([score.kl for score in text if score.kl is not None]) if "kl" in criteria else None,
        "retrieval": _mean([score.nll for score in answers]),
    }
    return PlacementScore(
        name=name,
        plan=str(plan),
        criterion=math.fsum(weight * (figures[each] or 0.0) for each, weight in criteria.items()),
        tail_nll=math.nan if figures["tail"] is None else figures["tail"],
        kl=figures["kl"],
        retrieval_nll=figures["retrieval"],
        retrieval_accuracy=_mean([float(score.right) for score in answers]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
