"""Which local span: blocks against windows at equal cost, window sizes, and attention sinks, without training."""

from __future__ import annotations

from masformer.plan import AttentionPlan
from masformer.reports.figures import draw
from masformer.spans import FullSpan, Span, WindowSpan
from masformer.study.findings import Findings, Results
from masformer.study.losses import Losses, over_each_other
from masformer.study.models import attention_share, layers_of
from masformer.study.settings import SpansStage
from masformer.study.units import Place, Unit
from masformer.study.verdicts import is_no_worse
from masformer.study.works import Perplexity

STAGE = "spans"


def units(stage: SpansStage, place: Place) -> list[Unit]:
    """The perplexity of every span that a group names, once."""
    return [
        Unit(
            _name(span),
            STAGE,
            Perplexity(stage.model, _plan(stage, span), stage.text, (stage.length,), stage.length),
        )
        for span in _spans(stage)
    ]


def _spans(stage: SpansStage) -> list[str]:
    return list(dict.fromkeys(span for spans in stage.groups.values() for span in spans))


def _name(span: str) -> str:
    return f"{STAGE}/{span}/perplexity"


def _plan(stage: SpansStage, span: str) -> str:
    spans = [Span.parse(span)] * layers_of(stage.model)
    if stage.full:
        for layer in AttentionPlan.parse(f"full@{stage.full}; {span}", len(spans)).full_layers:
            spans[layer] = FullSpan()
    return str(AttentionPlan(tuple(spans)))


def findings(stage: SpansStage, place: Place, results: Results) -> Findings:
    """Perplexity by span, and blocks against windows."""
    length = stage.length
    losses = {span: Losses([results[_name(span)]]) for span in _spans(stage) if _name(span) in results}
    beside = f"layers {stage.full} full" if stage.full else "no layer full"
    made = Findings(
        "Which local span",
        f"Perplexity of {stage.text.place} at {length:,} tokens with one span at all local layers, {beside}, without "
        "any training; attention is the share of the attention operations of all full. Intervals are 95% over "
        "documents; what a span is over the first of its table is the difference of the loss in the second half, in "
        "nats, paired by document.",
    )
    for title, spans in stage.groups.items():
        made.rows[title] = [
            {"name": span, "length": length}
            | losses[span].row(length, over_first=losses.get(spans[0]))
            | {"attention": attention_share(stage.model, _plan(stage, span), length)}
            for span in spans
            if span in losses
        ]
        if made.rows[title]:
            figure = draw(made.rows[title], "over_first", f"loss over {spans[0]}, second half, nats")
            made.draw(f"spans {title}", None if figure is None else (figure[0], f"{title}: {figure[1]}"))

    def share(span: str) -> float:
        return attention_share(stage.model, span, length)

    for windows, pairs in (("windows", _pairs(stage, False)), ("windows with sinks", _pairs(stage, True))):
        if pairs:
            claim = (
                f"Blocks, which the paper takes, are as good as {windows} of equal cost (without training for either)."
            )
            made.verdicts.append(is_no_worse(claim, over_each_other(losses, pairs, length, share)))
    return made


def _pairs(stage: SpansStage, sinks: bool) -> list[tuple[str, str]]:
    """Those of equal cost whose window has sinks, or has none."""
    found = []
    for block, window in stage.equal:
        span = Span.parse(window)
        if (isinstance(span, WindowSpan) and span.sinks > 0) == sinks:
            found.append((block, window))
    return found
