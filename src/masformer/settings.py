"""YAML files of settings, read strictly as plain values; `schema` makes dataclasses of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from masformer.errors import LARGEST, MasformerError, check_int, check_number, check_text, shown
from masformer.files import missing, read_text

MOST_VALUES = 1_000_000


def read_yaml(path: str | os.PathLike[str], what: str) -> Any:
    """What a YAML or JSON file holds, as plain values.

    Args:
        path: the file.
        what: it is, for messages, for example "recipe".

    Raises:
        MasformerError: the file cannot be read, is no YAML, or says something twice.
    """
    if not Path(path).exists():
        raise missing(what, path)
    try:
        return parse_yaml(read_text(path))
    except MasformerError as error:
        raise MasformerError(f"cannot read the {what} {path}: {error}") from None


def parse_yaml(text: str) -> Any:
    """What YAML holds, as plain values.

    Raises:
        MasformerError: it is no YAML, says something twice, or holds a value that is none, for example a day 31 June.
    """
    try:
        data = yaml.load(text, StrictLoader)
        if _values(data, {}) > MOST_VALUES:
            raise MasformerError(f"it holds more than {MOST_VALUES} values, by names for parts of it")
    except RecursionError:
        raise MasformerError("it is nested too deeply, or holds itself") from None
    except Exception as error:  # what stands for a number or a day and is none makes PyYAML raise errors of all kinds
        raise MasformerError(" ".join(str(error).split()) or f"no YAML: {type(error).__name__}") from None
    return data


def _values(data: Any, known: dict[int, int]) -> int:
    """How many values there are; a part that stands at several places counts as often."""
    if not isinstance(data, (dict, list)):
        return 1
    if id(data) not in known:
        known[id(data)] = sum(_values(each, known) for each in (data.values() if isinstance(data, dict) else data))
    return known[id(data)]


def read_settings(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The settings of a YAML file, as plain values.

    Args:
        path: the file.
        what: it is, for messages, for example "recipe".

    Raises:
        MasformerError: the file cannot be read, or holds something else.
    """
    data = read_yaml(path, what)
    if not isinstance(data, dict):
        raise MasformerError(f"{what} {path} must hold settings (output: ..., model: ..., ...)")
    return data


class StrictLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does, and refuses a setting that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name!r} is there twice, line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 1e-4 for text: it wants a point and a sign in the exponent.
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def check_plain(name: str, value: Any) -> None:
    """Raises MasformerError where a plain value, or one inside it, is no number that a machine holds, or no text."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_plain(f"{name}.{shown(key)}", key)
            check_plain(f"{name}.{key}", each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            check_plain(name, each)
    elif isinstance(value, str):
        check_text(name, value)
    elif isinstance(value, float):
        check_number(name, value, -math.inf)
    elif isinstance(value, int) and not isinstance(value, bool):
        check_int(name, value, -LARGEST)


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raises MasformerError unless the value is one of those allowed."""
    if value not in allowed:
        raise MasformerError(f"{name} {shown(value)} is not allowed; allowed: {', '.join(allowed)}")


def without_none(value: Any) -> Any:
    """Plain values without the names whose value is None."""
    if isinstance(value, dict):
        return {name: without_none(each) for name, each in value.items() if each is not None}
    return value
