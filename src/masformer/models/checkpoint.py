"""Checkpoints that carry their plan, and that stock transformers refuses instead of running full attention.

A saved config.json is sealed: its `model_type` is `masformer`, which AutoConfig does not know, and its `layer_types`
are spans, which the validation of every config class refuses. `load_model` takes the seal off.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from masformer.errors import MasformerError
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan, WindowSpan

SEAL = "masformer"


def seal_config(config: PretrainedConfig, plan: AttentionPlan) -> None:
    """From now on, whatever writes this config to a file writes it sealed, with the plan."""
    config.masformer = plan.to_dict()
    config.__class__ = _sealing_class(type(config))  # type: ignore[arg-type]


@cache
def _sealing_class(config_class: Any) -> Any:
    if getattr(config_class, "seals", False):
        return config_class

    def to_json_string(self: Any, *args: Any, **kwargs: Any) -> str:
        data = json.loads(config_class.to_json_string(self, *args, **kwargs))  # type: ignore[attr-defined]
        plan = AttentionPlan.from_dict(data[SEAL])
        hidden = {key: data.get(key) for key in ("model_type", "architectures", "layer_types")}
        data[SEAL] = plan.to_dict() | hidden
        data["model_type"] = SEAL
        data["architectures"] = [f"{SEAL}: load with masformer.load_model"]
        data["layer_types"] = [f"{SEAL}:{span}" for span in plan]
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    return type(config_class.__name__, (config_class,), {"to_json_string": to_json_string, "seals": True})


def native_plan(config: PretrainedConfig) -> AttentionPlan:
    """The spans a stock model was trained with: its sliding layers as windows, the others full."""
    layers = config.num_hidden_layers
    window: Any = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return AttentionPlan.uniform(layers, FullSpan() if window is None else WindowSpan(window))
    return AttentionPlan(tuple(WindowSpan(window) if kind == "sliding_attention" else FullSpan() for kind in types))


def load_model(
    model: str | os.PathLike[str], plan: AttentionPlan | None = None, *, dtype: Any = "auto", backend: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Loads a causal language model and its tokenizer, with mixed spans. Pickled weights are never loaded.

    Args:
        model: hub id, folder (stock, or written by `save_model`) or .gguf file.
        plan: one span per layer; by default the plan the checkpoint carries, or the spans it was trained with.
        dtype: torch dtype of the weights, or "auto" for the stored one.
        backend: see `masformer.attend`.

    Returns:
        The model in evaluation mode, and its tokenizer (None where the folder has none).

    Raises:
        MasformerError: the model cannot be read, or cannot take the plan.
    """
    from masformer.models.bridge import apply_plan

    source = os.fspath(model)
    options: dict[str, Any] = {}
    if source.endswith(".gguf"):
        if not Path(source).is_file():
            raise MasformerError(f"model file {source} does not exist")
        source, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    try:
        config, carried = _read_config(source, options)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=None if options else True, **options
        )
    except MasformerError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise MasformerError(f"cannot load the model {os.fspath(model)}: {' '.join(str(error).split())}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **options)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    return apply_plan(loaded.eval(), plan or carried or native_plan(config), backend), tokenizer


def _read_config(source: str, options: dict[str, Any]) -> tuple[PretrainedConfig, AttentionPlan | None]:
    data = {} if options else PretrainedConfig.get_config_dict(source)[0]
    if data.get("model_type") != SEAL:
        return AutoConfig.from_pretrained(source, **options), None
    hidden = data.pop(SEAL)
    plan = AttentionPlan.from_dict(hidden)
    data |= {"model_type": hidden["model_type"], "architectures": hidden["architectures"]}
    data.pop("layer_types")
    if hidden["layer_types"] is not None:
        data["layer_types"] = hidden["layer_types"]
    return AutoConfig.for_model(data.pop("model_type"), **data), plan


def save_model(
    model: PreTrainedModel, path: str | os.PathLike[str], tokenizer: Any = None, *, overwrite: bool = False
) -> None:
    """Writes safetensors and a sealed config.json (and the tokenizer) into a folder, whole or not at all.

    Raises:
        MasformerError: the model has no plan, the folder exists (unless `overwrite`), or it cannot be written.
    """
    path = Path(path)
    if not getattr(type(model.config), "seals", False):
        raise MasformerError("the model has no plan; call apply_plan first, or save it with save_pretrained")
    if path.exists() and not overwrite:
        raise MasformerError(f"{path} exists already; choose another folder or pass overwrite=True")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            whole = Path(temporary) / "model"
            model.save_pretrained(whole)
            if tokenizer is not None:
                tokenizer.save_pretrained(whole)
            if path.exists():
                path.rename(Path(temporary) / "old")
            shutil.move(whole, path)
    except OSError as error:
        raise MasformerError(f"cannot write {path}: {error}") from error
