"""Runs requests one after the other on a thread of its own, and hands on what comes of each as it comes."""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

from masformer.errors import MasformerError
from masformer.generation import CHUNK, CheckNumbers, end_tokens
from masformer.models.positions import position_limit
from masformer.serving.bodies import Asked, RequestError
from masformer.serving.prompts import parser_of, tokens_of
from masformer.serving.stops import Stops

Piece: TypeAlias = str | ReasoningText | ToolCall
"""Of an answer: text, reasoning (also a str), or a call of a tool."""


@dataclass(frozen=True)
class Began:
    """The prompt was read into so many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class Ended:
    """The answer is complete: why, in OpenAI's words, and after how many tokens."""

    reason: str
    tokens: int


class Gone(Exception):
    """Nobody waits for the answer any more."""


class _Stopped(Exception):
    """A stop sequence was met."""


@dataclass(eq=False)
class Job:
    """A request on its way."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    future: Future[Ended] = field(default_factory=Future)
    ended: Ended | None = None

    def give(self, event: Any) -> None:
        """Hands on an event, from any thread."""
        self.call(self.events.put_nowait, event)

    def call(self, function: Callable[..., Any], *values: Any) -> None:
        """Has the event loop call a function, from any thread."""
        try:
            self.loop.call_soon_threadsafe(function, *values)
        except RuntimeError:  # the loop is closed
            self.cancelled = True

    def cancel(self) -> None:
        """Ends the work before its next pass through the model; a request that waits loses its place at once."""
        self.cancelled = True
        self.future.cancel()

    def check(self) -> None:
        """Raises Gone if it was cancelled."""
        if self.cancelled:
            raise Gone

    async def began(self) -> Began:
        """Waits for its turn.

        Raises:
            MasformerError: the request cannot be answered.
            Gone: it was cancelled.
        """
        event = await self.events.get()
        if isinstance(event, BaseException):
            raise event
        assert isinstance(event, Began)
        return event

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer; `ended` is there after the last piece.

        Raises:
            Exception: whatever went wrong.
        """
        while not isinstance(event := await self.events.get(), Ended):
            if isinstance(event, BaseException):
                raise event
            yield event
        self.ended = event


