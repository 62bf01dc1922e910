"""The pieces that a study is made of: each is done once, and its result kept as a file of its own.

A unit is one trained model, one measurement or one search. Its file says what it was made with; a unit of other
settings is refused by name, so that nothing is lost and nothing is mixed up.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from masformer.data.sources import Source
from masformer.errors import MasformerError
from masformer.files import content_digest, make_folder, parse_json, read_text, write_whole
from masformer.records import environment
from masformer.reports.document import slug
from masformer.settings import without_none
from masformer.training.recipe import ModelRecipe

UNITS, MODELS, DATA = "units", "models", "data"
"""Folders of a study."""
HERE = "OUT"
"""Stands for the study's folder in what is written down."""


@dataclass(frozen=True)
class Estimate:
    """What a unit would take.

    Attributes:
        flops: of matrix products; None where they are not known before.
        memory: bytes of weights, gradients, optimizer and activations; None where they were not estimated.
        rate: which of the scale's rates its time is reckoned by.
        note: what else a reader should know.
    """

    flops: float | None = None
    memory: int | None = None
    rate: str = "forward"
    note: str = ""


@dataclass(frozen=True)
class Work(ABC):
    """What a unit does: its attributes say what, and of what texts."""

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on, as plain values."""
        return asdict(self)

    def sources(self) -> Sequence[Source]:
        """Texts that the result depends on."""
        return [value for value in self._values() if isinstance(value, Source)]

    def models(self) -> Sequence[str]:
        """Where the models come from that the result depends on: hub ids, folders or files."""
        found = [value.source for value in self._values() if isinstance(value, ModelRecipe)]
        return [source for source in found if source is not None]

    def _values(self) -> list[Any]:
        return [getattr(self, each.name) for each in fields(self)]

    def writes(self) -> str | None:
        """Name of a file that other units write to as well, so that one of them is done at a time."""
        return None

    @abstractmethod
    def run(self, place: Place, name: str) -> dict[str, Any]:
        """Does it; the result as plain values."""

    @abstractmethod
    def estimate(self) -> Estimate:
        """What it would take, as far as that is known without reading texts or weights."""


@dataclass(frozen=True)
class Unit:
    """A piece of a study.

    Attributes:
        name: of it, unlike all others, with the parts of it between slashes.
        stage: that it belongs to.
        work: what it does.
        needs: names of units that must be done before.
        turn: units of an earlier turn come first: all stages with their first seed, then the others.
    """

    name: str
    stage: str
    work: Work
    needs: tuple[str, ...] = ()
    turn: int = 0

    @cached_property
    def slug(self) -> str:
        """Of its files."""
        return slug(self.name)


class Place:
    """The folder of a study.

    Args:
        folder: made where it is missing.
        precision: of matrix products where perplexity is measured and plans are searched for, on this machine, see
            `masformer.evaluation.perplexity.perplexity`.
    """

    def __init__(self, folder: Path, precision: str = "auto") -> None:
        self.folder, self.precision = folder, precision
        self._content: dict[str, str] = {}
        self._prints: dict[str, str] = {}

    def make(self) -> None:
        """Makes the folders.

        Raises:
            MasformerError: they cannot be made.
        """
        for name in (UNITS, MODELS, DATA):
            make_folder(self.folder / name)

    def file(self, unit: Unit) -> Path:
        """Where a unit's result is kept."""
        return self.folder / UNITS / f"{unit.slug}.json"

    def beside(self, name: str, suffix: str) -> Path:
        """A file for what a unit keeps while it is at work."""
        return self.folder / UNITS / f"{slug(name)}.{suffix}"

    @contextmanager
    def claim(self, unit: Unit) -> Iterator[bool]:
        """Whether this process alone is to do a unit, as long as the context lasts; a process that ends claims nothing.

        The file of a claim goes with the last unit that it stands for: who was about to claim it finds that unit done.
        """
        path = self.beside(unit.work.writes() or unit.name, "lock")
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            lock.release()

    def kept(self, unit: Unit, units: Mapping[str, Unit]) -> dict[str, Any] | None:
        """What `keep` wrote of a unit; None where it has not been done.

        Raises:
            MasformerError: its file cannot be read, or was made with other settings.
        """
        path = self.file(unit)
        if not path.exists():
            return None
        kept = self._read(path)
        if kept["fingerprint"] != self.fingerprint(unit, units):
            old, new = dict(_flat("", kept["settings"])), dict(_flat("", self.settings(unit)))
            changed = next((name for name in (*old, *new) if old.get(name) != new.get(name)), None)
            why = "what it was made from has changed"
            if changed is not None:
                why = f"{changed.lstrip('.')} was {old.get(changed)!r} and is {new.get(changed)!r}"
            raise MasformerError(f"{path} was made with other settings: {why}; give another --out, or remove the file")
        return kept

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = parse_json(read_text(path), str(path))
            if {"result", "settings", "fingerprint", "environment", "seconds"} <= set(kept):
                return kept
        except (OSError, ValueError, TypeError):
            pass
        raise MasformerError(f"{path} is no result of a unit; remove it, or give another --out")

    def keep(self, unit: Unit, units: Mapping[str, Unit], result: Mapping[str, Any], seconds: float) -> None:
        """Writes a result, whole, with the settings, the versions and the device (`masformer.records.environment`)."""
        content = {
            "unit": unit.name,
            "stage": unit.stage,
            "fingerprint": self.fingerprint(unit, units),
            "settings": self.settings(unit),
            "seconds": round(seconds, 1),
            "environment": environment(),
            "result": result,
        }
        write_whole(self.file(unit), json.dumps(content, indent=1) + "\n")

    def settings(self, unit: Unit) -> dict[str, Any]:
        """A unit's settings without a path of this machine, as they read back from JSON."""
        found: dict[str, Any] = json.loads(json.dumps(self.portable(without_none(unit.work.settings()))))
        return found

    def portable(self, value: Any) -> Any:
        """Paths in the study's folder from there on, other absolute ones by the name of the file alone."""
        if isinstance(value, Mapping):
            return {name: self.portable(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.portable(each) for each in value]
        if isinstance(value, (str, Path)):
            path = Path(value)
            if path.is_relative_to(self.folder):
                return f"{HERE}/{path.relative_to(self.folder).as_posix()}"
            if path.is_absolute() or (path.name != str(value) and _exists(path)):
                return path.name
        return value

    def fingerprint(self, unit: Unit, units: Mapping[str, Unit]) -> str:
        """Changes with the settings of a unit and of those that it needs, and with the content of its texts and models.

        Of a hub's model the id alone counts.
        """
        if unit.name not in self._prints:
            parts = [
                json.dumps(self.settings(unit), sort_keys=True),
                [self._text(each) for each in unit.work.sources() if not any(map(self._is_made_here, each.files))],
                [self.fingerprint(units[name], units) for name in unit.needs],
                *(
                    self._model(Path(each))
                    for each in unit.work.models()
                    if _exists(Path(each)) and not self._is_made_here(each)
                ),
            ]
            self._prints[unit.name] = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return self._prints[unit.name]

    def _is_made_here(self, path: str) -> bool:
        """Whether a unit made a file or folder, which `Unit.needs` then speaks for."""
        return Path(path).is_relative_to(self.folder)

    def _model(self, path: Path) -> str:
        key = str(path)
        if key not in self._content:
            files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
            self._content[key] = repr([(each.name, content_digest(each).hex()) for each in files])
        return self._content[key]

    def _text(self, source: Source) -> str:
        key = repr(source)
        if key not in self._content:
            self._content[key] = source.fingerprint()
        return self._content[key]


def in_order(units: Sequence[Unit]) -> list[Unit]:
    """By turn, each after what it needs.

    Raises:
        MasformerError: a name is there twice, or a need that is nowhere.
    """
    by_name: dict[str, Unit] = {}
    for unit in units:
        if by_name.setdefault(unit.name, unit) != unit:
            raise MasformerError(f"two units are called {unit.name!r}")
    found: dict[str, Unit] = {}

    def add(unit: Unit) -> None:
        if unit.name in found:
            return
        for name in unit.needs:
            if name not in by_name:
                raise MasformerError(f"{unit.name} needs {name}, which is no unit")
            add(by_name[name])
        found[unit.name] = unit

    for unit in sorted(by_name.values(), key=lambda unit: unit.turn):
        add(unit)
    return list(found.values())


def _exists(path: Path) -> bool:
    """Also of text that is too long for a path."""
    try:
        return path.exists()
    except OSError:
        return False


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _flat(f"{path}.{name}", each)
    else:
        yield path, value
