"""Decoding as CUDA graphs: a token is one launch, not a thousand.

The operations of one token are so short that a GPU waits for each to be launched, whatever attention saves. A graph is
captured for a cache once its storage stays where it is, checked at the next token against the model as it is written,
and captured again when storage moves: when a full layer needs more room, or rows change their places.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from masformer.cache import SpanCache
from masformer.cache.token import TokenCache
from masformer.cache.units import stores
from masformer.errors import MasformerError
from masformer.models import rotary
from masformer.models.bridge import CACHE_NAMES, cache_name, check_cache, decoder_layers
from masformer.models.compiling import compile_layers, parts_compiled
from masformer.models.wrappers import bare_model

AFTER = 8
"""Tokens that run as the model is written before a graph is captured, which takes as long as four: short answers, and
caches whose storage moves, are not worth one."""
APART = 0.05
"""Logits of a graph and of the model may differ by so much of their norm: other kernels round differently."""
DEVICE = "cuda"
_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", "return_dict"}


def graph_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model with a plan decode by CUDA graphs, in place; done twice it changes nothing.

    Passes over one token of each row with a `SpanCache` and without gradients are replayed from a graph, once the cache
    has been used for a few of them; every other pass runs as before. The project's own commands and functions that
    generate do this by themselves.

    Args:
        model: a model that `apply_plan` or `load_model` gave its plan, on one NVIDIA GPU.

    Returns:
        The same model.

    Raises:
        MasformerError: no graph can be made of this model's tokens.
    """
    outer, model = model, bare_model(model)
    decoder_layers(model)
    if (reason := objection(model)) is not None:
        raise MasformerError(reason)
    if not isinstance(model.forward, _Tokens):
        model.forward = _Tokens(model)
    return outer


def compile_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """`graph_tokens`, and in the graphs the parts of layers beside attention are compiled: faster after some seconds.

    Args:
        model: see `graph_tokens`.

    Returns:
        The same model.

    Raises:
        MasformerError: see `graph_tokens`.
    """
    return compile_layers(graph_tokens(model))


def graph_tokens_if_possible(model: PreTrainedModel) -> bool:
    """The same, where it can be done; whether that is so."""
    possible = objection(model) is None
    if possible:
        graph_tokens(model)
    return possible


