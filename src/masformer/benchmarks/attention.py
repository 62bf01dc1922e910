"""Measured time of attention under spans: against full attention, other implementations and the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from masformer.attention import BACKENDS, ConstantSinks, attend
from masformer.attention.units import split, split_sinks
from masformer.benchmarks.limits import Probe
from masformer.benchmarks.peers import DIRECT, PEERS, UnableError
from masformer.benchmarks.rows import with_exponents
from masformer.benchmarks.timing import DTYPES, compare_times, default_device, prefixed
from masformer.errors import MasformerError, check_int
from masformer.spans import FullSpan, LayerSpan, UnitSpans, spans_of

FULL = "full causal SDPA"
FORWARD, BOTH = "forward", "forward + backward"
PRODUCTS = {FORWARD: 2, BOTH: 7}
"""Matrix products over all pairs: q k^T and p v forward; backward those scores again and four gradients."""
STREAMS = {FORWARD: (2, 2), BOTH: (6, 6)}
"""Tensors as large as the queries, and as the keys, that are read or written at least: q and out, k and v; backward
these again with the gradient of out, and the gradients of q, k and v."""


def bench_attention(
    spans: Sequence[LayerSpan],
    lengths: Sequence[int],
    *,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    batch: int = 1,
    dtype: str = "float32",
    backend: str = "auto",
    backward: bool = True,
    peers: Sequence[str] = tuple(PEERS),
    repeats: int = 5,
    cap: float | None = None,
    device: torch.device | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Times attention on random inputs: full causal SDPA, each span, and each span in other implementations.

    Queries, keys and values lie in memory as models make them, [batch, length, heads, dim].

    Args:
        spans: the spans to time; spans by unit also as the groups of units alone, each with tensors of its own.
        lengths: tokens, N.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: size of a head.
        batch: sequences.
        dtype: float32, bfloat16 or float16.
        backend: see `masformer.attend`.
        backward: also time forward and backward together.
        peers: names out of `PEERS`.
        repeats: timed rounds; all variants of one length and pass take turns in a round.
        cap: seconds after which a variant takes no part in further rounds.
        device: where; CUDA if there is one.
        progress: called with a line before each call.

    Returns:
        `results`: one row per length, pass and variant: `length`, `pass`, `name`, `span`, `peer` (None: ours),
        `seconds` (all rounds), `median`, `speedup` over full causal SDPA, `ideal` (visible pairs of full attention over
        those of the span), `share` (speedup / ideal), `of_direct` (the time of torch's FlashAttention called directly
        over this one; None where the peer `torch-flash` does not run), `exponent` (see `with_exponents`), the columns
        of `Limits.of`, and for peers `difference`, the largest from our output on the same inputs. `limits`: the rates
        of the machine, per length and pass. `left_out`: why a peer did not run -> what it was to run.

    Raises:
        MasformerError: a value is out of range.
    """
    sizes = {"heads": heads, "kv heads": kv_heads, "head dim": head_dim, "batch": batch}
    for name, size in (sizes | {"length": min(lengths, default=1)}).items():
        check_int(name, size, 1)
    for span in spans:
        if isinstance(span, UnitSpans) and len(span) != kv_heads:
            raise MasformerError(f"{len(span)} spans are named for {kv_heads} KV heads; give one span, or one for each")
    if heads % kv_heads:
        raise MasformerError(f"{heads} query heads are no multiple of {kv_heads} kv heads")
    named: list[tuple[str, str, Collection[str]]] = [("dtype", dtype, DTYPES), ("backend", backend, BACKENDS)]
    for what, name, allowed in [*named, *(("peer", peer, PEERS) for peer in peers)]:
        if name not in allowed:
            raise MasformerError(f"unknown {what} {name!r}; allowed: {', '.join(allowed)}")
    if not spans or not lengths:
        raise MasformerError("nothing to time: at least one span and one length are needed")
    device = device or default_device()
    probe = Probe(DTYPES[dtype], device)
    rows, rates = [], []
    left_out: dict[str, list[str]] = {}
    for pass_ in (FORWARD, BOTH) if backward else (FORWARD,):
        for length in lengths:
            inputs = tuple(
                torch.randn(batch, length, count, head_dim, dtype=DTYPES[dtype], device=device)
                .transpose(1, 2)
                .requires_grad_(pass_ == BOTH)
                for count in (heads, kv_heads, kv_heads)
            )
            query, key, value = inputs
            gradient = torch.randn_like(query, requires_grad=False) if pass_ == BOTH else None
            variants = _variants(spans, (query, key, value), backend, pass_, peers, left_out)
            calls = {}
            for each in variants:
                q, k, v = each.inputs or (query, key, value)
                calls[each.name] = partial(_run, each.attention, q, k, v, gradient)
            times = compare_times(
                probe.calls() | calls,
                repeats,
                prefixed(progress, length, f", {pass_}"),
                cap=cap,
                device=device,
                short=True,
            )
            limits = probe.limits(times)
            rates.append({"length": length, "pass": pass_} | limits.to_dict())
            per_query, per_key = STREAMS[pass_]
            moved = (per_query * query.numel() + per_key * key.numel()) * query.element_size()
            direct = {_name(each.span): times[each.name].median for each in variants if each.peer == DIRECT}
            for each in variants:
                median, pairs = times[each.name].median, _pairs(each.computed, length)
                speedup, ideal = times[FULL].median / median, FullSpan().visible_pairs(length) / pairs
                flops = round(PRODUCTS[pass_] * 2 * batch * heads * head_dim * pairs)
                rows.append(
                    {"length": length, "pass": pass_, "name": each.name, "span": _name(each.span), "peer": each.peer}
                    | {"seconds": list(times[each.name].seconds), "median": median, "difference": each.difference}
                    | {"speedup": speedup, "ideal": ideal, "share": speedup / ideal}
                    | {"of_direct": direct[_name(each.span)] / median if _name(each.span) in direct else None}
                    | limits.of(median, flops, moved)
                )
    return {"results": with_exponents(rows, ("pass", "name")), "limits": rates, "left_out": left_out}


