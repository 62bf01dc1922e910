"""Rotary positions whose table depends on the length of the whole text: LongRoPE (Phi-3) and dynamic NTK.

transformers chooses the table anew in each forward pass, by its highest position, and dynamic NTK also by what ran
before. Here the table depends on the text alone: earlier texts are forgotten, and a prompt that is read in pieces has
the table of the whole prompt from its first piece on. While tokens are generated one by one, the table changes where
it does in transformers.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

_length: ContextVar[int] = ContextVar("length_of_the_text", default=0)


def table(config: PretrainedConfig, length: int) -> tuple[int, ...]:
    """Names the rotary tables that a text of so many positions has; always () where they do not depend on it."""
    return tuple(
        int(length > rope["original_max_position_embeddings"])
        if rope["rope_type"] == "longrope"
        else max(length, config.max_position_embeddings)
        for rope in _ropes(config)
    )


def depends_on_length(config: PretrainedConfig) -> bool:
    """Whether texts of different lengths have different rotary tables."""
    return bool(_ropes(config))


def announce(base: Any, length: int) -> None:
    """Until `end`, the rotary modules of a model have the table of a text of at least so many positions.

    Args:
        base: the module that holds them; its config says that they depend on the length.
        length: 0 where the positions of a pass say it all.
    """
    _length.set(length)
    for module in base.modules():
        if hasattr(module, "rope_type") and not hasattr(module, "masformer_rotary"):
            module.register_forward_pre_hook(_before_rotary, with_kwargs=True)
            module.register_forward_hook(_after_rotary, with_kwargs=True)
            module.masformer_rotary = True


def end() -> None:
    """The announced length is that of no pass any more."""
    _length.set(0)


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [rope for rope in parameters.values() if isinstance(rope, dict)]
    return [rope for rope in nested or [parameters] if _depends(rope.get("rope_type", ""))]


def _depends(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type


def _before_rotary(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Appends the last position of the announced length, which the table is then chosen by."""
    types = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    for kind, rope_type in types.items():
        if "dynamic" in rope_type:
            _forget(module, f"{kind}_" if kind else "")
    length = _length.get()
    if not length:
        return None
    positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    longer = torch.cat([positions, torch.full_like(positions[..., :1], length - 1)], -1)
    if "position_ids" in kwargs:
        return args, kwargs | {"position_ids": longer}
    return (args[0], longer, *args[2:]), kwargs


def _after_rotary(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Drops what `_before_rotary` appended: of cosines and sines, each [..., length, dim]."""
    if not _length.get():
        return output
    return tuple(part[..., :-1, :] for part in output) if isinstance(output, tuple) else output[..., :-1, :]


def _forget(module: Any, prefix: str) -> None:
    """What longer texts before this one left in a module of dynamic NTK."""
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
    original = getattr(module, f"{prefix}original_inv_freq")
    setattr(module, f"{prefix}inv_freq", original.to(getattr(module, f"{prefix}inv_freq").device))
