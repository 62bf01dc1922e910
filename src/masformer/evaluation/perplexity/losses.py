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

from masformer.data.pairs import IGNORED
from masformer.evaluation.perplexity.windows import Window
from masformer.evaluation.room import padded


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


def target_losses(model: PreTrainedModel, windows: Sequence[Window], chunk: int) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, in nats, where the input stands that predicts it.

    Args:
        model: a causal language model.
        windows: shorter ones are padded at their end.
        chunk: positions whose logits exist at the same time, at least one of each window.

    Returns:
        [windows, length] float64, 0 where nothing is predicted, and bool, where something is; on the CPU.
    """
    starts = [len(inputs) - len(targets) for inputs, targets in windows]
    tokens = padded([inputs for inputs, _ in windows], 0)
    wanted = padded([[IGNORED] * start + targets for start, (_, targets) in zip(starts, windows, strict=True)], IGNORED)
    length = tokens.shape[1]
    inputs, here = tokens.to(model.device), wanted.to(model.device)
    output = model.base_model(input_ids=inputs, use_cache=False, return_dict=True)
    first, step = min(starts), max(1, chunk // len(windows))
    losses = [torch.zeros(len(windows), first, device=model.device)]
    with prepared_base(model, output) as prepared:
        for start in range(first, length, step):
            prepared.positions = slice(start, start + step)
            logits = model(input_ids=inputs[:, prepared.positions], use_cache=False, return_dict=True).logits
            targets = here[:, prepared.positions].to(logits.device)
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
            )
            losses.append(loss.view_as(targets).to(model.device))
    return torch.cat(losses, dim=1).cpu().double(), wanted != IGNORED


def exp_or_inf(nll: float) -> float:
    """exp(nll), infinite where that is beyond a float."""
    return math.exp(nll) if nll < 709 else math.inf
