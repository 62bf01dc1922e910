"""Runs a study: its units one after the other, each once, and the report of what is there."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as Lines

from masformer.cost import bytes_text, flops_text, seconds_text
from masformer.errors import MasformerError
from masformer.files import make_folder, write_whole
from masformer.settings import check_choice
from masformer.study.findings import Findings, Results
from masformer.study.scale import Scale
from masformer.study.stages import cost, generation, language, recall, spans, where
from masformer.study.units import Place, Unit, in_order
from masformer.study.works import Perplexity, Search, Train
from masformer.training.dry_run import Rate


@dataclass(frozen=True)
class Stage:
    """A stage of a study.

    Attributes:
        name: of it.
        settings: its part of the scale.
        units: makes its units.
        findings: what their results say.
    """

    name: str
    settings: Any
    units: Callable[[Any, Place], list[Unit]]
    findings: Callable[[Any, Place, Results], Findings]


WAIT = 1.0
"""Seconds between looks at what other processes have done."""
STAGES = ("recall", "where", "spans", "pretrained", "cost", "language", "training", "generation")
"""In the order in which they are run."""


def parts_of(stages: Sequence[str]) -> list[str]:
    """The parts of a scale that stages are made of.

    Args:
        stages: names; training belongs to language.
    """
    return [language.LANGUAGE if name == language.TRAINING else name for name in stages]


def stages_of(scale: Scale, chosen: Sequence[str] = ()) -> list[Stage]:
    """The stages that a scale has.

    Args:
        scale: of them.
        chosen: their names; none: all.

    Raises:
        MasformerError: a name that is none, or of a stage that this scale does not have.
    """
    every = (
        Stage("recall", scale.recall, recall.units, recall.findings),
        Stage("where", scale.where, where.units, where.findings),
        Stage("spans", scale.spans, spans.units, spans.findings),
        Stage(
            "pretrained",
            scale.pretrained,
            partial(language.units, group=language.PRETRAINED),
            language.pretrained_findings,
        ),
        Stage("cost", scale.cost, cost.units, cost.findings),
        Stage("language", scale.language, language.units, language.language_findings),
        Stage("training", scale.language if _trained_on(scale) else None, language.units, language.training_findings),
        Stage("generation", scale.generation, generation.units, generation.findings),
    )
    there = {stage.name: stage for stage in every if stage.settings is not None}
    for name in chosen:
        check_choice("--stage", name, STAGES)
        if name not in there:
            raise MasformerError(f"this scale has no stage {name}; it has {', '.join(there)}")
    return [stage for name, stage in there.items() if not chosen or name in chosen]


def _trained_on(scale: Scale) -> bool:
    """Whether there is more to say of training than what it ends with."""
    return scale.language is not None and bool(scale.language.long or scale.language.recipe.get("evaluation"))


def units_of(stages: Sequence[Stage], place: Place) -> list[Unit]:
    """Their units, in the order in which they are run; each once."""
    found: dict[str, Unit] = {}
    for stage in stages:
        mine = {unit.name: unit for unit in stage.units(stage.settings, place)}
        wanted = [unit for unit in mine.values() if unit.stage == stage.name]
        if stage.name == language.TRAINING:
            wanted = list(mine.values())  # what goes on from short sequences is held against it
        for unit in wanted:
            found |= {name: mine[name] for name in _needed(unit, mine)} | {unit.name: unit}
    return in_order(list(found.values()))


def _needed(unit: Unit, units: Mapping[str, Unit]) -> list[str]:
    return [name for need in unit.needs for name in (*_needed(units[need], units), need)]


def run_study(
    stages: Sequence[Stage],
    place: Place,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> None:
    """Does the units that are not done yet, but for those that another process is doing; ends when all are done.

    Args:
        stages: of `stages_of`.
        place: where results are kept.
        progress: called with (name of the unit, units done, units in all), before each unit and at the end.

    Raises:
        MasformerError: something cannot be done, or results are there that were made with other settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MasformerError(
            "a study runs in one process; on several GPUs write its recipes with --recipes, train them with torchrun "
            "and masformer train, and go on from there"
        )
    units = units_of(stages, place)
    if place.precision != "auto" and not any(isinstance(unit.work, (Perplexity, Search)) for unit in units):
        raise MasformerError("--precision does nothing: these stages neither measure perplexity nor search for plans")
    place.make()
    by_name, there = {unit.name: unit for unit in units}, dict[str, Any]()

    def is_done(unit: Unit) -> bool:
        """By this process, or in the meantime by another."""
        known = unit.name in there or _is_missed(unit, units, place)
        if not known and (kept := place.kept(unit, by_name)) is not None:
            there[unit.name] = kept["result"]
        return unit.name in there

    todo = [unit for unit in units if not is_done(unit)]
    check_precision(units, there, place)
    while todo:
        before = len(todo)
        for unit in todo:
            if is_done(unit) or not all(is_done(by_name[name]) for name in unit.needs):
                continue
            with place.claim(unit) as mine:
                if not mine or is_done(unit):
                    continue
                progress(unit.name, len(there), len(units))
                began = time.monotonic()
                result = unit.work.run(place, unit.name)
                check_precision(units, there | {unit.name: result}, place)
                place.keep(unit, by_name, result, time.monotonic() - began)
                there[unit.name] = result
                _clear(unit, units, place)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        todo = [unit for unit in todo if not is_done(unit)]
        if len(todo) == before:
            time.sleep(WAIT)  # other processes are at work on all that is left
    progress("", len(units), len(units))


