"""A plan: one span per layer, and the placement rules that say which layers are full.

>>> from masformer.spans import WindowSpan
>>> plan = AttentionPlan.mixed(num_layers=8, full=2, placement="middle", local=WindowSpan(512, sinks=4))
>>> str(plan)
'full@3-4; window:512+4'
>>> AttentionPlan.parse("full@3-4; window:512+4", num_layers=8) == plan
True
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from masformer.errors import MasformerError, check_int, read_int, shown
from masformer.files import write_whole
from masformer.settings import read_yaml
from masformer.spans import FullSpan, Span

PlanSource: TypeAlias = "AttentionPlan | str | os.PathLike[str]"
"""A plan, its text form, or a plan file."""
PLAN_FORMS = (
    "one span for all layers (window:512+4), one per layer separated by commas (full,window:512), "
    "full layers and the rest (full@0-3,17; window:512+4), or a .yaml/.json plan file"
)
PLAN_SUFFIXES = (".yaml", ".yml", ".json")
MOST_LAYERS = 1 << 16

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
        _check_layer(layer, num_layers)
    if duplicates := [layer for layer, count in Counter(layers).items() if count > 1]:
        raise MasformerError(f"layer {duplicates[0]} is named more than once among the full layers")
    return tuple(sorted(layers))


def _check_layer(layer: int, num_layers: int) -> None:
    check_int("layer", layer, 0)
    if layer >= num_layers:
        raise MasformerError(f"layer {layer} is out of range: the model has layers 0 to {num_layers - 1}")


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
        placement = _parse_layers(placement, num_layers)
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


def _parse_layers(text: str, num_layers: int) -> list[int]:
    """`0-3,17` -> [0, 1, 2, 3, 17]."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part)
        if not match:
            raise MasformerError(
                f"cannot read {shown(part.strip())} as a layer; allowed: a layer (17) or a range (0-3)"
            )
        first, last = (read_int("layer", number, 0) for number in (match[1], match[2] or match[1]))
        if last < first:
            raise MasformerError(f"layer range {part.strip()!r} ends before it starts")
        _check_layer(last, num_layers)
        layers.extend(range(first, last + 1))
    return layers


def _format_layers(layers: Sequence[int]) -> str:
    """[0, 1, 2, 3, 17] -> `0-3,17`."""
    parts: list[str] = []
    start = previous = layers[0]
    for layer in [*layers[1:], None]:
        if layer is None or layer != previous + 1:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = layer if layer is not None else start
        previous = layer if layer is not None else previous
    return ",".join(parts)


