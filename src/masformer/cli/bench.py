"""`masformer bench`: measured times, as ratios in one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from masformer import records
from masformer.cli.options import (
    LINE,
    Backend,
    Figures,
    ModelOptions,
    PlanOptions,
    device_of,
    lengths_of,
    say,
    show,
)
from masformer.defaults import LOSS_CHUNK, SEED
from masformer.errors import MasformerError, check_seed
from masformer.progress import progress_bar

Peers = Literal["all", "none"]
BASELINE = {"all": "transformers", "none": "all full"}


def bench_attention(
    span: list[str] | None = None,
    lengths: str = "8192",
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    batch: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    backend: Backend = "auto",
    forward_only: bool = False,
    peers: str = "all",
    repeats: int = 5,
    cap: float | None = None,
    seed: int = SEED,
    plot: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Times attention under spans against full causal attention, against other implementations, and against limits.

    Args:
        span: span to time, may be repeated; or one for each KV head, separated by commas. Default: window:512.
        lengths: tokens, separated by commas.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: size of a head.
        batch: sequences.
        dtype: dtype of the inputs.
        forward_only: leave out forward + backward.
        peers: other implementations, separated by commas; all (those that are installed and able) or none.
        repeats: timed rounds, after one for warming up.
        cap: seconds after which a variant is not timed again.
        seed: of the random inputs.
        plot: file for a picture of time against length.

    Example:
        masformer bench attention --lengths 4096,16384 --span window:512 --span block:1024x2
    """
    import torch

    from masformer import benchmarks
    from masformer.spans import Span, layer_span

    check_seed(seed)
    torch.manual_seed(seed)
    place = device_of(device)
    spans = [layer_span([Span.parse(part) for part in text.split(",")]) for text in span or ["window:512"]]
    sizes = lengths_of("--lengths", lengths)
    names = {"all": list(benchmarks.PEERS), "none": []}.get(peers) or [n for n in peers.split(",") if peers != "none"]
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch}

    def measure(progress: Callable[[str], None]) -> dict[str, Any]:
        return benchmarks.bench_attention(
            spans,
            sizes,
            **shape,
            dtype=dtype,
            device=place,
            backend=backend,
            backward=not forward_only,
            peers=names,
            repeats=repeats,
            cap=cap,
            progress=progress,
        )

    found = _measured("attention", "Attention; speed-up over full causal SDPA", measure, plot, quiet)
    for why, what in found["left_out"].items():
        say(f"left out: {why} ({'; '.join(what)})")
    named = {"dtype": dtype, "device": records.device_name(place), "backend": backend}
    return {**shape, **named, **found}


