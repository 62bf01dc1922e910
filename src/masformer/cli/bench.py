"""`masformer bench`: measured times, as ratios in one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from masformer import benchmarks, records
from masformer.cli.options import Figures, ModelOptions, console, lengths_of
from masformer.models.checkpoint import load_config
from masformer.progress import progress_bar
from masformer.spans import Span


def bench_attention(
    span: list[str] | None = None,
    length: int = 8192,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    batch: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    backend: Literal["auto", "tiled", "reference"] = "auto",
    forward_only: bool = False,
    no_mask: bool = False,
    repeats: int = 5,
    seed: int = records.SEED,
) -> Figures:
    """Times attention under spans against full causal attention and against the same span as a dense mask.

    Args:
        span: span to time, may be repeated. Default: window:512.
        length: tokens.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: size of a head.
        batch: sequences.
        dtype: dtype of the inputs.
        forward_only: leave out forward + backward.
        no_mask: leave out the dense mask, which needs memory for N x N values.
        repeats: timed rounds, after one for warming up.
        seed: of the random inputs.

    Example:
        masformer bench attention --length 16384 --span window:512 --span block:1024x2
    """
    torch.manual_seed(seed)
    spans = [Span.parse(text) for text in span or ["window:512"]]
    shape: dict[str, Any] = {
        "length": length,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "batch": batch,
    }
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        rows = benchmarks.bench_attention(
            spans,
            **shape,
            dtype=dtype,
            backend=backend,
            backward=not forward_only,
            masked=not no_mask,
            repeats=repeats,
            progress=lambda name: progress.update(task, description=name),
        )
    console.print(benchmarks.attention_table(rows))
    return {**shape, "dtype": dtype, "backend": backend, "results": rows}


def bench_prefill(
    model: str,
    options: ModelOptions,
    *,
    lengths: str = "1024,2048,4096,8192",
    repeats: int = 3,
    seed: int = records.SEED,
) -> Figures:
    """Times prompts up to the first token: plans, full attention, and transformers' own caches, in one run.

    Args:
        lengths: prompt lengths in tokens, separated by commas.
        repeats: timed rounds, after one in which memory is measured.
        seed: of the random tokens.

    Example:
        masformer bench prefill MODEL --lengths 2048,8192 --plan 'full@11-18; window:512+4'
    """
    measure = partial(benchmarks.bench_prefill, repeats=repeats)
    return _bench(measure, "Time to the first token", model, options, lengths, seed)


def bench_decode(
    model: str,
    options: ModelOptions,
    *,
    lengths: str = "1024,2048,4096,7680",
    new: int = 32,
    repeats: int = 5,
    seed: int = records.SEED,
) -> Figures:
    """Times decoding after prompts: plans, full attention, and transformers' own caches, in one run.

    Args:
        lengths: prompt lengths in tokens, separated by commas.
        new: tokens of one round.
        repeats: timed rounds, after one for warming up.
        seed: of the random tokens.

    Example:
        masformer bench decode MODEL --lengths 1024,7680 --new 32 --plan 'full@11-18; window:512+4'
    """
    measure = partial(benchmarks.bench_decode, repeats=repeats, new=new)
    return _bench(measure, f"Rounds of {new} new tokens", model, options, lengths, seed)


def _bench(
    measure: Callable[..., list[dict[str, Any]]], title: str, model: str, options: ModelOptions, lengths: str, seed: int
) -> Figures:
    sizes = lengths_of("--lengths", lengths)
    plans = options.named(load_config(model)[1])
    loaded, _ = options.load(model, next(iter(plans.values())))
    torch.manual_seed(seed)
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        rows = measure(loaded, plans, sizes, progress=lambda name: progress.update(task, description=name))
    console.print(benchmarks.generation_table(f"{title}; speed-up over {benchmarks.STOCK}", rows))
    return {"model": model, "dtype": str(loaded.dtype), "plans": list(map(str, plans.values())), "results": rows}
