"""What a CUDA graph has taken of a model: weights by their addresses, and what Python decides by."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

_QUIET_HOOKS = ("masformer.", "transformers.utils.output_capturing")
"""Of modules whose hooks have nothing to do in a pass that gives logits alone."""
_FIXED = ("torch.nn.", "transformers.")
"""Of modules whose parts compute by nothing but weights, parts and the config, attention aside."""
_OF_TORCH = set(vars(nn.Module()))


class Snapshot:
    """The state of a model, against which it can be held in less time than a token takes.

    Seen are weights, buffers and parts that are others or lie elsewhere; adapters that are added, chosen, merged or
    switched off; settings of the config, of attention and of parts of other packages; and hooks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        parts = list(model.modules())
        self._dicts: list[dict[Any, Any]] = [vars(model.config)]
        self._lists: list[Any] = []
        for part in parts:
            self._dicts += [x for x in (part._parameters, part._buffers, part._modules) if x]
            if hasattr(part, "masformer_span") or not type(part).__module__.startswith(_FIXED):
                own = [value for name, value in vars(part).items() if name not in _OF_TORCH]
                self._dicts += [vars(part), *(value for value in own if isinstance(value, dict))]
                self._lists += [value for value in own if isinstance(value, (list, set))]
        self._hooks = [hooks for part in parts[1:] for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._values, self._copies = self._now(), [copy.copy(value) for value in self._lists]
        self._weights = [value for value in self._values if isinstance(value, Tensor)]
        self._places = self._where()

    @property
    def is_heard(self) -> bool:
        """Whether others hear of the passes of parts of the model. Hooks of the whole are called around a graph."""
        return any(
            not getattr(hook, "__module__", "").startswith(_QUIET_HOOKS)
            for hooks in self._hooks
            if hooks
            for hook in hooks.values()
        )

    def still_holds(self) -> bool:
        """Whether the model is what it was."""
        try:
            same = self._now() == self._values and self._lists == self._copies
        except (RuntimeError, ValueError):  # other tensors, which Python cannot compare
            return False
        return same and self._where() == self._places and not self.is_heard

    def _now(self) -> list[Any]:
        return [value for held in self._dicts for value in held.values()]

    def _where(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._weights))
