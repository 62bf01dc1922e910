"""The loss of each token that windows predict; logits exist for a few hundred positions at a time, never for a whole
window, so that a long window with a large vocabulary fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from masformer.evaluation.perplexity.windows import Window


class _Prepared(nn.Module):
    """Stands in for a model's base: returns what the base returned, with some of its hidden states."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.positions = slice(0)

    @property
    def decoder(self) -> _Prepared:
        """What some heads call in place of the base (OPT)."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.output.last_hidden_state[:, self.positions]
        return type(self.output)(**{**self.output, "last_hidden_state": hidden})


@contextmanager
def prepared_base(model: PreTrainedModel, output: Any) -> Iterator[_Prepared]:
    """Puts a stand-in where the model's base is: calling the model then runs its own head, whatever that does.

    The submodule is exchanged, not its forward, so that no hook of the base runs.
    """
    name, base = model.base_model_prefix, model.base_model
    prepared = _Prepared(output)
    setattr(model, name, prepared)
    try:
        yield prepared
    finally:
        setattr(model, name, base)


def target_losses(model: PreTrainedModel, windows: Sequence[Window], chunk: int) -> Tensor:
    """Negative log-likelihood of each target, in nats.

    Args:
        model: a causal language model.
        windows: all with as many inputs, and as many targets, as the first.
        chunk: positions whose logits exist at the same time, at least one of each window.

    Returns:
        [windows, targets], float64, on the CPU.
    """
    tokens = torch.tensor([inputs for inputs, _ in windows], device=model.device)
    wanted = torch.tensor([targets for _, targets in windows], device=model.device)
    output = model.base_model(input_ids=tokens, use_cache=False, return_dict=True)
    length, count = tokens.shape[1], wanted.shape[1]
    first, step = length - count, max(1, chunk // len(windows))
    losses = []
    with prepared_base(model, output) as prepared:
        for start in range(0, count, step):
            prepared.positions = slice(first + start, min(first + start + step, length))
            logits = model(input_ids=tokens[:, prepared.positions], use_cache=False, return_dict=True).logits
            here = wanted[:, start : start + step].to(logits.device)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), here.flatten(), reduction="none")
            losses.append(loss.view_as(here))
    return torch.cat(losses, dim=1).cpu().double()


def exp_or_inf(nll: float) -> float:
    """exp(nll), infinite where that is beyond a float."""
    return math.exp(nll) if nll < 709 else math.inf