def bench_prefill(
    model: str,
    options: ModelOptions,
    *,
    lengths: str = "1024,2048,4096,8192",
    batch: int = 1,
    backend: Backend = "auto",
    random_weights: bool = False,
    peers: Peers = "all",
    repeats: int = 3,
    cap: float | None = None,
    seed: int = SEED,
    plot: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Times prompts up to the first token: plans, full attention, and transformers' own caches, in one run.

    Args:
        lengths: prompt lengths in tokens, separated by commas.
        batch: prompts that run together.
        random_weights: MODEL is a config alone; times do not depend on the weights.
        peers: transformers by itself, all its ways or none; its sliding layers need a mask of all pairs.
        repeats: timed rounds, after one in which memory is measured.
        cap: seconds after which a variant is not timed again.
        seed: of the random tokens.
        plot: file for a picture of time against length.

    Example:
        masformer bench prefill MODEL --lengths 2048,8192 --plan 'full@11-18; window:512+4'
    """
    from masformer import benchmarks

    measure = partial(benchmarks.bench_prefill, repeats=repeats, cap=cap, backend=backend, peers=peers == "all")
    settings = {"batch": batch}
    title = f"Time to the first token; speed-up over {BASELINE[peers]}"
    return _bench("prefill", title, measure, settings, model, options, lengths, random_weights, seed, plot, quiet)


def bench_decode(
    model: str,
    options: ModelOptions,
    *,
    lengths: str = "1024,2048,4096,7680",
    new: int = 32,
    batch: int = 1,
    backend: Backend = "auto",
    random_weights: bool = False,
    peers: Peers = "all",
    repeats: int = 5,
    cap: float | None = None,
    compile: bool = False,
    seed: int = SEED,
    plot: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Times decoding after prompts: plans, full attention, and transformers' own caches, in one run.

    Args:
        lengths: prompt lengths in tokens, separated by commas.
        new: tokens of one round.
        batch: prompts that run together.
        random_weights: MODEL is a config alone; times do not depend on the weights.
        peers: transformers by itself, all its ways or none; its sliding layers need a mask of all pairs.
        repeats: timed rounds, after one for warming up.
        cap: seconds after which a variant is not timed again.
        compile: on an NVIDIA GPU, compile the parts of layers beside attention; transformers by itself runs as it is.
        seed: of the random tokens.
        plot: file for a picture of time against length.

    Example:
        masformer bench decode MODEL --lengths 1024,7680 --new 32 --plan 'full@11-18; window:512+4'
    """
    from masformer import benchmarks

    measure = partial(benchmarks.bench_decode, repeats=repeats, cap=cap, backend=backend, peers=peers == "all")
    settings = {"batch": batch, "new": new, "compiled": compile}
    title = f"Rounds of {new} new tokens; speed-up over {BASELINE[peers]}"
    return _bench("decode", title, measure, settings, model, options, lengths, random_weights, seed, plot, quiet)


def bench_train(
    model: str,
    options: ModelOptions,
    *,
    lengths: str = "2048",
    checkpointing: bool = False,
    precision: Literal["float32", "bfloat16"] = "float32",
    loss_chunk: int = LOSS_CHUNK,
    batch: int = 1,
    backend: Backend = "auto",
    random_weights: bool = False,
    peers: Peers = "all",
    repeats: int = 3,
    cap: float | None = None,
    compile: bool = False,
    seed: int = SEED,
    plot: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Times training steps: plans, full attention, and transformers by itself, in one run.

    Args:
        lengths: tokens of a row, separated by commas.
        checkpointing: make activations anew in the backward pass, which saves memory.
        batch: rows of a step.
        precision: bfloat16 runs matrix products in 16 bits (autocast), as training.precision does in a recipe.
        loss_chunk: positions whose logits exist at the same time.
        random_weights: MODEL is a config alone; times do not depend on the weights.
        peers: transformers by itself, all its ways or none; its sliding layers need a mask of all pairs.
        repeats: timed rounds, after one in which memory is measured.
        cap: seconds after which a variant is not timed again.
        compile: compile the model's layers and loss, as training.compile does; transformers by itself runs as it is.
        seed: of the random tokens.
        plot: file for a picture of time against length.

    Example:
        masformer bench train MODEL --lengths 2048,8192 --checkpointing --plan 'full@11-18; window:512+4'
    """
    from masformer import benchmarks

    measure = partial(benchmarks.bench_train, repeats=repeats, cap=cap, backend=backend, peers=peers == "all")
    settings = {"batch": batch, "compiled": compile, "checkpointing": checkpointing, "precision": precision}
    settings |= {"loss_chunk": loss_chunk}
    title = f"Training step, rows: {batch}; speed-up over {BASELINE[peers]}"
    return _bench("train", title, measure, settings, model, options, lengths, random_weights, seed, plot, quiet)


def bench_eval(
    model: str,
    options: ModelOptions,
    *,
    lengths: str = "2048,8192",
    tokens: int = 65536,
    backend: Backend = "auto",
    random_weights: bool = False,
    repeats: int = 3,
    cap: float | None = None,
    compile: bool = False,
    seed: int = SEED,
    plot: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Times evaluation by perplexity: plans and full attention, in one run.

    Args:
        lengths: tokens of a window, separated by commas.
        tokens: random ones, that a round predicts.
        random_weights: MODEL is a config alone; times do not depend on the weights.
        repeats: timed rounds, after one for warming up.
        cap: seconds after which a variant is not timed again.
        compile: compile the layers.
        seed: of the random tokens.
        plot: file for a picture of time against length.

    Example:
        masformer bench eval MODEL --lengths 2048,8192 --plan 'full@11-18; window:512+4'
    """
    from masformer import benchmarks

    measure = partial(benchmarks.bench_eval, repeats=repeats, cap=cap, backend=backend)
    settings = {"compiled": compile, "tokens": tokens}
    title = "Evaluation; speed-up over all full"
    return _bench("eval", title, measure, settings, model, options, lengths, random_weights, seed, plot, quiet)


def bench_llama_cpp(
    model: str,
    options: PlanOptions,
    *,
    lengths: str = "2048,8192",
    new: int = 32,
    threads: int = 0,
    repeats: int = 3,
    sinks: str | None = None,
    python: str | None = None,
    plot: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Times a .gguf file in llama.cpp itself, with and without plans: the same weights, in one run.

    Args:
        model: .gguf file; a model in a folder becomes one by masformer export --target llama.cpp --plan full.
        lengths: of prompt and new tokens together, separated by commas.
        new: tokens after each prompt.
        threads: of llama.cpp; 0: its own choice.
        repeats: timed rounds, after one for warming up.
        sinks: for plans with constant sinks (window:512+sink), the folder of `masformer convert --sinks fit`.
        python: the Python of an environment that has xllamacpp (default: this one).
        plot: file for a picture of time against length.

    Example:
        masformer bench llama-cpp model.Q4_K_M.gguf --lengths 2048,8192 --plan 'full@11-18; window:512'
    """
    from masformer import benchmarks
    from masformer.export import gguf_config
    from masformer.models.native import native_plan

    sizes = lengths_of("--lengths", lengths)
    config = gguf_config(model)
    plans = options.named(native_plan(config))
    more: dict[str, Any] = {"new": new, "threads": threads, "repeats": repeats, "sinks": sinks, "python": python}
    measure = partial(benchmarks.bench_llama_cpp, model, plans, sizes, **more)
    found = _measured(
        "llama-cpp",
        "In llama.cpp; speed-up over all full",
        lambda progress: measure(progress=progress),
        plot,
        quiet,
    )
    return {"model": model, "plans": list(map(str, plans.values())), "settings": {"lengths": sizes, **more}, **found}


def _bench(
    bench: str,
    title: str,
    measure: Callable[..., dict[str, Any]],
    settings: dict[str, Any],
    model: str,
    options: ModelOptions,
    lengths: str,
    random_weights: bool,
    seed: int,
    plot: str | None,
    quiet: bool,
) -> Figures:
    import torch

    from masformer import benchmarks
    from masformer.models.checkpoint import load_config
    from masformer.plots import checked_figure

    sizes = lengths_of("--lengths", lengths)
    plans = options.named(load_config(model)[1])
    if plot is not None:
        checked_figure(plot)
    check_seed(seed)
    torch.manual_seed(seed)
    if random_weights:
        if options.max_positions is not None:
            raise MasformerError("--max-positions does nothing with --random-weights; the config says the positions")
        dtype = options.dtype if options.dtype == "auto" else benchmarks.DTYPES[options.dtype]
        loaded = benchmarks.random_model(model, next(iter(plans.values())), dtype, options.place)
    else:
        loaded, _ = options.load(model, next(iter(plans.values())))
    found = _measured(
        bench, title, lambda progress: measure(loaded, plans, sizes, **settings, progress=progress), plot, quiet
    )
    named = {"model": model, "random_weights": random_weights, "dtype": str(loaded.dtype)}
    named |= {"device": records.device_name(loaded.device), **settings}
    return {**named, "plans": list(map(str, plans.values())), **found}


def _measured(
    bench: str, title: str, measure: Callable[[Callable[[str], None]], dict[str, Any]], plot: str | None, quiet: bool
) -> dict[str, Any]:
    """Runs a bench and prints its table."""
    from masformer import benchmarks
    from masformer.plots import checked_figure, plot_times

    if plot is not None:
        checked_figure(plot)
    with progress_bar(quiet=quiet) as progress:
        task = progress.add_task("", total=None)
        found = measure(lambda name: progress.update(task, description=name))
    for table in benchmarks.bench_tables(title, found["results"]):
        show(table)
    if plot is not None:
        plot_times(found["results"], plot)
        say(f"picture: {plot}")
    return found | {LINE: benchmarks.summary_line(bench, found["results"])}
