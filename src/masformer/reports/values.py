"""One value of a record as text: numbers with a sensible number of digits, intervals, plans."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from masformer.cost import bytes_text, flops_text
from masformer.errors import MasformerError
from masformer.evaluation.intervals import Interval
from masformer.reports.document import Code

DIGITS = 4
"""Significant digits of a number."""
NOTHING = "-"

_RANGE = r"\d+(-\d+)?"
_UNITS = rf"{_RANGE}(:{_RANGE})?"
_SPAN = r"(full|(window:\d+(\+\d+)?|block:\d+(x\d+)?)(\+sink)?)"
_CLAUSE = rf"{_SPAN}(@{_UNITS}(,{_UNITS})*)?"
_PLAN = re.compile(rf"{_CLAUSE}(\s*[;,]\s*{_CLAUSE})*")


def as_interval(value: Any) -> Interval | None:
    """An interval from what `Interval.to_dict` gave, else None."""
    if not isinstance(value, Mapping) or not {"mean", "low", "high"} <= set(value) <= {"mean", "low", "high", "count"}:
        return None
    count = value.get("count", 2)
    if not all(is_number(part) for part in (value["mean"], value["low"], value["high"], count)):
        return None
    return Interval(float(value["mean"]), float(value["low"]), float(value["high"]), int(count))


def is_number(value: Any) -> bool:
    """Whether it is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_plan(text: str) -> bool:
    """Whether a text reads as a plan or a span."""
    return _PLAN.fullmatch(text) is not None


def show(value: Any, key: str = "", spec: str | None = None) -> str:
    """A value as text.

    Args:
        value: a number, text, a truth value, None, an `Interval`, or a list of such.
        key: its name in the record; numbers whose name ends with `bytes` or `flops` get a unit. A small one that is
            no `int` is a share.
        spec: how numbers are written: a format of Python (`.2f`, `.0%`, `,`), `bytes` or `flops`; by default four
            significant digits, and for an interval two of its width.

    Raises:
        MasformerError: no such spec.
    """
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        if all(is_number(each) and float(each).is_integer() for each in value):
            value = [int(each) for each in value]
        return ", ".join(show(each, key, spec) for each in value) or NOTHING
    if isinstance(value, str):
        return Code(value) if is_plan(value) else " ".join(value.split())  # a cell is one line
    unit = spec if spec is not None else next((unit for unit in ("bytes", "flops") if _ends_with(key, unit)), None)
    if spec is None and unit == "bytes" and isinstance(value, float) and value < 1024:
        unit = None
    if isinstance(value, Interval):
        parts = (value.mean, value.low, value.high)
        mean, low, high = (_number(part, unit) for part in parts) if unit else _rounded(value)
        return mean if value.count < 2 else f"{mean} [{low}, {high}]"
    return _number(value, unit)


def _ends_with(key: str, unit: str) -> bool:
    return key == unit or key.endswith((f"_{unit}", f".{unit}"))


def _number(value: float, spec: str | None) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if spec == "bytes":
        return bytes_text(value)
    if spec == "flops":
        return flops_text(value)
    if spec is not None:
        try:
            return format(value, spec)
        except ValueError:
            raise MasformerError(
                f"unknown format {spec!r} of a number; allowed: a format of Python such as .2f or .0%, bytes, flops"
            ) from None
    if isinstance(value, int):
        return f"{value:,}"
    if not value or abs(value) >= 10 ** (DIGITS - 1):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{DIGITS}g}"
    # Rounded first: 9.9996 has one digit before the point, what is left of it after rounding has two.
    decimals = DIGITS - 1 - math.floor(math.log10(abs(float(f"{value:.{DIGITS}g}"))))
    return f"{value:,.{max(0, decimals)}f}"


def _rounded(interval: Interval) -> tuple[str, str, str]:
    """The three numbers with as many decimals: two digits of the width, three at least of the largest number."""
    parts = interval.mean, interval.low, interval.high
    if not all(map(math.isfinite, parts)):
        return str(parts[0]), str(parts[1]), str(parts[2])
    largest, width = max(map(abs, parts)), interval.high - interval.low
    decimals = [2 - math.floor(math.log10(largest))] if largest else [0]
    if width:
        decimals.append(1 - math.floor(math.log10(width)))
    places = min(max(0, *decimals), 8)
    mean, low, high = (f"{part:,.{places}f}" for part in parts)
    return mean, low, high
