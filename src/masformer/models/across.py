"""A model across devices: within `across_devices`, each of them is given a slice of every sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from masformer.errors import MasformerError
from masformer.models.architecture import decoder_layers, running_layers
from masformer.models.bridge import MESH
from masformer.models.wrappers import bare_model


@contextmanager
def across_devices(model: PreTrainedModel, mesh: DeviceMesh) -> Iterator[None]:
    """Within it, the model is given a slice of each sequence, and the devices of a mesh see the whole one together.

    All of them make the same passes, with slices of one size; device i has slice i. Positions that are not given count
    on from slice to slice, so that of packed documents they must be. Labels must be shifted before they are cut
    (`shift_labels`): the last token of a slice predicts the first one of the next.

    Args:
        model: a model with a plan.
        mesh: of one dimension, see `masformer.parallel.forward.sequence_mesh`.

    Raises:
        MasformerError: the model has no plan, its layers are compiled, or its loss is none of each token alone.
    """
    model = bare_model(model)
    check_slices(model)
    owner, _ = running_layers(model.base_model)
    before = vars(model).get("_loss_function")
    loss = model.loss_function
    setattr(owner, MESH, mesh)
    model.loss_function = partial(_loss_of_slice, loss)
    try:
        yield
    finally:
        delattr(owner, MESH)
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


def check_slices(model: PreTrainedModel) -> None:
    """Raises MasformerError where `across_devices` does."""
    if any(layer._compiled_call_impl is not None for layer in decoder_layers(model.base_model)):
        raise MasformerError("compiled layers cannot share a sequence with other devices; do not compile them")
    if getattr(model.config, "output_router_logits", False):
        raise MasformerError(
            "the loss that balances experts is one of all tokens together, which no device has; set "
            "output_router_logits to false"
        )


def _loss_of_slice(
    loss: Callable[..., Tensor], *args: Any, shift_labels: Tensor | None = None, **kwargs: Any
) -> Tensor:
    check_shifted(shift_labels)
    return loss(*args, shift_labels=shift_labels, **kwargs)


def check_shifted(shift_labels: Tensor | None) -> None:
    """Raises MasformerError where labels of a slice are not shifted."""
    if shift_labels is None:
        raise MasformerError(
            "labels of a slice lack that of its last token, which is in the next slice; pass shift_labels, shifted "
            "before the sequence is cut"
        )


def is_sliced(model: nn.Module) -> bool:
    """Whether a model is within `across_devices`."""
    return any(hasattr(module, MESH) for module in model.modules())
