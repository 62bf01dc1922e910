"""`masformer eval summarization`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from masformer import records
from masformer.cli.options import Figures, ModelOptions, lengths_of, show
from masformer.defaults import BATCH, SEED, SHOT_TOKENS
from masformer.errors import MasformerError, check_int
from masformer.extras import need
from masformer.progress import plan_progress

if TYPE_CHECKING:
    from masformer.evaluation.prompts import Example, Template


def eval_summarization(
    model: str,
    options: ModelOptions,
    *,
    data: list[str],
    document_field: str,
    target_field: str,
    out: str,
    query_field: str | None = None,
    where: list[str] | None = None,
    documents: int | None = None,
    lengths: str = "1024,2048,4096",
    max_new_tokens: int = 256,
    template: str | None = None,
    raw: bool = False,
    cut: Literal["middle", "tail", "head"] = "middle",
    shots: int = 0,
    shot_where: list[str] | None = None,
    shot_tokens: int = SHOT_TOKENS,
    beams: int = 1,
    batch: int = BATCH,
    backend: Literal["auto", "tiled", "reference"] = "auto",
    seed: int = SEED,
    quiet: bool = False,
) -> Figures:
    """Summaries of long documents, or answers to queries about them: ROUGE by plan and length of the prompt.

    Args:
        data: JSON lines or Parquet files; JSON lines also as .gz, .xz, .bz2.
        document_field: field of the document.
        target_field: field of the reference; queries.answer is that field of each entry of the list queries.
        out: file for the predictions, as JSON lines; a run that was stopped goes on from it.
        query_field: field of a query about the document, for the template's {query}.
        where: use the rows whose field has this value, for example split=test; may be repeated.
        documents: use at most so many documents.
        lengths: tokens of the whole prompt, separated by commas; generated tokens come on top.
        max_new_tokens: the most tokens to generate.
        template: text file with {document} and perhaps {query}; by default a request for a summary, or the query.
        raw: take the prompt as it is, without the chat template.
        cut: which part of a document is cut out that does not fit: the middle as in LongBench, or its tail or head.
        shots: so many examples with their references come first, drawn from the data, never of a tested document.
        shot_where: draw the shots from the rows whose field has this value, for example split=train; may be repeated.
        shot_tokens: the most tokens of the document of a shot.
        beams: beam search with so many beams.
        batch: prompts that are continued together.
        seed: of drawing the shots.

    Example:
        masformer eval summarization MODEL --data qmsum.jsonl.xz --document-field document \\
            --query-field queries.query --target-field queries.answer --where split=test --where queries.kind=general \\
            --lengths 2048,4096 --plan full --plan 'full@11-18; window:512+4' --out predictions.jsonl
    """
    need("rouge", "masformer eval summarization")
    from masformer.evaluation.prompts import Prompter, read_examples
    from masformer.evaluation.summarization import summarization_tables, summarize
    from masformer.models.checkpoint import load_config

    sizes = lengths_of("--lengths", lengths)
    plans = options.named(load_config(model)[1])
    records.check_writable(out)
    words = _template(template, query_field)

    def read(selection: list[str] | None, option: str, limit: int | None) -> list[Example]:
        return read_examples(
            data,
            document_field=document_field,
            target_field=target_field,
            query_field=query_field,
            where=_where(selection, option),
            documents=limit,
        )

    examples = read(where, "--where", documents)
    shown = _shots(shots, shot_where, shot_tokens, seed, examples, read)
    loaded, tokenizer = options.load_both(model, next(iter(plans.values())))
    prompter = Prompter(tokenizer, words, chat=False if raw else None, cut=cut, shots=shown, shot_tokens=shot_tokens)
    with plan_progress(f"{model} on {records.device_name(loaded.device)}", quiet=quiet) as progress:
        results, differences = summarize(
            loaded,
            prompter,
            examples,
            plans,
            sizes,
            out,
            max_new_tokens=max_new_tokens,
            beams=beams,
            batch=batch,
            backend=backend,
            settings={"model": model},
            progress=progress,
        )
    for table in summarization_tables(results, differences):
        show(table)
    return {
        "model": model,
        "data": data,
        "dtype": str(loaded.dtype),
        "device": records.device_name(loaded.device),
        "settings": {
            "document_field": document_field,
            "target_field": target_field,
            "query_field": query_field,
            "where": where,
            "documents": documents,
            "max_new_tokens": max_new_tokens,
            "template": words.text,
            "chat": prompter.chat,
            "cut": cut,
            "shots": [shot.name for shot in shown],
            "shot_tokens": shot_tokens if shown else None,
            "beams": beams,
            "batch": batch,
            "backend": backend,
            "predictions": out,
        },
        "results": [result.to_dict() for result in results],
        "differences": [difference.to_dict() for difference in differences],
    }


def _template(path: str | None, query_field: str | None) -> Template:
    from masformer.evaluation.prompts import QUERY, SUMMARY, Template

    if path is None:
        return Template(SUMMARY if query_field is None else QUERY)
    template = Template.load(path)
    if template.has_query and query_field is None:
        raise MasformerError(f"{template.source} holds {{query}}; give --query-field")
    if query_field is not None and not template.has_query:
        raise MasformerError(f"--query-field does nothing: {template.source} holds no {{query}}")
    return template


def _where(selection: list[str] | None, option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in selection or ():
        field, sign, value = text.partition("=")
        if not sign or not field:
            raise MasformerError(f"{option} {text!r} is not allowed; allowed: FIELD=VALUE")
        if field in found:
            raise MasformerError(f"{option} names the field {field!r} twice")
        found[field] = value
    return found


def _shots(
    count: int,
    selection: list[str] | None,
    tokens: int,
    seed: int,
    tested: list[Example],
    read: Callable[[list[str] | None, str, int | None], list[Example]],
) -> list[Example]:
    check_int("shots", count, 0)
    if not count:
        given = {"--shot-where": selection is not None, "--shot-tokens": tokens != SHOT_TOKENS}
        given["--seed"] = seed != SEED
        for option, is_given in given.items():
            if is_given:
                raise MasformerError(f"{option} does nothing without --shots")
        return []
    if selection is None:
        raise MasformerError("--shots needs --shot-where FIELD=VALUE, the rows that they are drawn from")
    from masformer.evaluation.prompts import choose_shots

    return choose_shots(read(selection, "--shot-where", None), tested, count, seed)
