"""Loading models with a plan, and their tokenizers."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME

from masformer.errors import MasformerError, check_int, shown
from masformer.files import missing
from masformer.models import adapters, hub
from masformer.models.bridge import NAME, apply_plan, class_with_sinks
from masformer.models.gguf_files import reading_once
from masformer.models.native import native_plan
from masformer.models.positions import extend_positions
from masformer.models.sealing import SEAL, kv_heads, unseal
from masformer.models.sinks import check_there, sink_layers
from masformer.models.weights import check_runs, check_weights
from masformer.plan import AttentionPlan, PlanSource
from masformer.spans import FullSpan, Span

DEEPEST = 1024
"""Layers of a model: several times what any has; transformers builds what a damaged config says, for hours."""
OWN_CODE = {"trust_remote_code": False}
"""For transformers, which would ask on standard input whether to run the code that a model brings along."""
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.spm", "tekken.json")
"""What the files of a tokenizer are called, one of which is in every folder that has one."""


@reading_once()
def load_config(
    model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> tuple[PretrainedConfig, AttentionPlan]:
    """Reads a model's config and its plan: the one it carries, or the spans it was trained with. No weights are read.

    Args:
        model: hub id, folder, .gguf file, or a config.json file.
        revision: see `load_model`.
        token: see `load_model`.

    Raises:
        MasformerError: there is no such model, or its config cannot be read.
    """
    config, plan = _read_config(model, *_locate(model, revision, token))
    if plan is not None:
        return config, plan.for_layers(None, kv_heads(config))
    if not getattr(config, "num_hidden_layers", None):
        raise MasformerError(f"{os.fspath(model)} is no decoder-only language model ({config.model_type})")
    check_int(f"num_hidden_layers of {os.fspath(model)}", config.num_hidden_layers, 1, DEEPEST)
    try:
        return config, native_plan(config)
    except MasformerError:
        check_plan(config, AttentionPlan.uniform(config.num_hidden_layers, FullSpan()))  # the reason, where it has one
        raise


def _read_config(
    model: str | os.PathLike[str], source: str, options: Mapping[str, Any]
) -> tuple[PretrainedConfig, AttentionPlan | None]:
    """The config, and the plan that it carries, if so."""
    try:
        data = {} if "gguf_file" in options else PretrainedConfig.get_config_dict(source, **options)[0]
        _check_layers(data)
        if data.get("model_type") == SEAL:
            return unseal(data)
        if "gguf_file" in options:
            status = Path(source, options["gguf_file"]).stat()
            config = copy.deepcopy(_gguf_config(source, options["gguf_file"], status.st_mtime_ns, status.st_size))
        else:
            config = AutoConfig.from_pretrained(source, **OWN_CODE, **options)
        _check_layers({"num_hidden_layers": getattr(config, "num_hidden_layers", None)})
        return config, None
    except MasformerError as error:
        raise MasformerError(f"{os.fspath(model)}: {error}") from None
    except Exception as error:
        raise _cannot("read the config of", model, error) from error


@lru_cache(maxsize=4)
def _gguf_config(folder: str, file: str, changed: int, size: int) -> PretrainedConfig:
    """The config of a .gguf file, whose vocabulary transformers reads with it: seconds, and a load asks three times."""
    return AutoConfig.from_pretrained(folder, gguf_file=file, **OWN_CODE)


def _check_layers(data: Mapping[str, Any]) -> None:
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        if isinstance(data.get(name), int):
            check_int(name, int(data[name]), 0, DEEPEST)


def check_plan(config: PretrainedConfig, plan: AttentionPlan) -> PreTrainedModel:
    """Tries a plan on a model without weights, which it returns.

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
    return apply_plan(model, plan)


