"""Perplexity by length and by position, for several plans of one loaded model.

Every document is cut into rolling windows, as lm-eval does (`get_rolling_token_windows`): each token is predicted
exactly once. Logits exist for a few hundred positions at a time, never for a whole window, so that a long window with
a large vocabulary fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from masformer.data import Document
from masformer.errors import MasformerError, check_int
from masformer.models.bridge import apply_plan
from masformer.models.positions import position_limit
from masformer.plan import AttentionPlan

FIRST_BUCKET = 256
"""Positions in the first bucket; the following buckets each end at twice the position where they start."""


@dataclass(frozen=True)
class PositionLoss:
    """The loss of the predictions made at positions start..end-1 of their windows.

    Attributes:
        start: first position. A prediction made at position p has seen p + 1 tokens, the prefix token included.
        end: one past the last position.
        tokens: predicted tokens.
        nll: mean negative log-likelihood per token in nats; None where there is no token.
    """

    start: int
    end: int
    tokens: int
    nll: float | None

    @property
    def perplexity(self) -> float | None:
        """exp(nll)."""
        return None if self.nll is None else exp_or_inf(self.nll)


@dataclass(frozen=True)
class PerplexityResult:
    """How well one model, under one plan, predicts documents in windows of one length.

    Attributes:
        length: the most tokens a prediction sees.
        documents: documents with at least one predicted token.
        tokens: predicted tokens.
        nll: mean negative log-likelihood per token, in nats.
        buckets: the same by position in the window, edges at powers of two: 0-255, 256-511, 512-1023, ...
        second_half: the same for the positions from length // 2 on; where the length is a power of two above 256, the
            last bucket.
        text_bytes: UTF-8 bytes of the text, if known.
        name: the plan's name in a comparison.
        plan: the plan's text form in a comparison.
    """

    length: int
    documents: int
    tokens: int
    nll: float
    buckets: tuple[PositionLoss, ...]
    second_half: PositionLoss
    text_bytes: int | None = None
    name: str | None = None
    plan: str | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return exp_or_inf(self.nll)

    @property
    def bits_per_byte(self) -> float | None:
        """Total negative log-likelihood in bits over the text's bytes: comparable between tokenizers."""
        return None if self.text_bytes is None else self.nll * self.tokens / math.log(2) / self.text_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the attributes, with perplexities and bits per byte."""
        parts = [asdict(part) | {"perplexity": part.perplexity} for part in (*self.buckets, self.second_half)]
        derived = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return asdict(self) | derived | {"buckets": parts[:-1], "second_half": parts[-1]}


def rolling_windows(
    tokens: Sequence[int], prefix: int | None, length: int, context: int = 1
) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts a document into windows that predict each of its tokens exactly once, as lm-eval's rolling windows.

    The first window predicts as much as it can; each later one predicts the next `length - context + 1` tokens, and the
    last one reaches back so that it is as long as the others.

    Args:
        tokens: token ids of the document.
        prefix: what the first token is predicted from; None: the first token is not predicted.
        length: the most input tokens of a window.
        context: the fewest tokens that a prediction sees, after the first window; 1 to `length`.

    Yields:
        (inputs, targets): the targets are the tokens that follow the last `len(targets)` inputs. Inputs before those
        (there are some in the last window, or with `context` > 1) are seen, but predict nothing.

    Raises:
        MasformerError: `length` or `context` is out of range.
    """
    _check_window(length, context)
    stream = list(tokens) if prefix is None else [prefix, *tokens]
    done, last = 0, len(stream) - 1
    while done < last:
        end = min(done + (length - context + 1 if done else length), last)
        yield stream[max(0, end - length) : end], stream[done + 1 : end + 1]
        done = end


def prefix_token(tokenizer: Any) -> int | None:
    """What a document's first token is predicted from: the tokenizer's BOS token, else its EOS token, else None."""
    bos: int | None = tokenizer.bos_token_id
    eos: int | None = tokenizer.eos_token_id
    return eos if bos is None else bos


