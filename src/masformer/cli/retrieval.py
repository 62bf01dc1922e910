"""`masformer eval retrieval`, and `masformer pairs`, which writes what to train on for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from masformer import records
from masformer.cli.options import Figures, ModelOptions, lengths_of, say, show
from masformer.defaults import BATCH, SEED
from masformer.errors import MasformerError
from masformer.files import write_whole
from masformer.progress import plan_progress, progress_bar

if TYPE_CHECKING:
    from masformer.evaluation.retrieval import Haystack


def eval_retrieval(
    model: str,
    options: ModelOptions,
    *,
    tasks: str | None = None,
    lengths: str = "1024,2048,4096",
    depths: str = "5",
    examples: int = 10,
    data: list[str] | None = None,
    field: str | None = None,
    raw: bool = False,
    digits: int | None = None,
    max_new_tokens: int | None = None,
    batch: int = BATCH,
    backend: Literal["auto", "tiled", "reference"] = "auto",
    seed: int = SEED,
    out: str | None = None,
    plot: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Finding what is hidden in long prompts, pass keys and RULER's tasks, by length and depth; plans share one load.

    Args:
        tasks: passkey, niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking; separated by
            commas (default: all).
        lengths: tokens of prompt and answer together, separated by commas.
        depths: how many depths from 0 to 100%, or the depths themselves as in 0,10,50.
        examples: prompts for each task, length and depth.
        data: files whose text is the haystack; by default sentences that say nothing, again and again.
        field: key of the text in JSONL files (default: text).
        raw: take the prompt as it is, without the chat template.
        digits: of the numbers that are hidden; by default those of the papers, 5 to 7.
        max_new_tokens: the most tokens to generate; by default RULER's 128 (variable tracking 30, pass key 16).
        batch: prompts that are continued together.
        seed: of the prompts.
        out: file for the predictions, as JSON lines; a run that was stopped goes on from it.
        plot: image file for the heat map.

    Example:
        masformer eval retrieval MODEL --tasks passkey,niah_single --lengths 1024,2048 --depths 5 --examples 5 \\
            --plan full --plan 'full@11-18; window:512+4' --out predictions.jsonl --plot heat.png
    """
    from masformer.evaluation.retrieval import TASKS, Prober, parse_depths, retrieval_tables, retrieve, tasks_of
    from masformer.models.checkpoint import load_config
    from masformer.plots import checked_figure, write_figure
    from masformer.reports.figures import heat_map

    chosen = tasks_of(",".join(TASKS) if tasks is None else tasks)
    sizes, places = lengths_of("--lengths", lengths), parse_depths(depths)
    plans = options.named(load_config(model)[1])
    records.check_writable(out)
    if plot is not None:
        records.check_writable(checked_figure(plot))
    haystack = _haystack(data, field)
    loaded, tokenizer = options.load_both(model, next(iter(plans.values())))
    prober = Prober(
        tokenizer,
        chat=False if raw else None,
        haystack=haystack,
        seed=seed,
        digits=digits,
        max_new_tokens=max_new_tokens,
    )
    with plan_progress(f"{model} on {records.device_name(loaded.device)}", quiet=quiet) as progress:
        results, reach = retrieve(
            loaded,
            prober,
            chosen,
            plans,
            sizes,
            places,
            examples,
            out,
            batch=batch,
            backend=backend,
            settings={"model": model},
            progress=progress,
        )
    for table in retrieval_tables(results, reach):
        show(table)
    if plot is not None:
        figure = heat_map([{**result.to_dict(), "score": result.score} for result in results], "score")
        assert figure is not None
        write_figure(figure, plot)
        say(f"heat map: {plot}")
    return {
        "model": model,
        "data": data,
        "dtype": str(loaded.dtype),
        "device": records.device_name(loaded.device),
        "settings": {
            "tasks": [task.name for task in chosen],
            "lengths": sizes,
            "depths": places,
            "examples": examples,
            "haystack": haystack.name,
            "field": field,
            "chat": prober.chat,
            "digits": digits,
            "max_new_tokens": max_new_tokens,
            "batch": batch,
            "backend": backend,
            "seed": seed,
            "predictions": out,
        },
        "results": [result.to_dict() for result in results],
        "effective_lengths": [each.to_dict() for each in reach],
    }


def write_pairs(
    model: str,
    out: str,
    *,
    count: int,
    tasks: str = "passkey",
    lengths: str = "512,1024,2048",
    data: list[str] | None = None,
    field: str | None = None,
    digits: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = SEED,
    quiet: bool = False,
) -> None:
    """Writes prompt/target pairs to train retrieval with, for masformer train; masformer eval retrieval --raw tests it.

    Args:
        model: hub id, folder or .gguf file; only its tokenizer is read.
        out: JSON lines file to write.
        count: how many pairs.
        tasks: of eval retrieval, separated by commas; drawn at random for each pair, as are length and depth.
        lengths: tokens of prompt and answer together, separated by commas.
        data: files whose text is the haystack; by default sentences that say nothing, again and again.
        field: key of the text in JSONL files (default: text).
        digits: of the numbers that are hidden; by default those of the papers, 5 to 7.
        max_new_tokens: room for the answer within the length; by default as in eval retrieval.
        seed: of the pairs; their random numbers are others than those of eval retrieval, whatever the seed.

    Example:
        masformer pairs MODEL pairs.jsonl --count 10000 --tasks passkey,niah_single --lengths 512,1024,2048
    """
    from masformer.evaluation.retrieval import tasks_of, training_pairs
    from masformer.models.checkpoint import load_tokenizer

    chosen, sizes = tasks_of(tasks), lengths_of("--lengths", lengths)
    records.check_writable(out)
    haystack = _haystack(data, field)
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise MasformerError(f"{model} has no tokenizer")
    lines: list[str] = []
    with progress_bar(quiet=quiet) as progress:
        pairs = training_pairs(
            tokenizer, chosen, sizes, count, haystack=haystack, seed=seed, digits=digits, max_new_tokens=max_new_tokens
        )
        for pair in progress.track(pairs, total=count, description="pairs"):
            lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    write_whole(out, "".join(lines))
    say(f"{out}: {count:,} pairs; in a recipe: files [{out}], prompt prompt, target target")


def _haystack(data: list[str] | None, field: str | None) -> Haystack:
    from masformer.evaluation.retrieval import Haystack, read_haystack

    if data is None:
        if field is not None:
            raise MasformerError("--field does nothing without --data")
        return Haystack()
    return read_haystack(data, field or "text")
