"""Constants in place of first tokens: fits the constant sinks of a plan on a few texts, without training the model.

What windows miss when the first tokens of a text go is a share of the softmax and a value, and both are nearly constant
for a head (Xiao et al., arXiv 2309.17453, saw the share; gpt-oss, arXiv 2508.10925, has it as a weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from masformer.attention import ConstantSinks, attend
from masformer.data.tokens import opening_tokens
from masformer.defaults import LOSS_CHUNK
from masformer.errors import MasformerError, check_int, check_number
from masformer.evaluation.perplexity import prepared_base
from masformer.evaluation.room import autocast, autocast_on
from masformer.models.bridge import add_sinks, apply_plan, attending_by
from masformer.models.positions import position_limit
from masformer.models.sealing import kv_heads
from masformer.models.sinks import LOGIT, VALUE, named_sinks, sink_layers
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan, PlanSource
from masformer.spans import LayerSpan, Span, WindowSpan, spans_of

FIRST = 4
"""First tokens that the constants take the place of."""
RATE = 1e-2


def with_first_tokens(plan: AttentionPlan) -> AttentionPlan:
    """The plan in which first tokens stand where constant sinks are: `window:512+4` for `window:512+sink`.

    For blocks it is a window of as many keys as they show at most.

    Raises:
        MasformerError: there is no constant sink, or there are first tokens beside it, so that there is nothing to take
            the place of.
    """
    if not sink_layers(plan):
        raise MasformerError(f"the plan {plan} has no constant sink to fit; allowed: spans like window:512+sink")

    def change(span: Span) -> Span:
        if not span.constant_sink:
            return span
        if span.sinks:
            raise MasformerError(f"{span} keeps first tokens, so there is nothing to fit in their place")
        assert span.max_visible is not None
        return WindowSpan(span.max_visible, FIRST)

    return plan.changed(change)


def fit_sinks(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    plan: PlanSource,
    *,
    length: int = 2048,
    windows: int = 8,
    steps: int = 0,
    rate: float = RATE,
    progress: Callable[[str, int, int], None] | None = None,
) -> PreTrainedModel:
    """Gives a model the constant sinks of a plan, in closed form, and puts the plan to work.

    The model runs on the texts with the first S = 4 tokens in place of each constant sink. With q a query past the
    window, k_j and v_j key and value of first token j, and s_j = q k_j * scale (capped, in models with a soft cap),

        logit of a query head = mean over q of log(sum over j < S of exp(s_j))
        value of a KV head    = mean over its query heads of sum over j < S of mean over q of softmax(s)_j v_j,

    means over all texts. This is the project's own formula (docs/sinks.md has what it gives); the mean of the scores,
    not of their exponentials, since the latter gave worse constants.

    With `steps`, the constants alone are then trained to give what the model gives with the first tokens: AdamW
    without decay on the divergence KL(first tokens || constants) of the predictions past the window, one text a step.

    Args:
        model: a causal language model, with a plan or without.
        tokenizer: its tokenizer.
        texts: documents; those of fewer than `length` tokens are left out.
        plan: has spans with a constant sink, like `full@11-18; window:512+sink`.
        length: tokens of each text, from its beginning.
        windows: the most texts.
        steps: of training the constants; 0: none.
        rate: of that, falling to zero.
        progress: called with (stage, done, total).

    Returns:
        The same model.

    Raises:
        MasformerError: the plan has no constant sink, no text is long enough, or the model cannot take the plan.
    """
    check_int("windows", windows, 1)
    check_int("steps", steps, 0)
    check_number("rate", rate, 0, above=True)
    outer, model = model, bare_model(model)
    plan = AttentionPlan.load(plan, model.config.num_hidden_layers, kv_heads(model.config))
    stand_in = with_first_tokens(plan)
    starts = {layer: _start(plan.layers[layer]) for layer in sink_layers(plan)}
    check_int("length", length, max(starts.values()) + 1, position_limit(model.config) or length)
    rows = _rows(tokenizer, texts, length, windows)
    progress = progress or (lambda stage, done, total: None)
    add_sinks(model, plan)
    apply_plan(model, plan)
    means = _Means(starts)
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(model.device, autocast_on(model.device, model.dtype)):
        apply_plan(model, stand_in)
        with attending_by(model, means):
            for done, row in enumerate(rows):
                progress("constant sinks", done, len(rows))
                model.base_model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
    apply_plan(model, plan)
    sums = means.found(len(rows))
    for name, weight in named_sinks(model):
        place, _, kind = name.rpartition(".")
        layer = int(model.get_submodule(place).layer_idx)  # type: ignore[arg-type]
        if layer in sums:
            weight.data.copy_(sums[layer][kind])
    progress("constant sinks", len(rows), len(rows))
    if steps:
        _distill(model, plan, stand_in, rows, max(starts.values()), steps, rate, progress)
    model.train(was_training)
    return outer


def _start(layer: LayerSpan) -> int:
    """The first position whose query sees first tokens only as sinks."""
    return FIRST + max(span.max_visible or 0 for span in spans_of(layer) if span.constant_sink)


def _rows(tokenizer: Any, texts: Sequence[str], length: int, windows: int) -> list[list[int]]:
    """The beginnings of the texts that are long enough, as prompts begin."""
    rows: list[list[int]] = []
    for text in texts:
        tokens = opening_tokens(tokenizer, text)[:length]
        if len(tokens) == length:
            rows.append(tokens)
        if len(rows) == windows:
            break
    if not rows:
        raise MasformerError(
            f"none of the {len(texts)} texts has {length} tokens; give longer ones, or ask for a smaller length"
        )
    return rows


class _Means:
    """Takes the place of `attend` in a pass over one text, and adds up what the constants are the means of.

    Args:
        starts: layer -> the first position whose query counts.
    """

    def __init__(self, starts: Mapping[int, int]) -> None:
        self.starts = starts
        self.sums: dict[int, dict[str, Tensor]] = {}

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span: LayerSpan,
        *,
        sinks: ConstantSinks | None,
        scale: float,
        softcap: float | None = None,
        **options: Any,
    ) -> Tensor:
        if (start := self.starts.get(layer)) is not None:
            kv_heads = key.shape[1]
            queries = query[0, :, start:].unflatten(0, (kv_heads, -1)).float()
            scores = queries @ key[0, :, None, :FIRST].float().mT * scale  # [kv_heads, group, queries, first]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            shares = scores.softmax(-1).mean((1, 2), dtype=torch.float64)
            found = {
                LOGIT: scores.logsumexp(-1).mean(-1, dtype=torch.float64).flatten(),
                VALUE: (shares[..., None] * value[0, :, :FIRST].double()).sum(1),
            }
            held = self.sums.setdefault(layer, {})
            for name, each in found.items():
                held[name] = held.get(name, 0) + each
        return attend(
            query, key, value, span, sinks=sinks and sinks.under(span), scale=scale, softcap=softcap, **options
        )

    def found(self, texts: int) -> dict[int, dict[str, Tensor]]:
        """Layer -> the constants, float64."""
        return {layer: {name: each / texts for name, each in held.items()} for layer, held in self.sums.items()}


def _distill(
    model: PreTrainedModel,
    plan: AttentionPlan,
    stand_in: AttentionPlan,
    rows: Sequence[Sequence[int]],
    start: int,
    steps: int,
    rate: float,
    progress: Callable[[str, int, int], None],
) -> None:
    """Trains the constants alone, in float32, on the predictions from position `start` on."""
    weights = [weight for _, weight in named_sinks(model)]
    stored = model.dtype
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with _trained_alone(model, weights), autocast(model.device, autocast_on(model.device, model.dtype)):
        for step in range(steps):
            progress("distillation", step, steps)
            tokens = torch.tensor([rows[step % len(rows)]], device=model.device)
            with torch.no_grad():
                apply_plan(model, stand_in)
                wanted = model.base_model(input_ids=tokens, use_cache=False, return_dict=True)
            apply_plan(model, plan)
            with torch.enable_grad():
                output = model.base_model(input_ids=tokens, use_cache=False, return_dict=True)
                output.last_hidden_state.backward(_slope(model, wanted, output, tokens, start))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for weight in weights:
        weight.data = weight.data.to(stored)
    progress("distillation", steps, steps)


def _slope(model: PreTrainedModel, wanted: Any, output: Any, tokens: Tensor, start: int) -> Tensor:
    """The gradient of the mean divergence by the hidden states; logits exist for a chunk of positions at a time."""
    hidden = output.last_hidden_state.detach().requires_grad_()
    given = type(output)(**{**output, "last_hidden_state": hidden})
    length = tokens.shape[1]
    for first in range(start, length, LOSS_CHUNK):
        positions = slice(first, min(first + LOSS_CHUNK, length))
        with torch.no_grad():
            target = _log_probabilities(model, wanted, tokens, positions)
        found = _log_probabilities(model, given, tokens, positions)
        (nn.functional.kl_div(found, target, reduction="sum", log_target=True) / (length - start)).backward()
    slope: Tensor | None = hidden.grad
    assert slope is not None
    return slope


def _log_probabilities(model: PreTrainedModel, output: Any, tokens: Tensor, positions: slice) -> Tensor:
    with prepared_base(model, output) as prepared:
        prepared.positions = positions
        logits: Tensor = model(input_ids=tokens[:, positions], use_cache=False, return_dict=True).logits
    return logits.float().log_softmax(-1)


@contextmanager
def _trained_alone(model: PreTrainedModel, weights: Sequence[Tensor]) -> Iterator[None]:
    """Other parameters take no part in gradients."""
    mine = {id(weight) for weight in weights}
    others = [each for each in model.parameters() if each.requires_grad and id(each) not in mine]
    try:
        for each in others:
            each.requires_grad_(False)
        yield
    finally:
        for each in others:
            each.requires_grad_(True)