def _is_missed(unit: Unit, units: Sequence[Unit], place: Place) -> bool:
    """Whether a unit trained a model that is gone, and of which something is still to be measured."""
    if not isinstance(unit.work, Train) or (Path(unit.work.recipe.output) / "model").exists():
        return False
    return any(unit.name in each.needs and not place.file(each).exists() for each in units)


def _clear(unit: Unit, units: Sequence[Unit], place: Place) -> None:
    """Removes trained models that are not to stay, once everything was measured of them that this unit was part of."""
    for made in units:
        if made.name in unit.needs and isinstance(made.work, Train) and not made.work.stays:
            after = [each for each in units if made.name in each.needs]
            if all(place.file(each).exists() for each in after):
                shutil.rmtree(made.work.recipe.output, ignore_errors=True)


def done_of(stages: Sequence[Stage], place: Place) -> tuple[dict[str, dict[str, Any]], list[Unit]]:
    """What is kept of each unit (`Place.kept`), and the units that are missing.

    Raises:
        MasformerError: as `Place.kept` and `check_precision`.
    """
    units = units_of(stages, place)
    by_name = {unit.name: unit for unit in units}
    found, missing = {}, []
    for unit in units:
        kept = place.kept(unit, by_name)
        if kept is None:
            missing.append(unit)
        else:
            found[unit.name] = kept
    check_precision(units, {name: kept["result"] for name, kept in found.items()}, place)
    return found, missing


def check_precision(units: Sequence[Unit], results: Results, place: Place) -> None:
    """Raises MasformerError where perplexities of the same text were measured in unequal precision.

    Where none is asked for it is the device's (`masformer.evaluation.room`), so units that were done on several may
    differ in it.
    """
    first: dict[Any, tuple[Unit, str | None]] = {}
    for unit in units:
        if isinstance(unit.work, Perplexity) and unit.name in results:
            mine = results[unit.name]["results"][0].get("autocast")
            other, theirs = first.setdefault((repr(unit.work.text), unit.work.model.dtype), (unit, mine))
            if mine != theirs:
                raise MasformerError(
                    f"{unit.name} was measured in {mine or 'the precision of the weights'}, {other.name} in "
                    f"{theirs or 'the precision of the weights'}: they cannot be compared; measure both in one "
                    f"precision (--precision float32), with another --out or without {place.file(other)}"
                )


def write_recipes(units: Sequence[Unit], folder: Path) -> list[Path]:
    """The recipes of all training runs as files, for `masformer train --config FILE --resume` on other machines."""
    make_folder(folder)
    found = []
    for unit in units:
        if isinstance(unit.work, Train):
            found.append(folder / f"{unit.slug}.yaml")
            write_whole(found[-1], unit.work.recipe.to_yaml())
    return found


def forecast_rows(units: Sequence[Unit], scale: Scale, measured: Rate | None = None) -> list[dict[str, Any]]:
    """What each unit would take.

    Args:
        units: of a study.
        scale: its rates, where it knows some, say the seconds.
        measured: a rate of this machine, for the others; None: their seconds are not known.
    """
    rows = []
    for unit in units:
        found = unit.work.estimate()
        rate = scale.rates.get(found.rate, None if measured is None else measured.flops_per_second)
        seconds = None if found.flops is None or rate is None else found.flops / rate
        row = {"name": unit.name, "stage": unit.stage, "flops": found.flops, "memory_bytes": found.memory}
        rows.append(row | {"seconds": seconds, "note": found.note})
    return rows


def forecast_table(rows: Sequence[Mapping[str, Any]], scale: Scale, measured: Rate | None = None) -> Lines:
    """For people to read, with the sum of each stage."""
    table = Lines(title=f"{len(rows)} units", title_justify="left", caption_justify="left")
    if scale.measured_on:
        table.caption = f"times by rates that were measured on {scale.measured_on}"
    elif measured is not None:
        table.caption = f"times are the least there can be: at the {measured} here, which no work reaches"
    table.add_column("unit", overflow="fold")
    for column in ("operations", "memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        here = [row for row in rows if row["stage"] == stage]
        for row in here:
            memory = "-" if row["memory_bytes"] is None else bytes_text(row["memory_bytes"])
            table.add_row(row["name"], _flops(row["flops"]), memory, _time(row["seconds"]), row["note"])
        flops = [row["flops"] for row in here if row["flops"] is not None]
        seconds = [row["seconds"] for row in here if row["seconds"] is not None]
        table.add_row(f"stage {stage}", _flops(sum(flops)), "", _time(sum(seconds) if seconds else None), style="bold")
        table.add_section()
    return table


def _flops(flops: float | None) -> str:
    return "-" if flops is None else flops_text(flops)


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else seconds_text(seconds)
