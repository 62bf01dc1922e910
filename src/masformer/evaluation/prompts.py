"""Prompts of a given length about long documents: a template, examples before it, and a rule for what does not fit.

A template is text with `{document}` once and, where examples have a query, `{query}`; braces of its own are doubled.
What is cut is the document alone: the template's words, the query and the examples stay.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from masformer.data.documents import read_rows
from masformer.data.pairs import CUTS, cut_tokens
from masformer.data.tokens import part_tokens, tokenize_around
from masformer.defaults import SHOT_TOKENS
from masformer.errors import MasformerError, check_int, check_seed
from masformer.files import read_text
from masformer.generation import chat_text, uses_chat

SUMMARY = """\
Summarize the following document.

{document}

Now write a summary of the document above.

Summary:"""
QUERY = """\
Read the following document, then answer the question or instruction after it.

{document}

Question or instruction: {query}
Answer:"""
"""What is asked unless a template is given: a summary, or an answer to the query."""
NAMES = ("document", "query")
MARK = "<<DOCUMENT-OF-THE-PROMPT>>"
"""Stands for the document until the chat template has been applied."""


@dataclass(frozen=True)
class Example:
    """A document, perhaps a query about it, and the text that a person wrote.

    Attributes:
        name: file and line, and the number in the list where there is one (`meetings.jsonl:17#2`).
        document: never blank.
        target: the reference; never blank.
        query: None where there is none.
    """

    name: str
    document: str
    target: str
    query: str | None = None


def read_examples(
    paths: Iterable[Any],
    *,
    document_field: str,
    target_field: str,
    query_field: str | None = None,
    where: Mapping[str, str] | None = None,
    documents: int | None = None,
) -> list[Example]:
    """Reads examples from JSON lines or Parquet, in order.

    Args:
        paths: see `read_rows`; where fields lead into a list (`queries.answer`), each of its entries is an example.
        document_field: the field of the document.
        target_field: the field of the reference.
        query_field: the field of the query, if there is one.
        where: field -> value, see `read_rows`.
        documents: use all examples of the first so many documents.

    Raises:
        MasformerError: as `read_rows`; a field is blank, a document is there twice with the same query, or nothing is
            selected.
    """
    if documents is not None:
        check_int("limit of documents", documents, 1)
    fields = [document_field, target_field] + ([] if query_field is None else [query_field])
    twice = [left for left, right in pairwise(sorted(fields)) if left == right]
    if twice:
        raise MasformerError(f"field {twice[0]!r} is named twice; document, target and query are different fields")
    files = [Path(path) for path in paths]
    shown = len({path.name for path in files}) == len(files)  # then the files' names alone tell examples apart
    found: list[Example] = []
    seen: dict[tuple[str, str | None], str] = {}
    texts: set[str] = set()
    for row in read_rows(files, fields, where):
        for field in fields:
            if not row.texts[field].strip():
                raise MasformerError(f"{row.name}: field {field!r} is blank; it must hold text")
        document, query = row.texts[document_field], None if query_field is None else row.texts[query_field]
        if documents is not None and document not in texts and len(texts) == documents:
            break
        texts.add(document)
        if (before := seen.setdefault((document, query), row.name)) != row.name:
            raise MasformerError(
                f"{row.name}: the same document{'' if query is None else ' and query'} as in {before}; "
                f"give --query-field where examples differ by their query, or leave out the twin"
            )
        name = Path(row.name).name if shown else row.name
        found.append(Example(name, document, row.texts[target_field], query))
    if not found:
        chosen = "".join(f", {field} = {value}" for field, value in (where or {}).items())
        raise MasformerError(f"{', '.join(map(str, files))}: no example is selected{chosen and ' with' + chosen[1:]}")
    return found


@dataclass(frozen=True)
class Template:
    """The words around a document.

    Attributes:
        text: with placeholders.
        source: where it came from, for messages.

    Raises:
        MasformerError: a brace without its partner, an unknown placeholder, or not exactly one `{document}`.
    """

    text: str
    source: str = "the template"

    @classmethod
    def load(cls, path: Any) -> Template:
        """Reads a UTF-8 text file; the line break at its end is no part of the template.

        Raises:
            MasformerError: it cannot be read, or is no template.
        """
        text = read_text(path, "the template")
        return cls(text.removesuffix("\n").removesuffix("\r"), f"template {path}")

    def __post_init__(self) -> None:
        names = [name for _, name in self._parts if name is not None]
        for name in names:
            if name not in NAMES:
                raise MasformerError(
                    f"{self._line_of(name)}: unknown placeholder {{{name}}}; allowed: {{document}}, {{query}}, and "
                    f"doubled braces for braces as such"
                )
        if names.count("document") != 1:
            raise MasformerError(f"{self.source} must hold {{document}} once, it does {names.count('document')} times")

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        try:
            found = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise MasformerError(
                f"{self.source}: {error}; allowed: {{document}}, {{query}}, and doubled braces for braces as such"
            ) from None
        return [(words, _whole(name, form, conversion)) for words, name, form, conversion in found]

    def _line_of(self, name: str) -> str:
        start = self.text.find("{" + name)
        return f"{self.source}, line {self.text.count(chr(10), 0, max(start, 0)) + 1}"

    @property
    def has_query(self) -> bool:
        """Whether a query has its place in it."""
        return any(name == "query" for _, name in self._parts)

    def filled(self, document: str, query: str | None) -> str:
        """The text with what belongs into it."""
        values = {"document": document, "query": query or ""}
        return "".join(words + ("" if name is None else values[name]) for words, name in self._parts)


def _whole(name: str | None, form: str | None, conversion: str | None) -> str | None:
    """A placeholder as it was written: `{query!r}` and `{query:9}` are none that are known."""
    if name is None:
        return None
    return name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt.

    Attributes:
        tokens: all of it.
        cut: tokens of the document that were left out.
    """

    tokens: list[int]
    cut: int


