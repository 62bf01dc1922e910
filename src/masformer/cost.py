"""What a plan costs: floating-point operations and KV-cache bytes of one sequence, against full attention.

Only matrix products are counted, a multiplication and an addition as two operations. Of attention only the *visible*
(query, key) pairs count: what an implementation without waste would do. Attention, the whole pass and the cache are
kept apart, since a plan that saves most of the attention saves far less of the pass.

>>> from transformers import LlamaConfig
>>> shape = ModelShape.of(LlamaConfig(num_hidden_layers=2, vocab_size=32000))
>>> cost(shape, AttentionPlan.parse("full,window:16"), length=64)
Cost(length=64, attention_flops=48889856, dense_flops=68585259008, kv_cache_bytes=1310720, kv_storage_bytes=1310720)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import nn

from masformer.configs import once_per_config
from masformer.errors import MasformerError, check_int
from masformer.parallel.slices import traffic
from masformer.plan import AttentionPlan, PlanSource
from masformer.spans import FullSpan, Span

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder-only model that its cost depends on.

    Attributes:
        num_layers: attention layers.
        query_heads: query heads per layer.
        kv_heads: key and value heads per layer.
        head_dim: values per query and key head.
        value_dim: values per value head.
        matmul_weights: weights that one token is multiplied with: every linear map and the output layer (also where it
            shares the embedding's weights), but no embedding, norm or bias; of a mixture of experts only the experts
            that one token visits.
        parameters: all weights, shared ones counted once; no formula needs it.
        widest: values, for one token, on the wider side of the widest linear map; the output layer is left out.
    """

    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    matmul_weights: int
    parameters: int
    widest: int

    def __post_init__(self) -> None:
        for field in fields(self):
            check_int(field.name, getattr(self, field.name), 1)

    @staticmethod
    @once_per_config
    def of(config: PretrainedConfig) -> ModelShape:
        """Reads the shape from a model's config; the model is built on the meta device, without weights.

        Raises:
            MasformerError: not a causal language model of like attention layers, or one that compresses its cache.
        """
        from transformers import AutoModelForCausalLM  # here, for it takes seconds, and formulas do not need it

        attention = {} if hasattr(config, "masformer") else {"attn_implementation": "eager"}
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **attention)
        except ValueError as error:
            message = f"{config.model_type} is not a causal language model that transformers knows"
            raise MasformerError(message) from error
        except Exception as error:  # each architecture refuses numbers that it cannot have in its own way
            message = f"no {config.model_type} model can be made of this config: {' '.join(str(error).split())}"
            raise MasformerError(message) from error
        if reason := _odd_config(config):
            raise _unknown_cost(config, reason)
        query_heads, kv_heads, head_dim, value_dim = head_shape(config)
        shape = ModelShape(
            num_layers=config.num_hidden_layers,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            matmul_weights=sum(_matmul_weights(module, config) for module in model.modules()),
            parameters=model.num_parameters(),
            widest=max(
                max(weight.shape[-2:])
                for module in model.base_model.modules()
                if not isinstance(module, nn.Embedding)
                for weight in module.parameters(recurse=False)
                if weight.ndim > 1
            ),
        )
        outputs = {
            "q_proj": shape.query_heads * shape.head_dim,
            "k_proj": shape.kv_heads * shape.head_dim,
            "v_proj": shape.kv_heads * shape.value_dim,
        }
        for name, module in model.named_modules():
            expected = outputs.get(name.rpartition(".")[2])
            if expected and isinstance(module, nn.Linear) and module.out_features != expected:
                raise _unknown_cost(config, f"{name} has an unusual size")
        return shape


