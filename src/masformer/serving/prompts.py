"""Tokens of a request's prompt. A chat goes into the tokenizer's own template, never into one of the client's."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from transformers import PreTrainedModel
from transformers.cli.serving.utils import build_response_parser, get_response_template

from masformer.data.tokens import part_tokens
from masformer.generation import chat_text, prompt_tokens, uses_chat
from masformer.serving.bodies import Asked, AskedChat, AskedCompletion, RequestError
from masformer.serving.messages import Message


def tokens_of(asked: Asked, model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Token ids of the prompt.

    Raises:
        MasformerError: there is nothing to continue, or the template cannot express what is asked.
    """
    if isinstance(asked, AskedCompletion):
        return prompt_tokens(tokenizer, asked.prompt, chat=False)
    assert isinstance(asked, AskedChat)
    uses_chat(tokenizer, True)
    tools = _tools(asked)
    template = tokenizer.get_chat_template(tools=tools)
    fields = (get_response_template(tokenizer, model) or {}).get("fields", {})
    if tools and not (_reads(template, "tools") and "tool_calls" in fields):
        raise RequestError("tools is not supported: this model has no form of its own to call them", param="tools")
    messages = [_message(message, index, template) for index, message in enumerate(asked.messages)]
    text = chat_text(tokenizer, messages, **_variables(asked, template, tokenizer), tools=tools)
    return part_tokens(tokenizer, text)


def parser_of(asked: Asked, model: PreTrainedModel, tokenizer: Any, prompt: list[int]) -> Any:
    """What tells reasoning and calls of tools from text in the model's answer to a chat, or None."""
    return (
        build_response_parser(tokenizer, model, prompt, tools=_tools(asked)) if isinstance(asked, AskedChat) else None
    )


def _tools(asked: AskedChat) -> list[dict[str, Any]] | None:
    if asked.tool_choice == "none" or not asked.tools:
        return None
    return [tool.model_dump(exclude_unset=True) for tool in asked.tools]


def _message(message: Message, index: int, template: str) -> dict[str, Any]:
    """A message as templates read it."""
    found: dict[str, Any] = message.model_dump(exclude_unset=True)
    found.setdefault("content", "")
    if found["role"] == "developer" and not _reads(template, "developer"):
        found["role"] = "system"  # its name before
    for part in ("tool_calls", "reasoning_content"):
        if found.get(part) and not _reads(template, part):
            raise RequestError(
                f"{part} is not supported: the chat template ignores it", param=f"messages.{index}.{part}"
            )
    for call in found.get("tool_calls", ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return found


def _variables(asked: AskedChat, template: str, tokenizer: Any) -> dict[str, Any]:
    """The client's variables of the template: those that it reads, and that say nothing of how it is used."""
    found = dict(asked.chat_template_kwargs)
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map, "messages"}
    for name in found:
        if name in taken or not _reads(template, name):
            reason = "is for the server to say" if name in taken else "is not read by the chat template"
            raise RequestError(f"chat_template_kwargs: {name!r:.60} {reason}", param="chat_template_kwargs")
    if asked.reasoning_effort is not None:
        if not _reads(template, "reasoning_effort"):
            raise RequestError("reasoning_effort is not supported by this model", param="reasoning_effort")
        found["reasoning_effort"] = asked.reasoning_effort
    return found


def _reads(template: str, name: str) -> bool:
    return name.isidentifier() and re.search(rf"\b{name}\b", template) is not None