@reading_once()
def load_model(
    model: str | os.PathLike[str],
    plan: PlanSource | None = None,
    *,
    full: int | None = None,
    placement: str | int | Sequence[int] | None = None,
    local: Span | str | None = None,
    max_positions: int | None = None,
    position_method: str | None = None,
    dtype: Any = "auto",
    backend: str = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Loads a causal language model and its tokenizer, with mixed spans. Pickled weights are never loaded.

    Args:
        model: hub id, folder (stock, or written by `save_model`) or .gguf file.
        plan: one span per layer: an `AttentionPlan`, its text (full@11-18; window:512+4) or a plan file; by default the
            plan the checkpoint carries, or the spans it was trained with.
        full: number of full layers, in place of `plan`.
        placement: which layers are full, see `place_full_layers`; `middle` by default.
        local: span of the other layers, or its text.
        max_positions: longest sequence in tokens, beyond the trained length; see `extend_positions`.
        position_method: how the positions are extended; by default what suits the model.
        dtype: torch dtype of the weights, or "auto" for the stored one.
        backend: see `masformer.attend`.
        device_map: where the weights go, as transformers takes it: "auto", a device, or module -> device.
        quantization_config: how the weights are packed while they are loaded, as transformers takes it
            (`BitsAndBytesConfig(load_in_4bit=True)` for QLoRA); needs the package that packs them.
        revision: branch, tag or commit of a model on the hub.
        token: for private and gated models on the hub; True for the stored one. Files here need none.

    Returns:
        The model in evaluation mode, and its tokenizer (None where the folder has none).

    Raises:
        MasformerError: the model cannot be read, or cannot take the plan or the positions.
    """
    if position_method is not None and max_positions is None:
        raise MasformerError("a position method does nothing without max_positions")
    version = _given(revision=revision, token=token)
    config, carried = load_config(model, **version)
    source, options = _locate(model, **version)
    if source.endswith(".json"):
        raise MasformerError(f"{source} is a config alone; loading a model needs its folder, with the weights")
    chosen = AttentionPlan.from_options(
        len(carried), full, placement, local, kv_heads=carried.kv_heads, plan=plan, default=carried
    )
    check_there(os.fspath(model), carried, chosen)
    model_class: Any = AutoModelForCausalLM
    if sink_layers(carried):
        model_class = class_with_sinks(AutoModelForCausalLM._model_mapping[type(config)])
        config.masformer = carried.to_dict()
    options |= _given(device_map=device_map, quantization_config=quantization_config)
    if config.model_type == adapters.GPT_NEO:
        options["attn_implementation"] = NAME
    _check_generation_config(Path(source))
    if "gguf_file" in options:
        _show_bars_in_terminals_alone()
    use_safetensors = None if "gguf_file" in options else True
    try:
        loaded, report = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **OWN_CODE,
            **options,
        )
    except Exception as error:
        raise _cannot("load", model, error) from error
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise _adapter(model)
    left_over = [*report["unexpected_keys"], *(_unread(loaded, Path(model)) if "gguf_file" in options else ())]
    check_weights(os.fspath(model), report["missing_keys"], left_over, report["mismatched_keys"])
    if "gguf_file" in options and (quantizer := getattr(loaded, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(loaded)  # its weights are plain again: the model can be trained and saved
    if loaded.config.tie_word_embeddings and _has_own_head(loaded):
        loaded.config.tie_word_embeddings = False
    loaded = apply_plan(loaded.eval(), chosen)
    check_runs(os.fspath(model), loaded)
    if backend != "auto":  # which may be one of another device
        apply_plan(loaded, chosen, backend)
    if max_positions is not None:
        extend_positions(loaded, max_positions, position_method)
    tokenizer = load_tokenizer(model, **version)
    if tokenizer is not None:
        fit_tokenizer(tokenizer, loaded, max_positions)
    return loaded, tokenizer


def _has_own_head(loaded: PreTrainedModel) -> bool:
    """Whether the checkpoint has a head of its own, which transformers keeps whatever the config says."""
    head, embedding = (
        getattr(part, "weight", None) for part in (loaded.get_output_embeddings(), loaded.get_input_embeddings())
    )
    if head is None or embedding is None or head is embedding or head.is_meta or embedding.is_meta:
        return False
    return head.shape != embedding.shape or not torch.equal(head, embedding.to(head.device))


def _check_generation_config(folder: Path) -> None:
    """transformers goes on without a file that it cannot read, and so without the tokens that end a text."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise _cannot("read", folder / GENERATION_CONFIG_NAME, error) from error


def _show_bars_in_terminals_alone() -> None:
    """transformers draws a bar for a .gguf file into logs as well."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is not None and not isinstance(bar, partial):
        reader.tqdm = partial(bar, disable=None)


def _unread(loaded: PreTrainedModel, path: Path) -> list[str]:
    """Tensors of a .gguf file that transformers' older reader passes over: biases, and scaled rotary frequencies."""
    from transformers import modeling_gguf_pytorch_utils as reader

    try:
        from transformers.integrations.gguf import read_gguf_metadata

        metadata, names = read_gguf_metadata(path)
        architecture = metadata["general.architecture"]
    except ImportError:  # an older transformers
        from gguf import GGUFReader

        file = GGUFReader(path)
        architecture, names = file.fields["general.architecture"].contents(), [each.name for each in file.tensors]
    doubtful = [name for name in names if name.endswith(".bias") or name.startswith("rope_freqs")]
    if not doubtful:  # else their names in the model are worked out, which takes seconds
        return []
    process = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)(config=loaded.config.to_dict())
    try:
        known = reader.get_gguf_hf_weights_map(loaded, process)
    except NotImplementedError:  # the newer reader's, which reports by itself
        return []
    return [name for name in doubtful if name not in known]


