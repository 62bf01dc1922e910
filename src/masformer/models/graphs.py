"""Decoding as CUDA graphs: a token is one launch, not a thousand.

The operations of one token are so short that a GPU waits for each to be launched, whatever attention saves. A graph is
captured for a cache once its storage stays where it is, checked at the next token against the model as it is written,
and captured again when storage moves, as a full layer needs more room or rows change their places, or the model is
another: other weights, adapters, settings.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from masformer.cache import SpanCache
from masformer.cache.token import TokenCache
from masformer.cache.units import stores
from masformer.errors import MasformerError
from masformer.models import rotary
from masformer.models.architecture import decoder_layers
from masformer.models.bridge import CACHE_NAMES, cache_name, check_cache
from masformer.models.compiling import compile_layers, parts_compiled
from masformer.models.snapshot import Snapshot
from masformer.models.wrappers import bare_model

AFTER = 8
"""Tokens that run as the model is written before a graph is captured, which takes as long as four: short answers, and
caches whose storage moves, are not worth one."""
APART = 0.1
"""Of each row, logits of a graph and of the model may differ by so much of their spread: other kernels round
differently, in bfloat16 by up to 0.025."""
DEVICE = "cuda"
_KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict"}


def graph_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model with a plan decode by CUDA graphs, in place; done twice it changes nothing.

    Passes over one token of each row with a `SpanCache` and without gradients are replayed from a graph, once the cache
    has been used for a few of them; every other pass runs as before. The project's own commands and functions that
    generate do this by themselves. A model changed between passes, by other weights, adapters or a backend, gets other
    graphs. Where masformer has warned that it makes none, another call lets it try again.

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
    _take_over(model)
    model.forward.refused = False
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
    """The same, where it can be done and has not failed before; whether that is so."""
    model = bare_model(model)
    if objection(model) is not None:
        return False
    _take_over(model)
    return not model.forward.refused


def _take_over(model: PreTrainedModel) -> None:
    if not isinstance(model.forward, _Tokens):
        model.forward = _Tokens(model)


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
    if model.get_output_embeddings() is None:
        return f"graphs of tokens are not possible for a {type(model).__name__}: it gives no logits of the next token"
    if rotary.depends_on_length(model.config):
        return "graphs of tokens are not possible where rotary positions depend on the length of the text"
    return None


def _listed(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


class _State:
    """What is known of the tokens of one cache, which holds some.

    Attributes:
        tokens: that the model has run since storage lies where it does.
        graph: once it is captured.
        trusted: it gave the model's logits at the first token since the cache took several at once.
        was_trusted: it has been before.
    """

    def __init__(self, cache: SpanCache) -> None:
        self.stores = list(stores(cache.layers))
        self.storage = [ref(store.keys) for store in self.stores]  # type: ignore[arg-type]
        self.room = min(store.room for store in self.stores)
        self.tokens = 0
        self.graph: _Graph | None = None
        self.trusted = self.was_trusted = False

    def is_in_place(self, seen: int) -> bool:
        """Whether storage lies where it did, and has room for a token after so many."""
        held = zip(self.stores, self.storage, strict=True)
        return seen < self.room and all(store.keys is known() for store, known in held)


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
        if self.refused or cache is None or torch.compiler.is_compiling():
            return self.written(*args, **kwargs)
        state = self.states.get(cache)
        if not self._is_token(cache, given):
            if state is not None:  # a new turn: the model may have changed since
                state.trusted = False
            return self.written(*args, **kwargs)
        seen = cache.get_seq_length()
        if state is None or not state.is_in_place(seen):
            for store in stores(cache.layers):
                store.make_room(seen + 1)
            state = self.states[cache] = _State(cache)
        state.tokens += 1
        if state.tokens <= AFTER:
            return self.written(*args, **kwargs)
        return self._by_graph(state, cache, given, args, kwargs)

    def _by_graph(self, state: _State, cache: SpanCache, given: dict[str, Any], args: Any, kwargs: Any) -> Any:
        tokens = given["input_ids"]
        if state.graph is None:
            try:
                state.graph = _Graph(self, cache, tokens)
            except Exception as error:  # of torch, Triton, a compiler, ...: the model as it is written needs none of it
                return self._refuse(f"they cannot be captured ({_line(error)})", args, kwargs)
        if state.trusted:
            cache.begin(len(tokens), 1, given.get("attention_mask"))
        try:
            logits = state.graph.run(tokens, given.get("position_ids"), cache.row_starts(len(tokens)))
        except RuntimeError as error:
            return self._refuse(f"one cannot be run ({_line(error)})", args, kwargs)
        if not state.graph.snapshot.still_holds():  # asked while the GPU is at work
            self.states[cache] = _State(cache)
            return self.written(*args, **kwargs)
        if state.trusted:
            cache.count()
            return state.graph.output(logits, cache)
        out = self.written(*args, **kwargs)
        if not state.graph.snapshot.still_holds():
            return self._refuse("parts of the model are changed by a pass", args, kwargs, out)
        apart = _apart(logits, out.logits)
        is_close = apart < APART  # a NaN is not
        state.trusted = is_close and state.graph.take_output(out, cache)
        if not state.trusted and state.was_trusted:
            self.states[cache] = _State(cache)  # of a model that has changed
        elif not state.trusted:
            other = f"they give other logits, which are {apart:.2g} of the spread of the model's apart"
            return self._refuse("the model gives more than logits" if is_close else other, args, kwargs, out)
        state.was_trusted = True
        return out

    def _is_token(self, cache: SpanCache, given: dict[str, Any]) -> bool:
        """Whether a pass is one over a token of each row that a graph can do."""
        tokens, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if torch.is_grad_enabled() or self.model.training or tokens is None or tokens.shape[1] != 1:
            return False
        if tokens.device.type != DEVICE or len(tokens) != cache.rows:
            return False
        unusual = {name for name, value in given.items() if not (value is None or value is False)} - _KNOWN
        if unusual - set(CACHE_NAMES) or given.get("use_cache") is False or given.get("return_dict") is False:
            return False
        if torch.is_autocast_enabled(tokens.device.type) or not cache.is_even:
            return False
        check_cache(cache, self.model.config)
        if positions is None and any(cache.row_starts(len(tokens))):  # some models make positions of the mask
            return False
        if positions is not None and positions.shape != tokens.shape:
            return False
        if mask is None:
            return True
        seen = cache.get_seq_length()
        return mask.ndim == 2 and mask.shape[1] > seen and bool((mask[:, seen] != 0).all())

    def _refuse(self, why: str, args: Any, kwargs: Any, out: Any = None) -> Any:
        warnings.warn(
            f"no CUDA graphs are made of the tokens of this {self.model.config.model_type} model: {why}; decoding goes "
            "on as the model is written",
            stacklevel=4,
        )
        self.refused = True
        self.states.clear()
        return self.written(*args, **kwargs) if out is None else out


class _Graph:
    """A captured pass over one token of each row of a cache."""

    def __init__(self, tokens: _Tokens, cache: SpanCache, like: Tensor) -> None:
        model = tokens.model
        if Snapshot(model).is_heard:
            raise MasformerError("modules have hooks, which a graph would not call")
        if any(getattr(module, "masformer_backend", None) == "reference" for module in model.modules()):
            raise MasformerError("the backend is reference")
        self.cache = TokenCache(cache, len(like))
        with torch.inference_mode(False):
            self.tokens, self.positions = like.clone(), torch.full_like(like, cache.get_seq_length())
        self.output_class: Any = None
        self.names: list[str] = []
        given = {"input_ids": self.tokens, "position_ids": self.positions, cache_name(model.base_model): self.cache}

        def once() -> Tensor:
            return tokens.written(**given, use_cache=True).logits  # type: ignore[no-any-return]

        self.cache.place(cache.row_starts(len(like)))
        with parts_compiled(model):
            self.again = captured(once, like.device)
        self.snapshot = Snapshot(model)

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


def _apart(logits: Tensor, others: Tensor) -> float:
    """How far logits [rows, 1, vocabulary] are from others, in the row that is farthest: of the others' spread, since
    softmax takes no notice of what all of a row have in common."""
    mine, theirs = (x.float() - x.float().mean(-1, keepdim=True) for x in (logits, others))
    return float(((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def captured(once: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What does the work of a call again on the same storage, and returns a copy of what it gives."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device):
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are chosen and compiled before
                once()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = once()
    out.fill_(torch.nan)  # what it gives from now on is its own

    def again() -> Tensor:
        graph.replay()
        return out.clone()

    return again
