"""Whether a checkpoint's weights and the model they are for are the same set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from masformer.errors import MasformerError

SHOWN = 3
_COMPUTED = re.compile(
    r"(^|\.)(position_ids|inv_freq|cos_cached|sin_cached|masked_bias)$"
    r"|\.(attn|attention|self_attn)\.bias$|\.rotary\w*\.\w+$"
)
"""Names of what a model computes by itself and older versions saved: position tables and causal masks."""


def check_weights(
    where: object, missing: Iterable[str], left_over: Iterable[str], misfits: Iterable[tuple[str, Any, Any]] = ()
) -> None:
    """Refuses weights that are not those of the model; what it computes by itself may be left over.

    Args:
        where: what the weights were read from, for the message.
        missing: names of the model's weights that were not there.
        left_over: names that are of no weight of the model.
        misfits: names of weights whose shape there, which comes second, is not that of the model, the third.

    Raises:
        MasformerError: a weight is missing, left over or of another shape; the message names the first few.
    """
    lists = {
        "missing from it": sorted(set(missing)),
        "left over in it": sorted(name for name in set(left_over) if not _COMPUTED.search(name)),
        "of another shape": sorted(f"{name} {[*there]} instead of {[*own]}" for name, there, own in misfits),
    }
    if any(lists.values()):
        raise MasformerError(
            f"{where} does not hold the weights of its model: "
            + "; ".join(f"{words} {_listed(names)}" for words, names in lists.items() if names)
        )


PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values are what they say; those of quantized weights are codes."""


def check_runs(where: object, model: Any) -> None:
    """Refuses a model of damaged weights or settings, by its weights and by one pass over two tokens.

    Args:
        where: what the model was read from, for the message.
        model: a causal language model in evaluation mode.

    Raises:
        MasformerError: a weight holds what is no number, the settings do not go together, or the logits are no numbers.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        plain = tensor.dtype in PLAIN and tensor.numel() and not tensor.is_meta  # meta: offloaded by accelerate
        if plain and not all(end.isfinite() for end in tensor.aminmax()):
            raise MasformerError(f"{where} is damaged: {name} holds what is no number")
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = torch.tensor([[0, rows - 1]], device=None if model.device.type == "meta" else model.device)
    try:
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
    except Exception as error:  # each class fails in its own way on settings that do not go together
        raise MasformerError(f"{where} does not run: {' '.join(str(error).split())}") from error
    if not bool(logits.isfinite().all()):
        raise MasformerError(f"{where} gives logits that are no numbers: its settings or its weights are damaged")


def load_weights(model: Any, weights: Mapping[str, Tensor], where: object) -> None:
    """Puts all weights of a model in place, without a copy, and ties those that are tied; errors as `check_weights`."""
    wrong = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    named = list(model.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for name, weight in named if name in weights}
    check_weights(where, (name for name, weight in named if id(weight) not in loaded), wrong.unexpected_keys)


def load_trained(model: Any, weights: Mapping[str, Tensor], names: Iterable[str], where: object) -> None:
    """Copies trained weights into a model that has the others; these and no others. Errors as `check_weights`."""
    names = set(names)
    check_weights(where, names - weights.keys(), weights.keys() - names)
    model.load_state_dict(weights, strict=False)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ("is " if len(names) == 1 else "are ") + ", ".join(names[:SHOWN]) + more
