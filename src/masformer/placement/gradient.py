"""Gains of units, from gradients: what a wider span is worth to each KV head, or layer, all from the same few passes.

Every unit at once goes from its local attention to a wider one: out = local + a (wider - local), with a from 0 to 1. A
unit's gain is the fall of the loss that is credited to its own step along this path,

    gain = - integral over a of sum(dLoss/dout * (wider - local)),

its query heads together: integrated gradients (Sundararajan et al., arXiv 1703.01365). They are complete: the gains of
all units add up to the whole fall of the loss, but for the points at which the integral is taken. Along the path, and
not at one of its ends: a circuit of several heads shows nothing while the others of it are missing, and little once all
of them are there.

Of a further span than the widest, the gain is the same integral along the same path with that span's own difference to
local: what it would be credited with beside the widest ones. These gains compare spans of one unit; they are not
complete.

Of answers to questions the end of the path can be measured too, for question and answer alone, after a text that was
read there: to find something in a long text some heads must fetch it, and others tell it from what is like it. The
second ones have nothing to do until something is fetched, so that they show at the end, where a question costs little.

A layer keeps its differences for the backward pass; where those of all layers, and their activations, would not fit,
layers run again in the backward pass, so that one layer's exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from masformer.attention import ConstantSinks, attend
from masformer.cost import ModelShape
from masformer.errors import MasformerError
from masformer.evaluation.room import autocast, free_memory
from masformer.models.bridge import apply_plan, attending_by, cache_name
from masformer.models.rotary import depends_on_length
from masformer.models.sinks import named_sinks
from masformer.placement.measure import Measurer, Slope, replaced_forward
from masformer.placement.texts import Window
from masformer.plan import AttentionPlan
from masformer.spans import Span, spans_of

QUESTION = 64
"""Tokens before an answer that are its question."""
KEPT = 4 * 2**30
"""Bytes of activations that are kept where the device does not say how much is free."""


class GainMeter:
    """Measures the gains of units on windows.

    Args:
        measurer: gives the model, the precision and the journal, and is told of each pass.
        local: the span of every unit at the start of a path.
        wider: spans that a unit may get instead.

    Attributes:
        passes: forward passes with their backward passes that were run.
        recalled: those that the journal had already.
    """

    def __init__(self, measurer: Measurer, local: Span, wider: Sequence[Span]) -> None:
        self.measurer, self.local, self.wider = measurer, local, tuple(wider)
        self.passes = self.recalled = 0
        self._shape = ModelShape.of(measurer.model.config)
        self._fits = True

    def gains(
        self,
        criterion: str,
        windows: Sequence[Window],
        target: AttentionPlan,
        points: int | None,
        *,
        asked: bool = False,
    ) -> NDArray[np.float64]:
        """Means over the windows, in nats: [spans of `wider`, layers, KV heads], or one for each layer's heads together
        where layers have different numbers of them.

        Args:
            criterion: `kl`, or another name for the loss of the scored tokens.
            windows: of text, or probes.
            target: the end of the path; its spans are `local` or of `wider`.
            points: of the path; None: its end alone, what each unit is worth, to first order, where the others have
                that plan.
            asked: of the scored tokens and the `QUESTION` before them alone, after a text that was read under the
                target. Models whose rotary positions depend on the length of the text read all of it anew.

        Raises:
            MasformerError: the loss is not finite, a window does not fit, a layer has no part in the loss, or the
                journal cannot be written.
        """
        found = [slope.gains for window in windows for slope in self._slopes(criterion, window, target, points, asked)]
        alike = len({len(heads) for heads in found[0][0]}) == 1
        each = found if alike else [[[(sum(heads),) for heads in layers] for layers in gains] for gains in found]
        means: NDArray[np.float64] = np.asarray(each, dtype=np.float64).mean(axis=0)
        return means

    def _slopes(
        self, criterion: str, window: Window, target: AttentionPlan, points: int | None, asked: bool
    ) -> Iterator[Slope]:
        key, read = self.measurer.key(window), self._read(window) if asked else 0
        spans, reference = ", ".join(map(str, self.wider)), None
        kind = criterion if criterion == "kl" else "nll"
        for share in (1.0,) if points is None else [(point + 0.5) / points for point in range(points)]:
            path = f"{kind}: {self.local} to {target} at {share:.6g}, of {spans}"
            path += f", {read} tokens read" if read else ""
            slope = self.measurer.journal.get(key, path, Slope)
            if slope is None:
                if kind == "kl" and reference is None:
                    reference = self._reference(window)
                slope = self._fitting(window, target, share, reference, read)
                self.measurer.journal.add("path", path, {key: slope})
                self.passes += 1
            else:
                self.recalled += 1
            self.measurer.advance(1)
            yield slope

    def _read(self, window: Window) -> int:
        """How many tokens are read before the question."""
        if depends_on_length(self.measurer.model.config):
            return 0
        return max(0, len(window.tokens) - 1 - window.scored - QUESTION)

    @torch.no_grad()
    def _reference(self, window: Window) -> Any:
        """What the base gives under full attention."""
        model = self.measurer.model
        apply_plan(model, self.measurer.passes.full, self.measurer.passes.backend)
        with autocast(model.device, self.measurer.autocast):
            return model.base_model(input_ids=self._tokens(window)[:, :-1], use_cache=False, return_dict=True)

    def _tokens(self, window: Window) -> Tensor:
        return torch.tensor([window.tokens], device=self.measurer.model.device)

    def _fitting(self, window: Window, target: AttentionPlan, share: float, reference: Any, read: int) -> Slope:
        """The slope, with every layer's activations kept where that fits."""
        length = len(window.tokens) - 1
        if self._fits and self._keeps(length - read):
            try:
                return self._slope(window, target, share, reference, read, again=False)
            except torch.OutOfMemoryError:
                self._fits = False
        try:  # a layer that runs again would add to the cache again: a question has no need of it
            return self._slope(window, target, share, reference, read, again=not read)
        except torch.OutOfMemoryError as error:
            raise MasformerError(f"a window of {length} tokens does not fit into the device's memory") from error

    def _keeps(self, length: int) -> bool:
        """Whether the activations of all layers fit: as `room.fitting` counts those of one, and two more outputs."""
        model, shape = self.measurer.model, self._shape
        values = 8 * model.config.hidden_size + 4 * shape.widest
        values += (1 + len(self.wider)) * shape.query_heads * shape.value_dim
        free = free_memory(model.device)
        return bool(4 * values * length * shape.num_layers <= (KEPT if free is None else free // 2))

    def _cached(self, tokens: Tensor, target: AttentionPlan) -> dict[str, Any]:
        """What a pass over further tokens is given: every key of these, read under the target."""
        model, kept = self.measurer.model, DynamicCache()
        given = {cache_name(model.base_model): kept, "use_cache": True}
        apply_plan(model, target, self.measurer.passes.backend)
        with torch.no_grad(), autocast(model.device, self.measurer.autocast):
            model.base_model(input_ids=tokens, return_dict=True, **given)
        return given

    def _slope(
        self, window: Window, target: AttentionPlan, share: float, reference: Any, read: int, again: bool
    ) -> Slope:
        """At one point, of what follows the tokens that are read; with `again`, layers run once more in the backward
        pass."""
        measurer = self.measurer
        model, tokens = measurer.model, self._tokens(window)
        given = self._cached(tokens[:, :read], target) if read else {"use_cache": False}
        tokens = tokens[:, read:]
        path = _Path(self.local, self.wider, target, share)
        with ExitStack() as stack:
            stack.enter_context(attending_by(model, path))
            stack.enter_context(_frozen(model))
            stack.enter_context(autocast(model.device, measurer.autocast))
            stack.enter_context(torch.enable_grad())
            if again:
                for layer in measurer.passes.layers:
                    forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
                    stack.enter_context(replaced_forward(layer, forward))
            output = model.base_model(input_ids=tokens[:, :-1], return_dict=True, **given)
            loss, gradient = self._loss(output, reference, tokens, window.scored)
            output.last_hidden_state.backward(gradient)
        layers = range(len(measurer.passes.layers))
        if missing := sorted(set(layers) - path.gains.keys()):
            raise MasformerError(
                f"the gains of {model.config.model_type} models cannot be measured: layers {missing} have no part in "
                "the loss"
            )
        gains = tuple(
            tuple(tuple((path.gains[layer][index] / window.scored).tolist()) for layer in layers)
            for index in range(len(self.wider))
        )
        return Slope(loss / window.scored, gains)

    def _loss(self, output: Any, reference: Any, tokens: Tensor, scored: int) -> tuple[float, Tensor]:
        """The sum over the scored tokens, and its gradient by the hidden states; a chunk of logits exists at a time."""
        measurer, length = self.measurer, tokens.shape[1] - 1
        hidden = output.last_hidden_state.detach().requires_grad_()
        given, total = type(output)(**{**output, "last_hidden_state": hidden}), 0.0
        for start in range(length - scored, length, measurer.room.positions):
            positions = slice(start, min(start + measurer.room.positions, length))
            predicted = measurer.log_probabilities(given, tokens, positions)
            if reference is None:
                targets = tokens[:, 1:][:, positions, None].to(predicted.device)
                loss = -predicted.gather(-1, targets).sum()
            else:
                with torch.no_grad():
                    wanted = measurer.log_probabilities(reference, tokens, positions)
                loss = nn.functional.kl_div(predicted, wanted, reduction="sum", log_target=True)
            loss.backward()
            total += float(loss.detach())
        if not np.isfinite(total):
            raise measurer.not_finite()
        assert hidden.grad is not None
        return total, hidden.grad


class _Path:
    """Attention of every layer at one point between local and a plan; collects the gains in the backward pass.

    Attributes:
        gains: layer -> for each wider span, float64 [KV heads]; of the sum of the losses.
    """

    def __init__(self, local: Span, wider: Sequence[Span], target: AttentionPlan, share: float) -> None:
        self.local, self.wider, self.target, self.share = local, wider, target, share
        self.gains: dict[int, list[NDArray[np.float64]]] = {}

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span: Span,
        *,
        sinks: ConstantSinks | None,
        **options: Any,
    ) -> Tensor:
        def under(each: Span) -> Tensor:
            return attend(query, key, value, each, sinks=sinks and sinks.under(each), **options)

        near = under(self.local)
        out, differences = near, []
        for each in self.wider:
            moved = [self.share * (unit == each) for unit in spans_of(self.target.layers[layer])]
            with torch.set_grad_enabled(torch.is_grad_enabled() and any(moved)):
                difference = under(each) - near
            if any(moved):
                weights = torch.tensor(moved, dtype=out.dtype).repeat_interleave(query.shape[1] // len(moved))
                out = out + weights.to(out.device)[:, None, None] * difference
            differences.append(difference.detach())
        if not out.requires_grad:  # the first layer: nothing before it does
            out = out.detach().requires_grad_()
        tapped: Tensor = _Tap.apply(out, partial(self._take, layer, key.shape[1]), *differences)
        return tapped

    def _take(self, layer: int, kv_heads: int, sums: list[Tensor]) -> None:
        """Of each query head the sum of gradient times difference."""
        self.gains[layer] = [-heads.double().cpu().numpy().reshape(kv_heads, -1).sum(1) for heads in sums]


class _Tap(torch.autograd.Function):
    """Hands on a layer's attention; in the backward pass, its gradient times each difference is summed by heads."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, take: Any, *differences: Tensor) -> Tensor:
        ctx.take = take
        ctx.save_for_backward(*differences)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        differences = ctx.saved_tensors  # once: a layer that runs again gives them once
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        ctx.take([(exact * difference).sum((0, 2, 3)) for difference in differences])
        return gradient, None, *[None] * len(differences)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter takes part in gradients."""
    aside = (weight for _, weight in named_sinks(model))
    trained = [each for each in (*model.parameters(), *aside) if each.requires_grad]
    try:
        for each in trained:
            each.requires_grad_(False)
        yield
    finally:
        for each in trained:
            each.requires_grad_(True)
