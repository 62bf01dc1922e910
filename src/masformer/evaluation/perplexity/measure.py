"""Perplexity of one model at one length: of all tokens, by position in the window, and by document."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from masformer.errors import MasformerError, check_int
from masformer.evaluation.intervals import Interval, bootstrap
from masformer.evaluation.perplexity.losses import exp_or_inf, target_losses
from masformer.evaluation.perplexity.windows import (
    FixedTargets,
    check_window,
    document_windows,
    predicted_tokens,
)
from masformer.evaluation.room import autocast, autocast_on, dtype_name, room_of
from masformer.models.positions import position_limit
from masformer.models.wrappers import bare_model

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
class DocumentLosses:
    """What was predicted of each document; documents without a predicted token are not among them.

    Attributes:
        numbers: which documents, from 0, in order.
        tokens: predicted tokens of each.
        nll: the sum of their negative log-likelihoods, in nats.
    """

    numbers: tuple[int, ...]
    tokens: tuple[int, ...]
    nll: tuple[float, ...]

    @property
    def interval(self) -> Interval | None:
        """The mean loss per token in nats, with a bootstrap interval over the documents, each weighted by its tokens.

        None where there is no document.
        """
        means = [nll / tokens for nll, tokens in zip(self.nll, self.tokens, strict=True)]
        return bootstrap(means, self.tokens) if means else None

    def minus(self, other: DocumentLosses) -> Interval | None:
        """The mean loss per token less that of `other`, in nats, paired by document.

        Raises:
            MasformerError: they are not of the same tokens.
        """
        if (self.numbers, self.tokens) != (other.numbers, other.tokens):
            raise MasformerError("only losses of the same tokens of the same documents can be paired")
        losses = tuple(mine - theirs for mine, theirs in zip(self.nll, other.nll, strict=True))
        return DocumentLosses(self.numbers, self.tokens, losses).interval


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
        by_document: tokens and losses of each document.
        second_half_by_document: the same of the second half.
        target_tokens: predicted tokens of each document, where the same are predicted at every length; else None.
        left_out: documents that are too short to hold these tokens.
        text_bytes: UTF-8 bytes of the text, if known.
        name: the plan's name in a comparison.
        plan: the plan's text form in a comparison.
        autocast: dtype of matrix products, where it is not that of the weights; see `masformer.evaluation.room`.
    """

    length: int
    documents: int
    tokens: int
    nll: float
    buckets: tuple[PositionLoss, ...]
    second_half: PositionLoss
    by_document: DocumentLosses
    second_half_by_document: DocumentLosses
    target_tokens: int | None = None
    left_out: int = 0
    text_bytes: int | None = None
    name: str | None = None
    plan: str | None = None
    autocast: str | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return exp_or_inf(self.nll)

    @property
    def interval(self) -> Interval:
        """The perplexity, with a bootstrap interval over the documents; one document gives an interval of no width."""
        found = self.by_document.interval
        assert found is not None
        return exp_interval(found)

    @property
    def second_half_interval(self) -> Interval | None:
        """The same of the second half; None where it holds no token."""
        found = self.second_half_by_document.interval
        return None if found is None else exp_interval(found)

    @property
    def bits_per_byte(self) -> float | None:
        """Total negative log-likelihood in bits over the text's bytes: comparable between tokenizers."""
        return None if self.text_bytes is None else self.nll * self.tokens / math.log(2) / self.text_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the attributes, with perplexities, their intervals and bits per byte."""
        parts = [asdict(part) | {"perplexity": part.perplexity} for part in (*self.buckets, self.second_half)]
        half = self.second_half_interval
        parts[-1]["interval"] = None if half is None else half.to_dict()
        derived = {
            "perplexity": self.perplexity,
            "interval": self.interval.to_dict(),
            "bits_per_byte": self.bits_per_byte,
        }
        return asdict(self) | derived | {"buckets": parts[:-1], "second_half": parts[-1]}


def exp_interval(interval: Interval) -> Interval:
    """The interval of exp of a mean: exp is monotone, so percentiles go with it."""
    mean, low, high = (exp_or_inf(value) for value in (interval.mean, interval.low, interval.high))
    return Interval(mean, low, high, interval.count)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    length: int,
    *,
    prefix: int | None,
    context: int = 1,
    targets: FixedTargets | None = None,
    chunk: int | None = None,
    batch_size: int | None = None,
    precision: str = "auto",
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
        targets: predict these tokens alone (`target_window`); by default every token, in rolling windows.
        chunk: positions whose logits exist at the same time; their loss is computed in float32. By default what fits on
            CUDA, else 512.
        batch_size: windows that run together, where they are of equal length or nearly so; by default as many as fit
            on CUDA, else one. Where they do not fit after all, half of them run, and half of the logits.
        precision: of matrix products, where the weights are float32: `float32`, `bfloat16` (autocast), or `auto`:
            bfloat16 on CUDA.
        text_bytes: UTF-8 bytes of the documents, for `bits_per_byte`; not with `targets`.
        progress: called after each pass with the number of its input tokens that count as work done: those that
            predict, or with `targets` all of them.

    Raises:
        MasformerError: a value out of range, a length beyond the model's positions, nothing to predict, a model in
            training mode, or a loss that is not finite.
    """
    model = bare_model(model)
    check(model, documents, [length], prefix, context, targets, chunk, batch_size, precision, text_bytes)
    dtype, room = autocast_on(model.device, model.dtype, precision), room_of(model, rows=batch_size, positions=chunk)
    found = [
        (number, window)
        for number, document in enumerate(documents)
        for window in document_windows(document, prefix, length, context, targets)
    ]
    found.sort(key=lambda each: len(each[1][0]) - len(each[1][1]))  # together: those that predict from alike positions
    numbers, windows = zip(*found, strict=True)
    sizes = [len(inputs) for inputs, _ in windows]
    places = min(length, max(map(len, documents)) + 1)
    sums = torch.zeros(places, dtype=torch.float64)
    counts = torch.zeros(places, dtype=torch.int64)
    half = length // 2
    by_document = torch.zeros(len(documents), 2, dtype=torch.float64)  # all, and the second half
    tokens_of = torch.zeros(len(documents), 2, dtype=torch.int64)

    def losses_of(part: Sequence[int]) -> tuple[Tensor, Tensor]:
        with autocast(model.device, dtype):
            return target_losses(model, [windows[index] for index in part], room.positions)

    for batch in room.batches(sizes):
        for part_of, (losses, there) in room.run(batch, sizes[batch[0]], losses_of):
            mine = torch.tensor([numbers[index] for index in part_of])
            if not bool((finite := losses.isfinite().all(1)).all()):
                number = int(mine[~finite].min())
                raise MasformerError(
                    f"the loss is not finite in document {number + 1} of {len(documents)}, in windows of {length} "
                    f"tokens: the model's weights are damaged, or too coarse in {dtype or model.dtype}"
                )
            end = losses.shape[1]
            sums[:end] += losses.sum(0)
            counts[:end] += there.sum(0)
            by_document.index_add_(0, mine, torch.stack([losses.sum(1), losses[:, half:].sum(1)], 1))
            tokens_of.index_add_(0, mine, torch.stack([there.sum(1), there[:, half:].sum(1)], 1))
            if progress is not None:
                progress(int(there.sum()) if targets is None else len(part_of) * length)

    def part(start: int, end: int) -> PositionLoss:
        tokens = int(counts[start:end].sum())
        return PositionLoss(start, end, tokens, float(sums[start:end].sum()) / tokens if tokens else None)

    edges = [0, FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    tokens = int(counts.sum())
    whole = _document_losses(tokens_of[:, 0], by_document[:, 0])
    return PerplexityResult(
        length=length,
        documents=len(whole.numbers),
        tokens=tokens,
        nll=float(sums.sum()) / tokens,
        buckets=tuple(part(start, min(end, length)) for start, end in pairwise(edges)),
        second_half=part(half, length),
        by_document=whole,
        second_half_by_document=_document_losses(tokens_of[:, 1], by_document[:, 1]),
        target_tokens=None if targets is None else targets.count,
        left_out=0 if targets is None else sum(len(document) < targets.end for document in documents),
        text_bytes=text_bytes,
        autocast=dtype_name(dtype),
    )


def _document_losses(tokens: Tensor, nll: Tensor) -> DocumentLosses:
    numbers = tokens.nonzero()[:, 0]
    return DocumentLosses(tuple(numbers.tolist()), tuple(tokens[numbers].tolist()), tuple(nll[numbers].tolist()))


def check(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    lengths: Sequence[int],
    prefix: int | None,
    context: int,
    targets: FixedTargets | None,
    chunk: int | None,
    batch_size: int | None,
    precision: str,
    text_bytes: int | None,
) -> None:
    """Raises the errors of `perplexity` that are known before anything runs."""
    for name, value in (("chunk", chunk), ("batch_size", batch_size)):
        if value is not None:
            check_int(name, value, 1)
    autocast_on(model.device, model.dtype, precision)
    if text_bytes is not None:
        check_int("text_bytes", text_bytes, 1)
    limit = position_limit(model.config)
    for length in lengths:
        check_window(length, context)
        if targets is not None:
            targets.check(length, prefix)
        if limit is not None and length > limit:
            raise MasformerError(
                f"length {length} is beyond the {limit} positions of the model; allowed: 1 to {limit}, "
                f"or extend the model with --max-positions {length}"
            )
    if targets is not None:
        if context != 1 or text_bytes is not None:
            raise MasformerError("context and text_bytes are of rolling windows; they do nothing with fixed targets")
        longest = max(map(len, documents), default=0)
        if longest < targets.end:
            raise MasformerError(
                f"no document has the {targets.end} tokens of the longest context: the longest has {longest}; "
                f"give longer documents or smaller lengths"
            )
    if not predicted_tokens(documents, prefix, targets):
        raise MasformerError("the documents hold no token to predict")
    if model.training:
        raise MasformerError("the model is in training mode; call model.eval() first")
    if model.base_model is model:
        raise MasformerError(f"{type(model).__name__} has no head apart from its base model")
