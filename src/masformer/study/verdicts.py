"""From measurements to verdicts: what the intervals say of a claim, and nothing beyond them.

Values are losses, or scores with the sign turned: higher is worse. Plans are compared on the same seeds and documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from masformer.evaluation.intervals import Interval, bootstrap
from masformer.study.settings import FULL, LOCAL

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable at this scale"
CLOSE = 0.25
"""A plan comes close to full attention where at most this share of what local attention loses is left."""
MARGIN = 0.01
"""Nats per token, 1% of perplexity, below which two plans count as equally good."""

Values = Sequence[Sequence[float]]
"""[seeds][documents]; one document where each seed gave one number."""


@dataclass(frozen=True)
class Verdict:
    """What was found of a claim.

    Attributes:
        claim: a sentence.
        answer: `HOLDS`, `FAILS` or `OPEN`.
        why: the figures that decided it.
    """

    claim: str
    answer: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def interval(values: Values, weights: Sequence[float] | None = None) -> Interval:
    """The mean over seeds and documents, with a 95% interval.

    Over documents, each the mean of its seeds; and wide enough to hold the mean of every seed, so that it is never more
    certain than training once more would be. Where seeds give one number each, over seeds.

    Args:
        values: see `Values`.
        weights: of the documents.
    """
    table = np.asarray(values, dtype=np.float64)
    seeds = np.average(table, axis=1, weights=weights)
    found = bootstrap(seeds.tolist()) if table.shape[1] == 1 else bootstrap(table.mean(axis=0).tolist(), weights)
    return Interval(found.mean, min(found.low, seeds.min()), max(found.high, seeds.max()), found.count)


def alike(values: Iterable[Values]) -> list[Values]:
    """As many seeds of each, the first ones: what was measured with one seed is held against that seed."""
    found = list(values)
    count = min(map(len, found))
    return [each[:count] for each in found]


def difference(values: Values, base: Values, weights: Sequence[float] | None = None) -> Interval:
    """`values` less `base`, paired by seed and document."""
    return interval((np.asarray(values) - np.asarray(base)).tolist(), weights)


@dataclass(frozen=True)
class Nearness:
    """How near a plan comes to full attention.

    Attributes:
        gap: what local attention loses against full.
        left: what the plan loses against full.
        excess: `left` less `CLOSE` of the gap, paired.
    """

    gap: Interval
    left: Interval
    excess: Interval

    @classmethod
    def of(cls, full: Values, local: Values, plan: Values, weights: Sequence[float] | None = None) -> Nearness:
        """From the values of three plans."""
        whole, ends, mine = map(np.asarray, alike((full, local, plan)))
        gap, left = ends - whole, mine - whole
        return cls(*(interval(each.tolist(), weights) for each in (gap, left, left - CLOSE * gap)))

    @property
    def answer(self) -> str:
        """Whether it comes close; where local attention loses nothing for certain, a plan can only fail."""
        if _lone(self.gap):
            return OPEN
        if self.gap.low <= 0:
            return FAILS if self.left.low > 0 and self.excess.low > 0 else OPEN
        return HOLDS if self.excess.high <= 0 else FAILS if self.excess.low > 0 else OPEN

    def text(self, name: str, unit: str) -> str:
        """The figures in words."""
        if _lone(self.gap):
            return f"{name}: one measurement gives no interval"
        if self.gap.low <= 0 and self.answer == OPEN:
            return f"all local loses {self.gap} {unit}: no certain loss, so there is nothing to win back"
        return f"{name} loses {self.left} {unit} where all local loses {self.gap}"


def nearness(values: Mapping[str, Values], weights: Sequence[float] | None = None) -> dict[str, Nearness]:
    """How near every plan comes to full attention, but for the ends themselves; none where an end is missing.

    Args:
        values: by the plans' names.
        weights: of the documents.
    """
    if FULL not in values or LOCAL not in values:
        return {}
    mixes = {name: each for name, each in values.items() if name not in (FULL, LOCAL)}
    return {name: Nearness.of(values[FULL], values[LOCAL], each, weights) for name, each in mixes.items()}


def decisive(plans: Mapping[str, Nearness]) -> list[str]:
    """Names of those that come close to full attention; where none does, of all."""
    return [name for name, each in plans.items() if each.answer == HOLDS] or list(plans)


def comes_close(claim: str, plans: dict[str, Nearness], unit: str) -> Verdict:
    """Whether any of the plans comes close to full attention; not, where none does for certain.

    Args:
        claim: in a sentence.
        plans: name -> how near; none: nothing was measured that the claim is about.
        unit: of the values.
    """
    answers = {each.answer for each in plans.values()}
    answer = HOLDS if HOLDS in answers else FAILS if answers == {FAILS} else OPEN
    lines = dict.fromkeys(plans[name].text(name, unit) for name in decisive(plans))
    return Verdict(claim, answer, "; ".join(lines) or "nothing was measured")


def writes_as_well(claim: str, likely: dict[str, Nearness], written: dict[str, Nearness], unit: str) -> Verdict:
    """Whether the plans that come close to full attention by the loss of text do so in what they write as well.

    Not, where one of them does not for certain.

    Args:
        claim: in a sentence.
        likely: name -> how near by the loss of text.
        written: name -> how near by what is written.
        unit: of what is written.
    """
    chosen = [name for name, near in likely.items() if near.answer == HOLDS and name in written]
    if not chosen:
        return Verdict(claim, OPEN, "no plan comes close by the loss of text" if likely else "nothing was measured")
    answers = {written[name].answer for name in chosen}
    answer = FAILS if FAILS in answers else HOLDS if answers == {HOLDS} else OPEN
    return Verdict(claim, answer, "; ".join(dict.fromkeys(written[name].text(name, unit) for name in chosen)))


def is_better(claim: str, found: Interval, what: str, unit: str = "nats") -> Verdict:
    """Whether a difference is certainly below 0.

    Args:
        claim: in a sentence.
        found: value less what it is held against.
        what: was compared, for example "found less middle".
        unit: of the values.
    """
    if _lone(found):
        return Verdict(claim, OPEN, f"{what}: one measurement gives no interval")
    answer = HOLDS if found.high < 0 else FAILS if found.low > 0 else OPEN
    return Verdict(claim, answer, f"{what}: {signed(found)} {unit}")


def are_better(claim: str, found: dict[str, Interval], unit: str = "nats") -> Verdict:
    """Whether all differences are below 0 for certain; not, where one is above for certain.

    Args:
        claim: in a sentence.
        found: what was compared -> value less what it is held against.
        unit: of the values.
    """
    sure = [each for each in found.values() if not _lone(each)]
    if any(each.low > 0 for each in sure):
        answer = FAILS
    else:
        answer = HOLDS if sure and len(sure) == len(found) and all(each.high < 0 for each in sure) else OPEN
    why = "; ".join(f"{what}: {signed(each)} {unit}" for what, each in found.items())
    return Verdict(claim, answer, why or "nothing was measured")


def is_different(claim: str, found: Interval, what: str, unit: str = "nats") -> Verdict:
    """Whether a difference is certainly above 0; not, where it is certainly within `MARGIN`.

    Args:
        claim: in a sentence.
        found: the worst less the best.
        what: was compared.
        unit: of the values.
    """
    if _lone(found):
        return Verdict(claim, OPEN, f"{what}: one measurement gives no interval")
    answer = FAILS if found.high <= MARGIN else HOLDS if found.low > 0 else OPEN
    return Verdict(claim, answer, f"{what}: {signed(found)} {unit}")


def is_no_worse(claim: str, found: dict[str, Interval], unit: str = "nats") -> Verdict:
    """Whether all differences are at most `MARGIN` for certain; not, where one is above for certain.

    Args:
        claim: in a sentence.
        found: what was compared -> difference.
        unit: of the values.
    """
    sure = [each for each in found.values() if not _lone(each)]
    if any(each.low > MARGIN for each in sure):
        answer = FAILS
    elif sure and len(sure) == len(found) and all(each.high <= MARGIN for each in sure):
        answer = HOLDS
    else:
        answer = OPEN
    why = "; ".join(f"{what}: {signed(each)} {unit}" for what, each in found.items())
    return Verdict(claim, answer, why or "nothing was measured")


def is_faster(claim: str, ratios: dict[str, Interval]) -> Verdict:
    """Whether all ratios of times are above 1 for certain.

    Args:
        claim: in a sentence.
        ratios: what was timed -> time of full attention over that of the plan, over rounds of one run.
    """
    why = "; ".join(f"{what}: {each} times as fast" for what, each in ratios.items())
    if not ratios or any(_lone(each) for each in ratios.values()):
        return Verdict(claim, OPEN, why or "nothing was timed")
    slower = any(each.high < 1 for each in ratios.values())
    answer = HOLDS if all(each.low > 1 for each in ratios.values()) else FAILS if slower else OPEN
    return Verdict(claim, answer, why)


def signed(found: Interval) -> str:
    """`+0.0123 [+0.0100, +0.0150]`."""
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _lone(found: Interval) -> bool:
    return found.count < 2
