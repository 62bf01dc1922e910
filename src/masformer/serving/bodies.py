"""What a request may ask: OpenAI's fields, each honoured, or allowed only with the value that asks for nothing.

A field that is not named here is refused, so nothing that a client sends is ignored without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from masformer.errors import MasformerError
from masformer.serving.messages import Fields, Message, Tool, wrong

MAX_TOKENS = 1024
"""Length of an answer where a request does not say."""


class RequestError(MasformerError):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        param: the field at fault.
        code: OpenAI's name of the reason.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


def _only(value: float | bool) -> AfterValidator:
    """Of a field that may say no more than it would say by default."""

    def check(given: Any) -> Any:
        if given != value:
            raise PydanticCustomError("literal_error", "not that", {"expected": json.dumps(value)})
        return given

    return AfterValidator(check)


Off = Annotated[bool, _only(False)]
One = Annotated[int, _only(1)]
Zero = Annotated[float, _only(0)]


class _StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: Off = False


class _TextFormat(Fields):
    type: Literal["text"]


StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class Asked(Fields):
    """What chats and completions have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field({})
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = Field([])
    stream: bool = False
    stream_options: _StreamOptions | None = None
    # ask for nothing
    n: One = 1
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    # change no answer
    user: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options is only allowed together with stream")
        if self.temperature is not None and 0 < self.temperature < 0.01:
            raise wrong("a temperature must be 0 or at least 0.01: smaller ones divide by nothing")
        return self

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def length(self) -> int:
        """The most tokens of the answer."""
        return self.max_tokens or MAX_TOKENS


class AskedCompletion(Asked):
    """Of /v1/completions."""

    prompt: str
    best_of: One = 1
    echo: Off = False
    logprobs: Off = False
    suffix: Literal[""] = ""


class AskedChat(Asked):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, bool | int | float | str] = Field({})
    reasoning_effort: str | None = None
    # ask for nothing
    logprobs: Off = False
    top_logprobs: Zero = 0
    parallel_tool_calls: Annotated[bool, _only(True)] = True
    response_format: _TextFormat | None = None
    modalities: list[Literal["text"]] = Field([])
    store: Off = False
    service_tier: Literal["auto", "default"] = "auto"
    # change no answer
    metadata: dict[str, str] = Field({})
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _one_length(self) -> AskedChat:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise wrong("max_tokens and max_completion_tokens differ; give one")
        return self

    @property
    def length(self) -> int:
        """The most tokens of the answer."""
        return self.max_completion_tokens or super().length


AnyAsked = TypeVar("AnyAsked", AskedCompletion, AskedChat)


def parse(kind: type[AnyAsked], body: bytes) -> AnyAsked:
    """A request's body, checked.

    Raises:
        RequestError: it is not JSON, or asks for something that is not served.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        # of a union, what fits best is found wrong deepest down
        found = error.errors(include_url=False)
        place, worst = max(((_place(value, one["loc"]), one) for one in found), key=lambda pair: len(pair[0]))
        name = _short(".".join(map(str, place)))
        raise RequestError(_reason(name, worst), param=name or None) from error


def _place(value: Any, steps: tuple[int | str, ...]) -> list[int | str]:
    """The steps that lead through the body; pydantic puts names of its own types between them."""
    place: list[int | str] = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        if isinstance(value, dict) and isinstance(step, str) and (step in value or last):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int):
            value = value[step]
        else:
            continue
        place.append(step)
    return place


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _reason(name: str, error: Mapping[str, Any]) -> str:
    shown, context, said = _short(json.dumps(error["input"])), error.get("ctx", {}), error["msg"]
    match error["type"]:
        case "masformer":
            return f"{name}: {said}" if name else said
        case "missing":
            return f"{name} is missing"
        case "extra_forbidden":
            return f"{name} {shown} is not supported"
        case "literal_error":
            return f"{name} {shown} is not supported; allowed: {context['expected']}"
        case "union_tag_invalid":
            return f"{name}.role {_short(context['tag'])!r} is not supported; allowed: {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{name}.role is missing"
    return f"{name} {shown} is not allowed: {said[0].lower()}{said[1:]}"
