"""What a search may spend, and what a layer of each span costs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from transformers import PreTrainedModel

from masformer.cost import ModelShape, bytes_text, cost
from masformer.errors import LARGEST, MasformerError, check_int, check_number, read_int, shown
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan, Span

BUDGET_FORMS = (
    "a number of full layers, or of KV heads by heads (8), a share of all-full's attention FLOPs (30%), or KV-cache "
    "bytes (64MiB); the last two may name a length in tokens (30%@8192)"
)


@dataclass(frozen=True)
class Budget:
    """What a plan may cost: exactly one of the first three.

    Attributes:
        full_layers: full layers, the others local; in a search by heads, full KV heads.
        flops_share: attention FLOPs, as a fraction of full attention in every layer; above 0, below 1.
        cache_bytes: KV-cache bytes of one sequence, with values of 2 bytes.
        length: tokens at which the cost is counted; None: those of the search.
    """

    full_layers: int | None = None
    flops_share: float | None = None
    cache_bytes: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if (self.full_layers, self.flops_share, self.cache_bytes).count(None) != 2:
            raise MasformerError(f"a budget is one of: {BUDGET_FORMS}")
        if self.full_layers is not None:
            check_int("number of full layers", self.full_layers, 0)
        if self.flops_share is not None and not 0 < self.flops_share < 1:
            raise MasformerError(f"a share of the FLOPs must lie between 0% and 100%, got {self.flops_share:.6g}")
        if self.cache_bytes is not None:
            check_int("KV-cache bytes", self.cache_bytes, 1)
        if self.length is not None:
            check_int("length of the budget", self.length, 1)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads `8`, `30%`, `64MiB`, `30%@8192` or `64MiB@8192`.

        Raises:
            MasformerError: it is none of the forms, or out of range.
        """
        match = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*(%|B|KiB|MiB|GiB)?\s*(?:@\s*(\d+))?\s*", text)
        if match is None or (match[2] is None and (match[3] or "." in match[1])):
            raise MasformerError(f"cannot read the budget {shown(text)}; allowed: {BUDGET_FORMS}")
        number, unit = match[1], match[2]
        length = read_int("length of the budget", match[3], 1) if match[3] else None
        if unit is None:
            return cls(full_layers=read_int("number of full layers", number, 0))
        if unit == "%":
            return cls(flops_share=float(number) / 100, length=length)
        scale = 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)
        check_number("KV-cache bytes", float(number) * scale, 1, LARGEST)
        return cls(cache_bytes=int(float(number) * scale), length=length)

    def __str__(self) -> str:
        at = "" if self.length is None else f" at {self.length} tokens"
        if self.full_layers is not None:
            return f"{self.full_layers} full layers"
        if self.flops_share is not None:
            return f"{self.flops_share:.4g} of all-full's attention FLOPs{at}"
        return f"{bytes_text(self.cache_bytes or 0)} of KV cache{at}"


class Purse:
    """A budget for one model: what a unit of each span costs, and what there is to spend.

    Args:
        budget: the budget.
        model: the model.
        local: the span of units that are not full.
        length: tokens at which the cost is counted, where the budget does not say.
        heads: KV heads of a layer, where these are the units; None: layers are.

    Attributes:
        layers: of the model.
        units: in all.
        limit: FLOPs or bytes to spend.
    """

    def __init__(
        self, budget: Budget, model: PreTrainedModel, local: Span, length: int, heads: int | None = None
    ) -> None:
        self.layers = int(model.config.num_hidden_layers)
        self.units = self.layers * (heads or 1)
        self.length = budget.length or length
        self.shape = ModelShape.of(model.config)
        self.figure = "attention_flops" if budget.cache_bytes is None else "kv_cache_bytes"
        what = "layer" if heads is None else "KV head"
        full = self.units * self.price(FullSpan())
        self.text = str(budget)
        if budget.full_layers is not None:
            self.text = f"{budget.full_layers} full {what}s"
            if budget.full_layers > self.units:
                raise MasformerError(f"{self.text} are more than the model's {self.units} {what}s")
            local_units = self.units - budget.full_layers
            self.limit = budget.full_layers * self.price(FullSpan()) + local_units * self.price(local)
        elif budget.flops_share is not None:
            self.limit = math.floor(budget.flops_share * full)
        else:
            self.limit = budget.cache_bytes or 0
        if self.limit >= full:
            raise MasformerError(f"a budget of {self.text} lets every {what} be full: there is nothing to choose")
        if self.price(local) >= self.price(FullSpan()):
            raise MasformerError(f"{local} costs as much as full at {self.length} tokens: there is nothing to choose")
        self.budget, self.what = budget, what

    def price(self, span: Span) -> int:
        """Of one unit: FLOPs or bytes."""
        whole = getattr(cost(self.shape, AttentionPlan.uniform(self.layers, span), self.length), self.figure)
        return int(whole) // self.units

    def check(self, cheapest: Span) -> None:
        """Raises MasformerError unless every unit can have this span."""
        if self.units * self.price(cheapest) > self.limit:
            raise MasformerError(
                f"a budget of {self.text} is less than {cheapest} in every layer needs; give more or a smaller span"
            )

    def most(self, span: Span, local: Span) -> int:
        """How many units can have a span when the others are local; below 0 where not even none can."""
        left = self.limit - self.units * self.price(local)
        return min(self.units, left // (self.price(span) - self.price(local)))
