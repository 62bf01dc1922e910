"""What a search found: the plan, the evidence, and where it stands among its controls."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from masformer.errors import MasformerError
from masformer.evaluation.perplexity import exp_or_inf
from masformer.plan import AttentionPlan

HELD_OUT = "held-out"
"""Name of the part of the documents that nothing was chosen by."""
FULL, LOCAL, FOUND, RANDOM = "all full", "all local", "found", "random"
"""Names of placements, beside the rules; random ones are numbered."""


@dataclass(frozen=True)
class Evidence:
    """One row of the heat map: what was measured layer by layer.

    Attributes:
        name: the span that one layer at a time was restricted to, the step of the greedy search, or the span whose
            gain it is, with the KV head where units are heads (`full, head 0`).
        values: the rise of the criterion above all-full when that layer alone is restricted, its fall when that
            layer is made full in this step, or the gain of the layer or head, in nats; by several criteria, the gains
            of each as shares of their sum, weighed. Larger for a layer that is needed more. None: not measured.
    """

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class PlacementScore:
    """One placement on one text.

    Attributes:
        name: `found`, `all full`, `all local`, a rule of `masformer.plan.PLACEMENTS`, or `random 1` and so on.
        plan: its text form.
        criterion: what was searched for: the weighted sum, in nats.
        tail_nll: mean negative log-likelihood of the second half of the windows, in nats per token.
        kl: mean KL(all-full || plan) there, in nats per token; None where it was not asked for.
        retrieval_nll: the same of the answers to the probes, in nats per token; None where it was not asked for.
        retrieval_accuracy: share of the probes answered right; None where it was not asked for.
    """

    name: str
    plan: str
    criterion: float
    tail_nll: float
    kl: float | None = None
    retrieval_nll: float | None = None
    retrieval_accuracy: float | None = None

    @property
    def tail_perplexity(self) -> float:
        """exp(tail_nll)."""
        return exp_or_inf(self.tail_nll)

    def figure(self, criterion: str) -> float:
        """The one of that criterion, in nats."""
        value = {"tail": self.tail_nll, "kl": self.kl, "retrieval": self.retrieval_nll}[criterion]
        return math.nan if value is None else value


@dataclass(frozen=True)
class Work:
    """What a search took; of a resumed one, the last run alone.

    Attributes:
        measurements: plans measured on a window each.
        recalled: measurements that were known already.
        layer_evaluations: times that one layer ran over one window.
        unshared_layer_evaluations: the same if no prefix were shared.
        seconds: wall-clock time.
    """

    measurements: int
    recalled: int
    layer_evaluations: int
    unshared_layer_evaluations: int
    seconds: float


@dataclass(frozen=True)
class Completeness:
    """Whether the gains of all units add up to what they should, by one criterion; in nats.

    Attributes:
        criterion: its name.
        gains: the sum of the gains of all units, along the path from all local to the widest span everywhere.
        measured: the difference of the two ends, measured on the same windows.
    """

    criterion: str
    gains: float
    measured: float


@dataclass(frozen=True)
class GradientWork:
    """How gains were measured.

    Attributes:
        rounds: the first along the path to the widest span everywhere, the others at the plan found before.
        points: of the path, by criterion.
        passes: forward passes with their backward passes; of a resumed search, those of the last run; not compared.
        completeness: of the first round, by criterion.
        ends: whether by retrieval a unit counts as the larger of its shares along the path and at its end.
    """

    rounds: int
    points: dict[str, int]
    passes: int = field(compare=False)
    completeness: tuple[Completeness, ...]
    ends: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GradientWork:
        """The inverse of `asdict`; of a result before 0.3, whose criteria all had as many points, too."""
        found = tuple(Completeness(**row) for row in values["completeness"])
        points = values["points"]
        if isinstance(points, int):
            points = dict.fromkeys((row.criterion for row in found), points)
        return cls(**{**values, "points": points, "completeness": found})


@dataclass(frozen=True)
class SearchResult:
    """The plan found, with the evidence.

    Attributes:
        plan: the plan.
        method: one of `METHODS`.
        criteria: criterion -> weight.
        budget: in words.
        local: the local span.
        length: input tokens of a window.
        windows: text windows that the plan was chosen by.
        probes: retrieval probes that the plan was chosen by.
        held_out_windows: text windows of each text of `placements`.
        other_documents: whether the held-out windows are of other documents, or of other parts of the same.
        seed: of the random placements and the probes.
        evidence: rows of the heat map, from layer 0.
        placements: text -> the plan among its controls.
        work: what it took; not compared.
        autocast: dtype of matrix products, where it was not that of the weights.
        by: `layers` or `heads`, what the units were; None in records of before there were two.
        gradient: of the method `gradient`.
    """

    plan: AttentionPlan
    method: str
    criteria: dict[str, float]
    budget: str
    local: str
    length: int
    windows: int
    probes: int
    held_out_windows: int
    other_documents: bool
    seed: int
    evidence: tuple[Evidence, ...]
    placements: dict[str, tuple[PlacementScore, ...]]
    work: Work = field(compare=False)
    autocast: str | None = None
    by: str | None = None
    gradient: GradientWork | None = None

    def score(self, name: str, text: str = HELD_OUT) -> PlacementScore:
        """The placement of that name on that text."""
        return next(score for score in self.placements[text] if score.name == name)

    def random(self, text: str = HELD_OUT) -> list[PlacementScore]:
        """The random placements on that text, best first by the criterion."""
        scores = [score for score in self.placements[text] if score.name.startswith(RANDOM)]
        return sorted(scores, key=lambda score: score.criterion)

    def rank(self, text: str = HELD_OUT) -> int:
        """Where the plan stands among the random placements by the criterion: 1 is best, their number + 1 worst."""
        found = self.score(FOUND, text).criterion
        return 1 + sum(score.criterion < found for score in self.random(text))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the attributes, with perplexities and ranks."""
        placements = {
            text: [asdict(score) | {"tail_perplexity": score.tail_perplexity} for score in scores]
            for text, scores in self.placements.items()
        }
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}
        evidence = [{"name": row.name, "values": list(row.values)} for row in self.evidence]
        ranks = {text: {"rank": self.rank(text), "of": len(self.random(text)) + 1} for text in self.placements}
        derived: dict[str, Any] = {
            "evidence": evidence,
            "placements": placements,
            "ranks": ranks,
            "work": asdict(self.work),
        }
        derived["gradient"] = None if self.gradient is None else asdict(self.gradient)
        return self.plan.to_dict() | own | derived

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchResult:
        """The inverse of `to_dict`; other keys are passed over.

        Raises:
            MasformerError: a key is missing, or holds something else.
        """
        try:
            scores = {field.name for field in fields(PlacementScore)}
            own = {
                field.name: values[field.name]
                for field in fields(cls)
                if field.default is MISSING or field.name in values
            }
            own["plan"] = AttentionPlan.from_dict(values)
            own["evidence"] = tuple(Evidence(row["name"], tuple(row["values"])) for row in values["evidence"])
            own["placements"] = {
                text: tuple(
                    PlacementScore(**{key: value for key, value in row.items() if key in scores}) for row in rows
                )
                for text, rows in values["placements"].items()
            }
            own["work"] = Work(**values["work"])
            if own.get("gradient") is not None:
                own["gradient"] = GradientWork.from_dict(own["gradient"])
        except (KeyError, TypeError, AttributeError) as error:
            raise MasformerError(f"this is no result of a search: {type(error).__name__}: {error}") from None
        return cls(**own)

    def save(self, path: str | os.PathLike[str], **notes: Any) -> None:
        """Writes a plan file that also says how the plan was found; arguments and errors as `AttentionPlan.save`."""
        how = {key: value for key, value in self.to_dict().items() if key not in ("plan", "num_layers")}
        self.plan.save(path, found_by=how, **notes)
