"""What costs and pictures of plans need to know of a model, found out once and kept in the user's cache.

Finding it out asks the classes of the model, whose import takes seconds. What is kept is found again by all the bytes
of the config (of a .gguf file: its place, size and time), and only by the versions that found it out.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import masformer
from masformer.cost import ModelShape
from masformer.errors import MasformerError, check_int
from masformer.files import user_cache, write_whole
from masformer.plan import AttentionPlan
from masformer.spans import WindowSpan


@dataclass(frozen=True)
class KnownModel:
    """A model that takes plans.

    Attributes:
        kind: its type, as transformers calls it.
        own: the plan that it carries, or the spans it was trained with; has `kv_heads`.
        shape: what its cost depends on.
        positions: the longest sequence in tokens; None: there is no longest.
        own_sinks: layers with sinks that its class was made with.
    """

    kind: str
    own: AttentionPlan
    shape: ModelShape
    positions: int | None
    own_sinks: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.positions is not None:
            check_int("positions", self.positions, 1)

    def check(self, plan: AttentionPlan) -> None:
        """Raises MasformerError where the model cannot take a plan of so many layers."""
        from masformer.models.sinks import check_own

        check_own(self.own_sinks, plan)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = self.own.to_dict() | {"kv_heads": self.own.kv_heads}
        return vars(self) | {"own": own, "shape": vars(self.shape), "own_sinks": list(self.own_sinks)}


def kept_model(model: str | os.PathLike[str]) -> KnownModel | None:
    """What is kept of a model; None where nothing is.

    Args:
        model: config.json, folder or .gguf file; of others nothing is kept.
    """
    place = _place(model)
    if place is None:
        return None
    try:
        data = json.loads(place.read_bytes())
        own = AttentionPlan.from_dict(data["own"]).for_layers(None, data["own"]["kv_heads"])
        shape = ModelShape(**data["shape"])
        return KnownModel(data["kind"], own, shape, data["positions"], tuple(data["own_sinks"]))
    except (OSError, ValueError, KeyError, TypeError):  # nothing there, or nothing of ours
        return None


def find_model(model: str | os.PathLike[str]) -> KnownModel:
    """Finds out what there is to know of a model, and keeps it.

    Args:
        model: hub id, folder, .gguf file, or config.json.

    Raises:
        MasformerError: it cannot be read, takes no plans, or its cost is not known.
    """
    from masformer.models.checkpoint import check_plan, load_config  # here, for they import the classes of models
    from masformer.models.positions import position_limit
    from masformer.models.sinks import own_sinks

    config, own = load_config(model)
    built = check_plan(config, AttentionPlan.uniform(len(own), WindowSpan(1)))
    modules: dict[int, Any] = {each.layer_idx: each for each in built.modules() if hasattr(each, "masformer_span")}
    found = KnownModel(config.model_type, own, ModelShape.of(config), position_limit(config), own_sinks(modules))
    if (place := _place(model)) is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, json.dumps(found.to_dict()))
        except (OSError, MasformerError):  # what cannot be kept is found out again
            pass
    return found


def _place(model: str | os.PathLike[str]) -> Path | None:
    """Where a model's facts are kept: the name stands for all that they follow from."""
    path = Path(model)
    try:
        if path.suffix == ".gguf":
            status = path.stat()
            content = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()
        elif (path / "adapter_config.json").exists():
            return None
        else:
            content = (path if path.suffix == ".json" else path / "config.json").read_bytes()
        sources = Path(masformer.__file__).parent.rglob("*.py")
        changed = max(each.stat().st_mtime_ns for each in sources)
    except OSError:
        return None
    versions = f"{masformer.__version__} {changed} {version('transformers')}"
    return user_cache("models") / f"{hashlib.sha256(versions.encode() + bytes(1) + content).hexdigest()}.json"