@reading_once()
def load_tokenizer(
    model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Any:
    """The tokenizer beside a model, see `load_model`; None where a folder has none.

    Raises:
        MasformerError: it is there, but cannot be read.
    """
    source, options = _locate(model, revision, token)
    folder = Path(source)
    if folder.is_dir() and "gguf_file" not in options and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        return None
    return read_tokenizer(source, os.fspath(model), config=_read_config(model, source, options)[0], **options)


def read_tokenizer(source: str, name: str | None = None, **options: Any) -> Any:
    """A tokenizer by hub id or folder, options are transformers' own; `name` is that of the model it was found with.

    Raises:
        MasformerError: it cannot be read, or has no vocabulary, as transformers makes it up where files are missing.
    """
    if name is None and not Path(source).exists() and hub.is_cached_alone(source, file="tokenizer_config.json"):
        options["local_files_only"] = True
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **OWN_CODE, **options)
        tokenizer("")  # some settings are not looked at before
    except BaseException as error:  # the library behind it panics, which is no Exception, where merges do not fit
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise _cannot("read the tokenizer of", name or source, error) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise MasformerError(f"the tokenizer of {name or source} has no vocabulary: its files are missing")
    return tokenizer


def fit_tokenizer(tokenizer: Any, model: PreTrainedModel, max_positions: int | None = None) -> None:
    """Holds a tokenizer to its model, in place: texts give no token that the model lacks.

    Such tokens may be there, as padding or as transformers' defaults of a class; a text that has one is refused with a
    MasformerError.

    Args:
        tokenizer: its `model_max_length` is changed where it is less than `max_positions`.
        model: the model.
        max_positions: longest sequence in tokens, where that is new.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokenizer.get_vocab().values()) >= rows:
        tokenizer._encode_plus = partial(_encode_within, tokenizer, rows)
    if max_positions is not None:
        tokenizer.model_max_length = max(tokenizer.model_max_length, max_positions)


def _encode_within(tokenizer: Any, rows: int, *args: Any, **options: Any) -> Any:
    """What every way to encode comes to in transformers, for a tokenizer with more tokens than its model has rows."""
    encoded = type(tokenizer)._encode_plus(tokenizer, *args, **options)
    ids = encoded["input_ids"]
    for row in ids if len(ids) and not isinstance(ids[0], int) else [ids]:
        if (highest := max((int(index) for index in row), default=0)) >= rows:
            raise MasformerError(
                f"the text has the token {tokenizer.convert_ids_to_tokens(highest)!r}, number {highest}, but the "
                f"model has rows for only {rows}"
            )
    return encoded


def check_vocabulary(tokenizer: Any, rows: int, limit: str = "the model has rows for only") -> None:
    """For training, which may meet every token: raises MasformerError where one has no row, and names the last one."""
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= rows:
        raise MasformerError(f"the tokenizer has {index + 1} tokens, but {limit} {rows}: {token!r} is one too many")


def _locate(
    model: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> tuple[str, dict[str, Any]]:
    """What transformers is to be asked for."""
    source, path = os.fspath(model), Path(model)
    if source.endswith((".gguf", ".json")) and not path.is_file():
        raise missing("model file", source)
    if path.is_file() and not source.endswith((".gguf", ".json")):
        raise MasformerError(f"{source} is a file; allowed: a hub id, a folder, a .gguf file, or a config.json")
    if revision is not None and path.exists():
        raise MasformerError(f"revision {shown(revision)} is for models on the hub; {source} is here")
    if (part := re.search(r"-\d+-of-(\d+)\.gguf$", source)) and int(part[1]) > 1:
        raise MasformerError(f"{source} is one part of {int(part[1])}; join them first: llama-gguf-split --merge")
    if source.endswith(".gguf"):
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise _adapter(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise MasformerError(f"folder {source} holds no config.json")
    local = True if not path.exists() and hub.is_cached_alone(source, revision) else None
    return source, _given(revision=revision, token=token, local_files_only=local)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _adapter(model: str | os.PathLike[str]) -> MasformerError:
    return MasformerError(f"{os.fspath(model)} holds an adapter; merge it into its model first, by merge_and_unload")


def _cannot(what: str, model: str | os.PathLike[str], error: BaseException) -> MasformerError:
    if "trust_remote_code" in str(error):
        return MasformerError(
            f"{os.fspath(model)} needs code of its own, which is not run here; load it with transformers, if you trust "
            "it, and give the model to apply_plan"
        )
    return MasformerError(f"cannot {what} {os.fspath(model)}: {' '.join(str(error).split())}")