@dataclass(frozen=True)
class _Variant:
    """What is timed.

    Attributes:
        name: for people.
        attention: of query, key and value.
        span: the one that was asked for.
        computed: the one that it really computes.
        peer: whose it is; None: ours, or torch's full attention.
        difference: of its output from ours; None where there is nothing to compare.
        inputs: queries, keys and values of its own, each as parts; None: those of all.
    """

    name: str
    attention: Callable[..., Tensor | list[Tensor]]
    span: LayerSpan
    computed: LayerSpan
    peer: str | None = None
    difference: float | None = None
    inputs: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None


PARTS = "its parts alone"


def _name(span: LayerSpan) -> str:
    return ",".join(map(str, spans_of(span)))


def _pairs(span: LayerSpan, length: int) -> float:
    """Visible pairs of a head, on average."""
    spans = spans_of(span)
    return sum(each.visible_pairs(length) for each in spans) / len(spans)


def _parts(span: UnitSpans, inputs: tuple[Tensor, Tensor, Tensor], backend: str) -> _Variant:
    """The groups of units of a layer, each attended to alone: what the layer would cost if nothing had to be joined."""

    def attention(query: list[Tensor], key: list[Tensor], value: list[Tensor]) -> list[Tensor]:
        each = zip(query, key, value, span.groups, split_sinks(sinks, span), strict=True)
        return [attend(q, k, v, group.span, sinks=own, backend=backend) for q, k, v, group, own in each]

    def own(x: Tensor) -> list[Tensor]:
        parts = (part.detach().transpose(1, 2).contiguous().transpose(1, 2) for part in split(x, span))
        return [part.requires_grad_(x.requires_grad) for part in parts]

    sinks = _constant_sinks(span, inputs)
    query, key, value = map(own, inputs)
    return _Variant(f"{_name(span)}, {PARTS}", attention, span, span, PARTS, inputs=(query, key, value))


def _constant_sinks(span: LayerSpan, inputs: tuple[Tensor, Tensor, Tensor]) -> ConstantSinks | None:
    """Weights for those that a span has, which are trained where the inputs are."""
    query, _, value = inputs
    if not any(each.constant_sink for each in spans_of(span)):
        return None
    shapes = (query.shape[1],), (value.shape[1], value.shape[3])
    return ConstantSinks.of([query.new_zeros(shape).requires_grad_(query.requires_grad) for shape in shapes])


def _variants(
    spans: Sequence[LayerSpan],
    inputs: tuple[Tensor, Tensor, Tensor],
    backend: str,
    pass_: str,
    peers: Sequence[str],
    left_out: dict[str, list[str]],
) -> list[_Variant]:
    def ours(span: LayerSpan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        sinks = _constant_sinks(span, inputs)
        return lambda query, key, value: attend(query, key, value, span, sinks=sinks, backend=backend)

    full = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    found = [_Variant(FULL, full, FullSpan(), FullSpan())]
    for span in spans:
        found.append(_Variant(_name(span), ours(span), span, span))
        if isinstance(span, UnitSpans):
            found.append(_parts(span, inputs, backend))
            continue
        for peer in peers:
            try:
                if span.constant_sink:
                    raise UnableError("it has no constant sinks")
                attention, computed = PEERS[peer](span, *inputs[:2], pass_ == BOTH)
                with torch.set_grad_enabled(pass_ == BOTH):  # as it is timed: what compiles does so once
                    difference = (attention(*inputs) - ours(computed)(*inputs)).abs().max().item()
            except (UnableError, RuntimeError) as error:  # RuntimeError: it does not compile, or finds no memory
                why = " ".join(str(error).split())[:200]
                left_out.setdefault(f"{peer}: {why}", []).append(f"{span}, {inputs[0].shape[2]:,} tokens, {pass_}")
                continue
            found.append(_Variant(f"{span}, {peer}", attention, span, computed, peer, difference))
    return found


def _run(
    attention: Callable[..., Tensor | list[Tensor]],
    query: Tensor | list[Tensor],
    key: Tensor | list[Tensor],
    value: Tensor | list[Tensor],
    gradient: Tensor | None,
) -> None:
    """Forward alone, or with the backward pass of this gradient; tensors may be in parts."""
    if gradient is None:
        with torch.no_grad():
            attention(query, key, value)
        return
    out = attention(query, key, value)
    if isinstance(out, Tensor):
        torch.autograd.grad(out, (query, key, value), gradient)  # type: ignore[arg-type]
    else:
        per_part = gradient.split([part.shape[1] for part in out], 1)
        torch.autograd.grad(out, [*query, *key, *value], per_part)
