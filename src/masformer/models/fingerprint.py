"""Telling models apart by their weights."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

from masformer.models.sinks import is_sink, named_sinks

SAMPLE = 256
"""Values of each weight that the fingerprint of a model reads."""


def model_fingerprint(model: PreTrainedModel) -> str:
    """Tells models apart by class, config (the plan left out) and evenly spaced values of every weight and buffer."""
    digest = hashlib.sha256(type(model).__name__.encode())
    skipped = ("masformer", "_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation")
    config = {key: value for key, value in model.config.to_dict().items() if key not in skipped}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    weights = [*model.named_parameters(), *model.named_buffers()]
    others = [(name, weight) for name, weight in weights if not is_sink(name)]
    for name, tensor in [*others, *named_sinks(model)]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        size = tensor.numel()
        index = torch.arange(min(size, SAMPLE), device=tensor.device) * size // max(1, min(size, SAMPLE))
        digest.update(tensor.detach().reshape(-1)[index].double().cpu().numpy().tobytes())
    return digest.hexdigest()
