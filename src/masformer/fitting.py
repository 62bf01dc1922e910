"""Constants in place of first tokens: fits the constant sinks of a plan on a few texts, without training the model.

What windows miss when the first tokens of a text go is a share of the softmax and a value, and both are nearly constant
for a head (Xiao et al., arXiv 2309.17453, saw the share; gpt-oss, arXiv 2508.10925, has it as a weight).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from masformer.attention import ConstantSinks, attend
from masformer.data.tokens import opening_tokens
from masformer.errors import MasformerError, check_int
from masformer.evaluation.perplexity import prefix_token
from masformer.evaluation.room import autocast, autocast_on
from masformer.models.bridge import add_sinks, apply_plan, attending_by, give_sinks
from masformer.models.positions import position_limit
from masformer.models.sealing import kv_heads
from masformer.models.sinks import sink_layers
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan, PlanSource
from masformer.spans import LayerSpan, Span, WindowSpan, spans_of

FIRST = 4
"""First tokens that the constants take the place of."""
TURNS = 30
"""Of least squares: steps of the logits, and the values anew."""
STARTS = (0, -2, -4, -8)
"""Where it looks first, from the mean of the log masses of first tokens."""
FIRST_WEIGHT = 0.1
"""How much the query of the first token counts, of all queries of its text."""


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
    progress: Callable[[str, int, int], None] | None = None,
) -> PreTrainedModel:
    """Gives a model the constant sinks of a plan, by least squares, and puts the plan to work.

    The model runs on the texts with the first 4 tokens in place of each constant sink. With z the log-sum-exp of what
    a query sees beside them, `out` its attention to that, and t its attention with the first tokens, the logit c of a
    query head and the value u of its KV head are those with the least

        sum over queries of |(1 - w) out + w u - t|^2, w = sigmoid(c - z),

    over all texts. Queries that have the first tokens in their window count as well: a constant joins there too, and
    t is `out`. The query of the first token, which all others look at, counts as a tenth of all of its text. Half
    of the texts begin with the token that evaluation puts before a text, the others as prompts do. This is the
    project's own (docs/sinks.md has what it gives).

    Args:
        model: a causal language model, with a plan or without.
        tokenizer: its tokenizer.
        texts: documents; those of fewer than `length` tokens are left out.
        plan: has spans with a constant sink, like `full@11-18; window:512+sink`.
        length: tokens of each text, from its beginning.
        windows: the most texts.
        progress: called with (stage, done, total).

    Returns:
        The same model.

    Raises:
        MasformerError: the plan has no constant sink, no text is long enough, or the model cannot take the plan.
    """
    check_int("windows", windows, 1)
    outer, model = model, bare_model(model)
    plan = AttentionPlan.load(plan, model.config.num_hidden_layers, kv_heads(model.config))
    stand_in = with_first_tokens(plan)
    starts = {layer: _start(plan.layers[layer]) for layer in sink_layers(plan)}
    check_int("length", length, max(starts.values()) + 1, position_limit(model.config) or length)
    rows = _rows(tokenizer, texts, length, windows)
    told = progress or (lambda stage, done, total: None)
    add_sinks(model, plan)
    apply_plan(model, plan)
    fit = _Fit(starts, _bare(plan), lambda layer: told("constant sinks", sorted(starts).index(layer), len(starts)))
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(model.device, autocast_on(model.device, model.dtype)):
        apply_plan(model, stand_in)
        with attending_by(model, fit):
            model.base_model(input_ids=torch.tensor(rows, device=model.device), use_cache=False)
    give_sinks(model, plan, fit.found)
    told("constant sinks", len(starts), len(starts))
    model.train(was_training)
    return outer


def _bare(plan: AttentionPlan) -> AttentionPlan:
    """The plan in which the constant sinks are left out; without blocks, as in `with_first_tokens`."""
    return plan.changed(lambda span: WindowSpan(span.max_visible or 0) if span.constant_sink else span)


def _start(layer: LayerSpan) -> int:
    """The first position whose query sees first tokens only as sinks."""
    return FIRST + max(span.max_visible or 0 for span in spans_of(layer) if span.constant_sink)


def _rows(tokenizer: Any, texts: Sequence[str], length: int, windows: int) -> list[list[int]]:
    """The beginnings of the texts that are long enough, as prompts begin and, every other one, as in evaluation."""
    prefix = prefix_token(tokenizer)
    rows: list[list[int]] = []
    for text in texts:
        tokens = opening_tokens(tokenizer, text)
        if len(rows) % 2 and prefix is not None and tokens[:1] != [prefix]:
            tokens.insert(0, prefix)
        if len(tokens) >= length:
            rows.append(tokens[:length])
        if len(rows) == windows:
            break
    if not rows:
        raise MasformerError(
            f"none of the {len(texts)} texts has {length} tokens; give longer ones, or ask for a smaller length"
        )
    return rows


class _Fit:
    """Takes the place of `attend` in a pass over all texts, under the plan with first tokens, and fits each layer.

    Args:
        starts: layer -> the first position whose query sees first tokens only as sinks.
        bare: the plan without sinks where a constant is to be fitted.
        progress: called with the number of each layer that has constants.
    """

    def __init__(self, starts: Mapping[int, int], bare: AttentionPlan, progress: Callable[[int], None]) -> None:
        self.starts, self.bare, self.progress = starts, bare, progress
        self.found: dict[int, ConstantSinks] = {}

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
        if layer in self.starts:
            self.progress(layer)
            q, k, v = (x.float() for x in (query, key, value))
            bare, start = self.bare.layers[layer], self.starts[layer]
            with torch.autocast(query.device.type, enabled=False):
                self.found[layer] = _fitted(q, k, v, span, bare, start, scale=scale, softcap=softcap)
        return attend(
            query, key, value, span, sinks=sinks and sinks.under(span), scale=scale, softcap=softcap, **options
        )


def _fitted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: LayerSpan,
    bare: LayerSpan,
    start: int,
    *,
    scale: float,
    softcap: float | None,
) -> ConstantSinks:
    """The constants of one layer that under `bare` come nearest to `span`."""
    kv_heads = key.shape[1]

    def heads(x: Tensor) -> Tensor:  # [kv_heads, group, texts * queries, dim]
        grouped: Tensor = x.unflatten(1, (kv_heads, -1))
        return grouped.permute(1, 2, 0, 3, 4).flatten(2, 3)

    run = partial(attend, query, key, scale=scale, softcap=softcap, backend="tiled")
    out, wanted = heads(run(value, bare)), heads(run(value, span))
    scores = query[:, :, start:].unflatten(1, (kv_heads, -1)) @ key[:, :, None, :FIRST].mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    logit = scores.logsumexp(-1).mean((0, 3))
    rest = run(torch.ones_like(value), bare, sinks=ConstantSinks(logit.flatten(), None, always=True))
    sums = logit[..., None] + torch.logit(heads(rest)[..., 0], eps=1e-7)
    weights = torch.ones(query.shape[0], query.shape[2], device=query.device)
    weights[:, 0] = FIRST_WEIGHT * query.shape[2]
    change = (wanted - out).flatten(1, 2)
    return ConstantSinks(*_least_squares(logit, out.flatten(1, 2), change, sums, weights.flatten()))


def _least_squares(logit: Tensor, out: Tensor, change: Tensor, sums: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The logits c and values u for which w (u - out), w = sigmoid(c - sums), comes nearest to the change wanted.

    The best values for given logits are a formula; the logits take damped steps of Gauss and Newton.

    Args:
        logit: [kv_heads, group], to begin with.
        out: [kv_heads, group * queries, dim].
        change: the same.
        sums: [kv_heads, group, queries].
        weights: [queries] of the squares.

    Returns:
        [query_heads] and [kv_heads, dim].
    """
    tiny = torch.finfo(out.dtype).tiny
    squares, products = (out * out).sum(-1), (out * change).sum(-1)
    best, step, value = logit, torch.zeros_like(logit), out.new_zeros(len(out), out.shape[-1])
    least, damping = out.new_full((len(out),), torch.inf), out.new_ones(len(out))
    for turn in range(TURNS):
        tried = best - (step / (1 + damping[:, None])).clamp(-1, 1)
        if turn < len(STARTS):
            tried = logit + STARTS[turn]
        share = torch.sigmoid(tried[..., None] - sums)
        first, second = ((weights * x).flatten(1)[:, None] for x in (share, share * share))
        values = (second @ out + first @ change)[:, 0] / second.sum(-1).clamp_min(tiny)
        far = (squares - 2 * (out @ values[..., None])[..., 0] + (values * values).sum(-1, keepdim=True)).view_as(sums)
        along = ((change @ values[..., None])[..., 0] - products).view_as(sums)
        miss = (weights * share * (share * far - 2 * along)).sum((1, 2))  # beside what is the same for all
        slope = weights * share * (1 - share)
        newton = (slope * (share * far - along)).sum(-1)
        newton = newton / (slope * share * (1 - share) * far).sum(-1).clamp_min(tiny)
        better = miss < least
        least, damping = torch.where(better, miss, least), torch.where(better, damping / 4, damping * 4)
        best, step, value = (
            torch.where(better[:, None], new, old) for new, old in ((tried, best), (newton, step), (values, value))
        )
    return best.flatten(), value
