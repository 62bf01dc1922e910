"""The forms that a checkpoint is written in: each turns a stock config and a plan into the content of config.json.

Weights keep their names and values in every form; `form_weights` says what a form adds, and what becomes of constant
sinks. A form writes every value of the config, also those that transformers would leave out, since other tools have
other defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from masformer.export.sinks import no_sink, output_bias, value_bias
from masformer.models.sinks import by_layer, check_fit, shapes, sink_layers, without_sink_weights
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan, WindowSpan

SLIDING, FULL = "sliding_attention", "full_attention"
GRANITE_SWA = "granite_swa"
"""The model type, and the form, that has a sink of each head: Llama with layer types, in transformers from 5.15."""
SWITCHED = {"qwen2", "qwen3", "smollm3"}
"""Model types that drop their window unless `use_sliding_window` is set."""
NO_FULL_POSITIONS = {"cohere2", "exaone4"}
"""Model types whose full layers have no positions, where there is a window."""

ANY_CLASS = "TransformersForCausalLM"
"""An architecture by which vLLM takes its transformers backend, and llama.cpp's converter nothing."""
NO_CLASS = "MixedSpansForCausalLM"
"""An architecture that nothing knows. vLLM takes the first of a list that it knows, llama.cpp's converter the first."""
_UNUSED = {"_name_or_path", "_model_name_or_path", "attn_implementation", "id2label", "label2id"}

Form = Callable[[PretrainedConfig, AttentionPlan], dict[str, Any]]


def architecture(config: PretrainedConfig) -> str:
    """The name under which a tool's entry stands: the model type, apart from Llama with biases."""
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        return "llama with biases"
    return str(config.model_type)


def window_of(plan: AttentionPlan) -> int | None:
    """The one window of a plan; None where it has none."""
    return next((span.size for span in plan if isinstance(span, WindowSpan)), None)


def layer_types(plan: AttentionPlan) -> list[str]:
    """The plan's layers as transformers names them."""
    return [FULL if isinstance(span, FullSpan) else SLIDING for span in plan]


def layer_positions(config: PretrainedConfig) -> list[Any]:
    """What a stock model does to the positions of each layer: its rope settings, or None for no positions."""
    types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    rope = getattr(config, "rope_parameters", None) or {}
    if SLIDING in rope or FULL in rope:
        return [rope.get(kind) for kind in types]
    if config.model_type in NO_FULL_POSITIONS:
        unused = None if config.sliding_window or config.model_type == "cohere2" else rope
        return [rope if config.sliding_window and kind == SLIDING else unused for kind in types]
    return [rope] * config.num_hidden_layers


