"""The transformers model inside what peft, torch and accelerate put around it."""

from __future__ import annotations

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from masformer.errors import MasformerError


def bare_model(model: Any) -> PreTrainedModel:
    """The model itself, without `PeftModel`, `torch.compile`, DDP or DataParallel around it; adapters stay at work.

    Raises:
        MasformerError: it is no model of transformers, or cannot do without what is around it.
    """
    outer = model
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, FullyShardedDataParallel):
            raise MasformerError("the weights of an FSDP model are in pieces; gather them into a model of their own")
        inner = extract_model_from_parallel(model, keep_torch_compile=False) if isinstance(model, nn.Module) else model
        if hasattr(inner, "peft_config") and inner is model:
            if any(config.is_prompt_learning for config in inner.peft_config.values()):
                raise MasformerError(
                    f"{type(inner).__name__} puts trained tokens before each input, so it is no model with a plan"
                )
            inner = inner.base_model.model
        if inner is model:
            raise MasformerError(
                f"{type(outer).__name__} is no transformers model; allowed: one, also inside PeftModel, torch.compile, "
                "DistributedDataParallel or DataParallel"
            )
        model = inner
    return model
