"""The model that a recipe names: loaded or new, with its plan, its positions and, if asked, adapters."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from masformer.errors import MasformerError, check_int
from masformer.extras import need
from masformer.files import meant
from masformer.models import adapters
from masformer.models.across import check_slices
from masformer.models.bridge import NAME, add_sinks, apply_plan
from masformer.models.checkpoint import (
    check_vocabulary,
    fit_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    read_tokenizer,
)
from masformer.models.compiling import compile_layers
from masformer.models.native import native_plan
from masformer.models.positions import extend_positions, position_limit
from masformer.models.weights import load_trained
from masformer.plan import AttentionPlan
from masformer.training.loss import compile_loss, use_chunked_loss
from masformer.training.recipe import BYTES, LoraRecipe, ModelRecipe, Recipe

END = "<|end|>"
ADAPTER = "adapter.safetensors"


def dtype_of(name: str) -> Any:
    """`float32` -> torch.float32; `auto` stays."""
    return name if name == "auto" else getattr(torch, name)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one that ends a document: 257 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def recipe_tokenizer(recipe: ModelRecipe) -> Any:
    """The tokenizer that a recipe names, or the model's own.

    Raises:
        MasformerError: there is none, or it cannot be read.
    """
    if recipe.tokenizer == BYTES:
        return byte_tokenizer()
    if recipe.tokenizer is not None:
        return read_tokenizer(recipe.tokenizer)
    assert recipe.source is not None
    tokenizer = load_tokenizer(recipe.source)
    if tokenizer is None:
        raise MasformerError(f"{recipe.source} has no tokenizer; name one in model.tokenizer")
    return tokenizer


def recipe_config(recipe: ModelRecipe, tokenizer: Any = None) -> tuple[PretrainedConfig, AttentionPlan]:
    """The config of `model.config`, and the spans that such a model is trained with.

    Args:
        recipe: with a config.
        tokenizer: gives the vocabulary's size and special tokens where the config does not; without it there are no
            special tokens but the config's.

    Raises:
        MasformerError: an unknown model type or setting.
    """
    settings = dict(recipe.config or {})
    kind = settings.pop("model_type")
    try:
        usual = AutoConfig.for_model(kind)
    except (ValueError, KeyError):
        raise MasformerError(
            f"model.config: unknown model_type {kind!r}; transformers knows none of that name"
        ) from None
    known = [*usual.to_dict(), *usual.attribute_map]
    for name in settings:
        if name not in known:
            hint = meant(str(name), known) or "it would do nothing"
            raise MasformerError(f"model.config: {kind} models have no setting {name}; {hint}")
    if tokenizer is not None:
        settings.setdefault("vocab_size", len(tokenizer))
        check_int("model.config.vocab_size", settings["vocab_size"], 1)
        check_vocabulary(tokenizer, settings["vocab_size"], "model.config.vocab_size is")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings.setdefault(token, getattr(tokenizer, token, None))
    try:
        config = AutoConfig.for_model(kind, **settings)
    except Exception as error:  # each config class refuses in its own way
        raise MasformerError(f"model.config: {' '.join(str(error).split())}") from error
    return config, native_plan(config)


def recipe_plan(recipe: ModelRecipe, own: AttentionPlan) -> AttentionPlan:
    """The plan that a recipe names, or the model's own."""
    return AttentionPlan.from_options(
        len(own), recipe.full, recipe.placement, recipe.local, kv_heads=own.kv_heads, plan=recipe.plan, default=own
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a run trains.

    Attributes:
        model: the model, or a peft model around it; its forward computes the loss in chunks.
        causal: the causal language model itself.
        tokenizer: its tokenizer.
        plan: one span per layer.
        trainable: names of the trained parameters, in order.
    """

    model: Any
    causal: Any
    tokenizer: Any
    plan: AttentionPlan
    trainable: tuple[str, ...]


def prepare_model(recipe: Recipe, checkpoint: Path | None = None) -> Prepared:
    """Makes the model ready for training.

    Args:
        recipe: the run.
        checkpoint: where training goes on from; None: from the start.

    Raises:
        MasformerError: the model cannot be read, or does not fit the recipe.
    """
    torch.manual_seed(recipe.training.seed)
    settings = recipe.model
    tokenizer = recipe_tokenizer(settings)
    whole = None if checkpoint is None or recipe.lora is not None else checkpoint / "model"
    if whole is not None:
        causal, _ = load_model(whole, dtype=dtype_of(settings.dtype), backend=settings.backend)
        plan = load_config(whole)[1]
    elif settings.source is None:
        config, own = recipe_config(settings, tokenizer)
        plan = recipe_plan(settings, own)
        causal = new_model(config, plan, settings)
    else:
        config, own = load_config(settings.source)
        check_expected(settings, config)
        plan = recipe_plan(settings, own)
        causal, _ = load_model(
            settings.source,
            plan,
            max_positions=settings.max_positions,
            position_method=settings.position_method,
            dtype=dtype_of(settings.dtype),
            backend=settings.backend,
        )
    check_lengths(recipe, causal.config)
    check_vocabulary(tokenizer, causal.get_input_embeddings().weight.shape[0])
    fit_tokenizer(tokenizer, causal, position_limit(causal.config))
    use_chunked_loss(causal, recipe.training.loss_chunk)
    if recipe.training.checkpointing:
        _checkpoint_activations(causal)
    model = causal if recipe.lora is None else add_adapters(causal, recipe.lora)
    if recipe.training.compile:
        compile_layers(causal)
        compile_loss(causal)
    trainable = tuple(name for name, weight in model.named_parameters() if weight.requires_grad)
    if recipe.lora is not None and checkpoint is not None:
        load_trained(model, load_file(checkpoint / ADAPTER), trainable, checkpoint / ADAPTER)
    return Prepared(model, causal, tokenizer, plan, trainable)


def new_model(config: PretrainedConfig, plan: AttentionPlan, settings: ModelRecipe) -> Any:
    """A model with random weights; the seed is the caller's."""
    options = {"attn_implementation": NAME} if config.model_type == adapters.GPT_NEO else {}
    dtype = torch.float32 if settings.dtype == "auto" else dtype_of(settings.dtype)
    try:
        causal = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **options)
    except Exception as error:
        raise MasformerError(f"cannot make a {config.model_type} model: {' '.join(str(error).split())}") from error
    add_sinks(causal, plan)
    return apply_plan(causal, plan, settings.backend)


