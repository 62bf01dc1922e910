"""Whether a plan can go to a tool, and if not, why, and the nearest plan that can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import Any

from transformers import PretrainedConfig

from masformer.errors import MasformerError
from masformer.export.forms import (
    FORMS,
    FULL,
    GRANITE_SWA,
    PERIODIC,
    SLIDING,
    architecture,
    for_mlx_lm,
    for_vllm,
    layer_positions,
    period,
    unknown_to_converters,
)
from masformer.export.targets import FORM_NEEDS, KINDS, TARGETS, Entry, Target
from masformer.models.native import native_plan
from masformer.models.positions import position_limit
from masformer.models.sealing import kv_heads
from masformer.plan import AttentionPlan, PlanSource
from masformer.spans import BlockSpan, FullSpan, Span, WindowSpan

DROP = "drop the sinks"
REPLACE = "put constants in place of first tokens, which masformer convert --sinks fit finds"
_SINKS = "without training, that costs much (perplexity 47.6 in place of 20.6 in SmolLM2-135M)"
_UNTRAINED = "the model as it was published does not have; unless it was trained with them since, that costs much"
_YARN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
_YARN_USUAL = {"beta_fast": 32, "beta_slow": 1}
"""What llama.cpp runs, whatever its file says."""


def find_target(name: str) -> Target:
    """The tool of that name.

    Raises:
        MasformerError: there is no entry for such a tool.
    """
    if name not in TARGETS:
        raise MasformerError(f"unknown target {name!r}; allowed: {', '.join(TARGETS)}")
    return TARGETS[name]


def kind_of(plan: AttentionPlan) -> str:
    """The kind of a plan, one of `KINDS`: the hardest thing that it asks for."""
    if plan.by_heads:
        return "heads"
    if any(isinstance(span, BlockSpan) for span in plan):
        return "blocks"
    if any(span.sinks for span in plan):
        return "sinks"
    if len({span.size for span in plan if isinstance(span, WindowSpan)}) > 1:
        return "windows"
    if any(span.constant_sink for span in plan):
        return "constants"
    return "full" if plan.is_full else "mixed" if plan.full_layers else "window"


def plain(plan: AttentionPlan) -> AttentionPlan:
    """The same plan with windows for blocks of one token, which are windows: j >= i - lookback."""
    return plan.changed(lambda span: _as_window(span) if isinstance(span, BlockSpan) and span.size == 1 else span)


def entry_for(config: PretrainedConfig, plan: AttentionPlan, target: Target) -> Entry | None:
    """What the tool does with the model; for transformers the plan that a stock model has anyway needs no entry."""
    entry = target.entries.get(architecture(config))
    if entry is None and target.name == "transformers" and plan == native_plan(config):
        return Entry(KINDS, "unchanged", "", "the model as it was trained")
    return entry


def write_config(config: PretrainedConfig, plan: AttentionPlan, target: Target, entry: Entry) -> dict[str, Any]:
    """The content of config.json for a tool; the plan is one of those that the entry takes.

    Args:
        config: the stock config, with the layer types the model was trained with.
        plan: one span per layer.
        target: the tool.
        entry: what it does with the model.
    """
    data = FORMS[form_for(config, plan, entry)](config, plan)
    if target.name == "mlx-lm":
        data = for_mlx_lm(data)
    if target.name == "vllm":
        return for_vllm(data)
    known = plan.is_full or data["model_type"] == GRANITE_SWA or plan == native_plan(config)
    return data if known else unknown_to_converters(data)


def form_for(config: PretrainedConfig, plan: AttentionPlan, entry: Entry) -> str:
    """The form of the checkpoint: under full attention a model keeps its own class, if the tool has it."""
    if any(span.constant_sink for span in plan):
        return GRANITE_SWA
    if plan.is_full and config.model_type in ("llama", "mistral", "ministral"):
        return "without window"
    return "native" if plan.is_full and config.model_type in ("qwen2", "olmo2") else entry.form


def objection(config: PretrainedConfig, plan: AttentionPlan, target: Target) -> str | None:
    """Why the tool cannot run the plan on the model; None where it can.

    Args:
        config: the stock config, with the layer types the model was trained with.
        plan: one span per layer.
        target: the tool.
    """
    entry, kind = entry_for(config, plan, target), kind_of(plan)
    if entry is None:
        return target.other
    if kind not in entry.plans:
        return entry.why if not entry.plans else target.why.get(kind, entry.why)
    if getattr(config, "is_heterogeneous", False):
        return "its layers differ in shape"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised; export the model before that"
    form = form_for(config, plan, entry)
    for name, allowed in {**entry.needs, **FORM_NEEDS.get(form, {})}.items():
        if (value := getattr(config, name, None)) not in allowed:
            return f"it runs these models only with {name} {' or '.join(map(str, allowed))}, not {value}"
    if entry.form == "unchanged":
        return None
    if target.name == "llama.cpp" and (reason := _llama_cpp_objection(config, plan)):
        return reason
    if target.name == "transformers" and 1 in map(_size, plan.spans) and entry.form != "gpt_neo":
        return "its cache drops nothing under a window of 1, so generated tokens see more than their own"
    data = write_config(config, plan, target, entry)
    written = type(config).from_dict(data) if data["model_type"] == config.model_type else config
    if layer_positions(written) != layer_positions(config):
        return (
            f"the type of a layer also decides its rotary positions in {config.model_type}, so the layers that slide "
            f"must be those it was trained with ({native_plan(config)})"
        )
    if target.name == "mlx-lm" and config.model_type in PERIODIC and period(data["layer_types"]) is None:
        return entry.why
    return _rope_objection(data, target, entry, form)


def _llama_cpp_objection(config: PretrainedConfig, plan: AttentionPlan) -> str | None:
    """Numbers that its architectures have no key for."""
    layers = config.num_hidden_layers
    if config.model_type == "smollm3" and list(config.no_rope_layers) != [int((i + 1) % 4 != 0) for i in range(layers)]:
        return "it leaves out positions in every fourth layer of these models, and in no others"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide = head_dim * config.num_attention_heads != config.hidden_size
    if plan.is_full and config.model_type in ("qwen2", "smollm3"):  # their own classes; windows run as granite_swa
        if wide:
            return "its full attention takes these models only with heads that are as wide together as the model"
        if config.rope_parameters["rope_type"] == "llama3":
            return "its full attention has no llama3 rotary positions for these models"
    return None


def _rope_objection(data: dict[str, Any], target: Target, entry: Entry, form: str) -> str | None:
    """Rotary positions that the tool would compute in another way than transformers, from a config.json."""
    parameters = data.get("rope_parameters") or {}
    ropes = {key: rope for key, rope in parameters.items() if isinstance(rope, dict)} or {FULL: parameters}
    for key, rope in ropes.items():
        kind = rope.get("rope_type", "default")
        if kind not in (target.ropes if entry.ropes is None else entry.ropes):
            return f"it does not compute {kind} rotary positions as transformers does"
        part = rope.get("partial_rotary_factor") or 1.0
        if part != 1.0 and (target.name in ("mlx-lm", "llama.cpp") or form not in ("native", "gpt_neo")):
            return f"it does not agree with transformers on rotary positions in {part} of each head"
        usual = _YARN_USUAL if target.name == "llama.cpp" else {}
        odd = sorted(
            name
            for name, value in rope.items()
            if value is not None and (name not in _YARN or value != usual.get(name, value))
        )
        if kind == "yarn" and odd and target.name != "transformers":
            return f"it reads {odd[0]} of yarn rotary positions in another way than transformers"
        if target.name == "mlx-lm" and key == SLIDING and kind != "default":
            return f"its sliding layers have no {kind} rotary positions"
    if target.name == "mlx-lm" and len({rope.get("rope_theta") for rope in ropes.values()}) > 1:
        return "it has one rope_theta for all layers"
    return None


def quality_warning(config: PretrainedConfig, plan: AttentionPlan) -> str | None:
    """What a plan may cost that a tool can run: windows without sinks where the model was not trained with them.

    Args:
        config: the stock config.
        plan: one span per layer.
    """
    limit, trained = position_limit(config), native_plan(config)
    bare = {
        layer: WindowSpan(span.size, 4)
        for layer, span in enumerate(plan)
        if isinstance(span, WindowSpan) and span == span.bare != trained[layer] and span.size < (limit or inf)
    }
    if not bare:
        return None
    with_sinks = [bare.get(layer, span) for layer, span in enumerate(plan)]
    measured = _measure(AttentionPlan(tuple(with_sinks)), plan)
    return f"{len(bare)} of {len(plan)} layers have a window without sinks that {_UNTRAINED}: {measured}"


def _measure(*plans: AttentionPlan) -> str:
    named = " ".join(f"--plan '{plan}'" for plan in plans)
    return f"`masformer eval perplexity MODEL --data FILE {named}` measures it"


def check_export(config: PretrainedConfig, plan: PlanSource, target: str) -> None:
    """Whether the plan can go to the tool; needs no weights. Arguments and errors as in `chosen_entry`."""
    chosen_entry(config, plan, target)


def chosen_entry(config: PretrainedConfig, plan: PlanSource, target: str) -> tuple[Target, AttentionPlan, Entry]:
    """The tool, the plan as it is to be written, and what the tool does with the model.

    Args:
        config: the stock config, as `load_config` reads it.
        plan: one span per layer.
        target: name of the tool.

    Raises:
        MasformerError: it cannot run the plan; the message has the reason and the nearest plan that it can.
    """
    tool, plan = find_target(target), plain(AttentionPlan.load(plan, config.num_hidden_layers, kv_heads(config)))
    reason, entry = objection(config, plan, tool), entry_for(config, plan, tool)
    if reason is None and entry is not None:
        return tool, plan, entry
    message = f"{target} cannot run {plan} on {architecture(config)} models: {reason}"
    near = nearest(config, plan, tool)
    if near is not None:
        cost = f"; {_SINKS}: {_measure(plan, near[0])}" if DROP in near[1] else ""
        raise MasformerError(f"{message}; nearest plan that it can: {near[0]} ({near[1]}){cost}")
    others = [name for name, other in TARGETS.items() if objection(config, plan, other) is None]
    raise MasformerError(f"{message}; " + (f"--target {others[0]} can" if others else "masformer itself can run it"))


def nearest(config: PretrainedConfig, plan: AttentionPlan, target: Target) -> tuple[AttentionPlan, str] | None:
    """The plan with the fewest changed layers that the tool can run, and the changes in words; None where none is."""
    found = []
    for candidate, words in _candidates(config, plan):
        if objection(config, candidate, target) is None:
            changed = sum(ours != theirs for ours, theirs in zip(plan.layers, candidate, strict=True))
            found.append((changed, candidate, ", ".join(words)))
    return min(found, key=lambda each: each[0])[1:] if found else None


Changed = tuple[AttentionPlan, list[str]]
"""A plan, and the changes that lead to it, in words."""


def _candidates(config: PretrainedConfig, plan: AttentionPlan) -> Iterator[Changed]:
    """Ever simpler plans: those with the sinks, with constants in place of first tokens, and without."""
    words: list[str] = []
    if plan.by_heads:
        words, plan = ["give each layer one span"], one_span_per_layer(plan)
        yield plan, words
    starts = [(plan, words)]
    if any(span.sinks for span in plan):
        starts = [(plan.changed(_with_constant), [*words, REPLACE])]
    if any(span.sinks or span.constant_sink for span in plan):
        starts.append((plan.changed(lambda span: span.bare), [*words, DROP]))
    ends = []
    for start in starts:
        steps = list(_steps(*start))
        yield from steps
        ends.append(steps[-1])
    for end in ends:
        yield from _far(config, *end)


def _steps(plan: AttentionPlan, words: list[str]) -> Iterator[Changed]:
    """The plan, and those in which spans are changed one by one; full layers stay."""
    spans = list(plan)
    yield plan, words
    if any(isinstance(span, BlockSpan) for span in spans):
        words, spans = [*words, "use windows in place of blocks"], [_as_window(span) for span in spans]
        yield AttentionPlan(tuple(spans)), words
    if 1 in map(_size, spans):
        words = [*words, "use windows of at least 2"]
        spans = [_sized(span, 2) if _size(span) == 1 else span for span in spans]
        yield AttentionPlan(tuple(spans)), words
    windows = Counter(span for span in spans if isinstance(span, WindowSpan))
    if len({span.size for span in windows}) > 1:
        window = max(windows, key=lambda each: (windows[each], each.size))
        words, spans = [*words, "use one window"], [_sized(span, window.size) for span in spans]
        yield AttentionPlan(tuple(spans)), words


def _far(config: PretrainedConfig, plan: AttentionPlan, words: list[str]) -> Iterator[Changed]:
    """Plans with other full layers."""
    layers, full = len(plan), FullSpan()
    yield AttentionPlan.uniform(layers, full), [*words, "use full attention in every layer"]
    trained = native_plan(config)
    window = next((span for span in plan if isinstance(span, WindowSpan)), None)
    if window is None:
        yield trained, [*words, "use the plan it was trained with"]
        return
    yield AttentionPlan.uniform(layers, window), [*words, "use the window in every layer"]
    yield AttentionPlan.mixed(layers, 1, "middle", local=window), [*words, "keep one layer full"]
    pattern = AttentionPlan(tuple(full if isinstance(span, FullSpan) else window for span in trained))
    yield pattern, [*words, "keep full the layers that were trained so"]


def _size(span: Span) -> int | None:
    """Of a window."""
    return span.size if isinstance(span, WindowSpan) else None


def _sized(span: Span, size: int) -> Span:
    """A window of that size, with the sinks it has; other spans as they are."""
    return replace(span, size=size) if isinstance(span, WindowSpan) else span


def _with_constant(span: Span) -> Span:
    """A window with a constant sink in place of its first tokens."""
    return WindowSpan(span.size, constant_sink=True) if isinstance(span, WindowSpan) and span.sinks else span


def one_span_per_layer(plan: AttentionPlan) -> AttentionPlan:
    """The plan by layers that is nearest to one by heads: in each layer the span of most units, the wider of equals.

    As many layers are full as the full units would fill, those with the most of them.
    """
    kv_heads = plan.kv_heads or 1
    units = plan.units(kv_heads)
    counts = [sum(isinstance(span, FullSpan) for span in row) for row in units]
    full = sorted(range(len(units)), key=lambda layer: -counts[layer])[: round(sum(counts) / kv_heads)]
    layers: list[Span] = []
    for layer, row in enumerate(units):
        local = [span for span in row if not isinstance(span, FullSpan)]
        if layer in full or not local:
            layers.append(FullSpan())
        else:
            layers.append(max(local, key=lambda span: (local.count(span), span.max_visible or 0)))
    return AttentionPlan(tuple(layers), kv_heads)


def _as_window(span: Span) -> Span:
    if not isinstance(span, BlockSpan):
        return span
    return WindowSpan(span.size * (span.lookback + 1), constant_sink=span.constant_sink)
