"""Architectures whose attention has no hook for another implementation.

GPT-Neo, the model of the MASFormer paper, holds a [1, 1, max_positions, max_positions] mask in every layer and
computes all scores in float32. Its adapter has the same parameters under the same names and neither of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_neo import modeling_gpt_neo

GPT_NEO = "gpt_neo"


class GPTNeoSpanAttention(nn.Module):
    """Takes the place of transformers' GPTNeoSelfAttention; the weights stay as they are, scores are not scaled."""

    attention_function: Callable[..., tuple[Tensor, None]]

    def __init__(self, config: Any, attention_type: str, layer_id: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.attention_type = config, layer_id, attention_type
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.attn_dropout = nn.Dropout(float(config.attention_dropout))
        self.resid_dropout = nn.Dropout(float(config.resid_dropout))
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None]:
        """hidden_states [batch, length, hidden_size] -> the same shape, and no attention weights."""
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        dropout = self.attn_dropout.p if self.training else 0.0
        out, _ = type(self).attention_function(self, query, key, value, attention_mask, scaling=1.0, dropout=dropout)
        return self.resid_dropout(self.out_proj(out.flatten(2))), None


def register(name: str, attention_function: Callable[..., tuple[Tensor, None]]) -> None:
    """Makes `attn_implementation=name` build the adapters, which call `attention_function` as transformers would."""
    GPTNeoSpanAttention.attention_function = staticmethod(attention_function)  # type: ignore[assignment]
    modeling_gpt_neo.GPT_NEO_ATTENTION_CLASSES[name] = GPTNeoSpanAttention


def adapt(model: nn.Module) -> None:
    """Replaces, in place, every attention module that has an adapter here; parameters are shared, not copied."""
    for module in list(model.modules()):
        old = getattr(module, "attention", None)
        if isinstance(old, modeling_gpt_neo.GPTNeoSelfAttention):
            with torch.device("meta"):
                new = GPTNeoSpanAttention(old.config, old.attention_type, old.layer_id)
            for name, child in old.named_children():
                setattr(new, name, child)
            module.attention = new.train(old.training)
