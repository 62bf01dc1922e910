"""Confidence intervals over documents, by the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from masformer.errors import MasformerError

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over independent units and where it may lie.

    Attributes:
        mean: of all units.
        low: lower end of the 95% confidence interval; equal to `mean` where there is one unit, and nothing to resample.
        high: upper end.
        count: units (documents, prompts, seeds).
    """

    mean: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0) -> Interval:
    """The weighted mean of `values`, with a percentile bootstrap interval over the units.

    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. For a paired comparison of two plans on the
    same documents pass the differences.

    Args:
        values: one number per unit, for example the mean loss of each document.
        weights: the weight of each unit, for example its number of tokens; equal by default.
        seed: of the resampling.

    Raises:
        MasformerError: no unit, a weight below 0, or weights that add up to 0.
    """
    found = np.asarray(values, dtype=np.float64)
    shares = np.ones_like(found) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(found) or len(found) != len(shares) or shares.min() < 0 or not shares.sum():
        raise MasformerError(
            "an interval needs at least one value, and weights from 0 that are not all 0, one per value"
        )

    def mean(values: Any, weights: Any, axis: int = -1) -> Any:
        return (values * weights).sum(axis) / np.maximum(weights.sum(axis), np.finfo(np.float64).tiny)

    centre = float(mean(found, shares))
    if len(found) == 1 or bool((found == found[0]).all()):
        return Interval(centre, centre, centre, len(found))
    made = stats.bootstrap(
        (found, shares),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(centre, float(made.low), float(made.high), len(found))
