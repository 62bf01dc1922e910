"""Prompts are continued: prefill in chunks, streamed text, and what it cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, TextStreamer

from masformer.cache import SpanCache
from masformer.cost import ModelShape, bytes_text, cost
from masformer.defaults import PREFILL_CHUNK
from masformer.errors import MasformerError, check_int, check_number, check_seed
from masformer.models import rotary
from masformer.models.bridge import cache_name
from masformer.models.graphs import graph_tokens_if_possible
from masformer.models.positions import position_limit
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan


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
        held_tokens: tokens of the prompt that a cache held already, so that they were not read.
        token_ids: the generated tokens.
    """

    text: str
    tokens: int
    prompt_tokens: int
    first_seconds: float | None
    seconds: float
    cache_bytes: int
    full_cache_bytes: int
    held_tokens: int = 0
    token_ids: list[int] = field(default_factory=list, repr=False)

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
        held = f" ({self.held_tokens:,} held)" if self.held_tokens else ""
        parts = [f"{self.prompt_tokens:,} prompt tokens{held}", f"{self.tokens:,} new"]
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


class CheckNumbers(LogitsProcessor):  # type: ignore[misc]
    """Ends a generation whose next token would be chosen among scores that are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise MasformerError(
                "the model's scores of the next token are not numbers: its weights are damaged, or too coarse"
            )
        return scores


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the model's generation config, and the tokenizer's, which ends texts in
    training."""
    return _ends(model, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _ends(model: PreTrainedModel, others: Sequence[int]) -> list[int]:
    own = model.generation_config.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else own
    return list(dict.fromkeys([*ends, *others]))


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
    chunk: int = PREFILL_CHUNK,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
    on_prompt: Callable[[int], None] = lambda tokens: None,
    cache: SpanCache | None = None,
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
        on_prompt: called with the tokens of the prompt that were read: at the start, and after each pass over it.
        cache: of this model, holds the first tokens of the prompt, fewer than all; they are not read again.

    Raises:
        MasformerError: a value out of range, an option that would do nothing, a cache that does not fit, or a prompt
            beyond the model's positions.
    """
    model = bare_model(model)
    for name, number in {"max_new_tokens": max_new_tokens, "beams": beams, "chunk": chunk}.items():
        check_int(name, number, 1)
    check_seed(seed)
    check_number("temperature", temperature, 0)
    if top_p is not None:
        check_number("top_p", top_p, 0, 1, above=True)
    if top_k is not None:
        check_int("top_k", top_k, 1)
    if not temperature and (top_p is not None or top_k is not None):
        raise MasformerError("top_p and top_k do nothing without a temperature above 0")
    graph_tokens_if_possible(model)
    limit = position_limit(model.config)
    if not prompt:
        raise MasformerError("the prompt holds no token")
    if limit is not None and len(prompt) >= limit:
        raise MasformerError(
            f"the prompt has {len(prompt)} tokens, and the model {limit} positions for it and its continuation; "
            f"shorten it, or extend the model with --max-positions"
        )
    held = 0 if cache is None else cache.get_seq_length()
    if cache is not None and (beams > 1 or held >= len(prompt)):
        raise MasformerError("a cache serves no beams, and a prompt that is longer than what it holds")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
    settings = _settings(model, room, beams)
    settings.update(
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=top_p if top_p is not None else model.generation_config.top_p if temperature else None,
        top_k=top_k if top_k is not None else model.generation_config.top_k if temperature else None,
        eos_token_id=end_tokens(model, tokenizer) or None,
        prefill_chunk_size=chunk if chunk < len(prompt) - held else None,
        return_dict_in_generate=True,
    )
    clock = _Clock(tokenizer, on_text)
    tokens = torch.tensor([list(prompt)], device=model.device)
    torch.manual_seed(seed)
    start = time.perf_counter()
    with _reading(model, len(prompt) - held, on_prompt):
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=settings,
            logits_processor=[CheckNumbers()],
            streamer=clock if beams == 1 else None,
            **({} if cache is None else {cache_name(model.base_model): cache}),
        )
    seconds = time.perf_counter() - start
    generated = out.sequences[0, len(prompt) :]
    text = tokenizer.decode(generated, skip_special_tokens=True)
    if beams > 1:
        on_text(text)
    cache = _cache_of(out)
    return Generation(
        text=text,
        tokens=len(generated),
        prompt_tokens=len(prompt),
        held_tokens=held,
        token_ids=generated.tolist(),
        first_seconds=clock.times[0] - start if clock.times else None,
        seconds=seconds,
        cache_bytes=cache.nbytes,
        full_cache_bytes=_full_cache_bytes(model, cache, beams),
    )


@dataclass(frozen=True)
class Continuation:
    """What one prompt of a batch was continued with.

    Attributes:
        tokens: without the token that ended it.
        ended: whether such a token came; otherwise the limit ended it.
    """

    tokens: list[int]
    ended: bool


@dataclass(frozen=True)
class BatchGeneration:
    """What a batch of prompts was continued with.

    Attributes:
        rows: one for each prompt, in order.
        prefill_seconds: for the prompts without their last token.
        decode_seconds: from there to the last token of the longest row.
    """

    rows: list[Continuation]
    prefill_seconds: float
    decode_seconds: float


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int] = (),
    beams: int = 1,
    chunk: int = PREFILL_CHUNK,
) -> BatchGeneration:
    """Continues several prompts at once, greedily or by beam search, through transformers' own `generate`.

    Shorter prompts are padded on the left. A row does not depend on the others, beyond the rounding of other shapes:
    where rotary positions depend on the length of the text, only rows that share them are run together.
    The prompts are read once, whatever the number of beams.

    Args:
        model: a model with a plan, in evaluation mode.
        prompts: token ids of each.
        max_new_tokens: the most tokens to generate for each.
        end_tokens: tokens that end a text beside those of the model's generation config.
        beams: beam search with so many beams, if above 1.
        chunk: positions of one forward pass over the prompts, all rows together; at least one position of each row.

    Raises:
        MasformerError: a value out of range, no prompt, an empty one, or prompt and new tokens together are beyond the
            model's positions.
    """
    model = bare_model(model)
    for name, number in {"max_new_tokens": max_new_tokens, "beams": beams, "chunk": chunk}.items():
        check_int(name, number, 1)
    if not prompts or not all(prompts):
        raise MasformerError("there is no prompt, or one that holds no token")
    longest, limit = max(map(len, prompts)), position_limit(model.config)
    if limit is not None and longest + max_new_tokens > limit:
        raise MasformerError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are beyond the {limit} positions of the "
            f"model; shorten one, or extend the model with --max-positions"
        )
    graph_tokens_if_possible(model)
    settings = _settings(model, max_new_tokens, beams)
    ends = _ends(model, end_tokens)
    settings.update(
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    together: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        together.setdefault(_rotary_group(model, len(prompt), max_new_tokens), []).append(index)
    rows: dict[int, Continuation] = {}
    prefill = decode = 0.0
    for indices in together.values():
        part = _continue_together(
            model, [prompts[index] for index in indices], settings, ends, max(1, chunk // len(prompts))
        )
        rows |= zip(indices, part.rows, strict=True)
        prefill, decode = prefill + part.prefill_seconds, decode + part.decode_seconds
    return BatchGeneration([rows[index] for index in range(len(prompts))], prefill, decode)


def _rotary_group(model: PreTrainedModel, length: int, new: int) -> Any:
    """Prompts with the same one have the same rotary table at each step."""
    first, last = (rotary.table(model.config, tokens) for tokens in (length, length + new - 1))
    return first if first == last else length


def _continue_together(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig, ends: list[int], chunk: int
) -> BatchGeneration:
    """Continues prompts in one padded batch; a chunk is of so many positions of each row."""
    longest, beams = max(map(len, prompts)), settings.num_beams
    tokens = torch.full((len(prompts), longest), settings.pad_token_id)
    real = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        real[row, longest - len(prompt) :] = 1
    tokens, real = tokens.to(model.device), real.to(model.device)
    start = time.perf_counter()
    plan = AttentionPlan.from_dict(model.config.masformer)
    cache = SpanCache(plan, reserve=longest + settings.max_new_tokens, prompt=longest)
    name = cache_name(model.base_model)
    if longest > 1:
        # all but the last token: beams then share the prompt, and generate() has a token to begin with
        before = _settings(model, 1, 1)
        before.update(
            do_sample=False,
            pad_token_id=settings.pad_token_id,
            prefill_chunk_size=chunk if chunk < longest - 1 else None,
            return_dict_in_generate=True,
        )
        given = {"attention_mask": real[:, :-1], name: cache}
        cache = _cache_of(
            model.generate(tokens[:, :-1], **given, generation_config=before)
        )  # Phi-3 may begin a new one
        if beams > 1:
            cache.batch_repeat_interleave(beams)
    filled = time.perf_counter()
    out = model.generate(
        tokens, attention_mask=real, **{name: cache}, generation_config=settings, logits_processor=[CheckNumbers()]
    )
    done = time.perf_counter()
    rows = []
    for row in out[:, longest:].tolist():
        end = next((index for index, token in enumerate(row) if token in ends), None)
        rows.append(Continuation(row[:end], end is not None))
    return BatchGeneration(rows, filled - start, done - filled)


@contextmanager
def _reading(model: PreTrainedModel, tokens: int, on_prompt: Callable[[int], None]) -> Iterator[None]:
    """Hears of the model's forward passes, until a prompt of so many tokens is read."""
    done = 0
    on_prompt(0)

    def advance(module: Any, args: Any, output: Any) -> None:
        nonlocal done
        if done < tokens:
            done = min(tokens, done + output[0].shape[1])
            on_prompt(done)

    hook = model.base_model.register_forward_hook(advance)
    try:
        yield
    finally:
        hook.remove()


def _cache_of(out: Any) -> SpanCache:
    """The cache that `generate` ended with."""
    cache = out.get("cache") or out.get("past_key_values")
    assert isinstance(cache, SpanCache)
    return cache


def _settings(model: PreTrainedModel, max_new_tokens: int, beams: int) -> GenerationConfig:
    """The model's own settings, with one sequence of so many tokens for each prompt."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=max_new_tokens, max_length=None, num_beams=beams, num_return_sequences=1)
    return settings


def _full_cache_bytes(model: PreTrainedModel, cache: SpanCache, rows: int) -> int:
    full = AttentionPlan.uniform(len(cache.plan), FullSpan())
    width = torch.finfo(model.dtype).bits // 8
    length = cache.get_seq_length()
    return rows * cost(ModelShape.of(model.config), full, length, cache_bytes_per_value=width).kv_cache_bytes
