"""Scores of many plans on the same windows: prefixes that plans share run once, finished measurements are kept.

Plans are measured in lexicographic order of their spans, which walks the tree of their prefixes depth first: each
plan starts at the first layer where it differs from the one before, on the kept output of the layer below.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from masformer.errors import MasformerError, check_int
from masformer.evaluation.perplexity import prepared_base
from masformer.evaluation.room import autocast, autocast_on, dtype_name, padded, room_of
from masformer.journal import append_lines, recover_lines
from masformer.models.bridge import apply_plan, partial_passes
from masformer.models.fingerprint import model_fingerprint
from masformer.placement.texts import Window
from masformer.plan import AttentionPlan
from masformer.schema import Settings, build
from masformer.spans import FullSpan


class PrefixPasses:
    """Runs a model's base under one plan after another on the same tokens, without repeating their common prefix.

    The outputs of all layers under the last plan are kept: layers x tokens x hidden size values.

    Attributes:
        layers_run: layer evaluations so far, one layer over one sequence each.

    Raises:
        MasformerError: the model cannot take a plan, its layers are not found, or one layer hands the next one more
            than its output, so that they cannot run apart.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto") -> None:
        self.model, self.backend = model, backend
        self.full = AttentionPlan.uniform(model.config.num_hidden_layers, FullSpan())
        apply_plan(model, self.full, backend)
        self.layers = _decoder_layers(model)
        self.layers_run = 0
        self._checked = False

    def start(self, tokens: Tensor) -> None:
        """Takes other tokens: int64 [batch, length]."""
        self._tokens, self._spans, self._outputs = tokens, (), []  # type: tuple[Tensor, tuple[Any, ...], list[Any]]

    def run(self, plan: AttentionPlan) -> Any:
        """The base model's output under a plan; its `last_hidden_state` is that of a whole pass."""
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(self._spans, plan.layers, strict=False))))
        apply_plan(self.model, plan, self.backend)
        output = self._pass(shared)
        self._spans = plan.layers
        if not self._checked:
            self._check(output)
        return output

    def _pass(self, shared: int) -> Any:
        """Calls the base with its first `shared` layers skipped."""
        outputs = self._outputs[:shared]
        self._outputs = []
        base = self.model.base_model
        with ExitStack() as stack:
            for layer in self.layers[:shared]:
                stack.enter_context(replaced_forward(layer, partial(_returned, outputs[-1])))
            for layer in self.layers[shared:]:
                hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
                stack.callback(hook.remove)
            if shared:
                stack.enter_context(partial_passes())
            output = base(input_ids=self._tokens, use_cache=False, return_dict=True)
        self._outputs = outputs
        self.layers_run += (len(self.layers) - shared) * len(self._tokens)
        return output

    def _check(self, output: Any) -> None:
        """Runs the last layer alone."""
        kind = self.model.config.model_type
        if len(self._outputs) != len(self.layers):
            raise MasformerError(f"the layers of {kind} models cannot be run one by one: one of them runs twice")
        try:
            again = self._pass(len(self.layers) - 1).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise MasformerError(f"the layers of {kind} models cannot be run one by one: {error}") from error
        if not torch.allclose(again, output.last_hidden_state, rtol=1e-3, atol=1e-3):
            raise MasformerError(f"the layers of {kind} models cannot be run one by one: the last layer needs others")
        self._checked = True


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    for blocks in model.base_model.modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) == model.config.num_hidden_layers:
            found = ({getattr(module, "layer_idx", None) for module in block.modules()} for block in blocks)
            if all(layer in indices for layer, indices in enumerate(found)):
                return list(blocks)
    raise MasformerError(f"the layers of {model.config.model_type} models were not found")


