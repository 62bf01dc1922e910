"""The seal on a config: no checkpoint with a plan runs without its plan, and whatever runs no model reads it.

A sealed config.json has the `model_type` `masformer`, which transformers alone does not know, and in place of the
number of layers a sentence, which the config class of no model takes; the true values stay under names of their own
(given a nested `model_type`, a config class would take that part for the whole). Tokenizers, and trainers that look
at a checkpoint's version, ask for neither. Once masformer is imported, or through the module beside config.json where
remote code is trusted, `AutoConfig` takes the seal off and the `AutoModel` classes put the plan to work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from masformer.errors import MasformerError
from masformer.models.native import native_plan as native_plan  # it stood here, and may be imported from here
from masformer.models.sealed import SEAL as SEAL
from masformer.models.sealed import SealedConfig as SealedConfig
from masformer.models.sinks import is_sink, sink_layers
from masformer.models.weights import check_weights
from masformer.plan import AttentionPlan

CODE_FILE = "masformer_checkpoint.py"
"""The module beside a sealed config.json."""
_SENTENCE = "needs its attention plan: import masformer, then AutoModelForCausalLM or masformer.load_model reads it"
_CODE = f'''"""This checkpoint {_SENTENCE}.

Where masformer is installed, `trust_remote_code=True` does the same through this file.
"""

from masformer.models.sealing import SealedConfig  # noqa: F401
'''
_HIDDEN = ("model_type", "architectures", "layer_types", "auto_map")
_STOCK = "stock_"
_AUTO_CLASSES: tuple[Any, ...] = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)


def seal_config(config: PretrainedConfig, plan: AttentionPlan) -> None:
    """From now on, whatever writes this config to a file writes it sealed, with the plan."""
    config.masformer = plan.to_dict()
    config.__class__ = _sealing_class(type(config))  # type: ignore[arg-type]


def is_sealed(config: PretrainedConfig) -> bool:
    """Whether the config carries a plan."""
    return isinstance(config, _Sealing) and getattr(config, SEAL, None) is not None


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config without a plan: what transformers itself would have read, positions added since included."""
    stock: Any = config.stock if isinstance(config, _Sealing) else type(config)
    return stock.from_dict({key: value for key, value in config.to_dict().items() if key != SEAL})  # type: ignore[no-any-return]


def kv_heads(config: PretrainedConfig) -> int | None:
    """KV heads of each layer of a model, as its class makes them; None where they are not alike, or not known."""
    if isinstance(config, _Sealing):  # only read, so the values are shared: a search asks this before every pass
        stock = object.__new__(config.stock)
        vars(stock).update({key: value for key, value in vars(config).items() if key != SEAL})
        config = stock
    try:
        return native_plan(config).kv_heads
    except MasformerError:
        return None


