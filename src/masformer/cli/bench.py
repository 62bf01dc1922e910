"""`masformer bench`: measured times, as ratios in one run."""

from __future__ import annotations

from typing import Any, Literal

import torch

from masformer import benchmarks, records
from masformer.cli.options import Figures, console
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
