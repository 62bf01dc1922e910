"""What was read: documents, tokens, how long they are, and what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from masformer.cost import count_text
from masformer.data.chat_rows import ChatRows
from masformer.data.packing import PackedRows
from masformer.data.pairs import PairRows, WholeRows
from masformer.data.store import Ints, TokenStore


@dataclass(frozen=True)
class SourceReport:
    """One source.

    Attributes:
        name: in the recipe.
        documents: documents, pairs or conversations.
        blank: rows that were left out since they hold no text, or none of the assistant.
        characters: characters read.
        tokens: tokens, end-of-sequence tokens included.
        longest: tokens of the longest document.
        histogram: upper bound -> documents of at most so many tokens, and more than the bound before: powers of two.
    """

    name: str
    documents: int
    blank: int
    characters: int
    tokens: int
    longest: int
    histogram: dict[int, int]


def report_source(store: TokenStore) -> SourceReport:
    """Counts what a store holds."""
    lengths = store.lengths
    return SourceReport(
        name=store.name,
        documents=len(store),
        blank=store.blank,
        characters=store.characters,
        tokens=len(store.tokens),
        longest=int(lengths.max()),
        histogram=_histogram(lengths),
    )


def _histogram(lengths: Ints) -> dict[int, int]:
    bounds, counts = np.unique(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    return {int(2**bound): int(count) for bound, count in zip(bounds, counts, strict=True)}


def report_rows(stores: Sequence[TokenStore], rows: PackedRows | WholeRows) -> dict[str, Any]:
    """Plain values: the sources, the rows made of them, and what was cut."""
    places = len(rows) * rows.length
    found: dict[str, Any] = {
        "sources": [vars(report_source(store)) for store in stores],
        "rows": len(rows),
        "length": rows.length,
        "tokens": rows.tokens,
        "empty_places": places - rows.tokens,
        "separate": not isinstance(rows, PackedRows) or rows.separate,
        "cut": None,
    }
    if isinstance(rows, PairRows):
        found["cut"] = vars(rows.cut) | {"rule": rows.rule}
    elif isinstance(rows, ChatRows):
        found["cut"] = vars(rows.cut) | {"rule": rows.rule}
        found["predicted"] = rows.predicted
    elif isinstance(rows, PackedRows):
        found["documents_across_rows"] = _split(stores, rows.length)
    return found


def _split(stores: Sequence[TokenStore], length: int) -> int:
    """Documents that lie in more than one row."""
    ends = np.cumsum(np.concatenate([store.lengths for store in stores]))
    starts = np.concatenate([[0], ends[:-1]])
    return int((starts // length != (ends - 1) // length).sum())


def report_table(report: dict[str, Any]) -> Table:
    """The report for people to read."""
    table = Table(title="What was read", title_justify="left")
    for column in ("source", "documents", "tokens", "longest", "documents by tokens"):
        table.add_column(column, justify="left" if column in ("source", "documents by tokens") else "right")
    for source in report["sources"]:
        histogram = ", ".join(f"<={bound:,}: {count:,}" for bound, count in source["histogram"].items())
        blank = f" ({source['blank']:,} blank)" if source["blank"] else ""
        documents, tokens, longest = (f"{source[name]:,}" for name in ("documents", "tokens", "longest"))
        table.add_row(source["name"], documents + blank, tokens, longest, histogram)
    return table


def report_text(report: dict[str, Any]) -> str:
    """One line on the rows."""
    rows, empty = count_text(report["rows"], "row"), count_text(report["empty_places"], "place")
    text = f"{rows} of {report['length']:,} tokens, {empty} empty"
    if report["cut"] is None:
        how = "each document sees only itself" if report["separate"] else "documents see what came before them"
        return f"{text}; {count_text(report['documents_across_rows'], 'document')} in several rows; {how}"
    cut = report["cut"]
    if "chats" in cut:
        return (
            f"{text}; {report['predicted']:,} of {report['tokens']:,} tokens are the assistant's and predicted; "
            f"{count_text(cut['chats'], 'conversation')} cut at the end ({count_text(cut['tokens'], 'token')}), "
            f"{cut['dropped']:,} left out, whose first answer begins beyond a row"
        )
    gone = count_text(cut["prompt_tokens"], "token")
    return (
        f"{text}; {count_text(cut['prompts'], 'prompt')} cut ({cut['rule']}, {gone}), "
        f"{count_text(cut['targets'], 'target')} cut ({count_text(cut['target_tokens'], 'token')})"
    )
