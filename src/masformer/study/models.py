"""The models of a study: by their recipes, where they were not trained yet as well, and what a pass over them takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PretrainedConfig

from masformer import benchmarks
from masformer.cost import ModelShape, cost, prefill_bytes
from masformer.errors import MasformerError
from masformer.files import content_digest
from masformer.models.bridge import apply_plan
from masformer.models.checkpoint import fit_tokenizer, load_config, load_model
from masformer.models.saving import save_model
from masformer.models.sealing import kv_heads
from masformer.plan import AttentionPlan
from masformer.reports.document import slug
from masformer.spans import FullSpan, Span
from masformer.study.units import DATA, MODELS, Estimate, Place
from masformer.training.model import dtype_of, new_model, recipe_config, recipe_tokenizer
from masformer.training.recipe import ModelRecipe, Recipe


def load(model: ModelRecipe, place: Place, plan: AttentionPlan | None = None) -> tuple[Any, Any]:
    """The model on the default device, in evaluation mode, and its tokenizer.

    Where the recipe names no source, its weights are random.

    Raises:
        MasformerError: it cannot be read, or has no tokenizer.
    """
    model = unpacked(model, place)
    if model.source is None:
        tokenizer = recipe_tokenizer(model)
        config, own = recipe_config(model, tokenizer)
        return new_model(config, plan or own, model).eval().to(benchmarks.default_device()), tokenizer
    plan = plan or (None if model.plan is None else plan_of(model, model.plan))
    if plan is None:
        forget()
        return _read(model, None)
    key = (repr(model), _changed(Path(model.source)))
    if key not in _KEPT:
        forget()
        _KEPT[key] = _read(model, plan)
    loaded, tokenizer = _KEPT[key]
    apply_plan(loaded, plan, model.backend)
    return loaded, tokenizer


def unpacked(model: ModelRecipe, place: Place) -> ModelRecipe:
    """The same model, that of a .gguf file from a folder of the study: its weights are unpacked once, not each time.

    Raises:
        MasformerError: it cannot be read, or the folder not be written.
    """
    if model.source is None or not model.source.endswith(".gguf"):
        return model
    file = Path(model.source)
    name = f"{slug(file.stem)}-{content_digest(file).hex()[:8]}"
    folder = place.folder / DATA / name
    with FileLock(place.folder / DATA / f"{name}.lock"):
        if not folder.exists():
            loaded, tokenizer = load_model(file, dtype=torch.float32)
            save_model(loaded, folder, tokenizer)
    return replace(model, source=str(folder))


_KEPT: dict[Any, tuple[Any, Any]] = {}
"""The model that was read last: to read a quantised file takes longer than many a measurement."""


def forget() -> None:
    """Gives back the memory of the model that `load` read last."""
    _KEPT.clear()


def _changed(path: Path) -> tuple[float, ...]:
    """When a model's files were written last; none for one of a hub."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return tuple(file.stat().st_mtime for file in files)


def _read(model: ModelRecipe, plan: AttentionPlan | None) -> tuple[Any, Any]:
    assert model.source is not None
    tokenizer = recipe_tokenizer(model)
    loaded, _ = load_model(
        model.source,
        plan,
        max_positions=model.max_positions,
        position_method=model.position_method,
        dtype=dtype_of(model.dtype),
        backend=model.backend,
    )
    fit_tokenizer(tokenizer, loaded)
    return loaded.to(benchmarks.default_device()), tokenizer


def config_of(model: ModelRecipe) -> PretrainedConfig:
    """A model's config: its own where it is on this machine, else what is expected of it; no hub is asked."""
    if model.source is not None and (model.config is None or Path(model.source).exists()):
        return _config(model.source)
    return recipe_config(model)[0]


@lru_cache(maxsize=16)
def _config(source: str) -> PretrainedConfig:
    """Of a model on this machine; that of a .gguf file takes seconds to read."""
    return load_config(source)[0]


def layers_of(model: ModelRecipe) -> int:
    """Its number of layers."""
    return int(config_of(model).num_hidden_layers)


def heads_of(model: ModelRecipe) -> int | None:
    """Its number of KV heads in a layer; None where layers differ."""
    return kv_heads(config_of(model))


def plan_of(model: ModelRecipe, text: str) -> AttentionPlan:
    """A plan as text or file, for the layers and KV heads of a model."""
    return AttentionPlan.load(text, layers_of(model), heads_of(model))


def attention_share(model: ModelRecipe, plan: str, length: int) -> float:
    """Attention operations of a plan over those of full attention: the share of visible pairs (`masformer.cost`)."""
    layers, heads = layers_of(model), heads_of(model) or 1
    units = AttentionPlan.load(plan, layers, heads).unit_counts(heads)
    pairs = sum(count * span.visible_pairs(length) for span, count in units.items())
    return pairs / (layers * heads * FullSpan().visible_pairs(length))


def forward_estimate(model: ModelRecipe, plan: AttentionPlan | None, lengths: Sequence[int], each: float) -> Estimate:
    """Forward passes of one sequence of each length, `each` times; memory of the longest at once."""
    config = config_of(model)
    shape = ModelShape.of(config)
    spans = plan or AttentionPlan.uniform(shape.num_layers, Span.parse("full"))
    size = 4 if model.dtype == "float32" else 2
    longest = max(lengths)
    return Estimate(
        flops=each * sum(cost(shape, spans, length).forward_flops for length in lengths),
        memory=shape.parameters * size + prefill_bytes(shape, spans, longest, longest, bytes_per_value=size),
    )


def model_of(recipe: Recipe) -> ModelRecipe:
    """What a recipe leaves, with what its config is then expected to say."""
    settings = recipe.model
    config = dict(settings.config or {})
    if settings.max_positions is not None:
        config["max_position_embeddings"] = settings.max_positions
    return ModelRecipe(source=f"{recipe.output}/model", config=config, plan=settings.plan, dtype=settings.dtype)


def recipe_of(parts: Mapping[str, Any], place: Place, name: str, **changes: Mapping[str, Any]) -> Recipe:
    """A whole recipe from the parts that a scale gives.

    Args:
        parts: settings of a recipe, some left out.
        place: where the model goes.
        name: of the unit.
        **changes: part -> settings that take the place of those in it.

    Raises:
        MasformerError: the parts and changes are no recipe.
    """
    settings = copy.deepcopy(dict(parts))
    for part, values in changes.items():
        settings[part] = {**settings.get(part, {}), **values}
    settings["data"] = {"cache": str(place.folder / DATA / "tokens"), **settings.get("data", {})}
    settings["output"] = str(place.folder / MODELS / slug(name))
    settings["checkpoints"] = {"keep": 1, **settings.get("checkpoints", {})}
    try:
        return Recipe.from_dict(settings)
    except MasformerError as error:
        raise MasformerError(f"{name}: {error}") from None
