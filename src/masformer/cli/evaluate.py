"""`masformer eval`: how well a model does under plans."""

from __future__ import annotations

from collections.abc import Sequence

from masformer import records
from masformer.cli.options import Backend, Figures, ModelOptions, lengths_of, say, show
from masformer.errors import MasformerError
from masformer.progress import plan_progress


def eval_perplexity(
    model: str,
    options: ModelOptions,
    *,
    data: list[str],
    lengths: str = "1024,2048,4096",
    field: str = "text",
    documents: int | None = None,
    max_tokens: int | None = None,
    target_tokens: int | None = None,
    against: str | None = None,
    batch_size: int | None = None,
    backend: Backend = "auto",
    compile: bool = False,
    quiet: bool = False,
) -> Figures:
    """Perplexity by context length and by position, in rolling windows as in lm-eval; plans share one load.

    Args:
        data: text or JSONL files, also .gz, .xz, .bz2.
        lengths: context lengths in tokens, separated by commas.
        field: key of the text in JSONL files.
        documents: use at most so many documents.
        max_tokens: use at most the first so many tokens of each document.
        target_tokens: predict the same so many tokens of each document at every length: the last ones of as many of its
            tokens as the longest length; shorter documents are left out. Default: every token, in rolling windows.
        against: the plan that the others are compared with, document by document, as it was given to --plan (default:
            the first).
        batch_size: windows that run together (default: as many as fit on CUDA, else 1).
        compile: compile the decoder layers, which pays on a GPU where there is much to measure.

    Example:
        masformer eval perplexity MODEL --data books.jsonl.xz --lengths 1024,4096 \\
            --plan full --plan window:512+4 --plan 'full@11-18; window:512+4'
    """
    from masformer.data import read_documents
    from masformer.evaluation.perplexity import (
        compare_plans,
        difference_table,
        paired_differences,
        perplexity_table,
        prefix_token,
        tokenize,
    )
    from masformer.models.checkpoint import load_config
    from masformer.models.compiling import compile_layers

    windows = lengths_of("--lengths", lengths)
    plans = options.named(load_config(model)[1])
    if against is not None and len(plans) == 1:
        raise MasformerError("--against does nothing with one plan; give several --plan")
    if against is not None and against not in plans:
        raise MasformerError(f"--against {against!r} is no plan of this run; allowed: {', '.join(map(repr, plans))}")
    if max_tokens is not None and target_tokens is not None:
        raise MasformerError("--max-tokens does nothing with --target-tokens: the longest length says what is used")
    texts = list(read_documents(data, field=field, limit=documents))
    loaded, tokenizer = options.load_both(model, next(iter(plans.values())))
    tokens, text_bytes = tokenize(tokenizer, texts, max_tokens=max_tokens)
    if compile:
        compile_layers(loaded)
    with plan_progress(f"{model} on {records.device_name(loaded.device)}", quiet=quiet) as progress:
        results = compare_plans(
            loaded,
            tokens,
            plans,
            windows,
            prefix=prefix_token(tokenizer),
            backend=backend,
            target_tokens=target_tokens,
            batch_size=batch_size,
            precision=options.precision,
            text_bytes=text_bytes if target_tokens is None else None,
            progress=progress,
        )
    show(perplexity_table(results))
    if target_tokens is None:
        for line in shorter_texts([len(row) for row in tokens], windows):
            say(line)
    differences = paired_differences(results, against)
    if differences:
        show(difference_table(differences))
    return {
        "model": model,
        "data": data,
        "dtype": str(loaded.dtype),
        "device": records.device_name(loaded.device),
        "autocast": results[0].autocast,
        "settings": {
            "lengths": windows,
            "field": field,
            "documents": documents,
            "max_tokens": max_tokens,
            "target_tokens": target_tokens,
            "batch_size": batch_size,
            "backend": backend,
            "compile": compile,
        },
        "results": [result.to_dict() for result in results],
        "differences": [each.to_dict() for each in differences],
    }


def shorter_texts(sizes: Sequence[int], lengths: Sequence[int]) -> list[str]:
    """What is to be said of documents that do not fill a window."""
    found = []
    for length in sorted(lengths):
        if count := sum(size < length for size in sizes):
            which = f"{count:,} of {len(sizes):,} documents are" if len(sizes) > 1 else "the document is"
            found.append(f"{which} shorter than {length:,} tokens: no token there sees so much context")
    return found