class Worker:
    """The one model, and the queue in front of it.

    Args:
        model: a model with a plan, on its device.
        tokenizer: a fast tokenizer.
        waiting: the most requests that wait while one runs.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, waiting: int) -> None:
        self.model, self.tokenizer, self.room = model, tokenizer, waiting + 1
        self.jobs: set[Job] = set()
        self._thread = ThreadPoolExecutor(1, "masformer-serving")

    def submit(self, asked: Asked) -> Job:
        """Puts a request at the end of the queue.

        Raises:
            RequestError: the queue is full.
        """
        if len(self.jobs) >= self.room:
            message = f"{self.room} requests are under way or wait; try again later"
            raise RequestError(message, status=503, code="overloaded", headers={"retry-after": "1"})
        job = Job(asyncio.get_running_loop())
        self.jobs.add(job)
        job.future = self._thread.submit(self._answer, job, asked)
        job.future.add_done_callback(lambda future: self._done(job, future))
        return job

    def close(self) -> None:
        """Gives up whatever is under way."""
        for job in list(self.jobs):
            job.cancel()
        self._thread.shutdown()

    def _done(self, job: Job, future: Future[Ended]) -> None:
        self.jobs.discard(job)
        job.give(Gone() if future.cancelled() else future.exception() or future.result())

    @torch.inference_mode()
    def _answer(self, job: Job, asked: Asked) -> Ended:
        job.check()
        model, tokenizer = self.model, self.tokenizer
        prompt = tokens_of(asked, model, tokenizer)
        settings = _settings(model, tokenizer, asked, prompt)
        parser = parser_of(asked, model, tokenizer, prompt)
        job.give(Began(len(prompt)))
        text = _Text(tokenizer, parser, Stops(asked.stops), job.give)
        tokens = torch.tensor([prompt], device=model.device)
        torch.manual_seed(secrets.randbits(63) if asked.seed is None else asked.seed)
        guard = model.register_forward_pre_hook(lambda *given: job.check())
        try:
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                logits_processor=[CheckNumbers()],
                streamer=text,
            )
        except _Stopped:
            return Ended("stop", len(text.tokens))
        except MasformerError as error:  # the request is sound
            raise RequestError(str(error), status=500) from error
        finally:
            guard.remove()
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        reason = "tool_calls" if text.called else "stop" if text.tokens[-1] in ends else "length"
        return Ended(reason, len(text.tokens))


def _settings(model: PreTrainedModel, tokenizer: Any, asked: Asked, prompt: list[int]) -> GenerationConfig:
    """The model's own settings with those of the request, within the model's positions."""
    limit, size = position_limit(model.config), len(prompt)
    if not prompt:
        raise MasformerError("the prompt holds no token")
    if limit is not None and size >= limit:
        raise RequestError(
            f"the prompt has {size} tokens, and the model {limit} positions for it and its answer",
            code="context_length_exceeded",
        )
    own: GenerationConfig = model.generation_config
    temperature = asked.temperature if asked.temperature is not None else own.temperature or 1.0
    samples = temperature > 0
    top_p = own.top_p if asked.top_p is None else asked.top_p
    vocabulary = model.config.vocab_size
    if beyond := [token for token in asked.logit_bias if int(token) >= vocabulary]:
        raise RequestError(f"logit_bias: the model has {vocabulary} tokens, not {beyond[0]}", param="logit_bias")
    settings = copy.deepcopy(own)
    settings.update(
        max_new_tokens=asked.length if limit is None else min(asked.length, limit - size),
        max_length=None,
        eos_token_id=end_tokens(model, tokenizer) or None,
        num_beams=1,
        num_return_sequences=1,
        do_sample=samples,
        temperature=temperature if samples else None,
        top_p=top_p if samples else None,
        top_k=own.top_k if samples else None,
        sequence_bias={(int(token),): bias for token, bias in asked.logit_bias.items()} or None,
        prefill_chunk_size=CHUNK if size > CHUNK else None,
    )
    return settings


class _Text:
    """What `generate` hands tokens to: makes pieces of them, up to a stop sequence."""

    def __init__(self, tokenizer: Any, parser: Any, stops: Stops, give: Callable[[Piece], None]) -> None:
        self.tokenizer, self.parser, self.stops, self.give = tokenizer, parser, stops, give
        self.tokens: list[int] = []
        self.called = False
        self._prompt_comes = True
        self._decoded = ""
        self._stream = DecodeStream([], skip_special_tokens=parser is None)
        if parser is not None:
            self._hand_on(response_events_to_chunks(parser.initial_events))

    def put(self, value: Tensor) -> None:
        """New tokens; first, the prompt."""
        if self._prompt_comes:
            self._prompt_comes = False
            return
        for token in value.tolist():
            self.tokens.append(token)
            if text := self._stream.step(self.tokenizer.backend_tokenizer, token):
                self._read(text)

    def end(self) -> None:
        """Hands on what was held back: of a letter the first bytes, and what began like a stop sequence."""
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=self.parser is None)
        if whole.startswith(self._decoded) and whole != self._decoded:
            self._read(whole[len(self._decoded) :])
        if self.parser is not None:
            events: list[Any] = []
            with suppress(ValueError, RuntimeError):  # the answer ends within a call of a tool
                events = self.parser.finalize()[1]
            self._hand_on(response_events_to_chunks(events))
        self._say(self.stops.rest())

    def _read(self, text: str) -> None:
        self._decoded += text
        self._hand_on([text] if self.parser is None else response_events_to_chunks(self.parser.feed(text)))

    def _hand_on(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if type(piece) is str:
                self._say(self.stops.feed(piece))
                if self.stops.found:
                    raise _Stopped
            else:
                self._say(self.stops.rest())
                self.called |= isinstance(piece, ToolCall)
                self.give(piece)

    def _say(self, text: str) -> None:
        if text:
            self.give(text)
