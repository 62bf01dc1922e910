"""`masformer search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from masformer import records
from masformer.cli.options import Dtype, Figures, RunningOptions, say, show
from masformer.defaults import SEED, TargetName
from masformer.errors import MasformerError
from masformer.progress import stage_progress

if TYPE_CHECKING:
    from masformer.spans import Span

PAIR = ("prompt", "target")
"""The fields of `masformer pairs`."""


def search(
    model: str,
    *,
    data: list[str],
    budget: str,
    local: str,
    out: str,
    length: int = 2048,
    method: Literal["gradient", "sensitivity", "greedy", "joint"] = "gradient",
    by: Literal["layers", "heads"] = "layers",
    criteria: str | None = None,
    span: list[str] | None = None,
    rounds: int | None = None,
    points: int | None = None,
    ends: bool = False,
    test: list[str] | None = None,
    field: str = "text",
    documents: int | None = None,
    windows: int = 8,
    held_out_windows: int = 8,
    probes: int | None = None,
    pairs: list[str] | None = None,
    raw: bool = False,
    random_placements: int | None = None,
    seed: int = SEED,
    batch_size: int | None = None,
    dtype: Dtype = "auto",
    for_: TargetName | None = None,
    journal: str | None = None,
    plot: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Finds the layers or KV heads that need full attention, on your text, and holds them against other placements.

    Args:
        data: text or JSONL files to choose by; a part is held out, and results are reported on it.
        budget: number of full layers, or KV heads by heads (8), share of all-full's attention FLOPs (30%), or KV-cache
            size (64MiB@8192).
        local: span of the units that are not full, for example window:256+4.
        out: plan file to write, .yaml or .json.
        length: tokens of a window of text.
        method: gradient measures all units at once; the others layer by layer, one at a time, the best next one, or one
            span of a list per layer.
        by: what has a span of its own, layers or KV heads; other tools run plans by layers alone.
        criteria: what must not suffer: tail, kl, retrieval, or a weighted mix like tail:1,kl:0.5 (default: tail and
            retrieval alike; of the older methods tail).
        span: for gradient and joint, a span to choose from; may be repeated (default: full).
        rounds: of gradient: after the first, gains are measured again at the plan found (default: 1).
        points: of gradient: points of the path from local to full (default: 2 for the tail, 4 for other criteria).
        ends: of gradient: by the criterion retrieval, measure question and answer also at the end of the path, where
            heads show that tell one thing from another; a unit counts as the larger of its two shares.
        test: files of other text to report on as well.
        field: key of the text in JSONL files.
        documents: use at most so many documents of each text.
        windows: windows of text to choose by.
        held_out_windows: windows of text to report on; 0 finds the plan and leaves it at that.
        probes: for the criterion retrieval, prompts to choose by, and as many to report on (default: as many as
            windows; half of --pairs).
        pairs: for the criterion retrieval, JSONL files with prompt and target, in place of generated prompts.
        raw: take generated prompts as they are, without the chat template.
        random_placements: random placements of the same budget, for comparison (default: 20).
        seed: of the random placements and retrieval probes.
        batch_size: windows that run together (default: as many as fit on CUDA, else 1).
        for_: the tool that is to run the plan; what it could not run is refused before the work.
        journal: file that keeps finished measurements, so that an interrupted search goes on (default: OUT.journal).
        plot: image file for the map of the layers.

    Example:
        masformer search MODEL --data books.jsonl.xz --budget 8 --local window:256+4 --out plan.yaml
    """
    from masformer import placement
    from masformer.data import read_documents
    from masformer.data.documents import read_rows
    from masformer.export import check_export
    from masformer.models.checkpoint import load_config
    from masformer.plan import PLAN_SUFFIXES
    from masformer.plots import checked_figure
    from masformer.spans import Span

    records.check_writable(out)
    if plot is not None:
        records.check_writable(checked_figure(plot))
    if Path(out).suffix.lower() not in PLAN_SUFFIXES:
        raise MasformerError(f"cannot tell the format of plan file {out}; allowed: {', '.join(PLAN_SUFFIXES)}")
    rest, choices = Span.parse(local), [Span.parse(text) for text in span or ()]
    placement.Budget.parse(budget)
    config, own = load_config(model)
    if for_ is not None:
        _check_target(config, for_, by, [rest, *choices])
    texts = {name: list(read_documents([name], field=field, limit=documents)) for name in test or ()}
    chosen = list(read_documents(data, field=field, limit=documents))
    asked = None if pairs is None else [tuple(row.texts.values()) for row in read_rows(pairs, PAIR)]
    options = RunningOptions(dtype=dtype, device=device)
    loaded, tokenizer = options.load_both(model, own)
    with stage_progress(f"{model} on {records.device_name(loaded.device)}", quiet=quiet) as progress:
        result = placement.search(
            loaded,
            tokenizer,
            [document.text for document in chosen],
            budget,
            rest,
            length=length,
            other_texts={name: [document.text for document in text] for name, text in texts.items()},
            method=method,
            by=by,
            criteria=criteria,
            spans=choices,
            rounds=rounds,
            points=points,
            ends=ends,
            windows=windows,
            held_out_windows=held_out_windows,
            probes=probes,
            pairs=asked,
            chat=False if raw else None,
            random_placements=random_placements,
            seed=seed,
            batch_size=batch_size,
            precision=options.precision,
            journal=journal or f"{out}.journal",
            progress=progress,
        )
    if result.placements:
        show(placement.placement_table(result))
    else:
        say(placement.summary(result))
    result.save(out, model=model, data=data)
    say(f"{out}: {result.plan}")
    if plot is not None:
        placement.plot_search(result, plot)
        say(f"map of the layers: {plot}")
    if for_ is not None:
        check_export(config, result.plan, for_)
    return {
        "model": model,
        "data": data,
        "dtype": str(loaded.dtype),
        "device": records.device_name(loaded.device),
        **result.to_dict(),
    }


def _check_target(config: Any, target: str, by: str, spans: list[Span]) -> None:
    """Refuses before anything runs what the tool could not: plans by heads, and spans that it does not know.

    Args:
        config: of the model.
        target: the tool.
        by: what is searched.
        spans: the local one, and those to choose from.
    """
    from masformer.export import check_export
    from masformer.plan import AttentionPlan

    if by == "heads":
        raise MasformerError(
            f"{target} gives all KV heads of a layer the same span, so it runs no plan by heads; use --by layers"
        )
    local, *others = dict.fromkeys(spans)
    layers = config.num_hidden_layers
    if layers > 1:
        plan = list(AttentionPlan.mixed(layers, 1, local=local))
        places = [layer for layer, span in enumerate(plan) if span == local]
        for layer, span in zip(places[:-1], (each for each in others if each not in plan), strict=False):
            plan[layer] = span
        check_export(config, AttentionPlan(tuple(plan)), target)