def skeleton(recipe: Recipe, config: PretrainedConfig, plan: AttentionPlan) -> Any:
    """The model without weights, with its plan and positions, to find out whether all that is possible.

    Raises:
        MasformerError: it is not.
    """
    settings = recipe.model
    with torch.device("meta"):
        causal = new_model(config, plan, settings)
    if settings.max_positions is not None:
        extend_positions(causal, settings.max_positions, settings.position_method)
    check_lengths(recipe, causal.config)
    if recipe.training.sharing > 1:
        check_slices(causal)
    return causal


def check_expected(settings: ModelRecipe, config: PretrainedConfig) -> None:
    """Holds `model.config` against the model that was named.

    Raises:
        MasformerError: they differ.
    """
    for name, value in (settings.config or {}).items():
        found = getattr(config, name, None)
        if found != value:
            raise MasformerError(f"model.config says {name} {value!r}, but {settings.source} has {found!r}")


def check_lengths(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raises MasformerError where a row, or a context of the evaluation, is longer than the model's positions."""
    limit = position_limit(config)
    named = {"data.length": [recipe.data.length], "evaluation.lengths": recipe.evaluation.lengths}
    for name, lengths in named.items():
        for length in lengths:
            if limit is not None and length > limit:
                raise MasformerError(
                    f"{name} {length} is beyond the {limit} positions of the model; set model.max_positions to {length}"
                )


def _checkpoint_activations(causal: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(causal, "activation_checkpointing_enable"):
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def add_adapters(causal: Any, lora: LoraRecipe) -> Any:
    """A peft model whose adapters, and the modules of `lora.train`, are trained and nothing else.

    Raises:
        MasformerError: peft is not installed, or a name in the recipe fits no module.
    """
    need("train", "lora", "peft")
    import peft

    targets: Any = list(lora.targets) or "all-linear"
    options = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    wanted: dict[str, list[Any]] = {name: [] for name in (*lora.targets, *lora.train)}
    for name, module in causal.named_modules():
        for ending in wanted:
            if name == ending or name.endswith(f".{ending}"):
                wanted[ending].append(module)
    for ending, modules in wanted.items():
        if not modules:
            raise MasformerError(f"lora: {causal.config.model_type} models have no module named {ending}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(causal, options)
    except ValueError as error:
        raise MasformerError(f"lora: {' '.join(str(error).split())}") from error
    for ending in lora.train:
        for module in wanted[ending]:
            module.requires_grad_(True)
    return model
