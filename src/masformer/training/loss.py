"""The training loss without logits of all positions: exact, in chunks of positions, for any head.

Logits of 8192 positions and 49152 words are 1.5 GiB in float32, and a backward pass holds several such tensors. Here
the model's own output layer (bias, soft cap, scale and all) runs on some positions at a time, and again in the backward
pass, so that one chunk of logits exists at any time. Where the head is a plain linear map in one dtype, torch's
`linear_cross_entropy` does the same without running it twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from masformer.data.pairs import IGNORED
from masformer.defaults import LOSS_CHUNK
from masformer.errors import check_int
from masformer.evaluation.perplexity import prepared_base
from masformer.models.across import check_shifted, is_sliced
from masformer.models.wrappers import bare_model

LINEAR_CROSS_ENTROPY = getattr(nn.functional, "linear_cross_entropy", None)


def use_chunked_loss(model: PreTrainedModel, chunk: int = LOSS_CHUNK) -> PreTrainedModel:
    """Changes, in place, what the model does when it is given `labels` or `shift_labels`; without them nothing changes.

    It then returns the loss and no logits:

    - `labels` [batch, length]: position i predicts label i + 1, as everywhere in transformers;
    - `shift_labels` [batch, length]: position i predicts label i. -100 predicts nothing.
    - `num_items_in_batch`: the sum of the losses is divided by it; by default by the number of predictions.
    - `per_token=True`: the loss of each position, float32 [batch, length], 0 where nothing is predicted; `loss_chunk`
      then takes the place of `chunk`.

    Where the loss has further terms, or the head cannot be run apart from the base, the logits of all positions are
    made as before, and a warning says why.

    Args:
        model: a causal language model.
        chunk: positions whose logits exist at the same time.

    Returns:
        The same model.
    """
    check_int("loss chunk", chunk, 1)
    outer, model = model, bare_model(model)
    model.masformer_loss = _Loss(chunk)  # type: ignore[assignment]
    if getattr(model.config, "output_router_logits", False):
        model.masformer_loss.give_up("it adds a term that balances experts")
    elif model.base_model is model:
        model.masformer_loss.give_up(f"{type(model).__name__} has no head apart from its base model")
    else:
        model.masformer_loss.choose(model)
    model.accepts_loss_kwargs = True  # type: ignore[assignment]
    model.forward = partial(_forward, model)  # type: ignore[method-assign]
    return outer


def compile_loss(model: PreTrainedModel) -> None:
    """Compiles what `use_chunked_loss` does with the logits of a chunk: they are read twice, not ten times."""
    model.masformer_loss.cross_entropy = torch.compile(_cross_entropy, dynamic=True)  # type: ignore[union-attr]


class _Loss:
    """How the loss of one model is computed: in chunks, through torch's own function, or from all logits."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.way = ""
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] = _cross_entropy

    @property
    def is_chunked(self) -> bool:
        """Whether the logits of some positions alone exist at the same time."""
        return self.way != "plain"

    def give_up(self, reason: str) -> None:
        self.way = "plain"
        warnings.warn(f"the training loss needs the logits of all positions at once: {reason}", stacklevel=3)

    def choose(self, model: Any) -> None:
        """Tries the head on one position, before the model is wrapped: FSDP counts the calls of every module."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
                output = model.base_model(input_ids=token, use_cache=False, return_dict=True)
                hidden = output.last_hidden_state[0]
                # large, so that a soft cap shows, whatever the first token's own state is
                hidden = torch.linspace(-100, 100, hidden.shape[-1]).to(hidden).expand_as(hidden)
                logits = _logits(model, output, hidden)
                head = model.get_output_embeddings()
                linear = type(head) is nn.Linear and torch.equal(logits, head(hidden))
        except Exception as error:  # heads fail in their own ways
            self.give_up(f"the head of {type(model).__name__} cannot be run apart from its base ({error})")
        else:
            self.way = "linear" if linear else "chunked"
        finally:
            model.train(training)


def _forward(
    model: Any,
    input_ids: Tensor | None = None,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    per_token: bool = False,
    loss_chunk: int | None = None,
    **kwargs: Any,
) -> Any:
    """Takes the place of the model's forward."""
    if labels is None and shift_labels is None:
        return type(model).forward(model, input_ids, *args, **kwargs)
    if shift_labels is None:
        if is_sliced(model):
            check_shifted(shift_labels)
        assert labels is not None
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    loss: _Loss = model.masformer_loss
    kwargs = {"use_cache": False} | kwargs | {"return_dict": True}
    extra = None
    if loss.is_chunked:
        output = model.base_model(input_ids, *args, **kwargs)
    if not loss.is_chunked:
        losses, extra = _plain(model, input_ids, args, kwargs, shift_labels)
    elif not per_token and loss.way == "linear" and _suits(model, output.last_hidden_state):
        total = _linear(model, output.last_hidden_state, shift_labels, loss.chunk)
        return CausalLMOutput(loss=_mean(total, shift_labels, num_items_in_batch))
    else:
        chunk = loss.chunk if loss_chunk is None else loss_chunk
        losses = _chunked(model, output, shift_labels, chunk, loss.cross_entropy)
    if per_token:
        return CausalLMOutput(loss=losses.view_as(shift_labels))
    mean = _mean(losses.sum(), shift_labels, num_items_in_batch)
    return CausalLMOutput(loss=mean if extra is None else mean + extra)


