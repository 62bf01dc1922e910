"""A model of transformers as the content of a .gguf file of the same architecture, without windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PretrainedConfig

from masformer.errors import MasformerError
from masformer.export.llama_cpp.files import Content, Tensor
from masformer.export.llama_cpp.forms import FORMS, OUTPUT, floats, in_pairs
from masformer.export.llama_cpp.tokens import add_tokenizer

ARCHITECTURES = {"ministral": "llama", "mistral": "llama"} | {name: name for name in FORMS}
"""Model type of transformers -> architecture of llama.cpp, where they differ."""
KINDS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK = 32
"""Values of a row that Q8_0 stores together."""


def content_of(
    config: PretrainedConfig,
    weights: dict[str, torch.Tensor],
    tokenizer: Any,
    kind: GGMLQuantizationType,
    name: str,
    general: dict[str, str],
) -> Content:
    """The content of the file.

    Args:
        config: the stock config, of a model type in `ARCHITECTURES`.
        weights: by the names that transformers has.
        tokenizer: of the model.
        kind: how matrices are stored.
        name: of the model.
        general: more of what the file says of itself, by the key after `general.`.

    Raises:
        MasformerError: the tokenizer is of no kind that is known, or a weight has no place in the file.
    """
    architecture = ARCHITECTURES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    for key, value in general.items():
        writer.add_string(f"general.{key}", value)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    factors = _add_rope(writer, config, head_dim)
    add_tokenizer(writer, tokenizer, config)
    fields = dict(writer.kv_data[0])
    fields.pop(gguf.Keys.General.ARCHITECTURE, None)
    tensors = _tensors(config, weights, architecture, kind)
    if factors is not None:
        tensors["rope_freqs.weight"] = floats(factors)
    return Content(architecture, fields, tensors)


def _add_rope(writer: GGUFWriter, config: PretrainedConfig, head_dim: int) -> np.ndarray | None:
    """Writes the rotary positions; returns what the angle of each pair is divided by, where that is a table."""
    rope = config.rope_parameters
    kind, base = rope["rope_type"], float(rope["rope_theta"])
    writer.add_rope_freq_base(base)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if kind != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double().numpy()
    plain: np.ndarray = base ** (-np.arange(0, head_dim, 2) / head_dim)
    factors: np.ndarray = plain / scaled
    return factors


def _tensors(
    config: PretrainedConfig, weights: dict[str, torch.Tensor], architecture: str, kind: GGMLQuantizationType
) -> dict[str, Tensor]:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found = {}
    for name, weight in weights.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        known = names.get_name(name, (".weight", ".bias"))
        if known is None:
            raise MasformerError(f"llama.cpp's {architecture} has no place for the weight {name}")
        heads = None
        if FORMS[architecture].pairs and ".self_attn.q_proj." in name:
            heads = config.num_attention_heads
        if FORMS[architecture].pairs and ".self_attn.k_proj." in name:
            heads = config.num_key_value_heads
        stored = stored_as(weight, kind)
        found[known] = Tensor(tuple(weight.shape), stored, _reader(name, weight, stored, heads))
    return found if FORMS[architecture].tied else {OUTPUT: found["token_embd.weight"]} | found


def stored_as(weight: torch.Tensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """How one weight is stored where matrices are stored as `kind`: vectors in float32, and float16 where the rows of a
    matrix do not fill blocks."""
    if weight.dim() < 2:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and weight.shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return kind


def _reader(name: str, weight: torch.Tensor, kind: GGMLQuantizationType, heads: int | None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        values = weight.detach().float().cpu().numpy()
        if kind == GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
            raise MasformerError(f"{name} has values that float16 does not hold; choose --dtype bfloat16")
        values = values if heads is None else in_pairs(values, heads)
        stored: np.ndarray = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        return stored

    return read


def rounded(weight: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """What a weight is once it was stored, in float32."""
    stored = stored_as(weight, kind)
    values = gguf.quants.quantize(weight.detach().float().cpu().numpy(), stored)
    return torch.from_numpy(gguf.quants.dequantize(values, stored).astype(np.float32)).reshape(weight.shape)