class _Sealing:
    """What a config class becomes in front of itself: it writes sealed files, and reads sealed and stock ones."""

    stock: Any

    def __reduce__(self) -> Any:  # the class is made at run time, so no pickle finds it by name
        return _unpickled, (self.stock,), dict(self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {super().to_json_string()}"  # type: ignore[misc]

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        text: str = super().to_json_string(*args, **kwargs)  # type: ignore[misc]
        if not is_sealed(self):  # type: ignore[arg-type]
            return text
        data = json.loads(text)
        layers = self.stock.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        hidden = {f"{_STOCK}{key}": data.pop(key) for key in (*_HIDDEN, layers) if key in data}
        data[SEAL] = AttentionPlan.from_dict(data[SEAL]).to_dict() | hidden
        data |= {"model_type": SEAL, "architectures": [SEAL], layers: f"this checkpoint {_SENTENCE}"}
        data["auto_map"] = {"AutoConfig": f"{Path(CODE_FILE).stem}.{SealedConfig.__name__}"}
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        if is_sealed(self):  # type: ignore[arg-type]
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / CODE_FILE).write_text(_CODE, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        if config_dict.get("model_type") == SEAL:
            return SealedConfig.from_dict(config_dict, **kwargs)
        if SEAL not in config_dict:
            return cls.stock.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        return cls.from_dict(cls.stock._dict_from_json_file(json_file))


@cache
def _sealing_class(config_class: Any) -> Any:
    if issubclass(config_class, _Sealing):
        return config_class
    sealing = type(config_class.__name__, (_Sealing, config_class), {"stock": config_class})
    for auto in _AUTO_CLASSES:
        if config_class in auto._model_mapping:
            names = {"auto": auto, "stock": config_class}
            auto.register(sealing, type(_PlannedModel.__name__, (_PlannedModel,), names), exist_ok=True)
    return sealing


def _unpickled(config_class: Any) -> Any:
    sealing = _sealing_class(config_class)
    return sealing.__new__(sealing)


class _PlannedModel:
    """What an Auto class finds for a sealed config: the class it has for the stock config, with the plan at work."""

    auto: Any
    stock: Any

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        return cls._build("from_pretrained", source, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._build("_from_config", config, **kwargs)

    @classmethod
    def _build(cls, how: str, *args: Any, **kwargs: Any) -> Any:
        from masformer.models.bridge import apply_plan, class_with_sinks  # here, for the bridge imports this module

        check_attention(kwargs)
        asked = kwargs.pop("output_loading_info", False)
        if how == "from_pretrained":
            kwargs["output_loading_info"] = True
        plan = AttentionPlan.from_dict((kwargs["config"] if "config" in kwargs else args[0]).masformer)
        model_class = cls.auto._model_mapping[cls.stock]
        made = getattr(class_with_sinks(model_class) if sink_layers(plan) else model_class, how)(*args, **kwargs)
        model, *others = made if isinstance(made, tuple) else (made,)
        if others and cls.auto is AutoModelForCausalLM:  # others have a part that checkpoints lack
            check_weights(args[0], others[0]["missing_keys"], others[0]["unexpected_keys"])
        elif others:
            check_weights(args[0], filter(is_sink, others[0]["missing_keys"]), ())
        model.config.architectures = [type(model).__name__]
        apply_plan(model, plan)
        return (model, *others) if asked else model


def check_attention(options: Mapping[str, Any]) -> None:
    """Raises MasformerError where options of transformers ask for another attention than that of the plan."""
    asked = options.get("attn_implementation")
    if asked not in (None, SEAL):
        raise MasformerError(
            f"a checkpoint with a plan has an attention of its own; attn_implementation={asked!r} must go"
        )


def unseal(data: Mapping[str, Any]) -> tuple[PretrainedConfig, AttentionPlan]:
    """The stock config and the plan inside a sealed config.json.

    Raises:
        MasformerError: the seal is damaged.
    """
    data, plan = open_seal(data)
    return AutoConfig.for_model(data.pop("model_type"), **data), plan


def open_seal(data: Mapping[str, Any]) -> tuple[dict[str, Any], AttentionPlan]:
    """The stock config.json and the plan inside a sealed one; raises MasformerError where it is damaged."""
    seal = data[SEAL] if isinstance(data.get(SEAL), Mapping) else {}
    plan = AttentionPlan.from_dict(seal)
    stock = {key.removeprefix(_STOCK): value for key, value in seal.items() if key.startswith(_STOCK)}
    if not isinstance(stock.get("model_type"), str):
        raise MasformerError(f"the sealed config.json lacks stock_model_type under {SEAL!r}")
    if stock["model_type"] not in CONFIG_MAPPING:
        raise MasformerError(
            f"transformers knows no model type {stock['model_type']!r} (stock_model_type under {SEAL!r})"
        )
    data = {key: value for key, value in data.items() if key not in (SEAL, *_HIDDEN, *stock)}
    return data | {key: value for key, value in stock.items() if value is not None}, plan
