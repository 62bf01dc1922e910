"""Saving checkpoints that carry their plan: whole folders or none, and weights that are those of their config."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from masformer.errors import MasformerError
from masformer.models.card import checkpoint_card, origin_of, write_card
from masformer.models.sealing import is_sealed
from masformer.models.weights import check_weights
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan


def save_model(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Writes safetensors, a sealed config.json and a model card (and the tokenizer) into a folder, whole or not at all.

    The card (README.md) names the plan and, as far as the card of the source tells them, base model and license.

    Args:
        model: a model with a plan, also inside DDP or `torch.compile`. Adapters must have been merged.
        path: the folder to write.
        tokenizer: saved beside it, if given.
        overwrite: replace a model folder that is already there; a card that somebody wrote is kept.
        source: hub id, folder or .gguf file that the model was made of, for the card; by default what transformers
            loaded it from.

    Raises:
        MasformerError: the model has no plan, its weights are not those of its config (adapters, parts of a sharded
            model), the folder exists (unless `overwrite`), or it cannot be written.
    """
    model = bare_model(model)
    if not is_sealed(model.config):
        raise MasformerError("the model has no plan; call apply_plan first, or save it with save_pretrained")
    check_folder(path, overwrite=overwrite)
    weights = whole_weights(model)
    origin = origin_of(source or model.config.name_or_path)
    plan = AttentionPlan.from_dict(model.config.masformer)
    with model_folder(path, overwrite=overwrite) as folder:
        model.save_pretrained(folder, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_card(folder, path, checkpoint_card(Path(path).name, origin, model.config, plan))


def whole_weights(model: PreTrainedModel) -> dict[str, Any] | None:
    """Name -> weight, as the model that its config describes has them; None: they are transformers' to write."""
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in model.state_dict().items()}
    if any(part in name for name in weights for part in (".base_layer.", ".modules_to_save.")):
        raise MasformerError(
            "the model holds adapters; merge them first (peft's merge_and_unload), or write them alone with "
            "save_pretrained"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        return None  # it knows how to write what is packed
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        raise MasformerError("the model is sharded over processes; gather its weights into a model of its own first")
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    expected, tied = fresh.state_dict(), getattr(fresh, "all_tied_weights_keys", None) or {}
    check_weights("what would be written", expected.keys() - weights.keys(), weights.keys() - expected.keys())
    places = set()
    for name, weight in weights.items():
        if name in expected and weight.shape != expected[name].shape:
            shapes = list(weight.shape), list(expected[name].shape)
            raise MasformerError(f"{name} has the shape {shapes[0]}, and by the model's config {shapes[1]}")
        if weight.is_meta:
            if getattr(model, "hf_device_map", None) is not None:
                continue  # accelerate keeps it elsewhere, and transformers fetches it
            raise MasformerError(f"the model has no values in {name} (device meta)")
        source = tied.get(name)
        if source in weights and not torch.equal(weight, weights[source].to(weight.device)):
            raise MasformerError(
                f"the config ties {name} to {source}, but they differ: set tie_word_embeddings to False"
            )
        if source is None:  # what the config does not tie is written even where it is the same tensor as another
            place = weight.untyped_storage().data_ptr()
            weights[name] = weight.clone() if place in places else weight
            places.add(place)
    return weights


@contextmanager
def model_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write a model into, which gets its name once the block has ended well: whole or not at all.

    Args:
        path: the name it gets.
        overwrite: replace a model folder that is already there.

    Raises:
        MasformerError: the folder exists (unless `overwrite`) or is no model folder, or it cannot be written.
    """
    path = Path(path)
    check_folder(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            whole, old = Path(temporary) / "model", Path(temporary) / "old"
            whole.mkdir()
            yield whole
            for file in whole.rglob("*"):  # safetensors writes what only its owner may read
                file.chmod(whole.stat().st_mode & (0o777 if file.is_dir() else 0o666))
            if path.exists():
                path.rename(old)
            try:
                whole.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    except OSError as error:
        raise MasformerError(f"cannot write {path}: {error}") from error


def check_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Before long work: whether `model_folder` could write there; errors as there."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise MasformerError(f"{path} exists already; choose another folder, or --overwrite (overwrite=True) it")
    if path.exists() and not (path / "config.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise MasformerError(f"{path} is no model folder, so it is not overwritten")
    check_place(path)


def check_place(path: Path) -> None:
    """Whether something can be written to a path that need not exist; raises MasformerError where not."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise MasformerError(f"cannot write {path}: {above} is no folder")
    if not os.access(above, os.W_OK):
        raise MasformerError(f"cannot write {path}: folder {above} is not writable")