def _base(config: PretrainedConfig, model_type: str, **changes: Any) -> dict[str, Any]:
    data = config.to_dict() | changes
    data["model_type"] = model_type
    data["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return {key: value for key, value in data.items() if key not in _UNUSED}


def _native(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    """The model's own class, whose layer types or window are set."""
    window = window_of(plan)
    changes: dict[str, Any] = {}
    if config.model_type in SWITCHED:
        changes["use_sliding_window"] = window is not None
        changes["sliding_window"] = window
    elif hasattr(config, "layer_types"):
        unused = None if config.model_type in NO_FULL_POSITIONS else config.max_position_embeddings
        changes["sliding_window"] = window or config.sliding_window or unused
    elif hasattr(config, "sliding_window"):
        changes["sliding_window"] = window
    if hasattr(config, "max_window_layers"):
        changes["max_window_layers"] = 0 if window else config.num_hidden_layers
    if hasattr(config, "layer_types"):
        changes["layer_types"] = layer_types(plan)
    return _base(config, config.model_type, **changes)


def _without_window(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    """A Llama under full attention; the class of Ministral needs a window, Mistral's does not."""
    model_type = "mistral" if config.model_type == "ministral" else config.model_type
    data = _base(config, model_type, sliding_window=None)
    return {key: value for key, value in data.items() if key != "layer_types"}


def _like_llama(config: PretrainedConfig, plan: AttentionPlan, model_type: str, **changes: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sliding = {"layer_types": layer_types(plan), "sliding_window": window_of(plan)}
    return _base(config, model_type, head_dim=head_dim, **sliding, **changes)


def _ministral(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    """A Llama as the class of transformers that has its layers and layer types; versions without it fail loudly."""
    return _like_llama(config, plan, "ministral")


def _mistral(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    """The same for tools that know it as Mistral with layer types, which transformers takes for Ministral."""
    return _like_llama(config, plan, "mistral")


def _smollm3(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    """A Llama with biases: SmolLM3 with rotary positions in every layer."""
    return _like_llama(
        config,
        plan,
        "smollm3",
        use_sliding_window=window_of(plan) is not None,
        no_rope_layers=[1] * config.num_hidden_layers,
        attention_bias=getattr(config, "attention_bias", True),
        mlp_bias=getattr(config, "mlp_bias", False),
    )


def _granite_swa(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    """A Llama as the class with sinks: Granite's own scales are one, and that of the scores is Llama's."""
    layers, theta = config.num_hidden_layers, config.rope_parameters["rope_theta"]
    rotary = getattr(config, "no_rope_layers", None) or [1] * layers
    data = _like_llama(
        config,
        plan,
        GRANITE_SWA,
        attention_bias=_has_biases(config, plan),
        mlp_bias=getattr(config, "mlp_bias", False),
        embedding_multiplier=1.0,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        layer_rope_theta=[theta if each else 0.0 for each in rotary],
    )
    data["attention_multiplier"] = data["head_dim"] ** -0.5
    return {key: value for key, value in data.items() if key not in _OTHERS}


def _has_biases(config: PretrainedConfig, plan: AttentionPlan) -> bool:
    """Whether the projections of granite_swa have biases, all four: those of the model, or the values of sinks."""
    return bool(sink_layers(plan)) or config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))


_OTHERS = {"use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval"}
"""What classes that become granite_swa say of their layers in their own words."""


def _olmo3(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    """OLMo 2 as OLMo 3: the same layers, and the same rotary positions in both kinds of layer."""
    rope = {kind: dict(config.rope_parameters) for kind in (SLIDING, FULL)}
    sliding = {"layer_types": layer_types(plan), "sliding_window": window_of(plan)}
    return _base(config, "olmo3", rope_parameters=rope, **sliding)


def _gpt_neo(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    kinds = ["global" if isinstance(span, FullSpan) else "local" for span in plan]
    window = window_of(plan) or config.window_size
    return _base(
        config, "gpt_neo", attention_types=[[[kind], 1] for kind in kinds], attention_layers=kinds, window_size=window
    )


def _unchanged(config: PretrainedConfig, plan: AttentionPlan) -> dict[str, Any]:
    return _base(config, config.model_type)


FORMS: dict[str, Form] = {
    "native": _native,
    "without window": _without_window,
    "ministral": _ministral,
    "mistral": _mistral,
    "smollm3": _smollm3,
    GRANITE_SWA: _granite_swa,
    "olmo3": _olmo3,
    "gpt_neo": _gpt_neo,
    "unchanged": _unchanged,
}
"""Form -> its function: (stock config, plan with at most one window) -> config.json."""


def form_weights(
    config: PretrainedConfig, plan: AttentionPlan, form: str, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a model in a form.

    Where it has biases that the model has not, they are zero (Qwen2 has three biases where SmolLM3 has four); in
    granite_swa two of them hold the values of constant sinks (`masformer.export.sinks`), and their logits have the name
    that they have there. These are written in float32, whatever the others are: tools round them as they load them.

    Args:
        config: the stock config of the model.
        plan: one span per layer.
        form: key of `FORMS`.
        weights: the model's weights by name.

    Raises:
        MasformerError: constant sinks of the plan are missing.
    """
    found = without_sink_weights(weights)
    if form == GRANITE_SWA and _has_biases(config, plan):
        _add_zeros(found, ("q_proj", "k_proj", "v_proj", "o_proj"))
    elif form == "smollm3" and config.model_type == "qwen2":
        _add_zeros(found, ("o_proj",))
    if form != GRANITE_SWA:
        return found
    check_fit("the model", sinks := by_layer(weights), plan, shapes(config))
    outputs = [name for name in found if name.endswith(".self_attn.o_proj.weight")]
    for layer, name in enumerate(sorted(outputs, key=lambda each: int(each.split(".")[-4]))):
        attention, output = name.removesuffix("o_proj.weight"), found[name]
        found[f"{attention}sinks"] = torch.full((config.num_attention_heads,), no_sink(output.dtype))
        if layer in sink_layers(plan):
            found[f"{attention}sinks"] = sinks[layer].logit.detach().float()
            added_to = {"v_proj": value_bias(sinks[layer]), "o_proj": output_bias(sinks[layer], output)}
            for part, added in added_to.items():
                bias = found[f"{attention}{part}.bias"]
                found[f"{attention}{part}.bias"] = (bias.detach().double() + added).float()
    return found


def _add_zeros(weights: dict[str, Tensor], parts: tuple[str, ...]) -> None:
    """Biases of projections that have none."""
    for name, weight in list(weights.items()):
        projection, _, kind = name.rpartition(".")
        if kind == "weight" and projection.rpartition(".self_attn.")[2] in parts:
            weights.setdefault(f"{projection}.bias", torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))


def for_vllm(data: dict[str, Any]) -> dict[str, Any]:
    """Names vLLM's transformers backend: not all of its own classes read layer types, or every bias (Qwen 3)."""
    if data["model_type"] not in ("mistral", "llama", "gpt2", "gpt_neox", GRANITE_SWA):
        data["architectures"] = [ANY_CLASS]
    elif data["model_type"] == "mistral" and "layer_types" in data:
        data["architectures"].insert(0, NO_CLASS)
    return data


def unknown_to_converters(data: dict[str, Any]) -> dict[str, Any]:
    """Names no class: transformers and mlx-lm choose theirs by the model type. llama.cpp's converter goes by this name,
    and would write full attention for classes whose layer types it does not read; by a name that it does not know it
    stops."""
    data["architectures"] = [ANY_CLASS]
    return data


def for_mlx_lm(data: dict[str, Any]) -> dict[str, Any]:
    """Adds what mlx-lm reads under other names: flat rope settings, and the pattern of the layers."""
    rope = data.get("rope_parameters") or {}
    full = rope.get(FULL) or rope
    if full:
        data["rope_theta"] = full["rope_theta"]
        if full["rope_type"] != "default" or data["model_type"] == "exaone4":
            data["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    types: list[str] = data.get("layer_types") or []
    if data["model_type"] in PERIODIC:
        data["sliding_window_pattern"] = period(types)
    elif data["model_type"] == "exaone4":
        data["sliding_window_pattern"] = "".join("G" if kind == FULL else "L" for kind in types)
    return data


PERIODIC = {"cohere2"}
"""Model types whose full layers mlx-lm finds by a period."""


def period(types: list[str]) -> int | None:
    """n where exactly every n-th layer is full, counted from the bottom; None where they follow no such rule."""
    if FULL not in types:
        return None
    first = types.index(FULL) + 1
    return first if types == [SLIDING if (i + 1) % first else FULL for i in range(len(types))] else None