def head_shape(config: PretrainedConfig) -> tuple[int, int, int, int]:
    """Query heads, KV heads, values per query and key head, and per value head, in each layer of a model."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, head_dim, getattr(config, "v_head_dim", None) or head_dim


def _unknown_cost(config: PretrainedConfig, reason: str) -> MasformerError:
    return MasformerError(f"the cost of {config.model_type} models is not known: {reason}")


def _odd_config(config: PretrainedConfig) -> str | None:
    """Why one shape cannot describe all layers, if so."""
    if config.get_text_config() is not config:
        return "they are not text-only"
    if getattr(config, "is_heterogeneous", False):
        return "their layers differ in shape"
    if not hasattr(config, "num_attention_heads"):
        return "they have no attention heads"
    if other := set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS:
        return f"they have {min(other)} layers"
    if getattr(config, "kv_lora_rank", None):
        return "they compress the KV cache"
    if getattr(config, "multi_query", False) and not hasattr(config, "num_key_value_heads"):
        return "they name their key and value heads in a way of their own"
    if getattr(config, "num_kv_shared_layers", None):
        return "some of their layers share keys and values"
    return None


def _matmul_weights(module: nn.Module, config: PretrainedConfig) -> int:
    """Weights of this module alone, without its children, that one token is multiplied with."""
    if isinstance(module, nn.Embedding):
        return 0
    total = 0
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim == 3:  # [experts, out, in]: transformers keeps the experts of a layer in one tensor
            visited = getattr(config, "num_experts_per_tok", None)
            if visited is None:
                raise _unknown_cost(config, f"{name} is no plain matrix")
            total += weight.numel() // weight.shape[0] * visited
        elif weight.ndim == 2 and not name.endswith(("bias", "sink_value")):
            total += weight.numel()
    return total


@dataclass(frozen=True)
class Cost:
    """Cost of one sequence under one plan.

    Attributes:
        length: tokens.
        attention_flops: the products of queries with keys and of attention weights with values, visible pairs only.
        dense_flops: everything else that multiplies matrices; no plan changes it.
        kv_cache_bytes: a cache that keeps, after `length` tokens, what the spans can still see and no more
            (`SpanCache.nbytes`).
        kv_storage_bytes: the same with the room to grow that full layers reserve (`SpanCache.storage_nbytes`).
    """

    length: int
    attention_flops: int
    dense_flops: int
    kv_cache_bytes: int
    kv_storage_bytes: int

    @property
    def forward_flops(self) -> int:
        """One forward pass, with logits at every position."""
        return self.attention_flops + self.dense_flops

    @property
    def training_flops(self) -> int:
        """One training step without recomputation: the backward pass costs twice the forward pass.

        Kaplan et al. (arXiv 2001.08361), section 2.1; PaLM (arXiv 2204.02311), appendix B.
        """
        return 3 * self.forward_flops


def stored_keys(span: Span, length: int, reserve: int = 0, past: int = 0) -> int:
    """Keys that one layer of a `SpanCache` has storage for after `length` tokens of a row.

    What is reserved; beyond it the next power of two, at least 16; but no more than the span can see.

    Args:
        span: the layer's span.
        length: tokens.
        reserve: tokens that the cache makes room for at once.
        past: keys that are kept beside those the span can see, to take tokens back.
    """
    slots = reserve if length <= reserve else max(16, 1 << (length - 1).bit_length())
    return slots if span.max_visible is None else min(slots, span.max_visible + past)


def cost(
    shape: ModelShape,
    plan: PlanSource,
    length: int,
    *,
    cache_bytes_per_value: int = 2,
    cache_reserve: int = 0,
) -> Cost:
    """Cost of one sequence.

    Args:
        shape: the model.
        plan: one span per layer of it, or per KV head, or its text or file.
        length: tokens; at least 1.
        cache_bytes_per_value: 2 for bfloat16 and float16, 4 for float32.
        cache_reserve: `reserve` of the `SpanCache`.

    Raises:
        MasformerError: a number is out of range, or the plan has another number of layers or
            of KV heads.
    """
    check_int("length", length, 1)
    check_int("cache bytes per value", cache_bytes_per_value, 1)
    check_int("cache reserve", cache_reserve, 0)
    units = AttentionPlan.load(plan, shape.num_layers, shape.kv_heads).unit_counts(shape.kv_heads)
    pairs = sum(count * span.visible_pairs(length) for span, count in units.items())
    keys = sum(count * span.cached_keys(length) for span, count in units.items())
    slots = sum(count * stored_keys(span, length, cache_reserve) for span, count in units.items())
    values_per_head = shape.head_dim + shape.value_dim
    bytes_per_key = values_per_head * cache_bytes_per_value
    return Cost(
        length=length,
        attention_flops=2 * values_per_head * shape.query_heads * pairs // shape.kv_heads,
        dense_flops=2 * shape.matmul_weights * length,
        kv_cache_bytes=bytes_per_key * keys,
        kv_storage_bytes=bytes_per_key * slots,
    )


def prefill_bytes(
    shape: ModelShape, plan: PlanSource, length: int, chunk: int, *, bytes_per_value: int = 2, reserve: int = 0
) -> int:
    """Memory that a prompt takes beside the weights, when it is read in chunks (`masformer.generation`).

    The cache with its room to grow, and one chunk's activations in the widest part of a layer: for each token, the
    gate, its activation, the other half and their product in a gated MLP (Shazeer, arXiv 2002.05202), or as much.

    Args:
        shape: the model.
        plan: one span per layer of it.
        length: tokens of the prompt and what follows it.
        chunk: tokens of one forward pass.
        bytes_per_value: 2 for bfloat16 and float16, 4 for float32.
        reserve: of the `SpanCache`.

    Raises:
        MasformerError: as `cost`, or a chunk below 1.
    """
    check_int("chunk", chunk, 1)
    held = cost(shape, plan, length, cache_bytes_per_value=bytes_per_value, cache_reserve=reserve).kv_storage_bytes
    return held + 4 * min(chunk, length) * shape.widest * bytes_per_value


def flops_text(flops: float) -> str:
    """1.5e12 -> `1.50 TFLOP`."""
    return _scaled(flops, 1000, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def count_text(count: int, noun: str) -> str:
    """1 -> `1 row`; 2000 -> `2,000 rows`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def bytes_text(size: float) -> str:
    """3 * 2**29 -> `1.50 GiB`."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def seconds_text(seconds: float) -> str:
    """0.25 -> `0.25 s`, 42.3 -> `42 s`, 150 -> `2 min`, 9000 -> `2.5 h`, 1e6 -> `12 days`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86_400:,.0f} days"


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    """Three significant digits."""
    for unit in units:
        if number < step * 0.9995 or unit == units[-1]:
            break
        number /= step
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{0 if unit == units[0] else digits}f} {unit}"