def tokenize(
    tokenizer: Any, documents: Iterable[Document], *, max_tokens: int | None = None
) -> tuple[list[list[int]], int]:
    """Token ids of each document, without special tokens, and the UTF-8 bytes of text that they stand for.

    Args:
        tokenizer: of transformers.
        documents: what `read_documents` gives.
        max_tokens: keep at most the first `max_tokens` tokens of each document. The bytes of a document that was cut
            are those of its decoded tokens.

    Raises:
        MasformerError: `max_tokens` is below 1.
    """
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, 1)
    rows, text_bytes = [], 0
    for document in documents:
        tokens = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        kept = tokens[:max_tokens]
        rows.append(kept)
        text_bytes += len((document.text if len(kept) == len(tokens) else tokenizer.decode(kept)).encode())
    return rows, text_bytes


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    length: int,
    *,
    prefix: int | None,
    context: int = 1,
    chunk: int = 512,
    text_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a model as it is, in windows of one length.

    Args:
        model: a causal language model in evaluation mode, with or without a plan, on any device and of any dtype.
        documents: token ids of each document.
        length: the most input tokens of a window.
        prefix: what a document's first token is predicted from (`prefix_token`); None: it is not predicted.
        context: see `rolling_windows`.
        chunk: positions whose logits exist at the same time; their loss is computed in float32.
        text_bytes: UTF-8 bytes of the documents, for `bits_per_byte`.
        progress: called after each window with the number of tokens that it predicted.

    Raises:
        MasformerError: a value out of range, a length beyond the model's positions, nothing to predict, a model in
            training mode, or a loss that is not finite.
    """
    _check(model, documents, [length], prefix, context, chunk, text_bytes)
    sums = torch.zeros(length, dtype=torch.float64)
    counts = torch.zeros(length, dtype=torch.int64)
    for number, document in enumerate(documents, start=1):
        for inputs, targets in rolling_windows(document, prefix, length, context):
            losses = _losses(model, inputs, targets, chunk)
            if not bool(losses.isfinite().all()):
                raise MasformerError(
                    f"the loss is not finite in document {number} of {len(documents)}, in windows of {length} tokens: "
                    f"the model's weights are damaged, or too coarse in {model.dtype}"
                )
            here = slice(len(inputs) - len(targets), len(inputs))
            sums[here] += losses
            counts[here] += 1
            if progress is not None:
                progress(len(targets))

    def part(start: int, end: int) -> PositionLoss:
        tokens = int(counts[start:end].sum())
        return PositionLoss(start, end, tokens, float(sums[start:end].sum()) / tokens if tokens else None)

    edges = [0, FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    tokens = int(counts.sum())
    return PerplexityResult(
        length=length,
        documents=sum(_predicted([document], prefix) > 0 for document in documents),
        tokens=tokens,
        nll=float(sums.sum()) / tokens,
        buckets=tuple(part(start, min(end, length)) for start, end in pairwise(edges)),
        second_half=part(length // 2, length),
        text_bytes=text_bytes,
    )


def compare_plans(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    *,
    prefix: int | None,
    backend: str = "auto",
    context: int = 1,
    chunk: int = 512,
    text_bytes: int | None = None,
    progress: Callable[[str, int, int, int], None] | None = None,
) -> list[PerplexityResult]:
    """Perplexity under several plans at several lengths; the model keeps the last plan.

    Args:
        model: see `perplexity`.
        documents: token ids of each document.
        plans: name -> plan.
        lengths: window lengths in tokens.
        prefix: see `perplexity`.
        backend: see `masformer.attend`.
        context: see `rolling_windows`.
        chunk: see `perplexity`.
        text_bytes: see `perplexity`.
        progress: called with (name of the plan, length, tokens predicted so far, tokens in all): before each pair of
            plan and length, and after each window.

    Returns:
        One result for each plan and length: all lengths of the first plan, then the second.

    Raises:
        MasformerError: as `perplexity` and `apply_plan`; wrong lengths and plans are named before anything is run.
    """
    if not plans or not lengths:
        raise MasformerError("nothing to compare: at least one plan and one length are needed")
    for plan in plans.values():
        plan.for_layers(model.config.num_hidden_layers)
    _check(model, documents, lengths, prefix, context, chunk, text_bytes)
    done, total = 0, len(plans) * len(lengths) * _predicted(documents, prefix)
    results = []
    for name, plan in plans.items():
        apply_plan(model, plan, backend)
        for length in lengths:

            def advance(tokens: int, name: str = name, length: int = length) -> None:
                nonlocal done
                done += tokens
                if progress is not None:
                    progress(name, length, done, total)

            advance(0)
            result = perplexity(
                model,
                documents,
                length,
                prefix=prefix,
                context=context,
                chunk=chunk,
                text_bytes=text_bytes,
                progress=advance,
            )
            results.append(replace(result, name=name, plan=str(plan)))
    return results


def perplexity_table(results: Sequence[PerplexityResult]) -> Table:
    """Plans by lengths; each cell holds the perplexity of all tokens and of the second half of the context."""
    lengths = sorted({result.length for result in results})
    cells = {(result.name, result.length): result for result in results}
    table = Table(title="Perplexity")
    table.add_column("plan")
    for length in lengths:
        table.add_column(f"{length:,} tokens\nall / second half", justify="right")
    for name in dict.fromkeys(result.name for result in results):
        row = []
        for length in lengths:
            result = cells.get((name, length))
            half = result.second_half.perplexity if result else None
            row.append(f"{result.perplexity:.2f} / {'-' if half is None else f'{half:.2f}'}" if result else "-")
        table.add_row(name or "as it is", *row)
    return table


class _Prepared(nn.Module):
    """Stands in for a model's base: returns what the base returned, with some of its hidden states."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.positions = slice(0)

    @property
    def decoder(self) -> _Prepared:
        """What some heads call in place of the base (OPT)."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.output.last_hidden_state[:, self.positions]
        return type(self.output)(**{**self.output, "last_hidden_state": hidden})


@contextmanager
def prepared_base(model: PreTrainedModel, output: Any) -> Iterator[_Prepared]:
    """Puts a stand-in where the model's base is: calling the model then runs its own head, whatever that does.

    The submodule is exchanged, not its forward, so that no hook of the base runs.
    """
    name, base = model.base_model_prefix, model.base_model
    prepared = _Prepared(output)
    setattr(model, name, prepared)
    try:
        yield prepared
    finally:
        setattr(model, name, base)


def _losses(model: PreTrainedModel, inputs: list[int], targets: list[int], chunk: int) -> Tensor:
    """Negative log-likelihood of each target: [len(targets)], float64, on the CPU."""
    tokens = torch.tensor([inputs], device=model.device)
    wanted = torch.tensor(targets, device=model.device)
    output = model.base_model(input_ids=tokens, use_cache=False, return_dict=True)
    first = len(inputs) - len(targets)
    losses = []
    with prepared_base(model, output) as prepared:
        for start in range(0, len(targets), chunk):
            prepared.positions = slice(first + start, min(first + start + chunk, len(inputs)))
            logits = model(input_ids=tokens[:, prepared.positions], use_cache=False, return_dict=True).logits[0]
            here = wanted[start : start + chunk].to(logits.device)
            losses.append(nn.functional.cross_entropy(logits.float(), here, reduction="none"))
    return torch.cat(losses).cpu().double()


def _check(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    lengths: Sequence[int],
    prefix: int | None,
    context: int,
    chunk: int,
    text_bytes: int | None,
) -> None:
    check_int("chunk", chunk, 1)
    if text_bytes is not None:
        check_int("text_bytes", text_bytes, 1)
    limit = position_limit(model.config)
    for length in lengths:
        _check_window(length, context)
        if limit is not None and length > limit:
            raise MasformerError(
                f"length {length} is beyond the {limit} positions of the model; allowed: 1 to {limit}, "
                f"or extend the model with --max-positions {length}"
            )
    if not _predicted(documents, prefix):
        raise MasformerError("the documents hold no token to predict")
    if model.training:
        raise MasformerError("the model is in training mode; call model.eval() first")
    if model.base_model is model:
        raise MasformerError(f"{type(model).__name__} has no head apart from its base model")


def _check_window(length: int, context: int) -> None:
    check_int("length", length, 1)
    check_int("context", context, 1)
    if context > length:
        raise MasformerError(f"context must be at most the length, {length}, got {context}")


def _predicted(documents: Sequence[Sequence[int]], prefix: int | None) -> int:
    """Number of tokens that are predicted."""
    return sum(max(0, len(document) - (prefix is None)) for document in documents)


def exp_or_inf(nll: float) -> float:
    """exp(nll), infinite where that is beyond a float."""
    return math.exp(nll) if nll < 709 else math.inf
