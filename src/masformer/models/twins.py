"""The same weights in transformers as it is, to measure against: full attention, or its own sliding layers."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, MinistralConfig, PretrainedConfig, PreTrainedModel

from masformer.models.sealing import stock_config
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan, WindowSpan

LLAMAS = ("llama", "mistral", "ministral")
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Settings that mean the same in a Llama and in a Ministral."""


def stock_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model as transformers runs it by itself, with the spans it was trained with; the weights are shared."""
    return _twin(model, stock_config(model.config))


def sliding_twin(model: PreTrainedModel, plan: AttentionPlan) -> PreTrainedModel | None:
    """A class of transformers whose sliding layers are the plan's windows, sharing the model's weights.

    Sinks are left out: transformers has none. None where it has no such class (it has one for Llama-shaped models), or
    where the plan has blocks, windows of several sizes, or none.
    """
    config, windows = model.config, {span.size for span in plan if isinstance(span, WindowSpan)}
    odd = [span for span in plan if not isinstance(span, (FullSpan, WindowSpan))]
    if config.model_type not in LLAMAS or odd or len(windows) != 1 or getattr(config, "attention_bias", False):
        return None
    types = ["full_attention" if isinstance(span, FullSpan) else "sliding_attention" for span in plan]
    options = {key: copy.deepcopy(getattr(config, key)) for key in SHARED}
    return _twin(model, MinistralConfig(**options, sliding_window=windows.pop(), layer_types=types))


def _twin(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device(model.device):
        twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    wrong = twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not wrong.unexpected_keys, wrong.unexpected_keys
    twin.tie_weights()
    return twin.eval()  # type: ignore[no-any-return]
