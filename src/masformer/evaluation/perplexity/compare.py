"""Several plans of one loaded model on the same documents: perplexities, and differences paired by document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from masformer.errors import MasformerError
from masformer.evaluation.intervals import Interval
from masformer.evaluation.perplexity.measure import PerplexityResult, check, exp_interval, perplexity
from masformer.evaluation.perplexity.windows import FixedTargets, predicted_tokens
from masformer.models.bridge import apply_plan
from masformer.models.sealing import kv_heads
from masformer.models.wrappers import bare_model
from masformer.plan import PlanSource, read_plans


@dataclass(frozen=True)
class Difference:
    """How much more loss one plan has than another, on the same tokens of the same documents.

    Attributes:
        name: the plan's name.
        plan: its text form.
        against: name of the plan that it is compared with.
        length: of the windows.
        difference: mean loss per token less that of the other plan, in nats, paired by document: above 0 is worse.
        second_half: the same of the second half of the windows; None where it holds no token.
    """

    name: str | None
    plan: str | None
    against: str | None
    length: int
    difference: Interval
    second_half: Interval | None

    @property
    def ratio(self) -> Interval:
        """Perplexity over that of the other plan: exp(difference)."""
        return exp_interval(self.difference)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        half = self.second_half
        return {
            "name": self.name,
            "plan": self.plan,
            "against": self.against,
            "length": self.length,
            "difference": self.difference.to_dict(),
            "ratio": self.ratio.to_dict(),
            "second_half_difference": None if half is None else half.to_dict(),
        }


def compare_plans(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    plans: Mapping[str, PlanSource] | Iterable[PlanSource],
    lengths: Sequence[int],
    *,
    prefix: int | None,
    backend: str = "auto",
    context: int = 1,
    target_tokens: int | None = None,
    chunk: int | None = None,
    batch_size: int | None = None,
    precision: str = "auto",
    text_bytes: int | None = None,
    progress: Callable[[str, int, int, int], None] | None = None,
) -> list[PerplexityResult]:
    """Perplexity under several plans at several lengths; the model keeps the last plan.

    Args:
        model: see `perplexity`.
        documents: token ids of each document.
        plans: name -> plan, or plans alone, each named by its text; a plan may be given as text or file.
        lengths: window lengths in tokens.
        prefix: see `perplexity`.
        backend: see `masformer.attend`.
        context: see `rolling_windows`.
        target_tokens: predict only the last so many of the first `max(lengths)` tokens of each document, the same at
            every length, so that lengths differ by the context alone (`target_window`). Shorter documents are left out.
        chunk: see `perplexity`.
        batch_size: see `perplexity`.
        precision: see `perplexity`.
        text_bytes: see `perplexity`.
        progress: called with (name of the plan, length, work done so far, work in all), in tokens as in `perplexity`:
            before each pair of plan and length, and after each pass.

    Returns:
        One result for each plan and length: all lengths of the first plan, then the second.

    Raises:
        MasformerError: as `perplexity` and `apply_plan`; wrong lengths and plans are named before anything is run.
    """
    model = bare_model(model)
    plans = read_plans(plans, model.config.num_hidden_layers, kv_heads(model.config))
    if not plans or not lengths:
        raise MasformerError("nothing to compare: at least one plan and one length are needed")
    targets = None if target_tokens is None else FixedTargets(target_tokens, max(lengths))
    check(model, documents, lengths, prefix, context, targets, chunk, batch_size, precision, text_bytes)
    if targets is None:
        each = len(lengths) * predicted_tokens(documents, prefix, None)
    else:
        each = sum(lengths) * sum(len(document) >= targets.end for document in documents)
    done, total = 0, len(plans) * each
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
                targets=targets,
                chunk=chunk,
                batch_size=batch_size,
                precision=precision,
                text_bytes=text_bytes,
                progress=advance,
            )
            results.append(replace(result, name=name, plan=str(plan)))
    return results


def paired_differences(results: Sequence[PerplexityResult], against: str | None = None) -> list[Difference]:
    """Each plan against one of them, document by document, at every length.

    Args:
        results: of `compare_plans`.
        against: name of a plan; by default the first one.

    Returns:
        One difference per result of the other plans, in their order; none where there is one plan.

    Raises:
        MasformerError: there is no such plan, or two plans were measured in unequal precision.
    """
    names = list(dict.fromkeys(result.name for result in results))
    base = names[0] if against is None and names else against
    if against is not None and against not in names:
        allowed = ", ".join(repr(name) for name in names)
        raise MasformerError(f"no plan {against!r} to compare against; allowed: {allowed}")
    bases = {result.length: result for result in results if result.name == base}
    found = []
    for result in results:
        if result.name != base and result.length in bases:
            other = bases[result.length]
            if result.autocast != other.autocast:
                raise MasformerError(
                    f"{result.name} was measured in {result.autocast or 'the precision of the weights'} and {base} in "
                    f"{other.autocast or 'the precision of the weights'}: they cannot be compared"
                )
            difference = result.by_document.minus(other.by_document)
            assert difference is not None
            half = result.second_half_by_document.minus(other.second_half_by_document)
            found.append(Difference(result.name, result.plan, base, result.length, difference, half))
    return found


def perplexity_table(results: Sequence[PerplexityResult]) -> Table:
    """Plans by lengths; each cell holds the perplexity of all tokens and of the second half of the context, and the
    interval of the first. Where the same tokens are predicted at every length, the perplexity of those alone."""
    lengths = sorted({result.length for result in results})
    cells = {(result.name, result.length): result for result in results}
    targets = results[0].target_tokens if results else None
    title = "Perplexity" if targets is None else f"Perplexity of the same {targets:,} tokens of each document"
    table = Table(title=title, caption=_caption(results), title_justify="left", caption_justify="left", min_width=72)
    table.add_column("plan")
    for length in lengths:
        table.add_column(f"{length:,} tokens" + ("\nall / second half" if targets is None else ""), justify="right")
    for name in dict.fromkeys(result.name for result in results):
        table.add_row(name or "as it is", *(_perplexity_cell(cells.get((name, length))) for length in lengths))
    return table


def _perplexity_cell(result: PerplexityResult | None) -> str:
    if result is None:
        return "-"
    text = f"{result.perplexity:.2f}"
    if result.target_tokens is None:
        half = result.second_half.perplexity
        text += f" / {'-' if half is None else f'{half:.2f}'}"
    if result.documents > 1:
        text += f"\n\\[{result.interval.low:.2f}, {result.interval.high:.2f}]"
    return text


def _caption(results: Sequence[PerplexityResult]) -> str | None:
    if not results:
        return None
    count, left = results[0].documents, results[0].left_out
    text = f"[low, high]: 95% interval over {count:,} documents" if count > 1 else "one document gives no interval"
    if left:
        text += f"; {left:,} shorter {'documents' if left > 1 else 'document'} left out"
    return text.replace("[", r"\[")


def difference_table(differences: Sequence[Difference]) -> Table:
    """Plans by lengths; each cell holds the difference of mean loss, its interval, and the ratio of perplexities."""
    lengths = sorted({each.length for each in differences})
    cells = {(each.name, each.length): each for each in differences}
    table = Table(
        title=f"Mean loss less that of {differences[0].against}, in nats, and ratio of perplexities",
        caption="paired by document; above 0 is worse",
        title_justify="left",
        caption_justify="left",
        min_width=72,
    )
    table.add_column("plan")
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    for name in dict.fromkeys(each.name for each in differences):
        row = []
        for length in lengths:
            each = cells.get((name, length))
            if each is None:
                row.append("-")
                continue
            text = f"{each.difference.mean:+.4f} ({each.ratio.mean:.3f}x)"
            if each.difference.count > 1:
                text += f"\n\\[{each.difference.low:+.4f}, {each.difference.high:+.4f}]"
            row.append(text)
        table.add_row(name or "as it is", *row)
    return table
