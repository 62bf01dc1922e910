"""OpenAI's form of answers, streamed or whole, and of errors."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from transformers.cli.serving.utils import ReasoningText, ToolCall

from masformer.serving.bodies import Asked, RequestError
from masformer.serving.worker import Gone, Job, Piece

logger = logging.getLogger("masformer.serving")


class Answer:
    """The answer of one request to /v1/completions.

    Args:
        asked: the request.
        name: what clients call the model.
        prompt_tokens: its length.
    """

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, asked: Asked, name: str, prompt_tokens: int) -> None:
        self.asked, self.prompt_tokens, self.calls = asked, prompt_tokens, 0
        self.head = {"id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    async def whole(self, job: Job) -> dict[str, Any]:
        """The answer at once."""
        content = self.content([piece async for piece in job.pieces()])
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": self.reason(job)}
        return {**self.head, "object": self.whole_object, "choices": [choice], "usage": self.usage(job)}

    async def stream(self, job: Job) -> AsyncIterator[str]:
        """The answer in pieces, as server-sent events."""
        try:
            for opening in self.opening():
                yield self._chunk(opening)
            async for piece in job.pieces():
                yield self._chunk(self.delta(piece))
            yield self._chunk(self.closing(), self.reason(job))
            if self._with_usage:
                yield self._event({"choices": [], "usage": self.usage(job)})
        except Gone:
            return
        except Exception as error:
            logger.exception("a stream failed")
            yield f"data: {json.dumps(error_body(error, 500))}\n\n"
        finally:
            job.cancel()
        yield "data: [DONE]\n\n"

    def usage(self, job: Job) -> dict[str, int]:
        """Tokens of the prompt and of the answer, its end included."""
        assert job.ended is not None
        prompt, new = self.prompt_tokens, job.ended.tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def reason(self, job: Job) -> str:
        """Why the answer ended."""
        assert job.ended is not None
        return job.ended.reason

    def opening(self) -> Sequence[dict[str, Any]]:
        """What a stream begins with."""
        return ()

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A piece as part of a choice."""
        return {"text": piece}

    def closing(self) -> dict[str, Any]:
        """What stands where a stream gives its reason to end."""
        return {"text": ""}

    def content(self, pieces: list[Piece]) -> dict[str, Any]:
        """All pieces as part of a choice."""
        return {"text": "".join(str(piece) for piece in pieces)}

    @property
    def _with_usage(self) -> bool:
        return self.asked.stream_options is not None and self.asked.stream_options.include_usage

    def _chunk(self, content: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return self._event({"choices": [choice], **({"usage": None} if self._with_usage else {})})

    def _event(self, content: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.head, 'object': self.chunk_object, **content})}\n\n"


class ChatAnswer(Answer):
    """The same of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self) -> Sequence[dict[str, Any]]:
        return ({"delta": {"role": "assistant", "content": ""}},)

    def delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, ToolCall):
            return {"delta": {"tool_calls": [{"index": self.calls, **self._call(piece)}]}}
        return {"delta": {"reasoning_content" if isinstance(piece, ReasoningText) else "content": piece}}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}}

    def content(self, pieces: list[Piece]) -> dict[str, Any]:
        reasoning = "".join(piece for piece in pieces if isinstance(piece, ReasoningText))
        calls = [self._call(piece) for piece in pieces if isinstance(piece, ToolCall)]
        text = "".join(piece for piece in pieces if type(piece) is str)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        return {"message": message | ({"tool_calls": calls} if calls else {})}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self.calls += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def error_body(error: Exception, status: int) -> dict[str, Any]:
    """An error where OpenAI's clients look for it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    param, code = (error.param, error.code) if isinstance(error, RequestError) else (None, None)
    reason = error.detail if isinstance(error, HTTPException) else str(error) or type(error).__name__
    return {"error": {"message": " ".join(reason.split()), "type": kind, "param": param, "code": code}}
