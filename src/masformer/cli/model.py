"""`masformer plan` and `masformer convert`: from a model and a plan to a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from masformer import records
from masformer.cli.options import Figures, PlanOptions, StoredModelOptions, lengths_of, say, show
from masformer.cli.parser import INSTEAD
from masformer.cli.preparing import importing, prepare
from masformer.errors import MasformerError
from masformer.progress import stage_progress

if TYPE_CHECKING:
    from masformer.plan import AttentionPlan


def show_plan(
    model: str,
    options: PlanOptions,
    *,
    seq: str = "2048,8192,32768",
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    devices: int | None = None,
    plot: str | None = None,
) -> Figures:
    """Shows a plan's picture and what it costs, against full attention in every layer. Needs no weights.

    Args:
        model: hub id, folder, .gguf file, or config.json.
        seq: sequence lengths in tokens, separated by commas.
        cache_dtype: dtype of the KV cache, and of what devices send each other.
        devices: also show what so many devices send each other in training, if they share each sequence.
        plot: image file for the attention patterns layer by layer, at the longest sequence.

    Example:
        masformer plan HuggingFaceTB/SmolLM2-135M --full 8 --placement middle --local window:512+4
    """
    with importing():
        from masformer.cost import communication, communication_table, compare, cost_table
        from masformer.models.known import find_model, kept_model
        from masformer.plan import AttentionPlan
        from masformer.plots import checked_figure, picture, plot_plan
        from masformer.spans import FullSpan

    if plot is not None:
        records.check_writable(checked_figure(plot))
    lengths = lengths_of("--seq", seq)
    known = kept_model(model)
    if known is None:
        prepare()
        known = find_model(model)
    own, shape = known.own, known.shape
    plans = options.named(own)
    for each in plans.values():
        known.check(each)
    if plot is not None and len(plans) > 1:
        raise MasformerError("--plot draws one plan; give one --plan")
    width = 4 if cache_dtype == "float32" else 2
    say(f"{model}: {known.kind}, {shape.num_layers} layers, {shape.parameters:,} parameters")
    figures: list[dict[str, Any]] = []
    for each in plans.values():
        say(f"\n{picture(each)}\n")
        costs = compare(shape, each, lengths, cache_bytes_per_value=width)
        show(cost_table(costs))
        figures.append({"plan": str(each), "costs": [cost.to_dict() for cost in costs]})
        if devices is not None:
            sent = [communication(shape, each, length, devices, bytes_per_value=width) for length in lengths]
            show(communication_table(sent))
            figures[-1]["communication"] = [each.to_dict() for each in sent]
        if plot is not None:
            plot_plan(each, plot, max(lengths))
            say(f"attention patterns: {plot}")
    limit = known.positions
    if limit is not None and limit < max(lengths):
        say(f"the model has {limit:,} positions; convert and train take more with --max-positions and max_positions")
    if list(plans.values()) == [AttentionPlan.uniform(len(own), FullSpan())]:
        say(f"a plan saves: try --full {max(1, len(own) // 4)} --placement middle --local window:512+4")
    return {"model": model, "cache_dtype": cache_dtype, "plans": figures}


def show_schema() -> None:
    """Prints the JSON schema of a plan file."""
    from masformer.plan_file import PlanFile
    from masformer.schema import schema_text

    print(schema_text(PlanFile), end="")


INSTEAD[show_plan] = {"schema": (show_schema, "print the JSON schema of plan files, and stop.")}


def convert(
    model: str,
    out: str,
    options: StoredModelOptions,
    *,
    sinks: Literal["fit"] | None = None,
    data: list[str] | None = None,
    field: str = "text",
    documents: int | None = None,
    length: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that carries a plan, and longer positions if asked, with a model card.

    Args:
        out: folder to write.
        sinks: fit gives the plan's constant sinks (window:512+sink) their weights, from a few texts.
        data: of --sinks, text or JSONL files.
        field: of --sinks, key of the text in JSONL files.
        documents: of --sinks, the most texts, of which those count that are long enough (default: 8 that are).
        length: of --sinks, tokens of each text (default: 2048).
        dtype: dtype of the weights; auto is what they are stored as, and bfloat16 for those of a quantised .gguf file.
        overwrite: replace a model folder that is already there; a README.md that somebody wrote is kept.

    Example:
        masformer convert EleutherAI/gpt-neo-1.3B OUT --plan 'full@0-7; window:512' --max-positions 8192
    """
    from masformer.data import read_documents
    from masformer.models.card import weights_text
    from masformer.models.checkpoint import check_plan, load_config
    from masformer.models.saving import check_folder, save_model

    given = {"--data": data, "--documents": documents, "--length": length}
    if sinks is None and (idle := [name for name, value in given.items() if value is not None]):
        raise MasformerError(f"{idle[0]} does nothing without --sinks fit")
    if sinks is not None and data is None:
        raise MasformerError("--sinks fit needs --data FILE, the texts to fit on")
    if not options.are_given and options.max_positions is None:
        raise MasformerError("nothing to convert: give --plan, or --full N --local SPAN, or --max-positions N")
    check_folder(out, overwrite=overwrite)
    config, own = load_config(model)
    chosen = options.one(own)
    check_plan(config, chosen)
    if sinks is None:
        loaded, tokenizer = options.to_write(model).load(model, chosen)
    else:
        texts = [document.text for document in read_documents(data or (), field=field, limit=documents)]
        wanted = {name: each for name, each in (("length", length), ("windows", documents)) if each is not None}
        loaded, tokenizer = _fitted(model, options, chosen, texts, **wanted)
    say(f"{out}: {chosen}; {weights_text(loaded)}")
    save_model(loaded, out, tokenizer, overwrite=overwrite, source=model)
    say(f"load it with masformer.load_model({out!r}), or with AutoModelForCausalLM after `import masformer`")


def _fitted(
    model: str, options: StoredModelOptions, plan: AttentionPlan, texts: list[str], **wanted: int
) -> tuple[Any, Any]:
    """The model with the plan's constant sinks, fitted where and as models are run, and its tokenizer."""
    from masformer.benchmarks import DTYPES, default_device
    from masformer.fitting import fit_sinks, with_first_tokens

    loaded, tokenizer = options.load_both(model, with_first_tokens(plan))
    with stage_progress() as progress:
        loaded.to(default_device())
        fit_sinks(loaded, tokenizer, texts, plan, progress=progress, **wanted)
        loaded.cpu()
    written = options.to_write(model).dtype
    return (loaded if written == "auto" else loaded.to(DTYPES[written])), tokenizer