def _mean(total: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
    """A batch without anything to predict has the loss 0."""
    count = (targets != IGNORED).sum() if items is None else torch.as_tensor(items, device=total.device)
    return total / count.clamp(min=1)


def _plain(
    model: Any, input_ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The losses from the logits of all positions, and what the model adds to their mean."""
    output = type(model).forward(model, input_ids, *args, **kwargs)
    losses = _cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    extra = getattr(output, "aux_loss", None)
    return losses, None if extra is None else extra * model.router_aux_loss_coef


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[positions], in float32 at least."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(exact, targets.to(exact.device), ignore_index=IGNORED, reduction="none")


def _logits(model: Any, output: Any, hidden: Tensor) -> Tensor:
    """The model's own head on hidden states [positions, hidden_size]: [positions, vocabulary]."""
    with prepared_base(model, type(output)(**{**output, "last_hidden_state": hidden[None]})) as prepared:
        prepared.positions = slice(None)
        stand_in = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits: Tensor = type(model).forward(model, stand_in, use_cache=False, return_dict=True).logits[0]
    return logits


def _chunked(
    model: Any, output: Any, targets: Tensor, chunk: int, cross_entropy: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """[batch * length] losses; the logits of a chunk are made anew in the backward pass."""

    def losses(hidden: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(_logits(model, output, hidden), wanted)

    found = []
    for hidden, wanted in zip(
        output.last_hidden_state.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True
    ):
        if torch.is_grad_enabled():
            found.append(checkpoint(losses, hidden, wanted, use_reentrant=False))
        else:
            found.append(losses(hidden, wanted))
    return torch.cat(found)


def _suits(model: Any, hidden: Tensor) -> bool:
    """Whether torch's `linear_cross_entropy` computes the very same loss, for a head that is a plain linear map.

    In 16 bits it returns a rounded loss, and it takes no part in autocast, so it serves float32 and float64.
    """
    weight = model.get_output_embeddings().weight
    exact = hidden.dtype == weight.dtype and hidden.dtype in (torch.float32, torch.float64)
    return LINEAR_CROSS_ENTROPY is not None and exact and not torch.is_autocast_enabled(hidden.device.type)


def _linear(model: Any, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """The sum of the losses."""
    from torch.nn import LinearCrossEntropyOptions

    assert LINEAR_CROSS_ENTROPY is not None
    head = model.get_output_embeddings()
    total: Tensor = LINEAR_CROSS_ENTROPY(
        hidden.flatten(0, 1),
        head.weight,
        targets.flatten(),
        linear_bias=head.bias,
        reduction="sum",
        ignore_index=IGNORED,
        options=LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None),
    )
    return total
