"""Plans from what was measured: the most valued units, one after the other, or spans for all of them at once."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masformer.placement.budget import Purse
from masformer.placement.result import Evidence
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan, Span, layer_span

DIGITS = 6
"""Losses that agree in so many decimals are taken as equal, so that rounding does not decide."""
STATES = 100_000
"""Partial choices that `knapsack` keeps; with two spans there are never as many."""


def plan_of(spans: Sequence[Span], layers: int) -> AttentionPlan:
    """The plan of units in order: by layers where there are as many as layers, else by heads."""
    heads = len(spans) // layers
    return AttentionPlan(tuple(layer_span(spans[layer * heads : (layer + 1) * heads]) for layer in range(layers)))


def with_span(plan: AttentionPlan, layer: int, span: Span) -> AttentionPlan:
    """The plan with another span in one layer."""
    return AttentionPlan((*plan.layers[:layer], span, *plan.layers[layer + 1 :]))


def most_valued(values: ArrayLike, span: Span, local: Span, count: int, layers: int) -> AttentionPlan:
    """`span` for the units whose value is largest, `local` for the others.

    Args:
        values: of each unit.
        span: of the chosen units.
        local: of the others.
        count: units to choose.
        layers: of the model.
    """
    flat = np.asarray(values, dtype=float).ravel()
    chosen = set(np.argsort(-flat, kind="stable")[:count].tolist())
    return plan_of([span if unit in chosen else local for unit in range(len(flat))], layers)


def greedy(
    layers: int, local: Span, full_layers: int, criterion: Callable[[Sequence[AttentionPlan]], list[float]]
) -> tuple[AttentionPlan, tuple[Evidence, ...]]:
    """Makes full the layer that helps most, given those before it, again and again."""
    plan, evidence = AttentionPlan.uniform(layers, local), []
    (value,) = criterion([plan])
    for step in range(1, full_layers + 1):
        candidates = [layer for layer in range(layers) if layer not in plan.full_layers]
        values = criterion([with_span(plan, layer, FullSpan()) for layer in candidates])
        falls = {layer: round(value - each, DIGITS) for layer, each in zip(candidates, values, strict=True)}
        best = max(candidates, key=lambda layer: falls[layer])
        evidence.append(Evidence(f"step {step}", tuple(falls.get(layer) for layer in range(layers))))
        plan, value = with_span(plan, best, FullSpan()), values[candidates.index(best)]
    return plan, tuple(evidence)


def joint(losses: ArrayLike, choices: Sequence[Span], purse: Purse) -> AttentionPlan:
    """The spans that lose least together under the budget, if what units lose adds up.

    Args:
        losses: [choices, units].
        choices: spans.
        purse: the budget.
    """
    chosen = knapsack(np.asarray(losses, dtype=float), [purse.price(span) for span in choices], purse.limit)
    return plan_of([choices[choice] for choice in chosen], purse.layers)


def knapsack(losses: NDArray[np.float64], prices: Sequence[int], limit: int) -> list[int]:
    """The multiple-choice knapsack, by dynamic programming over the units; dominated partial choices are dropped.

    It is exact as long as no more than `STATES` partial choices are left; of more, so many are kept, evenly by price.

    Args:
        losses: [choices, units].
        prices: of each choice.
        limit: of the prices' sum; the cheapest choice for every unit is within it.

    Returns:
        The choice of each unit.
    """
    units, cheapest, costs = losses.shape[1], min(prices), np.asarray(prices)[:, None]
    price, loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], int]] = []
    for unit in range(units):
        before = len(price)
        grown_price, grown_loss = (price + costs).ravel(), (loss + losses[:, unit, None]).ravel()
        order = np.lexsort((grown_loss, grown_price))
        order = order[grown_price[order] <= limit - (units - unit - 1) * cheapest]
        rounded = grown_loss[order].round(DIGITS)
        order = order[[True, *(rounded[1:] < np.minimum.accumulate(rounded)[:-1])]]
        if len(order) > STATES:
            order = order[np.linspace(0, len(order) - 1, STATES).astype(np.int64)]
        steps.append((order, before))
        price, loss = grown_price[order], grown_loss[order]
    at, chosen = len(price) - 1, []
    for order, before in reversed(steps):
        choice, at = divmod(int(order[at]), before)
        chosen.append(choice)
    return chosen[::-1]


def shuffled(plan: AttentionPlan, count: int, seed: int, heads: int | None = None) -> list[AttentionPlan]:
    """Distinct plans with the same spans at other units: `count` of them, or all there are.

    Args:
        plan: the plan.
        count: how many.
        seed: of the places.
        heads: KV heads of a layer, where these are the units; None: layers are.
    """
    spans = plan.spans if heads is None else [span for layer in plan.units(heads) for span in layer]
    kinds = Counter(spans)
    others = math.factorial(len(spans)) // math.prod(map(math.factorial, kinds.values())) - 1
    choose, drawn = random.Random(seed), dict[AttentionPlan, None]()
    while len(drawn) < min(count, others):
        each = plan_of(choose.sample(spans, len(spans)), len(plan))
        if each != plan:
            drawn[each] = None
    return list(drawn)
