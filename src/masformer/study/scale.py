"""A scale: what a study trains and measures, as a file. The code is the same at every scale."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from masformer.errors import MasformerError, shown
from masformer.schema import Named, Settings, build
from masformer.settings import read_settings
from masformer.study.settings import CostStage, GenerationStage, LanguageStage, RecallStage, SpansStage, WhereStage

SCALES = ("tiny", "small", "gpu", "paper")
"""Scales that come with the package."""
DATA = "@"
"""Before a name in `files` of a source: the files that `--data NAME=FILE` gives."""
MODEL = "@model"
"""As the source of a model: what `--model` gives."""


@dataclass(frozen=True)
class Scale(Settings):
    """What a study does.

    Attributes:
        about: what this scale is for.
        data: texts that `--data` gives: name -> what they must be.
        rates: FLOP/s that were measured for training, forward passes and so on, to reckon times by.
        measured_on: the machine of the rates.
        recall: the recall task.
        language: language modelling and continual training.
        pretrained: the same from the weights of a pretrained model, without `start`, `vocabulary` and `long`.
        where: placement of full layers.
        spans: local spans.
        generation: summaries and retrieval.
        cost: cost.
    """

    about: str
    data: Named[str] = field(default_factory=dict)
    rates: Named[float] = field(default_factory=dict)
    measured_on: str | None = None
    recall: RecallStage | None = None
    language: LanguageStage | None = None
    pretrained: LanguageStage | None = None
    where: WhereStage | None = None
    spans: SpansStage | None = None
    generation: GenerationStage | None = None
    cost: CostStage | None = None

    def __post_init__(self) -> None:
        if self.pretrained is not None and (self.pretrained.start, self.pretrained.vocabulary) != (None, None):
            raise MasformerError("pretrained begins with recipe.model; start and vocabulary are of language alone")


def _settings(name: str) -> dict[str, Any]:
    if name in SCALES:
        with resources.as_file(resources.files("masformer.study") / "scales" / f"{name}.yaml") as path:
            return read_settings(path, "scale")
    if name.endswith((".yaml", ".yml")):
        return read_settings(Path(name), "scale")
    raise MasformerError(f"unknown scale {name!r}; allowed: {', '.join(SCALES)}, or a .yaml file")


def data_names(name: str) -> list[str]:
    """Names of the texts that a scale asks for; errors as `load_scale`."""
    return list(_data(name, _settings(name)))


def _data(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    wanted = settings.get("data") or {}
    if not isinstance(wanted, dict):
        raise MasformerError(f"scale {name}: data must hold names and what they are, got {shown(wanted)}")
    return wanted


def needs_model(name: str) -> bool:
    """Whether a scale leaves a model open; errors as `load_scale`."""
    return _holds(_settings(name), MODEL)


def load_scale(
    name: str,
    *,
    data: Mapping[str, Sequence[str]] | None = None,
    model: str | None = None,
    check: bool = True,
    parts: Sequence[str] = (),
) -> Scale:
    """Reads a scale.

    Args:
        name: one of `SCALES`, or a YAML file.
        data: name -> files.
        model: hub id, folder or .gguf file, where the scale leaves it open.
        check: texts that are missing are an error; else they stay names.
        parts: of the scale that are wanted; none: all. Texts that these need must be there; another part whose texts
            are missing is left out.

    Raises:
        MasformerError: there is no such scale, a setting is wrong, or texts or a model are missing or not asked for.
    """
    settings = _settings(name)
    wanted, given = _data(name, settings), dict(data or {})
    for each in given:
        if each not in wanted:
            raise MasformerError(
                f"scale {name} uses no data named {each!r}; allowed: {', '.join(wanted) or 'none, it needs no data'}"
            )
    if model is not None and not _holds(settings, MODEL):
        raise MasformerError(f"--model does nothing at scale {name}: it names its models itself")
    if check:
        for part, value in list(settings.items()):
            missing = [each for each in wanted if each not in given and _holds(value, f"{DATA}{each}")]
            if missing and parts and part not in parts:
                del settings[part]
            elif missing:
                raise MasformerError(
                    f"scale {name} needs --data {missing[0]}=FILE for its part {part}: {wanted[missing[0]]}"
                )
    filled = _filled(copy.deepcopy(settings), given, model)
    try:
        scale: Scale = build(Scale, filled, "the scale")
    except MasformerError as error:
        raise MasformerError(f"scale {name}: {error}") from None
    return scale


def named_files(words: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Reads the words of `--data`: `papers=pubmed.jsonl.xz`; a file alone is that of the name it begins with.

    Raises:
        MasformerError: it is not said which texts a file holds.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not sign:
            name, path = Path(word).name.partition(".")[0], word
            if name not in names:
                raise MasformerError(
                    f"--data {word}: which texts are these? Give NAME={word}; allowed names: {', '.join(names)}"
                )
        found.setdefault(name, []).append(path)
    return found


def _holds(value: Any, what: str) -> bool:
    if isinstance(value, Mapping):
        return any(_holds(each, what) for each in value.values())
    if isinstance(value, list):
        return any(_holds(each, what) for each in value)
    return bool(value == what)


def _filled(value: Any, data: Mapping[str, Sequence[str]], model: str | None) -> Any:
    if isinstance(value, dict):
        found = {key: _filled(each, data, model) for key, each in value.items()}
        files = found.get("files")
        if isinstance(files, list):
            found["files"] = [
                path
                for each in files
                for path in (data.get(str(each)[1:], [each]) if str(each).startswith(DATA) else [each])
            ]
        return found
    return model if value == MODEL and model is not None else value
