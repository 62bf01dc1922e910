"""Generation from long prompts: prefill in chunks, streamed text, and what it cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from masformer.cache import SpanCache
from masformer.cost import ModelShape, bytes_text, cost
from masformer.errors import MasformerError, check_int
from masformer.models.positions import position_limit
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan

CHUNK = 2048
"""Prompt tokens in one forward pass: what a pass needs beside the cache does not grow with the prompt."""


@dataclass(frozen=True)
class Generation:
    """A generated text and what it took.

    Attributes:
        text: without the prompt.
        tokens: generated tokens, an end-of-text token included; of several beams, the best one.
        prompt_tokens: tokens of the prompt.
        first_seconds: from the call to the first token: the prefill. With beams, which are not streamed, None.
        seconds: from the call to the last token.
        cache_bytes: keys and values held at the end, of all beams (`SpanCache.nbytes`).
        full_cache_bytes: the same with full attention in every layer.
    """

    text: str
    tokens: int
    prompt_tokens: int
    first_seconds: float | None
    seconds: float
    cache_bytes: int
    full_cache_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there are none, or where they were not streamed."""
        if self.first_seconds is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}

    def summary(self) -> str:
        """The figures in one line, for people."""
        parts = [f"{self.prompt_tokens:,} prompt tokens", f"{self.tokens:,} new"]
        if self.first_seconds is None:
            parts.append(f"{self.seconds:.2f} s")
        else:
            parts.append(f"first after {self.first_seconds:.2f} s")
        if self.tokens_per_second is not None:
            parts.append(f"then {self.tokens_per_second:.1f} tokens/s")
        share = self.cache_bytes / self.full_cache_bytes
        held, full = bytes_text(self.cache_bytes), bytes_text(self.full_cache_bytes)
        return ", ".join(parts) + f"; cache {held}, {share:.0%} of all-full's {full}"


class _Clock(TextStreamer):  # type: ignore[misc]
    """Hands on text as it comes, and notes when the tokens did."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.extend([time.perf_counter()] * value.numel())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


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
    template = getattr(tokenizer, "chat_template", None)
    chat = bool(template) if chat is None else chat
    if chat and not template:
        raise MasformerError("the tokenizer has no chat template; give the prompt as it is")
    if system is not None and not chat:
        raise MasformerError("a system message needs a chat template, which is not used here")
    if not text.strip():
        raise MasformerError("the prompt is empty")
    if not chat:
        return list(tokenizer(text, verbose=False)["input_ids"])
    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": text}]
    try:
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:
        raise MasformerError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from error
    return list(tokens)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    beams: int = 1,
    chunk: int = CHUNK,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continues a prompt of any length, through transformers' own `generate`.

    Args:
        model: a model with a plan, in evaluation mode.
        tokenizer: its tokenizer.
        prompt: token ids.
        max_new_tokens: the most tokens to generate; fewer where the model's positions end.
        temperature: 0 takes the most likely token; above, tokens are sampled.
        top_p: of sampling; by default the model's own setting.
        top_k: of sampling; by default the model's own setting.
        beams: beam search with so many beams, if above 1.
        chunk: prompt tokens in one forward pass.
        seed: of sampling.
        on_text: called with each piece of text as soon as it is certain; with beams, once.

    Raises:
        MasformerError: a value out of range, an option that would do nothing, or a prompt beyond the model's positions.
    """
    for name, number in {"max_new_tokens": max_new_tokens, "beams": beams, "chunk": chunk}.items():
        check_int(name, number, 1)
    if temperature < 0:
        raise MasformerError(f"temperature must be at least 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise MasformerError(f"top_p must be above 0 and at most 1, got {top_p}")
    if top_k is not None:
        check_int("top_k", top_k, 1)
    if not temperature and (top_p is not None or top_k is not None):
        raise MasformerError("top_p and top_k do nothing without a temperature above 0")
    limit = position_limit(model.config)
    if not prompt:
        raise MasformerError("the prompt holds no token")
    if limit is not None and len(prompt) >= limit:
        raise MasformerError(
            f"the prompt has {len(prompt)} tokens, and the model {limit} positions for it and its continuation; "
            f"shorten it, or extend the model with --max-positions"
        )
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)),
        max_length=None,
        num_beams=beams,
        num_return_sequences=1,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=top_p if top_p is not None else settings.top_p if temperature else None,
        top_k=top_k if top_k is not None else settings.top_k if temperature else None,
        prefill_chunk_size=chunk if chunk < len(prompt) else None,
        return_dict_in_generate=True,
    )
    clock = _Clock(tokenizer, on_text)
    tokens = torch.tensor([list(prompt)], device=model.device)
    torch.manual_seed(seed)
    start = time.perf_counter()
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=settings,
        streamer=clock if beams == 1 else None,
    )
    seconds = time.perf_counter() - start
    generated = out.sequences[0, len(prompt) :]
    text = tokenizer.decode(generated, skip_special_tokens=True)
    if beams > 1:
        on_text(text)
    cache = out.get("cache") or out.get("past_key_values")
    assert isinstance(cache, SpanCache)
    return Generation(
        text=text,
        tokens=len(generated),
        prompt_tokens=len(prompt),
        first_seconds=clock.times[0] - start if clock.times else None,
        seconds=seconds,
        cache_bytes=cache.nbytes,
        full_cache_bytes=_full_cache_bytes(model, cache, beams),
    )


def _full_cache_bytes(model: PreTrainedModel, cache: SpanCache, rows: int) -> int:
    full = AttentionPlan.uniform(len(cache.plan), FullSpan())
    width = torch.finfo(model.dtype).bits // 8
    length = cache.get_seq_length()
    return rows * cost(ModelShape.of(model.config), full, length, cache_bytes_per_value=width).kv_cache_bytes
