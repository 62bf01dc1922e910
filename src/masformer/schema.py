"""Settings as dataclasses: pydantic reads them strictly and describes them as JSON schema; what is wrong is one line.

A name that does not exist, a missing one or a value of the wrong kind is an error, and so is what a class itself
refuses (`__post_init__`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from pydantic import ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from masformer.errors import MasformerError, shown
from masformer.files import meant
from masformer.settings import check_plain

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_MUST = {
    "bool": "be true or false",
    "int": "be a whole number",
    "float": "be a number",
    "string": "be text",
    "list": "be a list",
    "dict": "hold names and values",
    "dataclass": "hold settings",
}
"""What a value must do that pydantic's errors find at fault, by the first word of their type."""

_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
"""The types of errors that say that a name does not exist; the second is of a name that is no text."""

Value = TypeVar("Value")


class Settings:
    """What a dataclass of settings inherits."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        found = handler(source)
        cast(dict[str, Any], handler.resolve_ref_schema(found))["strict"] = False  # it is read from a mapping
        return found

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        own = handler.resolve_ref_schema(found)
        docs = parse_docstring(cls.__doc__ or "")
        texts = {each.arg_name: " ".join((each.description or "").split()) for each in docs.params}
        own["description"] = docs.short_description or ""
        for name, option in own["properties"].items():
            option.pop("title", None)
            option["description"] = texts[name]
        return found


class _OneOrSeveral:
    """Of a list: one value is a list of one."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._listed, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        several = handler(schema)
        return {"anyOf": [several["items"], several]}

    @staticmethod
    def _listed(value: Any) -> Any:
        return value if value is None or isinstance(value, Mapping | list) else [value]


class _ByName:
    """Of a mapping: a name that YAML takes for a number is a name."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._named, handler(source))

    @staticmethod
    def _named(value: Any) -> Any:
        return {str(name): each for name, each in value.items()} if isinstance(value, Mapping) else value


Several: TypeAlias = Annotated[list[Value], _OneOrSeveral()]
"""A list, or one value of it."""
Named: TypeAlias = Annotated[dict[str, Value], _ByName()]
"""Values by their names."""


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def build(cls: Any, data: Any, what: str = "the settings") -> Any:
    """An instance of a dataclass, from plain values.

    Args:
        cls: the dataclass, of `Settings`, as are those of its fields.
        data: a mapping of names to values.
        what: it is, for messages.

    Raises:
        MasformerError: a name that does not exist or is missing, a value of the wrong kind, or what the class raises.
    """
    for name, value in data.items() if isinstance(data, Mapping) else ():
        check_plain(str(name), value)
    try:
        return _adapter(cls).validate_python(data)
    except ValidationError as error:
        raise MasformerError(_line(cls, error.errors(include_url=False), what)) from None


def schema_text(cls: Any) -> str:
    """The JSON schema of files of such settings, for editors: every name, its kind, default and description."""
    return json.dumps({"$schema": DIALECT} | _adapter(cls).json_schema(), indent=2) + "\n"


def _line(cls: Any, errors: list[ErrorDetails], what: str) -> str:
    """What is wrong, in a line: a name that does not exist before all else."""
    error = next((each for each in errors if each["type"] in _UNKNOWN), errors[0])
    kind, value = error["type"], error["input"]
    path = ".".join(each for each in error["loc"] if isinstance(each, str))
    if kind == "missing":
        return f"setting {path} is missing"
    if kind in _UNKNOWN:
        *place, name = error["loc"]
        known = [field.name for field in fields(_class_at(cls, place))]
        hint = meant(str(name), known) or f"allowed: {', '.join(known)}"
        return f"unknown setting {'.'.join(map(str, error['loc']))}; {hint}"
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        return text if text.startswith(path) else f"{path}: {text}"
    if kind == "literal_error":
        allowed = re.findall("'(.*?)'", error["ctx"]["expected"])
        return f"{path} {shown(value)} is not allowed; allowed: {', '.join(allowed)}"
    if (must := _MUST.get(kind.partition("_")[0])) is not None:
        return f"{path or what} must {must}, got {shown(value)}"
    return f"{path or what}: {error['msg']}"


def _class_at(cls: Any, place: Sequence[int | str]) -> Any:
    """The dataclass of the settings at a place inside those of another."""
    kind = cls
    for part in place:
        kind = get_type_hints(kind)[str(part)] if is_dataclass(kind) else get_args(kind)[-1]
        if get_origin(kind) in (Union, UnionType):
            kind = next(each for each in get_args(kind) if each is not NoneType)
    return kind