@contextmanager
def replaced_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives a layer another forward for a while; its attributes stay in place."""
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _returned(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


@dataclass(frozen=True)
class Score(Settings):
    """How well one plan does on one window.

    Attributes:
        nll: mean negative log-likelihood of the scored tokens, in nats.
        right: whether each scored token was the most likely one.
        kl: mean KL divergence of the plan's distribution from that of full attention, KL(full || plan), in nats.
    """

    nll: float
    right: bool
    kl: float | None = None


@dataclass(frozen=True)
class Slope:
    """The gains of units at one point of a path between plans, on one window (`masformer.placement.gradient`).

    Attributes:
        loss: there, in nats per scored token.
        gains: [span][layer][KV head]: the fall of the loss with the unit's step from local to the span, in nats.
    """

    loss: float
    gains: tuple[tuple[tuple[float, ...], ...], ...]


Entry = TypeVar("Entry", Score, Slope)


def _measurement(row: dict[str, Any]) -> tuple[tuple[str, str], Score | Slope]:
    if "path" not in row:
        return (row.pop("window"), row.pop("plan")), build(Score, row)
    gains = tuple(tuple(tuple(map(float, heads)) for heads in layers) for layers in row["gains"])
    return (row["window"], row["path"]), Slope(float(row["loss"]), gains)


class Journal:
    """Finished measurements, in memory and, one JSON object a line, in a file.

    Args:
        path: the file, made if missing; None: memory alone.

    Raises:
        MasformerError: the file cannot be read or written, or is no journal.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._entries: dict[tuple[str, str], Score | Slope] = {}
        if self.path is not None:
            self._entries |= recover_lines(self.path, _measurement, "a measurement")

    def get(self, window: str, what: str, kind: type[Entry]) -> Entry | None:
        """The score of a plan or the slope at a point of a path, by its text, if it is known."""
        found = self._entries.get((window, what))
        return found if isinstance(found, kind) else None

    def add(self, name: str, what: str, entries: Mapping[str, Score | Slope]) -> None:
        """Keeps what was measured on windows; it is in the file when this returns.

        Args:
            name: `plan` for scores, `path` for slopes.
            what: its text.
            entries: by window.
        """
        self._entries |= {(window, what): entry for window, entry in entries.items()}
        if self.path is not None:
            rows = [{"window": window, name: what} | asdict(entry) for window, entry in entries.items()]
            append_lines(self.path, rows)


