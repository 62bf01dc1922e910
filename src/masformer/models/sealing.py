"""The seal on a config: stock transformers refuses a checkpoint with a plan instead of running full attention.

A sealed config.json has the `model_type` `masformer`, which AutoConfig does not know, and its `layer_types` are
spans, which the validation of every config class refuses. `unseal` takes the seal off. The true values stay under
names of their own: given a nested `model_type` of its own, a config class would take that part for the whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from masformer.errors import MasformerError
from masformer.plan import AttentionPlan

SEAL = "masformer"
_HIDDEN = ("model_type", "architectures", "layer_types")


def seal_config(config: PretrainedConfig, plan: AttentionPlan) -> None:
    """From now on, whatever writes this config to a file writes it sealed, with the plan."""
    config.masformer = plan.to_dict()
    config.__class__ = _sealing_class(type(config))  # type: ignore[arg-type]


def is_sealed(config: PretrainedConfig) -> bool:
    """Whether the config carries a plan."""
    return getattr(type(config), "seals", False)


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config without a plan: what transformers itself would have read, positions added since included."""
    stock: Any = type(config).__mro__[1] if is_sealed(config) else type(config)
    return stock.from_dict({key: value for key, value in config.to_dict().items() if key != SEAL})  # type: ignore[no-any-return]


@cache
def _sealing_class(config_class: Any) -> Any:
    if getattr(config_class, "seals", False):
        return config_class

    def to_json_string(self: Any, *args: Any, **kwargs: Any) -> str:
        data = json.loads(config_class.to_json_string(self, *args, **kwargs))
        plan = AttentionPlan.from_dict(data[SEAL])
        data[SEAL] = plan.to_dict() | {f"stock_{key}": data.get(key) for key in _HIDDEN}
        data["model_type"] = SEAL
        data["architectures"] = [f"{SEAL}: load with masformer.load_model"]
        data["layer_types"] = [f"{SEAL}:{span}" for span in plan]
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    return type(config_class.__name__, (config_class,), {"to_json_string": to_json_string, "seals": True})


def unseal(data: Mapping[str, Any]) -> tuple[PretrainedConfig, AttentionPlan]:
    """The stock config and the plan inside a sealed config.json.

    Raises:
        MasformerError: the seal is damaged.
    """
    seal = data[SEAL] if isinstance(data.get(SEAL), Mapping) else {}
    plan = AttentionPlan.from_dict(seal)
    stock = {key: seal.get(f"stock_{key}") for key in _HIDDEN}
    if not isinstance(stock["model_type"], str):
        raise MasformerError(f"the sealed config.json lacks stock_model_type under {SEAL!r}")
    data = {key: value for key, value in data.items() if key not in (SEAL, *_HIDDEN)}
    data |= {key: value for key, value in stock.items() if value is not None}
    return AutoConfig.for_model(data.pop("model_type"), **data), plan
