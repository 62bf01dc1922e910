"""The text form of a plan, in both directions.

A plan by layers or by units is a list of clauses, `SPAN@UNITS`, and the span of the rest. Semicolons lie between them,
or commas, so that a shell needs no quotes. A unit is a KV head with its query heads: `4` is all of layer 4, `7:0` the
unit of KV head 0 in layer 7, `4-6:0-1` the first two units of three layers.

>>> read_plan("full@0,1:0; window:8", num_layers=3, kv_heads=2)[0]
FullSpan()
>>> write_plan(read_plan("full@0,1:0,window:8", num_layers=3, kv_heads=2))
'full@0,1:0; window:8'
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from masformer.errors import MasformerError, check_int, read_int, shown
from masformer.spans import FullSpan, LayerSpan, Span, UnitSpans, layer_span

MOST_LAYERS = 1 << 16
MOST_UNITS = 1 << 20
"""Of all layers, in a plan by heads."""
PLAN_FORMS = (
    "one span for all layers (window:512+4), one per layer separated by commas (full,window:512), full layers and the "
    "rest (full@0-3,17; window:512+4), KV heads of a layer and the rest (full@4,7:0-1; window:512+4), or a .yaml/.json "
    "plan file"
)


def check_layer(layer: int, num_layers: int) -> None:
    """Raises MasformerError where a model of so many layers has no such layer."""
    _check_number("layer", layer, num_layers)


def check_head(head: int, kv_heads: int) -> None:
    """Raises MasformerError where a layer of so many KV heads has no such head."""
    _check_number("KV head", head, kv_heads)


def _check_number(what: str, number: int, count: int) -> None:
    check_int(what, number, 0)
    if number >= count:
        plural = "layers" if what == "layer" else "KV heads"
        raise MasformerError(f"{what} {number} is out of range: the model has {plural} 0 to {count - 1}")


def check_units(num_layers: int, kv_heads: int) -> None:
    """Raises MasformerError where the numbers are out of range."""
    check_int("number of layers", num_layers, 1, MOST_LAYERS)
    check_int("number of KV heads", kv_heads, 1, MOST_UNITS // num_layers)


def read_layers(text: str, num_layers: int) -> list[int]:
    """`0-3,17` -> [0, 1, 2, 3, 17].

    Raises:
        MasformerError: the text cannot be read, or the model has no such layer.
    """
    layers: list[int] = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*\d+\s*(-\s*\d+\s*)?", part):
            raise MasformerError(
                f"cannot read {shown(part.strip())} as a layer; allowed: a layer (17) or a range (0-3)"
            )
        layers.extend(_read_range("layer", part, num_layers))
    return layers


def _read_range(what: str, text: str, count: int) -> range:
    """`0-3` or `17`."""
    numbers = [read_int(what, number.strip(), 0) for number in text.split("-")]
    first, last = numbers[0], numbers[-1]
    if last < first:
        raise MasformerError(f"{what} range {text.strip()!r} ends before it starts")
    _check_number(what, last, count)
    return range(first, last + 1)


def _format_range(numbers: Sequence[int]) -> list[str]:
    """[0, 1, 2, 3, 17] -> ['0-3', '17']."""
    parts: list[str] = []
    for before, number in zip([None, *numbers], numbers, strict=False):
        if before is not None and number == before + 1:
            parts[-1] = f"{parts[-1].partition('-')[0]}-{number}"
        else:
            parts.append(str(number))
    return parts


def is_one_per_layer(text: str) -> bool:
    """Whether a plan's text says nothing of which layers it means: one span, or one for each layer."""
    return "@" not in text and ";" not in text


