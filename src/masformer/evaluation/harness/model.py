"""`--model masformer` for lm-evaluation-harness: its own `hf` model, loaded by masformer and with a plan.

What is asked, how it is cut into tokens and what is counted are `HFLM`'s; what it runs is a transformers model under
its plan, whose `generate` takes a span cache. lm-eval finds the class by the entry point `lm_eval.models`; versions
that read no entry points (to 0.4.13) find it once this module is imported.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import masformer
from masformer.attention import BACKENDS
from masformer.data.tokens import open_ended
from masformer.errors import MasformerError, check_int, shown
from masformer.models.checkpoint import fit_tokenizer, load_model
from masformer.models.positions import parse_max_positions, position_limit
from masformer.plan import PlanSource

DTYPES = ("auto", "float32", "bfloat16", "float16")
OWN = ("pretrained", "plan", "full", "placement", "local", "max_positions", "dtype", "backend")
SHARED = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "device",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "tokenizer",
    "truncation",
)
"""Options of `hf` that mean the same here. Its others say how weights are loaded, which masformer does itself."""


@register_model("masformer")
class MasformerLM(HFLM):  # type: ignore[misc]
    """A causal language model with mixed spans, as lm-evaluation-harness asks it.

    With full attention in every layer it gives the numbers of lm-eval's `hf` model.

    Args:
        pretrained: hub id, folder (stock, or written by `save_model`) or .gguf file.
        plan: the plan, as text or file; by default what the checkpoint carries, or the spans it was trained with.
        full: number of full layers, in place of `plan`.
        placement: which layers are full (see `place_full_layers`): `middle` by default.
        local: span of the other layers, as text.
        max_positions: N or N:METHOD, positions beyond the trained length.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        backend: implementation of attention, see `masformer.attend`. (That of `hf`, causal or seq2seq, is causal here.)
        device: cpu, cuda, cuda:1, ...; by default CUDA where there is one.
        max_length: most input tokens of a request; by default all positions of the model.
        batch_size: requests that run together, or auto.
        options: those of `SHARED`, as `HFLM` takes them. Others of `HFLM` may be given with the value that they have
            anyway.

    Raises:
        MasformerError: an option that is unknown or cannot be honoured, a model that cannot be read or has no
            tokenizer, or a plan or length that does not fit it.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        plan: PlanSource | None = None,
        full: int | None = None,
        placement: Any = None,
        local: str | None = None,
        max_positions: int | str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if not isinstance(pretrained, str):
            raise MasformerError(
                "pretrained must be a hub id, a folder or a .gguf file; a loaded model is for lm-eval's HFLM"
            )
        if dtype not in DTYPES:
            raise MasformerError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
        if backend not in BACKENDS:
            raise MasformerError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
        if not re.fullmatch(r"[1-9]\d{0,9}|auto(:\d{0,9}\.?\d{1,9})?", shown(batch_size).strip("'")):
            raise MasformerError(
                f"batch_size {shown(batch_size)} is not allowed; allowed: a whole number from 1, auto, auto:N"
            )
        if max_length is not None:
            check_int("max_length", max_length, 1)
        shared = _shared_options(options)
        positions, method = (None, None) if max_positions is None else parse_max_positions(str(max_positions))
        self._load_options: dict[str, Any] = {
            "plan": plan,
            "full": full,
            "placement": placement,
            "local": local,
            "max_positions": positions,
            "position_method": method,
            "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
            "backend": backend,
        }
        super().__init__(
            pretrained,
            backend="causal",
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            max_length=max_length,
            batch_size=batch_size,
            **shared,
        )
        limit = position_limit(self.config)
        if max_length is not None and limit is not None and max_length > limit:
            raise MasformerError(
                f"max_length {max_length} is beyond the {limit} positions of the model; allowed: 1 to {limit}, "
                f"or extend the model with max_positions={max_length}"
            )

    def _get_config(self, pretrained: str, **options: Any) -> None:
        """Loads everything: `load_model` gives model, config and tokenizer at once."""
        self._model, self._own_tokenizer = load_model(pretrained, **self._load_options)
        self._config = self._model.config

    def _create_tokenizer(self, pretrained: str, tokenizer: Any, **options: Any) -> None:
        own = self._own_tokenizer
        if tokenizer is None and own is None:
            raise MasformerError(f"{pretrained} has no tokenizer; give tokenizer=FOLDER")
        if tokenizer is None and options.get("add_bos_token") is not None:
            own.add_bos_token = options["add_bos_token"]
        super()._create_tokenizer(pretrained, own if tokenizer is None else tokenizer, **options)
        self.tokenizer: Any = open_ended(self.tokenizer)
        fit_tokenizer(self.tokenizer, self._model)

    def _create_model(self, *args: Any, **options: Any) -> None:
        """Puts the loaded model where it runs; its passes keep no cache, but `generate` asks for one."""
        self._model.to(self._device)
        self._model.config.use_cache = False

    @property
    def max_length(self) -> int:
        """The most input tokens of a request."""
        own = position_limit(self.config)
        return self._max_length or own or super().max_length  # type: ignore[no-any-return]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model; also the plan, which may come from a file."""
        about = {"masformer_version": masformer.__version__, "masformer_plan": self.config.masformer["plan"]}
        return super().get_model_info() | about  # type: ignore[no-any-return]


def _shared_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that `HFLM` is to be given; what merely says its default is left out."""
    known = inspect.signature(HFLM.__init__).parameters
    shared = {name: value for name, value in options.items() if name in SHARED and name in known}
    for name, value in options.items():
        if name in shared or (name in known and value == known[name].default):
            continue
        if not name.isidentifier():
            raise MasformerError(
                f"model_args were cut at the commas, and {name!r} is no option; put a plan that holds commas into "
                f"quotes (plan='...'), give model_args as JSON, or name a plan file"
            )
        what = f"{name}={value!r} of hf cannot be honoured" if name in known else f"{name} is not known"
        raise MasformerError(
            f"model_args: {what}; allowed: {', '.join((*OWN, *(each for each in SHARED if each in known)))}"
        )
    return shared
