"""Loading models with a plan, and saving checkpoints that carry theirs."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from masformer.errors import MasformerError
from masformer.models import adapters
from masformer.models.bridge import NAME, apply_plan
from masformer.models.native import native_plan
from masformer.models.positions import extend_positions
from masformer.models.sealing import SEAL, is_sealed, unseal
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan


def load_config(model: str | os.PathLike[str]) -> tuple[PretrainedConfig, AttentionPlan]:
    """Reads a model's config and its plan: the one it carries, or the spans it was trained with. No weights are read.

    Args:
        model: hub id, folder, .gguf file, or a config.json file.

    Raises:
        MasformerError: there is no such model, or its config cannot be read.
    """
    source, options = _locate(model)
    try:
        data = {} if options else PretrainedConfig.get_config_dict(source)[0]
        if data.get("model_type") == SEAL:
            return unseal(data)
        config = AutoConfig.from_pretrained(source, **options)
    except MasformerError as error:
        raise MasformerError(f"{os.fspath(model)}: {error}") from None
    except Exception as error:
        raise _cannot("read the config of", model, error) from error
    if not getattr(config, "num_hidden_layers", None):
        raise MasformerError(f"{os.fspath(model)} is no decoder-only language model ({config.model_type})")
    try:
        return config, native_plan(config)
    except MasformerError:
        check_plan(config, AttentionPlan.uniform(config.num_hidden_layers, FullSpan()))  # the reason, where it has one
        raise


def check_plan(config: PretrainedConfig, plan: AttentionPlan) -> None:
    """Tries a plan on a model without weights.

    Raises:
        MasformerError: the plan has another number of layers, or the architecture cannot take one.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except ValueError as error:
        raise MasformerError(f"{config.model_type} is not a causal language model that transformers knows") from error
    except Exception as error:  # each class refuses settings in its own way
        raise _cannot("make", f"a {config.model_type} model", error) from error
    apply_plan(model, plan)


def load_model(
    model: str | os.PathLike[str],
    plan: AttentionPlan | None = None,
    *,
    max_positions: int | None = None,
    position_method: str | None = None,
    dtype: Any = "auto",
    backend: str = "auto",
) -> tuple[PreTrainedModel, Any]:
    """Loads a causal language model and its tokenizer, with mixed spans. Pickled weights are never loaded.

    Args:
        model: hub id, folder (stock, or written by `save_model`) or .gguf file.
        plan: one span per layer; by default the plan the checkpoint carries, or the spans it was trained with.
        max_positions: longest sequence in tokens, beyond the trained length; see `extend_positions`.
        position_method: how the positions are extended; by default what suits the model.
        dtype: torch dtype of the weights, or "auto" for the stored one.
        backend: see `masformer.attend`.

    Returns:
        The model in evaluation mode, and its tokenizer (None where the folder has none).

    Raises:
        MasformerError: the model cannot be read, or cannot take the plan or the positions.
    """
    if position_method is not None and max_positions is None:
        raise MasformerError("a position method does nothing without max_positions")
    config, carried = load_config(model)
    source, options = _locate(model)
    if source.endswith(".json"):
        raise MasformerError(f"{source} is a config alone; loading a model needs its folder, with the weights")
    if config.model_type == adapters.GPT_NEO:
        options["attn_implementation"] = NAME
    use_safetensors = None if "gguf_file" in options else True
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=use_safetensors, **options
        )
    except Exception as error:
        raise _cannot("load", model, error) from error
    if "gguf_file" in options and (quantizer := getattr(loaded, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(loaded)  # its weights are plain again: the model can be trained and saved
    loaded = apply_plan(loaded.eval(), plan or carried, backend)
    if max_positions is not None:
        extend_positions(loaded, max_positions, position_method)
    return loaded, load_tokenizer(model)


def load_tokenizer(model: str | os.PathLike[str]) -> Any:
    """The tokenizer beside a model; None where a folder has none.

    Raises:
        MasformerError: it is there, but cannot be read.
    """
    source, options = _locate(model)
    if Path(source).is_dir() and not options and not any(Path(source).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, config=load_config(model)[0], **options)
    except Exception as error:
        raise _cannot("read the tokenizer of", model, error) from error


def _locate(model: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """What transformers is to be asked for."""
    source, path = os.fspath(model), Path(model)
    if source.endswith((".gguf", ".json")) and not path.is_file():
        raise MasformerError(f"model file {source} does not exist")
    if path.is_file() and not source.endswith((".gguf", ".json")):
        raise MasformerError(f"{source} is a file; allowed: a hub id, a folder, a .gguf file, or a config.json")
    if source.endswith(".gguf"):
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise MasformerError(f"folder {source} holds no config.json")
    return source, {}


def _cannot(what: str, model: str | os.PathLike[str], error: Exception) -> MasformerError:
    return MasformerError(f"cannot {what} {os.fspath(model)}: {' '.join(str(error).split())}")


def save_model(
    model: PreTrainedModel, path: str | os.PathLike[str], tokenizer: Any = None, *, overwrite: bool = False
) -> None:
    """Writes safetensors and a sealed config.json (and the tokenizer) into a folder, whole or not at all.

    Args:
        model: a model with a plan.
        path: the folder to write.
        tokenizer: saved beside it, if given.
        overwrite: replace a model folder that is already there.

    Raises:
        MasformerError: the model has no plan, the folder exists (unless `overwrite`), or it cannot be written.
    """
    if not is_sealed(model.config):
        raise MasformerError("the model has no plan; call apply_plan first, or save it with save_pretrained")
    with model_folder(path, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


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
        raise MasformerError(f"{path} exists already; choose another folder or allow overwriting")
    if path.exists() and not (path / "config.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise MasformerError(f"{path} is no model folder, so it is not overwritten")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise MasformerError(f"cannot write {path}: {above} is no folder")
    if not os.access(above, os.W_OK):
        raise MasformerError(f"cannot write {path}: folder {above} is not writable")
