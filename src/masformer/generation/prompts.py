"""Prompts as tokens, in the tokenizer's chat template where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from masformer.data.tokens import opening_tokens, part_tokens
from masformer.errors import MasformerError


def prompt_tokens(tokenizer: Any, text: str, *, chat: bool | None = None, system: str | None = None) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: of transformers.
        text: the prompt, or the user's message in a chat.
        chat: whether to put it into the tokenizer's chat template; None: where there is one.
        system: system message of the chat.

    Raises:
        MasformerError: the prompt is empty, or there is no chat template to put it into, or it refuses the messages.
    """
    chat = uses_chat(tokenizer, chat)
    if system is not None and not chat:
        raise MasformerError("a system message needs a chat template, which is not used here")
    if not text.strip():
        raise MasformerError("the prompt is empty")
    if not chat:
        return opening_tokens(tokenizer, text)
    messages = [] if system is None else [{"role": "system", "content": system}]
    chat_prompt = chat_text(tokenizer, [*messages, {"role": "user", "content": text}])
    return part_tokens(tokenizer, chat_prompt)


def uses_chat(tokenizer: Any, chat: bool | None = None) -> bool:
    """Whether a prompt is put into the tokenizer's chat template: as asked, or by default where there is one.

    Raises:
        MasformerError: it is asked for, and there is none.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise MasformerError("the tokenizer has no chat template; give the prompt as it is")
    return bool(template) if chat is None else chat


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The messages in the tokenizer's chat template, up to where the answer begins; special tokens stand in the text.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: each with `role` and `content`.
        variables: what else the template is given, `tools` for example.

    Raises:
        MasformerError: the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **variables
        )
    except Exception as error:
        raise MasformerError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from error
    return text