@dataclass(frozen=True)
class AttentionPlan:
    """One span per layer, layer 0 next to the embedding.

    Raises:
        MasformerError: no layer at all, or something that is not a span.
    """

    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(self.spans))
        if not self.spans:
            raise MasformerError("a plan needs at least one layer")
        for layer, span in enumerate(self.spans):
            if not isinstance(span, Span):
                raise MasformerError(f"layer {layer} of the plan is {span!r}; allowed: FullSpan, WindowSpan, BlockSpan")

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def __getitem__(self, layer: int) -> Span:
        return self.spans[layer]

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers with full attention, ascending."""
        return tuple(layer for layer, span in enumerate(self.spans) if isinstance(span, FullSpan))

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
    def from_options(
        cls,
        num_layers: int,
        full: int | None = None,
        placement: str | int | Sequence[int] | None = None,
        local: Span | str | None = None,
        *,
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
            plan: a plan, text or file, in place of the rule.
            default: the plan where nothing is named.
            dashes: what stands before the names of the options in messages.

        Raises:
            MasformerError: the options do not name a plan.
        """
        if full is None and placement is None and local is None:
            if plan is None and default is None:
                raise MasformerError(f"no plan is named; give {dashes}plan, or {dashes}full and {dashes}local")
            return cls.load(default if plan is None else plan, num_layers)  # type: ignore[arg-type]
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
    def parse(cls, text: str, num_layers: int | None = None) -> AttentionPlan:
        """Reads the text form: `full@0-3,17; window:512+4`, `window:512` for all layers, or one span per layer.

        Args:
            text: the plan.
            num_layers: layers of the model. Needed unless the text gives one span per layer.

        Raises:
            MasformerError: the text cannot be read or does not fit the number of layers.
        """
        text = text.strip()
        if not text:
            raise MasformerError(f"the plan is empty; allowed: {PLAN_FORMS}")
        if text.startswith("full@"):
            head, _, rest = text.partition(";")
            if not rest.strip():
                raise MasformerError(f"plan {shown(text)} does not say what the other layers do; add '; SPAN'")
            if num_layers is None:
                raise MasformerError(f"plan {shown(text)} needs the number of layers of the model")
            check_int("number of layers", num_layers, 1, MOST_LAYERS)
            layers = _parse_layers(head.removeprefix("full@"), num_layers)
            return cls.mixed(num_layers, placement=layers, local=rest)
        if ";" in text:
            raise MasformerError(f"cannot read the plan {shown(text)}; allowed: {PLAN_FORMS}")
        spans = [Span.parse(part) for part in text.split(",")]
        if len(spans) == 1 and num_layers is not None:
            return cls.uniform(num_layers, spans[0])
        return cls(tuple(spans)).for_layers(num_layers)

    @classmethod
    def load(cls, source: PlanSource, num_layers: int | None = None) -> AttentionPlan:
        """The plan that a text or a .yaml/.json file (what `save` wrote) says; a plan stays as it is.

        Raises:
            MasformerError: the file is missing or is no plan, the text cannot be read, or the plan has another number
                of layers.
        """
        if isinstance(source, AttentionPlan):
            return source.for_layers(num_layers)
        if not isinstance(source, str | os.PathLike):
            raise MasformerError(f"{shown(source)} is no plan; allowed: an AttentionPlan, or as text {PLAN_FORMS}")
        path = Path(source)
        if path.suffix.lower() not in PLAN_SUFFIXES:
            return cls.parse(os.fspath(source), num_layers)
        data = read_yaml(path, "plan file")
        try:
            if isinstance(data, Mapping) and data.get("num_layers") is None:
                data = {**data, "num_layers": num_layers}
            return cls.from_dict(data).for_layers(num_layers)
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
        if path.suffix.lower() == ".json":
            write_whole(path, json.dumps(data, indent=2) + "\n")
        else:
            write_whole(path, yaml.safe_dump(data, sort_keys=False))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, JSON or a model's config: `{"plan": text, "num_layers": n}`."""
        return {"plan": str(self), "num_layers": len(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionPlan:
        """The inverse of `to_dict`; other keys are ignored."""
        if not isinstance(data, Mapping) or not isinstance(data.get("plan"), str):
            raise MasformerError("not a plan: it must hold `plan` (text) and `num_layers` (a whole number)")
        num_layers = data.get("num_layers")
        if num_layers is not None:
            check_int("num_layers", num_layers, 1, MOST_LAYERS)
        return cls.parse(data["plan"], num_layers)

    def for_layers(self, num_layers: int | None) -> AttentionPlan:
        """This plan, checked against a model's number of layers (None: not checked).

        Raises:
            MasformerError: the plan has another number of layers.
        """
        if num_layers is not None and len(self) != num_layers:
            raise MasformerError(f"the plan has {len(self)} layers, but the model has {num_layers}")
        return self

    def __repr__(self) -> str:
        return f"AttentionPlan.parse({str(self)!r}, num_layers={len(self)})"

    def __str__(self) -> str:
        kinds = list(dict.fromkeys(self.spans))
        if len(kinds) == 1 and len(self) > 1:
            return str(kinds[0])
        full, local = self.full_layers, [kind for kind in kinds if not isinstance(kind, FullSpan)]
        if full and len(local) == 1:
            return f"full@{_format_layers(full)}; {local[0]}"
        return ",".join(str(span) for span in self.spans)


def read_plans(
    plans: Mapping[str, PlanSource] | Iterable[PlanSource], num_layers: int, *, what: str = "plan"
) -> dict[str, AttentionPlan]:
    """Several plans of one model by name: those of a mapping, or each by its text or the name of its file.

    Args:
        plans: name -> plan, or the plans alone.
        num_layers: layers of the model.
        what: what messages call one.

    Raises:
        MasformerError: one cannot be read, has another number of layers, or is given twice.
    """
    if isinstance(plans, Mapping):
        return {name: AttentionPlan.load(plan, num_layers) for name, plan in plans.items()}
    found: dict[str, AttentionPlan] = {}
    for plan in [plans] if isinstance(plans, str | os.PathLike | AttentionPlan) else plans:
        name = os.fspath(plan) if isinstance(plan, os.PathLike) else str(plan)
        if name in found:
            raise MasformerError(f"{what} {shown(name)} is given twice")
        found[name] = AttentionPlan.load(plan, num_layers)
    return found
