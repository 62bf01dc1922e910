"""Which layers or KV heads are full: rules, searches, and random placements of equal cost, without training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from masformer.data.sources import Source
from masformer.evaluation.intervals import Interval
from masformer.plan import PLACEMENTS, AttentionPlan
from masformer.reports.document import slug
from masformer.spans import FullSpan, Span
from masformer.study.asked import add_answers, asking
from masformer.study.figures import by_budget
from masformer.study.findings import Findings, Results, Row
from masformer.study.losses import Losses
from masformer.study.models import attention_share, heads_of, layers_of, plan_of
from masformer.study.settings import FULL, LOCAL, FindPart, WhereStage
from masformer.study.units import Place, Unit
from masformer.study.verdicts import (
    Nearness,
    Verdict,
    are_better,
    comes_close,
    difference,
    is_different,
    is_no_worse,
)
from masformer.study.works import Perplexity, Search

STAGE = "where"
CONTROLS = "rules and random"
SHORT = "lost by what is full"


@dataclass(frozen=True)
class Placement:
    """One placement that is measured.

    Attributes:
        name: of it, unlike all others.
        plan: its text; None: what `search` finds.
        size: what is full, in words (`8 layers`); empty for the two ends.
        budget: number of full layers, or of layers with as many KV heads; None for the two ends.
        search: name of the search that finds it; None: a rule, or drawn.
        chosen: name of the documents that it was chosen by.
    """

    name: str
    plan: str | None
    size: str = ""
    budget: int | None = None
    search: str | None = None
    chosen: str | None = None

    @property
    def unit(self) -> str:
        """Name of the unit that searches."""
        return f"{STAGE}/search/{self.search}/{self.size}/{self.chosen}"

    @property
    def is_control(self) -> bool:
        """A rule, or drawn."""
        return self.budget is not None and self.search is None


def placements(stage: WhereStage) -> list[Placement]:
    """All that are measured: the ends, what searches find, rules, and random ones."""
    return [Placement(FULL, "full"), Placement(LOCAL, stage.local), *_found(stage), *_controls(stage)]


def _count(stage: WhereStage, budget: int, by: str) -> int:
    """Full layers of a budget, or as many KV heads as these have."""
    return budget * (heads_of(stage.model) or 1) if by == "heads" else budget


def _size(stage: WhereStage, budget: int, by: str) -> str:
    count = _count(stage, budget, by)
    return f"{count} {by if count > 1 else by[:-1]}"


def _found(stage: WhereStage) -> Iterator[Placement]:
    for budget in stage.budgets:
        for name, part in stage.searches.items():
            for chosen in stage.choose:
                size = _size(stage, budget, part.by)
                known = part.known.get(str(budget), {}).get(chosen)
                yield Placement(f"{name}, {size}, chosen on {chosen}", known, size, budget, name, chosen)


def _controls(stage: WhereStage) -> Iterator[Placement]:
    layers, local = layers_of(stage.model), Span.parse(stage.local)
    heads = heads_of(stage.model)
    choose = random.Random(stage.seed)
    for budget in stage.budgets:
        size = _size(stage, budget, "layers")
        for rule in PLACEMENTS:
            plan = AttentionPlan.mixed(layers, budget, rule, local=local)
            yield Placement(f"{rule}, {size}", str(plan), size, budget)
        for number in range(1, stage.random + 1):
            if heads is None or heads < 2 or number % 2:
                chosen = sorted(choose.sample(range(layers), budget))
                plan, size = AttentionPlan.mixed(layers, placement=chosen, local=local), _size(stage, budget, "layers")
            else:
                units = choose.sample(
                    [(layer, head) for layer in range(layers) for head in range(heads)], budget * heads
                )
                plan = AttentionPlan.of_units(layers, heads, dict.fromkeys(units, FullSpan()), local=local)
                size = _size(stage, budget, "heads")
            yield Placement(f"random {number}, {size}", str(plan), size, budget)


def units(stage: WhereStage, place: Place) -> list[Unit]:
    """The searches, the perplexity of what they find on other texts, what is retrieved under it; then the controls."""
    every = placements(stage)
    chosen, controls = ([each for each in every if each.is_control == wanted] for wanted in (False, True))
    found = [_search(stage, each) for each in chosen if each.search is not None and each.plan is None]
    for each in chosen:
        found += [_measured(stage, each, text, source) for text, source in stage.texts.items()]
    if (asked := stage.retrieval) is not None:
        for each in _retrieved(stage):
            for task in asked.tasks:
                work = asking(asked, stage.model, each.plan, task, stage.length, _found_by(each))
                found.append(Unit(_retrieval(each, task), STAGE, work, _needs(each)))
    for each in controls:
        for text, source in stage.texts.items():
            few = source if stage.controls is None else replace(source, limit=stage.controls)
            found.append(_measured(stage, each, text, few))
    return found


def _search(stage: WhereStage, each: Placement) -> Unit:
    assert each.search is not None
    assert each.chosen is not None
    assert each.budget is not None
    part = stage.searches[each.search]
    work = Search(
        stage.model,
        stage.choose[each.chosen],
        _count(stage, each.budget, part.by),
        stage.local,
        stage.length,
        stage.windows,
        part.by,
        part.method,
        part.criteria,
        part.rounds,
        part.points,
        f"{STAGE}/search/{each.chosen}",
    )
    return Unit(each.unit, STAGE, work)


def _measured(stage: WhereStage, each: Placement, text: str, source: Source) -> Unit:
    work = Perplexity(stage.model, each.plan, source, (stage.length,), stage.length, found_by=_found_by(each))
    return Unit(_perplexity(each, text), STAGE, work, _needs(each))


def _retrieved(stage: WhereStage) -> list[Placement]:
    """The ends, and what the named searches find on the first text."""
    first = next(iter(stage.choose))
    wanted = None if stage.retrieval is None else stage.retrieval.searches
    every = [each for each in placements(stage) if not each.is_control and each.chosen in (None, first)]
    return [each for each in every if each.search is None or wanted is None or each.search in wanted]


def _found_by(each: Placement) -> str | None:
    return each.unit if each.plan is None else None


def _needs(each: Placement) -> tuple[str, ...]:
    return (each.unit,) if each.plan is None else ()


def _perplexity(each: Placement, text: str) -> str:
    return f"{STAGE}/{each.name}/perplexity/{text}"


def _retrieval(each: Placement, task: str) -> str:
    return f"{STAGE}/{each.name}/{task}"


def findings(stage: WhereStage, place: Place, results: Results) -> Findings:
    """Perplexity and retrieval of each placement; whether placement matters, searching pays, and heads beat layers."""
    every, length = placements(stage), stage.length
    losses: dict[str, dict[str, Losses]] = {
        text: {
            each.name: Losses([results[_perplexity(each, text)]])
            for each in every
            if _perplexity(each, text) in results
        }
        for text in stage.texts
    }
    made = Findings(
        "Where",
        f"Perplexity at {length:,} tokens with some layers or KV heads full and {stage.local} at the others, without "
        f"training, on {', '.join(stage.texts)}; a search chose on {stage.windows} windows of other documents. "
        "Full bytes are the share of keys and values of full units. Intervals are 95% over documents; what a plan is "
        "over all full is the difference of the loss in the second half, in nats, paired by document."
        + (f" Rules and random placements were measured on {stage.controls} documents." if stage.controls else ""),
    )
    for text, here in losses.items():
        made.rows[text] = [
            _row(stage, each, results[_perplexity(each, text)]["plan"], here) for each in every if each.name in here
        ]
        _verdicts(made, stage, every, text, here)
        lines = {name: _line(stage, every, name, here) for name in stage.searches}
        drawn = {name: line for name, line in lines.items() if line}
        if drawn and LOCAL in here and FULL in here:
            ends = [(0.0, here[LOCAL].over(here[FULL], length))]
            controls = [
                (each.budget / layers_of(stage.model), here[each.name].over(here[FULL], length))
                for each in every
                if each.is_control and each.budget is not None and each.name in here
            ]
            figure = by_budget({name: [*ends, *line] for name, line in drawn.items()}, {CONTROLS: controls})
            made.drawings.append((f"where {text}", figure, f"what is lost on {text}, by what is full"))
            if not made.short:
                _add_short(made, stage, every, text, here)
    if stage.retrieval is not None:
        _add_retrieval(made, stage, stage.retrieval, results)
    return made


def _add_short(
    made: Findings, stage: WhereStage, every: list[Placement], text: str, here: Mapping[str, Losses]
) -> None:
    """What each search loses at each budget, against the best rule or random placement, for the first page."""
    full, length = here[FULL], stage.length
    few = f" ({stage.controls} documents)" if stage.controls else ""
    rows: list[Row] = []
    said = []
    for budget in stage.budgets:
        row: Row = {
            "full": " or ".join(dict.fromkeys(_size(stage, budget, part.by) for part in stage.searches.values()))
        }
        lost: dict[str, float] = {}
        for name in stage.searches:
            found = _less(_of(every, here, name, budget), full, length)
            if found is not None:
                lost[name] = found.mean
                row[slug(name).replace("-", "_")] = found
        controls = {
            each.name: here[each.name].over(full, length)
            for each in every
            if each.is_control and each.budget == budget and each.name in here
        }
        if controls:
            best = min(controls, key=lambda name: controls[name].mean)
            row["best_rule_or_random"] = controls[best]
        if lost:
            rows.append(row)
            name = min(lost, key=lambda name: lost[name])
            against = f", and the best rule or random placement {controls[best].mean:.2f}{few}" if controls else ""
            said.append(f"with {row['full']} full {lost[name]:.3f} nats ({name}){against}")
    if said:
        lost_by_all = here[LOCAL].over(full, length).mean
        made.short = (
            f"As the model is, on {text}, {stage.local} everywhere loses {lost_by_all:.2f} nats to full attention; "
            f"{'; '.join(said)}."
        )
        made.rows[SHORT] = rows
        made.opening = (SHORT, f"where {text}")


def _row(stage: WhereStage, each: Placement, plan: str, here: Mapping[str, Losses]) -> Row:
    row: Row = {"name": each.name, "plan": plan, "length": stage.length}
    row |= here[each.name].row(stage.length, over_full=here.get(FULL))
    heads = heads_of(stage.model) or 1
    counts = plan_of(stage.model, plan).unit_counts(heads)
    row["full_bytes"] = counts[FullSpan()] / counts.total()
    return row | {"attention": attention_share(stage.model, plan, stage.length)}


def _of(every: list[Placement], here: Mapping[str, Losses], name: str, budget: int) -> dict[str, Losses]:
    """Losses of what a search found at a budget, by the text that it chose by, as far as they are there."""
    mine = [each for each in every if each.search == name and each.budget == budget and each.chosen is not None]
    return {str(each.chosen): here[each.name] for each in mine if each.name in here}


def _less(one: Mapping[str, Losses], other: Mapping[str, Losses] | Losses, length: int) -> Interval | None:
    """The loss of some plans less that of others, in pairs by the texts that they were chosen by, or of one other.

    The interval holds the mean of every such pair. None where there is no pair.
    """
    pairs = [
        (mine, other if isinstance(other, Losses) else other[chosen])
        for chosen, mine in one.items()
        if isinstance(other, Losses) or chosen in other
    ]
    if not pairs:
        return None
    count = min(len(each.late(length)[0]) for pair in pairs for each in pair)
    values, base = ([pair[side].late(length)[0][:count] for pair in pairs] for side in (0, 1))
    return difference(values, base, pairs[0][0].weights(length)[:count])


def _line(
    stage: WhereStage, every: list[Placement], name: str, here: Mapping[str, Losses]
) -> list[tuple[float, Interval]]:
    """Of a search: share of what is full -> loss over all full."""
    line = []
    for budget in sorted(stage.budgets):
        over = _less(_of(every, here, name, budget), here[FULL], stage.length) if FULL in here else None
        if over is not None:
            line.append((budget / layers_of(stage.model), over))
    return line


def _verdicts(made: Findings, stage: WhereStage, every: list[Placement], text: str, here: Mapping[str, Losses]) -> None:
    length = stage.length
    controls = {
        budget: sorted(
            (each.name for each in every if each.is_control and each.budget == budget and each.name in here),
            key=lambda name: _mean(here[name], length),
        )
        for budget in stage.budgets
    }
    rules = [name for name in controls[stage.budgets[0]] if not name.startswith("random")]
    if len(rules) > 1:
        apart = here[rules[-1]].over(here[rules[0]], length)
        made.verdicts.append(
            is_different(f"On {text} it matters which layers are full.", apart, f"{rules[-1]} less {rules[0]}")
        )
    for name, part in stage.searches.items():
        found = {
            f"{_size(stage, budget, part.by)} less {best[0]}": _less(
                _of(every, here, name, budget), here[best[0]], length
            )
            for budget, best in controls.items()
            if best
        }
        claim = f"On {text}, what {name} finds is better than every rule and random placement."
        _judge(made, are_better, claim, found)
    for pairs, claim, judge in (
        (stage.better, "is better than", are_better),
        (stage.as_good, "is as good as", is_no_worse),
    ):
        for one, other in pairs:
            found = {
                f"{_size(stage, budget, stage.searches[one].by)} against "
                f"{_size(stage, budget, stage.searches[other].by)}": _less(
                    _of(every, here, one, budget), _of(every, here, other, budget), length
                )
                for budget in stage.budgets
            }
            _judge(made, judge, f"On {text}, what {one} finds {claim} what {other} finds.", found)


def _judge(
    made: Findings,
    judge: Callable[[str, dict[str, Interval]], Verdict],
    claim: str,
    found: Mapping[str, Interval | None],
) -> None:
    """Adds a verdict on what was measured, if anything was."""
    there = {what: each for what, each in found.items() if each is not None}
    if there:
        made.verdicts.append(judge(claim, there))


def _mean(losses: Losses, length: int) -> float:
    values = losses.late(length)[0]
    return sum(values) / len(values)


def _add_retrieval(made: Findings, stage: WhereStage, asked: FindPart, results: Results) -> None:
    every = _retrieved(stage)
    here = {
        task: {each.name: [results[_retrieval(each, task)]] for each in every if _retrieval(each, task) in results}
        for task in asked.tasks
    }
    for task, scores in add_answers(made, "where retrieval", here, asked.length or stage.length).items():
        for name in stage.searches:
            if FULL in scores and LOCAL in scores:
                near = {
                    each.size: Nearness.of(scores[FULL], scores[LOCAL], scores[each.name])
                    for each in every
                    if each.search == name and each.name in scores
                }
                if near:
                    claim = f"Of {task}, what {name} finds comes close to full attention."
                    made.verdicts.append(comes_close(claim, near, "points"))
