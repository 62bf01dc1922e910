"""The same weights in transformers as it is, to measure against: its own attention, or its own sliding layers."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from masformer.errors import MasformerError
from masformer.export.choose import chosen_entry, write_config
from masformer.models.saving import whole_weights
from masformer.models.sealing import stock_config
from masformer.models.sinks import without_sink_weights
from masformer.models.weights import load_weights
from masformer.plan import AttentionPlan


def stock_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model as transformers runs it by itself, with the spans it was trained with; the weights are shared."""
    return _twin(model, stock_config(model.config))


def sliding_twin(model: PreTrainedModel, plan: AttentionPlan) -> PreTrainedModel | None:
    """The class of transformers that has the plan's windows as sliding layers; the weights are shared.

    Sinks are left out: transformers has none. None where it has no such class (`masformer export --list`), or where the
    plan is full in every layer.
    """
    config = stock_config(model.config)
    bare = without_sinks(plan)
    if bare.is_full:
        return None
    try:
        tool, written, entry = chosen_entry(config, bare, "transformers")
    except MasformerError:
        return None
    data = write_config(config, written, tool, entry)
    return _twin(model, AutoConfig.for_model(data.pop("model_type"), **data))


def without_sinks(plan: AttentionPlan) -> AttentionPlan:
    """The plan with bare windows and blocks."""
    return plan.changed(lambda span: span.bare)


def _twin(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device(model.device):
        twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    load_weights(twin, without_sink_weights(whole_weights(model) or model.state_dict()), "the model")
    return twin.eval()  # type: ignore[no-any-return]