class Measurer:
    """Measures plans on windows.

    Args:
        model: a causal language model in evaluation mode.
        backend: see `masformer.attend`.
        batch_size: windows that run together; by default as many as fit on CUDA, else one. Each is scored apart, so a
            score does not depend on it beyond rounding.
        precision: see `masformer.evaluation.perplexity.perplexity`. The journal keeps scores of each apart.
        kl: also measure the divergence from full attention, on windows that are no probes.
        journal: see `Journal`.
        advance: called after each step with the number of measurements (one plan on one window each) now done.

    Attributes:
        autocast: dtype of matrix products, where it is not that of the weights.
        measured: measurements that were run.
        recalled: measurements that the journal, or an earlier call, had already.
        unshared: layer evaluations that whole passes would have taken for what was run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        backend: str = "auto",
        batch_size: int | None = None,
        precision: str = "auto",
        kl: bool = False,
        journal: str | os.PathLike[str] | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        if batch_size is not None:
            check_int("batch size", batch_size, 1)
        if model.training:
            raise MasformerError("the model is in training mode; call model.eval() first")
        if model.base_model is model:
            raise MasformerError(f"{type(model).__name__} has no head apart from its base model")
        self.passes = PrefixPasses(model, backend)
        self.kl, self.advance = kl, advance
        self.autocast = autocast_on(model.device, model.dtype, precision)
        kept = (model.config.num_hidden_layers + kl) * model.config.hidden_size  # `PrefixPasses`, and all-full's output
        self.room = room_of(model, rows=batch_size, kept=kept)
        self.journal = Journal(journal)
        self.measured = self.recalled = self.unshared = 0
        self.model, self._fingerprint = model, model_fingerprint(model)
        self._keys: dict[Window, str] = {}

    def scores(self, plans: Sequence[AttentionPlan], windows: Sequence[Window]) -> list[list[Score]]:
        """The score of each plan on each window.

        Raises:
            MasformerError: a loss is not finite, or the journal cannot be written.
        """
        distinct = _in_order(plans)
        todo: dict[tuple[Any, ...], list[Window]] = {}
        for window in dict.fromkeys(windows):
            missing = tuple(plan for plan in distinct if self._known(window, plan) is None)
            if missing:
                todo.setdefault((missing, len(window.tokens), window.scored, window.probe), []).append(window)
        recalled = len(plans) * len(windows) - sum(len(group[0]) * len(each) for group, each in todo.items())
        self.recalled += recalled
        self.advance(recalled)
        for (missing, length, *_), each in todo.items():
            for _ in self.room.run(each, length - 1, partial(self._measure, missing)):
                pass
        return [[self._found(window, plan) for window in windows] for plan in plans]

    def key(self, window: Window) -> str:
        """What stands for the model and a window in the journal."""
        if window not in self._keys:
            how = self._fingerprint if self.autocast is None else f"{self._fingerprint} {dtype_name(self.autocast)}"
            self._keys[window] = hashlib.sha256(f"{how} {window}".encode()).hexdigest()[:32]
        return self._keys[window]

    def _known(self, window: Window, plan: AttentionPlan) -> Score | None:
        score = self.journal.get(self.key(window), str(plan), Score)
        return None if score is not None and score.kl is None and self._needs_kl(window) else score

    def _found(self, window: Window, plan: AttentionPlan) -> Score:
        score = self._known(window, plan)
        assert score is not None
        return score

    def _needs_kl(self, window: Window) -> bool:
        return self.kl and not window.probe

    @torch.inference_mode()
    def _measure(self, plans: Sequence[AttentionPlan], windows: Sequence[Window]) -> None:
        """Measures what is not known yet; what was done before the memory was not enough is."""
        plans = [plan for plan in plans if any(self._known(window, plan) is None for window in windows)]
        tokens = padded([window.tokens for window in windows], 0).to(self.model.device)
        with autocast(self.model.device, self.autocast):
            self.passes.start(tokens[:, :-1])
            reference = self.passes.run(self.passes.full) if self._needs_kl(windows[0]) else None
            self.unshared += (
                len(tokens) * len(self.passes.layers) * (reference is not None and self.passes.full != plans[0])
            )
            for plan in plans:
                scores = self._scores(self.passes.run(plan), reference, tokens, windows[0].scored)
                self.unshared += len(tokens) * len(self.passes.layers)
                self.journal.add("plan", str(plan), dict(zip(map(self.key, windows), scores, strict=True)))
                self.measured += len(windows)
                self.advance(len(windows))

    def _scores(self, output: Any, reference: Any, tokens: Tensor, scored: int) -> list[Score]:
        """One score per row of tokens [batch, length + 1]."""
        length = tokens.shape[1] - 1
        nll, right, kl = [], [], []
        step = max(1, self.room.positions // len(tokens))
        for start in range(length - scored, length, step):
            positions = slice(start, min(start + step, length))
            predicted = self.log_probabilities(output, tokens, positions)
            targets = tokens[:, 1:][:, positions, None].to(predicted.device)
            nll.append(-predicted.gather(-1, targets)[..., 0])
            right.append(predicted.argmax(-1) == targets[..., 0])
            if reference is not None:
                wanted = self.log_probabilities(reference, tokens, positions)
                divergence = nn.functional.kl_div(predicted, wanted, reduction="none", log_target=True)
                kl.append(divergence.sum(-1))
        # from the device once, not for each chunk: it would wait there
        losses = torch.cat(nll, 1).cpu().double().mean(1)
        answered = torch.cat(right, 1).all(1).tolist()
        divergences = torch.cat(kl, 1).cpu().double().mean(1) if kl else torch.zeros(len(tokens))
        if not bool((losses + divergences).isfinite().all()):
            raise self.not_finite()
        return [
            Score(nll, right, None if reference is None else kl)
            for nll, right, kl in zip(losses.tolist(), answered, divergences.tolist(), strict=True)
        ]

    def not_finite(self) -> MasformerError:
        """The error of a loss that is not finite."""
        return MasformerError(
            "the loss is not finite: the model's weights are damaged, or too coarse in "
            f"{self.autocast or self.model.dtype}"
        )

    def log_probabilities(self, output: Any, tokens: Tensor, positions: slice) -> Tensor:
        """[batch, positions, vocabulary] in float32 at least, from the model's own head."""
        with prepared_base(self.model, output) as prepared:
            prepared.positions = positions
            logits: Tensor = self.model(input_ids=tokens[:, positions], use_cache=False, return_dict=True).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _in_order(plans: Sequence[AttentionPlan]) -> list[AttentionPlan]:
    """The distinct plans so that neighbours share the longest prefixes: lexicographic, full spans first."""
    kinds = sorted(
        {span for plan in plans for span in plan.layers}, key=lambda span: (not isinstance(span, FullSpan), repr(span))
    )
    rank = {span: index for index, span in enumerate(kinds)}
    return sorted(set(plans), key=lambda plan: [rank[span] for span in plan.layers])