@dataclass(frozen=True)
class Communication:
    """Bytes that devices send each other for the attention to sequences that they share, in one training step.

    What they send for their weights (DDP, FSDP) is not in it.

    Attributes:
        devices: that share a sequence.
        length: tokens of the sequence.
        layers: of each layer, all devices together.
        spans: text of a span -> the same for all heads that have it, in the order of the plan.
        ways: text of a span -> how they go: edge, by heads, ring (`masformer.parallel.slices.Traffic`), or several of
            these, since layers may have other numbers of heads under a span.
        busiest: what the device sends or receives that does most, all layers together.
        positions: once a pass, all devices together: the sizes of slices, positions and padding.
        gathered: all devices together, if each fetched the keys of all others in every layer (all-gather).
        ring: the same, if keys went round in every layer, and with their gradients once more (ring attention,
            arXiv 2310.01889).
    """

    devices: int
    length: int
    layers: tuple[int, ...]
    spans: dict[str, int]
    ways: dict[str, str]
    busiest: int
    positions: int
    gathered: int
    ring: int

    @property
    def total(self) -> int:
        """Of all layers and devices."""
        return sum(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"total": self.total, "layers": list(self.layers)}


def communication(
    shape: ModelShape,
    plan: PlanSource,
    length: int,
    devices: int,
    *,
    rows: int = 1,
    bytes_per_value: int = 2,
    recompute: bool = False,
) -> Communication:
    """What devices that share sequences send each other (`masformer.parallel`).

    Packed documents need no more: their slices see no further back than those of one document.

    Args:
        shape: the model.
        plan: one span per layer of it, or per KV head, or its text or file.
        length: tokens; made a multiple of the devices, as rows are filled up.
        devices: that share a sequence; at least 2.
        rows: sequences at a time.
        bytes_per_value: 2 for bfloat16 and float16, 4 for float32.
        recompute: whether the backward pass makes each layer's forward pass again (checkpointing).

    Raises:
        MasformerError: a number is out of range, or the plan has other numbers of layers or KV heads.
    """
    check_int("length", length, 1)
    check_int("devices", devices, 2)
    check_int("rows", rows, 1)
    check_int("bytes per value", bytes_per_value, 1)
    each = -(-length // devices)
    forward = 1 + recompute
    unit = rows * (shape.head_dim + shape.value_dim) * bytes_per_value
    plan = AttentionPlan.load(plan, shape.num_layers, shape.kv_heads)
    layers: list[int] = []
    spans = dict.fromkeys(map(str, plan.kinds), 0)
    ways: dict[str, list[str]] = {span: [] for span in spans}
    out, into = [0] * devices, [0] * devices
    for units in plan.units(shape.kv_heads):
        layers.append(0)
        for span, heads in Counter(units).items():
            queries = heads * shape.query_heads // shape.kv_heads
            way = traffic(span, queries, heads, devices, each)
            for total, once, back in zip((out, into), way.forward, way.backward, strict=True):
                for device in range(devices):
                    total[device] += unit * (forward * once[device] + back[device])
            size = unit * (way.total + recompute * sum(way.forward[0]))
            layers[-1] += size
            spans[str(span)] += size
            if way.way not in ways[str(span)]:
                ways[str(span)].append(way.way)
    keys = unit * shape.kv_heads * shape.num_layers * each * devices * (devices - 1)
    return Communication(
        devices=devices,
        length=each * devices,
        layers=tuple(layers),
        spans=spans,
        ways={span: " and ".join(found) for span, found in ways.items()},
        busiest=max(*out, *into),
        positions=devices * (devices - 1) * (16 + 8 * rows * each),
        gathered=keys * (forward + 1),
        ring=keys * (forward + 2),
    )


def communication_table(found: Iterable[Communication]) -> Table:
    """The bytes for people to read, one section per length; fits into 80 columns."""
    table = Table(title="", title_justify="left")
    for column in ("tokens", "", "all devices", "of all-gather"):
        table.add_column(column, justify="left" if not column else "right")
    for each in found:
        table.title = f"Sent for attention in a training step, {each.devices} devices"
        spans = {f"  {span}, {each.ways[span]}": size for span, size in each.spans.items()}
        rows = {"plan": each.total} | spans | {"all-gather instead": each.gathered, "ring instead": each.ring}
        length = f"{each.length:,}"
        for name, size in rows.items():
            table.add_row(length, name, bytes_text(size), f"{size / each.gathered:.1%}")
            length = ""
        table.add_row("", "busiest device", bytes_text(each.busiest), "")
        table.add_section()
    return table


FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "attention_flops": ("attention, forward", flops_text),
    "forward_flops": ("forward pass", flops_text),
    "training_flops": ("training step", flops_text),
    "kv_cache_bytes": ("KV cache", bytes_text),
}
"""Figure of `Cost` -> (its name for people, how it is written)."""


