"""`masformer eval`: how well a model does under plans."""

from __future__ import annotations

from masformer.cli.options import Backend, Figures, ModelOptions, console, lengths_of
from masformer.data import read_documents
from masformer.evaluation.perplexity import compare_plans, perplexity_table, prefix_token, tokenize
from masformer.models.checkpoint import load_config
from masformer.progress import progress_bar


def eval_perplexity(
    model: str,
    options: ModelOptions,
    *,
    data: list[str],
    lengths: str = "1024,2048,4096",
    field: str = "text",
    documents: int | None = None,
    max_tokens: int | None = None,
    backend: Backend = "auto",
) -> Figures:
    """Perplexity by context length and by position, in rolling windows as in lm-eval; plans share one load.

    Args:
        data: text or JSONL files, also .gz, .xz, .bz2.
        lengths: context lengths in tokens, separated by commas.
        field: key of the text in JSONL files.
        documents: use at most so many documents.
        max_tokens: use at most the first so many tokens of each document.

    Example:
        masformer eval perplexity MODEL --data books.jsonl.xz --lengths 1024,4096 \\
            --plan full --plan window:512+4 --plan 'full@11-18; window:512+4'
    """
    windows = lengths_of("--lengths", lengths)
    plans = options.named(load_config(model)[1])
    texts = list(read_documents(data, field=field, limit=documents))
    loaded, tokenizer = options.load_both(model, next(iter(plans.values())))
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
