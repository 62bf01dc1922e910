"""A plan: one span per layer or per KV head, and the placement rules that say which layers are full.

>>> from masformer.spans import WindowSpan
>>> plan = AttentionPlan.mixed(num_layers=8, full=2, placement="middle", local=WindowSpan(512, sinks=4))
>>> str(plan)
'full@3-4; window:512+4'
>>> AttentionPlan.parse("full@3-4; window:512+4", num_layers=8) == plan
True
>>> AttentionPlan.parse("full@4,7:0; window:512+4", num_layers=8, kv_heads=2).units(2)[7]
(FullSpan(), WindowSpan(size=512, sinks=4, constant_sink=False))
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from masformer.errors import MasformerError, check_int, shown
from masformer.files import write_whole
from masformer.plan_text import (
    MOST_LAYERS,
    MOST_UNITS,
    PLAN_FORMS,
    check_head,
    check_layer,
    check_units,
    is_one_per_layer,
    read_layers,
    read_plan,
    write_plan,
)
from masformer.settings import read_yaml
from masformer.spans import FullSpan, LayerSpan, Span, UnitSpans, layer_span, spans_of

PlanSource: TypeAlias = "AttentionPlan | str | os.PathLike[str]"
"""A plan, its text form, or a plan file."""
PLAN_SUFFIXES = (".yaml", ".yml", ".json")
SCHEMA = Path(__file__).with_name("plan.schema.json")
"""The JSON schema of plan files, which those that are written name, so that editors complete and check."""

PLACEMENTS: dict[str, Callable[[int, int], range | list[int]]] = {
    "bottom": lambda layers, full: range(full),
    "top": lambda layers, full: range(layers - full, layers),
    "middle": lambda layers, full: range((layers - full) // 2, (layers - full) // 2 + full),
    "spread": lambda layers, full: [(2 * i + 1) * layers // (2 * full) for i in range(full)],
}
"""Placement name -> (number of layers, number of full layers) -> indices of the full layers.

