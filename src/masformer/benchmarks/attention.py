"""Measured time of attention under spans, as ratios to full causal attention in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from masformer.attention import BACKENDS, attend
from masformer.benchmarks.timing import DTYPES, compare_times, default_device
from masformer.errors import MasformerError, check_int
from masformer.spans import FullSpan, Span

FULL = "full causal SDPA"


def bench_attention(
    spans: Sequence[Span],
    *,
    length: int = 8192,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    batch: int = 1,
    dtype: str = "float32",
    backend: str = "auto",
    backward: bool = True,
    masked: bool = True,
    repeats: int = 5,
    device: torch.device | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Times attention on random inputs: full causal SDPA, each span, and SDPA with the span as a dense mask.

    Args:
        spans: the spans to time.
        length: tokens, N.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: size of a head.
        batch: sequences.
        dtype: float32, bfloat16 or float16.
        backend: see `masformer.attend`.
        backward: also time forward and backward together.
        masked: also time SDPA with an N x N mask of the same span, which is what a sliding window costs without tiles;
            the mask is made beforehand.
        repeats: timed rounds.
        device: where; CUDA if there is one.
        progress: called with a line before each call.

    Returns:
        One row per pass and variant: `pass`, `name`, `seconds` (all rounds), `median`, `speedup` over full causal SDPA,
        `ideal` (visible pairs of full attention over those of the span).

    Raises:
        MasformerError: a value is out of range.
    """
    sizes = {"length": length, "heads": heads, "kv heads": kv_heads, "head dim": head_dim, "batch": batch}
    for name, size in sizes.items():
        check_int(name, size, 1)
    if heads % kv_heads:
        raise MasformerError(f"{heads} query heads are no multiple of {kv_heads} kv heads")
    if dtype not in DTYPES:
        raise MasformerError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if backend not in BACKENDS:
        raise MasformerError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    if not spans:
        raise MasformerError("no span to time")
    device = device or default_device()
    make: dict[str, Any] = {"dtype": DTYPES[dtype], "device": device, "requires_grad": True}
    query = torch.randn(batch, heads, length, head_dim, **make)
    key, value = (torch.randn(batch, kv_heads, length, head_dim, **make) for _ in range(2))
    full_pairs = FullSpan().visible_pairs(length)

    def sdpa(mask: Tensor | None) -> Callable[[], Tensor]:
        causal = mask is None
        return lambda: F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)

    variants: dict[str, tuple[Callable[[], Tensor], float]] = {FULL: (sdpa(None), 1.0)}
    index = torch.arange(length, device=device)
    for span in spans:
        ideal = full_pairs / span.visible_pairs(length)
        variants[str(span)] = partial(attend, query, key, value, span, backend=backend), ideal
        if masked:
            variants[f"{span} as a mask"] = sdpa(span.visible(index[:, None], index[None, :])), ideal

    def forward(run: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            run()

    def both(run: Callable[[], Tensor]) -> None:
        out = run()
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    rows: list[dict[str, Any]] = []
    passes = {"forward": forward} | ({"forward + backward": both} if backward else {})
    for pass_, how in passes.items():
        calls = {f"{pass_}: {name}": partial(how, run) for name, (run, _) in variants.items()}
        times = dict(zip(variants, compare_times(calls, repeats, progress).values(), strict=True))
        for name, (_, ideal) in variants.items():
            median = times[name].median
            speedup = times[FULL].median / median
            rows.append(
                {"pass": pass_, "name": name, "seconds": list(times[name].seconds), "median": median}
                | {"speedup": speedup, "ideal": ideal}
            )
    return rows


def attention_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `bench_attention` for people to read."""
    table = Table(title="Attention: median times, speed-up over full causal SDPA", title_justify="left")
    for column in ("pass", "variant", "ms", "speed-up", "ideal"):
        text = column in ("pass", "variant")
        table.add_column(column, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        table.add_row(
            row["pass"], row["name"], f"{row['median'] * 1000:.1f}", f"{row['speedup']:.2f}", f"{row['ideal']:.2f}"
        )
    return table