def objection(model: PreTrainedModel) -> str | None:
    """Why the tokens of a model with a plan cannot become graphs, in words for a user; None where they can."""
    model = bare_model(model)
    devices = {weight.device for weight in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != DEVICE:
        return f"graphs of tokens need a model on one NVIDIA GPU, and this one is on {_listed(devices)}"
    if "forward" in vars(model) and not isinstance(model.forward, _Tokens):
        return "graphs of tokens are not possible where something else has replaced the model's forward"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"graphs of tokens are not possible for {model.config.model_type} models: they take no position_ids"
    if rotary.depends_on_length(model.config):
        return "graphs of tokens are not possible where rotary positions depend on the length of the text"
    return None


def _listed(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


@dataclass
class _State:
    """What is known of the tokens of one cache.

    Attributes:
        places: where storage and weights lie; a graph is of these.
        tokens: that the model has run since.
        graph: once it is captured.
        trusted: it gave the model's logits at the first token since the cache took several at once.
        was_trusted: it has been before.
    """

    places: tuple[int, ...]
    tokens: int = 0
    graph: _Graph | None = None
    trusted: bool = False
    was_trusted: bool = False


class _Tokens:
    """What takes the place of a model's forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))
        self.states: MutableMapping[SpanCache, _State] = WeakKeyDictionary()
        self.refused = False

    def __reduce__(self) -> Any:  # graphs are not copied with their model
        return type(self), (self.model,)

    def written(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return type(self.model).forward(self.model, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.__signature__.bind(*args, **kwargs).arguments
        given = given | given.pop("kwargs", {})
        cache = next((given[name] for name in CACHE_NAMES if isinstance(given.get(name), SpanCache)), None)
        if self.refused or cache is None:
            return self.written(*args, **kwargs)
        if not self._is_token(cache, given):
            if cache in self.states:  # a new turn: the model may have changed since
                self.states[cache].trusted = False
            return self.written(*args, **kwargs)
        tokens = given["input_ids"]
        seen = cache.get_seq_length()
        for store in stores(cache.layers):
            store.make_room(seen + 1)
        places = self._places(cache)
        state = self.states.get(cache)
        if state is None or state.places != places:
            state = self.states[cache] = _State(places)
        state.tokens += 1
        if state.tokens <= AFTER:
            return self.written(*args, **kwargs)
        try:
            if state.graph is None:
                state.graph = _Graph(self, cache, tokens)
            logits = state.graph.run(tokens, given.get("position_ids"), cache.row_starts(len(tokens)))
        except (RuntimeError, NotImplementedError) as error:
            return self._refuse(f"they cannot be captured ({str(error).splitlines()[0]})", args, kwargs)
        if state.trusted:
            cache.begin(*tokens.shape, given.get("attention_mask"))
            cache.count()
            return state.graph.output(logits, cache)
        out = self.written(*args, **kwargs)
        apart = float((logits - out.logits).float().norm() / out.logits.float().norm())
        state.trusted = apart < APART and state.graph.take_output(out, cache)  # a NaN is apart
        if not state.trusted and state.was_trusted:
            self.states[cache] = _State(places)  # of a model that has changed
        elif not state.trusted:
            return self._refuse("they give other logits, or the model gives more than logits", args, kwargs, out)
        state.was_trusted = True
        return out

    def _is_token(self, cache: SpanCache, given: dict[str, Any]) -> bool:
        """Whether a pass is one over a token of each row that a graph can do."""
        tokens, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if torch.is_grad_enabled() or self.model.training or tokens is None or tokens.shape[1] != 1:
            return False
        unusual = {name for name, value in given.items() if not (value is None or value is False)} - _KNOWN
        if unusual - set(CACHE_NAMES) or given.get("use_cache") is False or given.get("return_dict") is False:
            return False
        if torch.is_autocast_enabled(tokens.device.type) or not cache.is_even:
            return False
        check_cache(cache, self.model.config)
        if positions is not None and positions.shape != tokens.shape:
            return False
        if mask is None:
            return True
        seen = cache.get_seq_length()
        return mask.ndim == 2 and mask.shape[1] > seen and bool((mask[:, seen] != 0).all())

    def _places(self, cache: SpanCache) -> tuple[int, ...]:
        first, head = next(self.model.parameters()), self.model.get_output_embeddings().weight
        kept = [x for store in stores(cache.layers) for x in (store.keys, store.values)]
        return tuple(x.data_ptr() for x in (first, head, *kept))  # type: ignore[union-attr]

    def _refuse(self, why: str, args: Any, kwargs: Any, out: Any = None) -> Any:
        warnings.warn(
            f"no CUDA graphs are made of the tokens of this {self.model.config.model_type} model: {why}; decoding goes "
            "on as the model is written",
            stacklevel=3,
        )
        self.refused = True
        self.states.clear()
        return self.written(*args, **kwargs) if out is None else out


class _Graph:
    """A captured pass over one token of each row of a cache."""

    def __init__(self, tokens: _Tokens, cache: SpanCache, like: Tensor) -> None:
        model = tokens.model
        if _other_hooks(model):
            raise NotImplementedError("modules have hooks, which a graph would not call")
        if any(getattr(module, "masformer_backend", None) == "reference" for module in model.modules()):
            raise NotImplementedError("the backend is reference")
        self.cache = TokenCache(cache, len(like))
        with torch.inference_mode(False):
            self.tokens, self.positions = torch.zeros_like(like), torch.zeros_like(like)
        self.output_class: Any = None
        self.names: list[str] = []
        given = {"input_ids": self.tokens, "position_ids": self.positions, cache_name(model.base_model): self.cache}

        def once() -> Tensor:
            return tokens.written(**given, use_cache=True).logits  # type: ignore[no-any-return]

        self.cache.place(cache.row_starts(len(like)))
        with parts_compiled(model):
            self.again = captured(once, like.device)

    def run(self, tokens: Tensor, positions: Tensor | None, starts: tuple[int, ...]) -> Tensor:
        """The logits [rows, 1, vocabulary] of the cache's next token, whose lengths stay as they are."""
        self.cache.place(starts)
        self.tokens.copy_(tokens)
        if positions is None:
            self.positions.fill_(self.cache.get_seq_length())
        else:
            self.positions.copy_(positions)
        return self.again()

    def take_output(self, out: Any, cache: SpanCache) -> bool:
        """Learns what the model gives beside logits; whether that is the cache alone."""
        self.output_class = type(out)
        self.names = [name for name, value in out.items() if value is cache]
        return set(out) <= {"logits", *self.names}

    def output(self, logits: Tensor, cache: SpanCache) -> Any:
        """What the model would give."""
        return self.output_class(logits=logits, **dict.fromkeys(self.names, cache))


def _other_hooks(model: nn.Module) -> bool:
    """Whether others than masformer hear of the passes of parts of a model."""
    parts = list(model.modules())
    hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    return any(not getattr(hook, "__module__", "").startswith("masformer.") for hook in hooks)


def captured(once: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What does the work of a call again on the same storage, and returns a copy of what it gives."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are chosen and compiled before
            once()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = once()

    def again() -> Tensor:
        graph.replay()
        return out.clone()

    return again