class Prompter:
    """Makes prompts of examples.

    Args:
        tokenizer: of transformers.
        template: the words around the document.
        chat: whether the prompt is a message in the tokenizer's chat template; None: where there is one. Without, the
            tokenizer adds its special tokens, as in training on pairs.
        cut: which part of a document goes that does not fit: see `masformer.data.pairs.cut_tokens`.
        shots: examples with their targets that come first: earlier turns of the chat, or else texts above the prompt.
        shot_tokens: the most tokens of the document of a shot, cut by the same rule.

    Raises:
        MasformerError: an unknown rule, a number out of range, or a chat template that is missing.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        chat: bool | None = None,
        cut: str = "middle",
        shots: Sequence[Example] = (),
        shot_tokens: int = SHOT_TOKENS,
    ) -> None:
        check_int("shot_tokens", shot_tokens, 1)
        if cut not in CUTS:
            raise MasformerError(f"unknown cut {cut!r}; allowed: {', '.join(CUTS)}")
        self.tokenizer, self.template, self.cut, self.shot_tokens = tokenizer, template, cut, shot_tokens
        self.chat = uses_chat(tokenizer, chat)
        self.shots = tuple(shots)
        self._turns = [(template.filled(self._shortened(each), each.query), each.target) for each in shots]
        self._around = lru_cache(maxsize=256)(self._tokens_around)
        self._document = lru_cache(maxsize=4)(self._tokens)

    def _tokens(self, text: str) -> Any:
        return np.asarray(part_tokens(self.tokenizer, text), dtype=np.int64)

    def _shortened(self, example: Example) -> str:
        tokens = self._tokens(example.document)
        if len(tokens) <= self.shot_tokens:
            return example.document
        text: str = self.tokenizer.decode(cut_tokens(tokens, self.shot_tokens, self.cut).tolist())
        return text

    def text(self, document: str, query: str | None) -> str:
        """The whole prompt as text."""
        asked = self.template.filled(document, query)
        if not self.chat:
            space = "" if self.template.text[-1:].isspace() else " "
            return "".join(f"{shot}{space}{target}\n\n" for shot, target in self._turns) + asked
        messages = []
        for shot, target in self._turns:
            messages += [{"role": "user", "content": shot}, {"role": "assistant", "content": target}]
        return chat_text(self.tokenizer, [*messages, {"role": "user", "content": asked}])

    def _tokens_around(self, query: str | None) -> tuple[list[int], list[int]]:
        pieces = self.text(MARK, query).split(MARK)
        if len(pieces) != 2:
            raise MasformerError(f"the chat template, the query or an example repeats the prompt or holds {MARK}")
        return tokenize_around(self.tokenizer, *pieces, special=not self.chat)

    def prompt(self, example: Example, length: int) -> Prompt:
        """A prompt of at most `length` tokens, the template and its surroundings included.

        Raises:
            MasformerError: no token of the document has room.
        """
        head, tail = self._around(example.query)
        room = length - len(head) - len(tail)
        if room < 1:
            raise MasformerError(
                f"{example.name}: a prompt of {length} tokens has no room for the document, since the template"
                f"{f' and {len(self.shots)} shots' if self.shots else ''} alone takes {len(head) + len(tail)}; "
                f"give more --lengths" + (", or fewer --shots or --shot-tokens" if self.shots else "")
            )
        document = self._document(example.document)
        kept = cut_tokens(document, room, self.cut)
        return Prompt([*head, *kept.tolist(), *tail], len(document) - len(kept))


def choose_shots(pool: Sequence[Example], tested: Sequence[Example], count: int, seed: int = 0) -> list[Example]:
    """Draws examples to show, at random by the seed; the same for every prompt, and none of a tested document.

    Args:
        pool: what they are drawn from.
        tested: what the model is asked about.
        count: how many.
        seed: of the draw.

    Raises:
        MasformerError: too few are left.
    """
    check_seed(seed)
    documents = {example.document for example in tested}
    left = [example for example in pool if example.document not in documents]
    if len(left) < count:
        raise MasformerError(
            f"{count} shots asked for, but {len(left)} examples are left whose document is not tested; give fewer "
            f"--documents, or select others with --shot-where"
        )
    return random.Random(seed).sample(left, count)