@dataclass(frozen=True)
class Comparison:
    """A plan and full attention in every layer, at the same length."""

    plan: Cost
    full: Cost

    @property
    def fractions(self) -> dict[str, float]:
        """Each of `FIGURES` under the plan, as a fraction of the same figure under full attention."""
        return {figure: getattr(self.plan, figure) / getattr(self.full, figure) for figure in FIGURES}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `{"length": n, "plan": figures, "full": figures, "fractions": figures}`."""
        plan, full = (
            {"dense_flops": each.dense_flops} | {figure: getattr(each, figure) for figure in FIGURES}
            for each in (self.plan, self.full)
        )
        return {"length": self.plan.length, "plan": plan, "full": full, "fractions": self.fractions}


def compare(
    shape: ModelShape, plan: PlanSource, lengths: Iterable[int], *, cache_bytes_per_value: int = 2
) -> list[Comparison]:
    """Cost of the plan against full attention at each length; arguments and errors as in `cost`."""
    full = AttentionPlan.uniform(shape.num_layers, FullSpan())
    return [
        Comparison(*(cost(shape, each, length, cache_bytes_per_value=cache_bytes_per_value) for each in (plan, full)))
        for length in lengths
    ]


def cost_table(comparisons: Iterable[Comparison]) -> Table:
    """The figures for people to read, one section per length; fits into 80 columns."""
    table = Table(title="Cost of one sequence", title_justify="left")
    for column in ("tokens", "", "plan", "all full", "plan / full"):
        table.add_column(column, justify="left" if not column else "right")
    for comparison in comparisons:
        length = f"{comparison.plan.length:,}"
        for figure, (name, text) in FIGURES.items():
            plan, full = (text(getattr(each, figure)) for each in (comparison.plan, comparison.full))
            table.add_row(length, name, plan, full, f"{comparison.fractions[figure]:.1%}")
            length = ""
        table.add_section()
    return table