`bottom` counts from the embedding (layer 0), `top` from the output; `middle` is one run around the centre, nearer
to the bottom where the halves differ; `spread` is evenly spaced, each at the centre of its share of the layers.
"""


def _check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    for layer in layers:
        check_layer(layer, num_layers)
    if duplicates := [layer for layer, count in Counter(layers).items() if count > 1]:
        raise MasformerError(f"layer {duplicates[0]} is named more than once among the full layers")
    return tuple(sorted(layers))


def place_full_layers(num_layers: int, full: int | None, placement: str | int | Sequence[int]) -> tuple[int, ...]:
    """Indices of the full layers, ascending.

    Args:
        num_layers: layers of the model; at least 1.
        full: how many are full; may be None (or must agree) when `placement` lists them.
        placement: `bottom`, `top`, `middle`, `spread`, or the layers themselves (a list, one number, or text like
            "0-3,17").

    Raises:
        MasformerError: unknown placement, more full layers than layers, a layer out of range or named twice.
    """
    check_int("number of layers", num_layers, 1, MOST_LAYERS)
    if full is not None:
        check_int("number of full layers", full, 0)
        if full > num_layers:
            raise MasformerError(f"{full} full layers asked for, but the model has only {num_layers} layers")
    if isinstance(placement, str) and placement in PLACEMENTS:
        if full is None:
            raise MasformerError(f"placement {placement!r} needs the number of full layers")
        return tuple(PLACEMENTS[placement](num_layers, full)) if full else ()
    if isinstance(placement, str):
        if not re.fullmatch(r"[\d\s,-]+", placement):
            allowed = ", ".join(PLACEMENTS)
            raise MasformerError(f"unknown placement {shown(placement)}; allowed: {allowed}, or layers like 0-3,17")
        placement = read_layers(placement, num_layers)
    if isinstance(placement, int):
        placement = [placement]
    if not isinstance(placement, Iterable):
        raise MasformerError(
            f"placement {shown(placement)} is not allowed; allowed: {', '.join(PLACEMENTS)}, or layers"
        )
    layers = _check_layers(list(placement), num_layers)
    if full is not None and full != len(layers):
        raise MasformerError(f"{full} full layers asked for, but the placement lists {len(layers)}")
    return layers


@dataclass(frozen=True)
class AttentionPlan:
    """One span per layer, or per unit of a layer: a KV head with its query heads. Layer 0 is next to the embedding.

    Args:
        layers: for each layer its span, or the spans of its KV heads in order.
        kv_heads: KV heads of each layer, if known. Plans by layers fit any number, and are alike whatever it is.

    Raises:
        MasformerError: no layer at all, something that is not a span, or layers of different numbers of KV heads.
    """

    layers: tuple[LayerSpan, ...]
    kv_heads: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(_layer_of(number, spans) for number, spans in enumerate(self.layers)))
        if not self.layers:
            raise MasformerError("a plan needs at least one layer")
        counts = {len(layer) for layer in self.layers if isinstance(layer, UnitSpans)}
        if len(counts) > 1:
            raise MasformerError(f"layers of a plan have {min(counts)} and {max(counts)} KV heads; all have as many")
        if counts:
            known = self.kv_heads
            object.__setattr__(self, "kv_heads", counts.pop())
            self.for_layers(None, known)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def __getitem__(self, layer: int) -> Span:
        span = self.layers[layer]
        if isinstance(span, UnitSpans):
            raise self._by_heads_error()
        return span

    @property
    def by_heads(self) -> bool:
        """Whether the units of some layer differ."""
        return any(isinstance(layer, UnitSpans) for layer in self.layers)

    @property
    def spans(self) -> tuple[Span, ...]:
        """One span per layer.

        Raises:
            MasformerError: the plan is one by heads, which is not one span per layer; see `layers` and `units`.
        """
        if self.by_heads:
            raise self._by_heads_error()
        return self.layers  # type: ignore[return-value]

    def units(self, kv_heads: int) -> tuple[tuple[Span, ...], ...]:
        """The span of each unit: for each layer, of each KV head.

        Args:
            kv_heads: KV heads of each layer of the model.

        Raises:
            MasformerError: the plan is for another number.
        """
        self.for_layers(None, kv_heads)
        return tuple(layer.spans if isinstance(layer, UnitSpans) else (layer,) * kv_heads for layer in self.layers)

    @property
    def kinds(self) -> tuple[Span, ...]:
        """The distinct spans, in the order in which they appear."""
        return tuple(dict.fromkeys(span for layer in self.layers for span in spans_of(layer)))

    def changed(self, change: Callable[[Span], Span]) -> AttentionPlan:
        """The plan in which each span is what `change` makes of it."""
        layers = tuple(layer_span(tuple(map(change, spans_of(layer)))) for layer in self.layers)
        return AttentionPlan(layers, self.kv_heads)

    def unit_counts(self, kv_heads: int) -> Counter[Span]:
        """How many units of all layers have each span; arguments and errors as in `units`."""
        self.for_layers(None, kv_heads)
        counts: Counter[Span] = Counter()
        for layer in self.layers:
            counts.update(layer.spans if isinstance(layer, UnitSpans) else {layer: kv_heads})
        return counts

    def _by_heads_error(self) -> MasformerError:
        return MasformerError(
            f"plan {shown(str(self))} gives the KV heads of one layer different spans; only plans by "
            "layers are allowed here"
        )

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers of full attention in every head, ascending."""
        return tuple(number for number, layer in enumerate(self.layers) if isinstance(layer, FullSpan))

    @property
    def is_full(self) -> bool:
        """True when every layer has full attention."""
        return len(self.full_layers) == len(self)

    @classmethod
    def uniform(cls, num_layers: int, span: Span | str) -> AttentionPlan:
        """The same span, which may be its text, in every layer."""
        check_int("number of layers", num_layers, 1, MOST_LAYERS)
        return cls((Span.parse(span),) * num_layers)

    @classmethod
    def mixed(
        cls,
        num_layers: int,
        full: int | None = None,
        placement: str | int | Sequence[int] = "middle",
        *,
        local: Span | str,
    ) -> AttentionPlan:
        """Full attention at the layers the placement names, `local` at all the others (MASFormer, section 3).

        Args:
            num_layers: layers of the model.
            full: number of full layers; not needed when `placement` lists the layers.
            placement: see `place_full_layers`.
            local: span of the other layers, or its text: window:512+4.
        """
        full_layers = set(place_full_layers(num_layers, full, placement))
        span = Span.parse(local)
        return cls(tuple(FullSpan() if layer in full_layers else span for layer in range(num_layers)))

    @classmethod
    def of_units(
        cls, num_layers: int, kv_heads: int, units: Mapping[tuple[int, int], Span | str], *, local: Span | str
    ) -> AttentionPlan:
        """The spans of some units, and `local` in all the others.

        Args:
            num_layers: layers of the model.
            kv_heads: KV heads of each layer.
            units: (layer, KV head) -> its span, or the text of it.
            local: span of the other units, or its text.

        Raises:
            MasformerError: a number is out of range, or the model has no such unit.
        """
        check_units(num_layers, kv_heads)
        rows = [[Span.parse(local)] * kv_heads for _ in range(num_layers)]
        for (layer, head), span in units.items():
            check_layer(layer, num_layers)
            check_head(head, kv_heads)
            rows[layer][head] = Span.parse(span)
        return cls(tuple(layer_span(row) for row in rows))

    @classmethod
    def from_options(
        cls,
        num_layers: int,
        full: int | None = None,
        placement: str | int | Sequence[int] | None = None,
        local: Span | str | None = None,
        *,
        kv_heads: int | None = None,
        plan: PlanSource | None = None,
        default: AttentionPlan | None = None,
        dashes: str = "",
    ) -> AttentionPlan:
        """The plan that options name: itself, or the rule of a mixed one, where `middle` is the default placement.

        Args:
            num_layers: layers of the model.
            full: number of full layers.
            placement: see `place_full_layers`.
            local: span of the other layers, or its text.
            kv_heads: KV heads of each layer; needed by a plan that names some.
            plan: a plan, text or file, in place of the rule.
            default: the plan where nothing is named.
            dashes: what stands before the names of the options in messages.

        Raises:
            MasformerError: the options do not name a plan.
        """
        if full is None and placement is None and local is None:
            if plan is None and default is None:
                raise MasformerError(f"no plan is named; give {dashes}plan, or {dashes}full and {dashes}local")
            return cls.load(default if plan is None else plan, num_layers, kv_heads)  # type: ignore[arg-type]
        if plan is not None:
            raise MasformerError(f"give either {dashes}plan or {dashes}full/{dashes}placement/{dashes}local")
        if local is None:
            raise MasformerError(
                f"{dashes}full and {dashes}placement need {dashes}local SPAN, the span of the other layers"
            )
        if full is None and placement is None:
            raise MasformerError(
                f"{dashes}local needs {dashes}full N or {dashes}placement LAYERS, the layers that stay full"
            )
        return cls.mixed(num_layers, full, "middle" if placement is None else placement, local=local)

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None, kv_heads: int | None = None) -> AttentionPlan:
        """Reads the text form: `window:512` for all layers, one span per layer, or clauses: `SPAN@UNITS; ...; SPAN`.

        `full@0-3,17; window:512+4` names layers, `full@4,7:0,18:0-1; window:256+4` KV heads as well: all of layer 4,
        head 0 of layer 7, heads 0 and 1 of layer 18. Commas may stand for the semicolons.

        Args:
            text: the plan.
            num_layers: layers of the model. Needed unless the text gives one span per layer.
            kv_heads: KV heads of each layer. Needed where the text names some.

        Raises:
            MasformerError: the text cannot be read or does not fit the numbers.
        """
        text = text.strip()
        if not text:
            raise MasformerError(f"the plan is empty; allowed: {PLAN_FORMS}")
        if is_one_per_layer(text):
            spans = [Span.parse(part) for part in text.split(",")]
            if len(spans) == 1 and num_layers is not None:
                return cls.uniform(num_layers, spans[0])
            return cls(tuple(spans)).for_layers(num_layers)
        if num_layers is None:
            raise MasformerError(f"plan {shown(text)} needs the number of layers of the model")
        return cls(tuple(read_plan(text, num_layers, kv_heads)))

    @classmethod
    def load(cls, source: PlanSource, num_layers: int | None = None, kv_heads: int | None = None) -> AttentionPlan:
        """The plan that a text or a .yaml/.json file (what `save` wrote) says; a plan stays as it is.

        Raises:
            MasformerError: the file is missing or is no plan, the text cannot be read, or the plan has another number
                of layers or of KV heads.
        """
        if isinstance(source, AttentionPlan):
            return source.for_layers(num_layers, kv_heads)
        if not isinstance(source, str | os.PathLike):
            raise MasformerError(f"{shown(source)} is no plan; allowed: an AttentionPlan, or as text {PLAN_FORMS}")
        path = Path(source)
        if path.suffix.lower() not in PLAN_SUFFIXES:
            return cls.parse(os.fspath(source), num_layers, kv_heads)
        from masformer.plan_file import PlanFile  # here, for its library takes a tenth of a second
        from masformer.schema import build

        data = read_yaml(path, "plan file")
        try:
            found = build(PlanFile, data, "it")
            layers, heads = found.num_layers or num_layers, found.kv_heads or kv_heads
            return cls.parse(found.plan, layers, heads).for_layers(num_layers, kv_heads)
        except MasformerError as error:
            raise MasformerError(f"plan file {path}: {error}") from None

    def save(self, path: str | os.PathLike[str], **notes: Any) -> None:
        """Writes a plan file, YAML or JSON by its suffix, whole or not at all.

        Args:
            path: file with the suffix .yaml, .yml or .json.
            **notes: plain values kept in the file beside the plan (how it was found, for example).
        """
        path = Path(path)
        data = self.to_dict() | notes
        if path.suffix.lower() not in PLAN_SUFFIXES:
            raise MasformerError(f"cannot tell the format of plan file {path}; allowed: {', '.join(PLAN_SUFFIXES)}")
        schema = SCHEMA.as_uri()
        if path.suffix.lower() == ".json":
            write_whole(path, json.dumps({"$schema": schema} | data, indent=2) + "\n")
        else:
            write_whole(path, f"# yaml-language-server: $schema={schema}\n{yaml.safe_dump(data, sort_keys=False)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, JSON or a model's config: the text as `plan`, `num_layers`, by heads `kv_heads`."""
        heads = {"kv_heads": self.kv_heads} if self.by_heads else {}
        return {"plan": str(self), "num_layers": len(self)} | heads

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionPlan:
        """The inverse of `to_dict`; other keys are ignored."""
        if not isinstance(data, Mapping) or not isinstance(data.get("plan"), str):
            raise MasformerError("not a plan: it must hold `plan` (text) and `num_layers` (a whole number)")
        num_layers, kv_heads = data.get("num_layers"), data.get("kv_heads")
        if num_layers is not None:
            check_int("num_layers", num_layers, 1, MOST_LAYERS)
        if kv_heads is not None:
            check_int("kv_heads", kv_heads, 1, MOST_UNITS)
        return cls.parse(data["plan"], num_layers, kv_heads)

    def for_layers(self, num_layers: int | None, kv_heads: int | None = None) -> AttentionPlan:
        """This plan, checked against a model's numbers of layers and of KV heads in each (None: not checked).

        Raises:
            MasformerError: the plan has other numbers.
        """
        if num_layers is not None and len(self) != num_layers:
            raise MasformerError(f"the plan has {len(self)} layers, but the model has {num_layers}")
        if kv_heads is None or kv_heads == self.kv_heads:
            return self
        if self.by_heads:
            raise MasformerError(f"the plan has {self.kv_heads} KV heads in each layer, but the model has {kv_heads}")
        return replace(self, kv_heads=kv_heads)

    def __repr__(self) -> str:
        heads = f", kv_heads={self.kv_heads}" if self.by_heads else ""
        return f"AttentionPlan.parse({str(self)!r}, num_layers={len(self)}{heads})"

    def __str__(self) -> str:
        return write_plan(self.layers)


def _layer_of(number: int, spans: Any) -> LayerSpan:
    if isinstance(spans, Sequence) and not isinstance(spans, str):
        try:
            spans = layer_span(spans)
        except MasformerError as error:
            raise MasformerError(f"layer {number} of the plan: {error}") from None
    if not isinstance(spans, Span | UnitSpans):
        raise MasformerError(f"layer {number} of the plan is {spans!r}; allowed: FullSpan, WindowSpan, BlockSpan")
    return spans


def read_plans(
    plans: Mapping[str, PlanSource] | Iterable[PlanSource],
    num_layers: int,
    kv_heads: int | None = None,
    *,
    what: str = "plan",
) -> dict[str, AttentionPlan]:
    """Several plans of one model by name: those of a mapping, or each by its text or the name of its file.

    Args:
        plans: name -> plan, or the plans alone.
        num_layers: layers of the model.
        kv_heads: KV heads of each layer; needed by plans that name some.
        what: what messages call one.

    Raises:
        MasformerError: one cannot be read, has another number of layers, or is given twice.
    """
    if isinstance(plans, Mapping):
        return {name: AttentionPlan.load(plan, num_layers, kv_heads) for name, plan in plans.items()}
    found: dict[str, AttentionPlan] = {}
    for plan in [plans] if isinstance(plans, str | os.PathLike | AttentionPlan) else plans:
        name = os.fspath(plan) if isinstance(plan, os.PathLike) else str(plan)
        if name in found:
            raise MasformerError(f"{what} {shown(name)} is given twice")
        found[name] = AttentionPlan.load(plan, num_layers, kv_heads)
    return found
