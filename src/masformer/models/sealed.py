"""The config class of sealed checkpoints (`sealing`), by itself: registering it imports nothing but `AutoConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

SEAL = "masformer"
"""The `model_type` of sealed checkpoints."""


class SealedConfig(PretrainedConfig):
    """What `AutoConfig` knows as `masformer`; reading one gives the model's own config, with the plan."""

    model_type = SEAL

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """The config of the model, sealed in memory, and what is left of the options if those are asked for.

        Raises:
            MasformerError: the seal is damaged, or another attention is asked for.
        """
        from masformer.models.sealing import check_attention, open_seal, seal_config

        check_attention(kwargs)
        data, plan = open_seal(config_dict)
        read = CONFIG_MAPPING[data["model_type"]].from_dict(data, **kwargs)
        config: Any = read[0] if isinstance(read, tuple) else read
        seal_config(config, plan)
        config._attn_implementation = SEAL
        config.architectures = [SEAL]  # other programs choose by it what to run; a model made of the config has its own
        return read

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: a copy of this module beside a checkpoint is not wanted."""


AutoConfig.register(SEAL, SealedConfig, exist_ok=True)
