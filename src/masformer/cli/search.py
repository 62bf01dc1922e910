"""`masformer search`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from masformer import placement, records
from masformer.cli.options import Dtype, Figures, RunningOptions, say, show
from masformer.data import read_documents
from masformer.errors import MasformerError
from masformer.evaluation.perplexity import prefix_token, tokenize
from masformer.models.checkpoint import load_config
from masformer.plan import PLAN_SUFFIXES
from masformer.progress import stage_progress
from masformer.spans import Span


def search(
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
    probes: int | None = None,
    random_placements: int = 20,
    seed: int = records.SEED,
    batch_size: int | None = None,
    dtype: Dtype = "auto",
    journal: str | None = None,
    plot: str | None = None,
    device: str | None = None,
    quiet: bool = False,
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
        probes: for the criterion retrieval, questions to choose by, and as many to report on (default: 16).
        random_placements: random placements of the same budget, for comparison.
        seed: of the random placements and retrieval probes.
        batch_size: windows that run together (default: as many as fit on CUDA, else 1).
        journal: file that keeps finished measurements, so that an interrupted search goes on (default: OUT.journal).
        plot: image file for the map of the layers.

    Example:
        masformer search MODEL --data books.jsonl.xz --budget 8 --local window:256+4 --out plan.yaml
    """
    records.check_writable(out)
    records.check_writable(plot)
    if Path(out).suffix.lower() not in PLAN_SUFFIXES:
        raise MasformerError(f"cannot tell the format of plan file {out}; allowed: {', '.join(PLAN_SUFFIXES)}")
    rest, choices = Span.parse(local), [Span.parse(text) for text in span or ()]
    placement.Budget.parse(budget)
    if probes is not None and "retrieval" not in placement.parse_criteria(criteria):
        raise MasformerError("--probes does nothing without the criterion retrieval")
    texts = {name: list(read_documents([name], field=field, limit=documents)) for name in test or ()}
    chosen = list(read_documents(data, field=field, limit=documents))
    options = RunningOptions(dtype=dtype, device=device)
    loaded, tokenizer = options.load_both(model, load_config(model)[1])
    with stage_progress(f"{model} on {records.device_name(loaded.device)}", quiet=quiet) as progress:
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
            probes=16 if probes is None else probes,
            random_placements=random_placements,
            seed=seed,
            batch_size=batch_size,
            precision=options.precision,
            journal=journal or f"{out}.journal",
            progress=progress,
        )
    show(placement.placement_table(result))
    result.save(out, model=model, data=data)
    say(f"{out}: {result.plan}")
    if plot is not None:
        placement.plot_search(result, plot)
        say(f"map of the layers: {plot}")
    return {
        "model": model,
        "data": data,
        "dtype": str(loaded.dtype),
        "device": records.device_name(loaded.device),
        **result.to_dict(),
    }
