"""Messages of a chat, and the tools it may call: texts only, for the model reads nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, from_json


class Fields(BaseModel):
    """Values of exactly these types; null is as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def wrong(message: str) -> PydanticCustomError:
    """What a check of ours raises."""
    return PydanticCustomError("masformer", message)  # type: ignore[arg-type]


class _TextPart(Fields):
    type: Literal["text"]
    text: str


def _joined(content: str | list[_TextPart]) -> str:
    return content if isinstance(content, str) else " ".join(part.text for part in content)


Text = Annotated[str | Annotated[list[_TextPart], Field(min_length=1)], AfterValidator(_joined)]


class _Instruction(Fields):
    role: Literal["system", "developer", "user"]
    content: Text


class _CalledFunction(Fields):
    name: str
    arguments: str

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> _CalledFunction:
        try:
            is_object = isinstance(from_json(self.arguments, allow_inf_nan=False), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise wrong("arguments must be the text of a JSON object")
        return self


class _ToolCall(Fields):
    type: Literal["function"] = "function"
    id: str
    function: _CalledFunction


class _Reply(Fields):
    role: Literal["assistant"]
    content: Text = ""
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] = []

    @model_validator(mode="after")
    def _says_something(self) -> _Reply:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise wrong("a message of the assistant needs content or tool_calls")
        return self


class _ToolResult(Fields):
    role: Literal["tool"]
    content: Text
    tool_call_id: str
    name: str | None = None


Message = Annotated[_Instruction | _Reply | _ToolResult, Field(discriminator="role")]


class _Function(Fields):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] = False


class Tool(Fields):
    """A function that the model may call."""

    type: Literal["function"]
    function: _Function
