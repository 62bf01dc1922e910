"""Conversations in the tokenizer's own chat template: only the assistant's turns are predicted, each up to its end.

A conversation is a list of messages, objects with `role` and `content`. What comes after the last of the assistant's
turns teaches nothing and is left out. Which tokens are the assistant's is said by the template's `{% generation %}`
marks; without them, by what each turn adds to the conversation before it. The token that ends a turn belongs to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from masformer.data.documents import Row
from masformer.errors import MasformerError, shown

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
PARTS = ("tool_calls", "reasoning_content")
"""Parts of a message that not every template reads."""
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "masformerprobe"


def check_chat(tokenizer: Any) -> None:
    """Raises MasformerError where a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise MasformerError(
            "conversations need a chat template, which the tokenizer lacks; name one that has it in model.tokenizer"
        )


class ChatTokenizer:
    """Conversations as tokens.

    Args:
        tokenizer: of transformers, with a chat template.

    Raises:
        MasformerError: it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        check_chat(tokenizer)
        self.tokenizer = tokenizer
        self.template = str(tokenizer.get_chat_template())
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
        self._read: set[str] = set()

    def conversation(self, row: Row) -> tuple[list[int], list[bool]] | None:
        """Tokens, and whether each is the assistant's; None where no turn of the assistant says anything.

        Args:
            row: of a source of messages.

        Raises:
            MasformerError: it is no conversation, or the template cannot say which tokens are the assistant's.
        """
        text, *tools = row.texts.values()
        messages = [_message(each, f"{row.name}: message {n}") for n, each in enumerate(json.loads(text), start=1)]
        turns = [n for n, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not any(_says_something(messages[n]) for n in turns):
            return None
        messages = messages[: turns[-1] + 1]
        told = {"tools": known} if tools and (known := json.loads(tools[0])) else {}
        self._check_read(messages, row.name, told)
        tell = self._marked if MARKS.search(self.template) else self._added
        tokens, wanted = tell(messages, turns, row.name, told)
        last = max(place for place, own in enumerate(wanted) if own)
        end = self.tokenizer.eos_token_id
        if tokens[last] not in self._special and end is not None:  # the template ends no turn: the text ends here
            tokens, wanted = [*tokens, end], [*wanted, True]
        return tokens, wanted

    def _text(
        self, messages: Sequence[Mapping[str, Any]], name: str, told: Mapping[str, Any], prompt: bool = False
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **told
            )
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())
            raise MasformerError(f"{name}: the chat template refuses the messages: {reason}") from error
        return text

    def _check_read(self, messages: Sequence[Mapping[str, Any]], name: str, told: Mapping[str, Any]) -> None:
        """Raises where the template leaves out what messages say, by role and by part, or the tools; roles are tried
        once."""
        for part in [*(part for part in PARTS if any(message.get(part) for message in messages)), *told]:
            if not re.search(rf"\b{part}\b", self.template):
                raise MasformerError(f"{name}: the chat template does not read {part}")
        for role in {message["role"] for message in messages if message["content"]} - self._read:
            probe = [{**m, "content": PROBE} if m["role"] == role and m["content"] else m for m in messages]
            if PROBE not in self._text(probe, name, told):
                raise MasformerError(f"{name}: the chat template leaves out what messages of the role {role} say")
            self._read.add(role)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _added(
        self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int], name: str, told: Mapping[str, Any]
    ) -> tuple[list[int], list[bool]]:
        """By prefixes: a turn is what is there after it, less what is there when it is asked for."""
        if turns[0] == 0:
            raise MasformerError(f"{name}: it begins with the assistant's turn; allowed: a system or user turn first")
        texts = [self._text(messages, name, told)]
        for turn in turns:
            texts += [self._text(messages[:turn], name, told, prompt=True)]
            texts += [self._text(messages[: turn + 1], name, told)]
        whole, *parts = self._tokens(texts)
        wanted = [False] * len(whole)
        for turn, before, after in zip(turns, parts[::2], parts[1::2], strict=True):
            if whole[: len(before)] != before or whole[: len(after)] != after or len(after) <= len(before):
                raise MasformerError(
                    f"{name}: which tokens of message {turn + 1} are the assistant's cannot be told, since the chat "
                    "template or the tokenizer writes what is around it differently without it; mark the assistant's "
                    "text with {% generation %} in the template, or leave this conversation out"
                )
            ends = [place for place in range(len(before), len(after)) if whole[place] in self._special]
            for place in range(len(before), ends[-1] + 1 if ends else len(after)):
                wanted[place] = True
        return whole, wanted

    def _marked(
        self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int], name: str, told: Mapping[str, Any]
    ) -> tuple[list[int], list[bool]]:
        """By the template's marks, and the token that ends a turn, where the marks leave it out."""
        try:
            made = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **told
            )
            tokens, wanted = list(made["input_ids"]), [bool(each) for each in made["assistant_masks"]]
        except Exception as error:  # slow tokenizers have no marks, and templates raise what they like
            reason = " ".join(str(error).split())
            raise MasformerError(f"{name}: the chat template's generation marks cannot be used: {reason}") from error
        stops = [n for n, own in enumerate(wanted) if own and not (n + 1 < len(wanted) and wanted[n + 1])]
        spoken = sum(_says_something(messages[turn]) for turn in turns)
        if len(stops) < spoken:
            raise MasformerError(
                f"{name}: the chat template marks {len(stops)} of {spoken} assistant's turns with {{% generation %}}"
            )
        end = next((token for token in tokens[stops[-1] + 1 :] if self._says_more(token)), None)
        for stop in stops:
            if tokens[stop] not in self._special and end in self._special:
                place = next((n for n in range(stop + 1, len(tokens)) if self._says_more(tokens[n])), len(tokens))
                if place < len(tokens) and tokens[place] == end:
                    wanted[stop + 1 : place + 1] = [True] * (place - stop)
        return tokens, wanted

    def _says_more(self, token: int) -> bool:
        """Whether a token is more than white space."""
        return token in self._special or bool(self.tokenizer.decode([token]).strip())


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or any(message.get(part) for part in PARTS))


def _message(data: Any, place: str) -> dict[str, Any]:
    """A message as templates read it.

    Raises:
        MasformerError: it is none.
    """
    if not isinstance(data, Mapping):
        raise MasformerError(f"{place} must be an object with role and content, got {shown(data)}")
    found = {name: value for name, value in data.items() if value is not None}
    role = found.get("role")
    if role is None:
        raise MasformerError(f"{place} has no role; the fields there are: {', '.join(found) or 'none at all'}")
    if role not in ROLES:
        raise MasformerError(f"{place} has the role {shown(role)}; allowed: {', '.join(ROLES)}")
    content = found.setdefault("content", "" if found.get("tool_calls") else None)
    if not isinstance(content, str):
        raise MasformerError(f"{place} must have text as its content, got {shown(content)}")
    for call in found.get("tool_calls", ()):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, dict):
            raise MasformerError(f"{place} must have calls of functions in tool_calls, got {shown(call)}")
        if isinstance(function.get("arguments"), str):  # as OpenAI's clients write them; templates read objects
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                raise MasformerError(f"{place} has arguments in tool_calls that are not JSON") from None
    return found