def read_plan(text: str, num_layers: int, kv_heads: int | None) -> list[LayerSpan]:
    """The spans of each layer, from clauses.

    Args:
        text: `SPAN@UNITS; ...; SPAN`.
        num_layers: layers of the model.
        kv_heads: KV heads of each layer; needed where the text names some.

    Raises:
        MasformerError: the text cannot be read, does not fit the numbers, or names a unit twice.
    """
    check_int("number of layers", num_layers, 1, MOST_LAYERS)
    if kv_heads is not None:
        check_units(num_layers, kv_heads)
    separator = ";" if ";" in text else r"[,\s]\s*(?=[a-z])"
    clauses = [clause.strip() for clause in re.split(separator, text)]
    named: dict[int, list[tuple[int, Span]]] = {}  # layer -> masks of its heads and their spans; -1: all heads
    rest: Span | None = None
    for number, clause in enumerate(clauses):
        head, at, units = clause.partition("@")
        if not at:
            if number < len(clauses) - 1 or number == 0:
                raise MasformerError(f"cannot read the plan {shown(text)}; allowed: {PLAN_FORMS}")
            if clause:
                rest = Span.parse(clause)
            continue
        span = Span.parse(head)
        for layer, mask in _read_units(units, num_layers, kv_heads):
            if any(mask & other for other, _ in named.get(layer, ())):
                raise MasformerError(f"layer {layer} is named more than once among the units of a plan")
            named.setdefault(layer, []).append((mask, span))
    if rest is None:
        raise MasformerError(
            f"plan {shown(text)} does not say what the other layers do; add their span, as in full@0-3,window:512+4 "
            "(a shell needs quotes around a ';')"
        )
    known: dict[tuple[tuple[int, Span], ...], LayerSpan] = {}
    layers: list[LayerSpan] = []
    for layer in range(num_layers):
        masks = tuple(named.get(layer, ()))
        if masks not in known:
            known[masks] = _layer(masks, rest, kv_heads)
        layers.append(known[masks])
    return layers


def _layer(masks: tuple[tuple[int, Span], ...], rest: Span, kv_heads: int | None) -> LayerSpan:
    if not masks:
        return rest
    if masks[0][0] == -1:
        return masks[0][1]
    assert kv_heads is not None
    return layer_span([next((span for mask, span in masks if mask >> head & 1), rest) for head in range(kv_heads)])


def _read_units(text: str, num_layers: int, kv_heads: int | None) -> list[tuple[int, int]]:
    """`4,7:0-1` -> [(4, all bits), (7, 0b11)]: layers, and a bit for each KV head."""
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*\d+\s*(-\s*\d+\s*)?(:\s*\d+\s*(-\s*\d+\s*)?)?", part):
            raise MasformerError(
                f"cannot read {shown(part.strip())} as a layer; allowed: a layer (17), a range (0-3), or KV heads of "
                "it (17:0, 17:0-1)"
            )
        layers, colon, heads = part.partition(":")
        mask = -1
        if colon:
            if kv_heads is None:
                raise MasformerError(f"plan clause {shown(text.strip())} needs the number of KV heads of the model")
            chosen = _read_range("KV head", heads, kv_heads)
            mask = (1 << chosen.stop) - (1 << chosen.start)
        found.extend((layer, mask) for layer in _read_range("layer", layers, num_layers))
    return found


def write_plan(layers: Sequence[LayerSpan]) -> str:
    """The text of a plan; `read_plan` and `Span.parse` read it again."""
    kinds = list(dict.fromkeys(layers))
    if not any(isinstance(kind, UnitSpans) for kind in kinds):
        if len(kinds) == 1 and len(layers) > 1:
            return str(kinds[0])
        local = [kind for kind in kinds if not isinstance(kind, FullSpan)]
        if len(local) == len(kinds) or len(local) != 1:
            return ",".join(str(span) for span in layers)
    counts: Counter[Span] = Counter()
    for layer in layers:
        counts.update(layer.spans if isinstance(layer, UnitSpans) else [layer] * _kv_heads(layers))
    spans = sorted(counts, key=lambda span: not isinstance(span, FullSpan))  # full first, else as they appear
    rest = max((span for span in spans if not isinstance(span, FullSpan)), key=counts.__getitem__)
    clauses = [f"{span}@{','.join(_units_of(span, layers))}" for span in spans if span != rest]
    return "; ".join([*clauses, str(rest)])


def _kv_heads(layers: Sequence[LayerSpan]) -> int:
    return next((len(layer) for layer in layers if isinstance(layer, UnitSpans)), 1)


def _units_of(span: Span, layers: Sequence[LayerSpan]) -> list[str]:
    parts: list[str] = []
    whole: list[int] = []
    for number, layer in enumerate([*layers, None]):
        if layer == span:
            whole.append(number)
            continue
        heads = [head for head, each in enumerate(layer.spans) if each == span] if isinstance(layer, UnitSpans) else []
        if heads or layer is None:
            parts += _format_range(whole)
            whole = []
            parts += [f"{number}:{each}" for each in _format_range(heads)]
    return parts
