"""Tokenized once, kept on disk: one array of token ids for a source, and where its documents lie in it.

A store is a folder whose name is the fingerprint of the content, the tokenizer and every setting that changes a token.
It is written beside its place and renamed when it is whole, so an interrupted run leaves no half store behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masformer.data.chats import ChatTokenizer, check_chat
from masformer.data.documents import Row
from masformer.data.sources import Source
from masformer.data.tokens import token_rows, tokenize_around
from masformer.errors import MasformerError
from masformer.files import hash_file, parse_json, read_text, user_cache

VERSION = 2
BATCH_CHARACTERS = 1 << 20
"""Characters of text that are tokenized at the same time."""
PROMPT = "{prompt}"
STALE = 24 * 3600
"""Seconds after which what an interrupted run left is removed."""
TOKENS, OFFSETS, PARTS, FACTS = "tokens.bin", "offsets.npy", "parts.npy", "store.json"
OWNED = "owned.npy"
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The tokens of one source.

    Attributes:
        name: of the source in the recipe.
        tokens: [tokens] ids of all documents, one after the other; read from disk as needed.
        offsets: [documents + 1] int64, where each document starts, and the end of the last one.
        parts: of pairs: [documents, 3] int64, how many of a document's tokens come before the part of the prompt that
            may be cut, before its end, and before the target; None for others.
        characters: characters that were read.
        blank: rows that were left out since they hold no text.
        end_token: the token that ends each document; None where the tokenizer has none.
        owned: of conversations: [tokens] bool, whether a token is the assistant's; None for others.
    """

    name: str
    tokens: NDArray[Any]
    offsets: Ints
    parts: Ints | None
    characters: int
    blank: int
    end_token: int | None
    owned: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def kind(self) -> str:
        """What it holds: see `masformer.data.sources.KINDS`."""
        return "pairs" if self.parts is not None else "chats" if self.owned is not None else "texts"

    @property
    def lengths(self) -> Ints:
        """[documents] int64, tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> Ints:
        """[tokens] int64 of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    def own(self, index: int) -> NDArray[np.bool_]:
        """[tokens] bool of one conversation: whether a token is the assistant's."""
        assert self.owned is not None
        return self.owned[self.offsets[index] : self.offsets[index + 1]]


def token_store(
    name: str,
    source: Source,
    tokenizer: Any,
    cache: str | os.PathLike[str] | None = None,
    *,
    template: str = PROMPT,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> TokenStore:
    """Tokenizes a source, or opens what was tokenized before.

    A document is what the tokenizer makes of it, with the special tokens that it adds by itself, and an end-of-sequence
    token if there is one. A pair is `template` with the prompt in it, the target, and an end-of-sequence token. A
    conversation is what the tokenizer's chat template makes of it (`masformer.data.chats`).

    Args:
        name: for messages and reports.
        source: what to read.
        tokenizer: of transformers.
        cache: folder of the stores; one in the user's cache by default.
        template: of pairs: the words around the prompt; they are never cut.
        progress: called with the documents and tokens done so far.

    Raises:
        MasformerError: something cannot be read or written, there is no text at all, the template lacks `{prompt}`, or
            the tokenizer a chat template.
    """
    if template.count(PROMPT) != 1:
        raise MasformerError(f"the template must hold {PROMPT} exactly once, got {template!r}")
    if source.kind == "chats":
        check_chat(tokenizer)
    place = user_cache("tokens") if cache is None else Path(cache)
    folder = place / _fingerprint(source, tokenizer, template)
    if (folder / FACTS).is_file() and (store := _opened(name, folder)) is not None:
        return store
    try:
        place.mkdir(parents=True, exist_ok=True)
        for left in place.glob(".*"):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=f".{folder.name}.") as temporary:
            whole, old = Path(temporary) / "store", Path(temporary) / "old"
            whole.mkdir()
            _write(whole, name, source, tokenizer, template, progress)
            try:
                whole.rename(folder)
            except OSError:  # another run was faster, or what is there is damaged
                if _opened(name, folder) is None:
                    folder.rename(old)
                    whole.rename(folder)
    except OSError as error:
        raise MasformerError(f"cannot write the tokens of {name} to {place}: {error.strerror or error}") from error
    store = _opened(name, folder)
    if store is None:
        raise MasformerError(f"the tokens of {name} in {folder} cannot be read back")
    return store


def _fingerprint(source: Source, tokenizer: Any, template: str) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    parts = [VERSION, source.fingerprint(), type(tokenizer).__name__, vocabulary, tokenizer.special_tokens_map]
    parts += [template] if source.is_pairs else []
    parts += [tokenizer.chat_template] if source.kind == "chats" else []
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _opened(name: str, folder: Path) -> TokenStore | None:
    """None where the store is not whole, or a byte of it has changed."""
    try:
        facts = parse_json(read_text(folder / FACTS), str(folder / FACTS))
        chats = facts.get("chats", False)
        if facts["digest"] != _digest(folder, facts["pairs"], chats):
            return None
        offsets = np.load(folder / OFFSETS, allow_pickle=False)
        parts = np.load(folder / PARTS, allow_pickle=False) if facts["pairs"] else None
        tokens = np.memmap(folder / TOKENS, dtype=facts["dtype"], mode="r")
        owned = np.load(folder / OWNED, mmap_mode="r", allow_pickle=False) if chats else None
    except (OSError, ValueError, KeyError, TypeError):  # a MasformerError is a ValueError
        return None
    if len(tokens) != offsets[-1] or len(offsets) != facts["documents"] + 1:
        return None
    return TokenStore(name, tokens, offsets, parts, facts["characters"], facts["blank"], facts["end_token"], owned)


def _digest(folder: Path, pairs: bool, chats: bool) -> str:
    """Of all that a store holds beside its facts."""
    digest = hashlib.sha256()
    for name in (TOKENS, OFFSETS, *[PARTS] * pairs, *[OWNED] * chats):
        hash_file(digest, folder / name)
    return digest.hexdigest()


def _write(
    folder: Path,
    name: str,
    source: Source,
    tokenizer: Any,
    template: str,
    progress: Callable[[int, int], None],
) -> None:
    end = tokenizer.eos_token_id
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    chats = ChatTokenizer(tokenizer) if source.kind == "chats" else None
    offsets, parts, owned = [0], [], bytearray()
    characters = read = 0
    with (folder / TOKENS).open("wb") as file:
        for rows in _batches(source.rows()):
            characters += sum(len(text) for row in rows for text in row.texts.values())
            read += len(rows)
            made: Iterable[tuple[list[int], Any]]
            if chats is None:
                kept = [row for row in rows if all(text.strip() for text in row.texts.values())]
                pieces = [list(row.texts.values()) for row in kept]
                made = _pairs(pieces, tokenizer, template) if source.is_pairs else _texts(pieces, tokenizer)
            else:
                made = [found for row in rows if (found := chats.conversation(row)) is not None]
            for tokens, part in made:
                if chats is not None:
                    owned += bytes(part)
                    part = ()
                elif end is not None and (not tokens or tokens[-1] != end):
                    tokens = [*tokens, end]
                file.write(np.asarray(tokens, dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(tokens))
                parts.append(part)
            progress(len(parts), offsets[-1])
        file.flush()
        os.fsync(file.fileno())
    if not offsets[-1]:
        raise MasformerError(f"source {name} ({source.place}) holds no text: every row in it is blank")
    np.save(folder / OFFSETS, np.asarray(offsets, dtype=np.int64))
    if source.is_pairs:
        np.save(folder / PARTS, np.asarray(parts, dtype=np.int64))
    if chats is not None:
        np.save(folder / OWNED, np.frombuffer(owned, dtype=np.bool_))
    facts = {"documents": len(parts), "characters": characters, "end_token": end}
    facts["blank"] = read - len(parts)
    facts |= {"dtype": dtype.name, "pairs": source.is_pairs, "source": source.place}
    facts |= {"chats": True} if chats is not None else {}
    facts["digest"] = _digest(folder, source.is_pairs, chats is not None)
    (folder / FACTS).write_text(json.dumps(facts))


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(text) for text in row.texts.values())
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _texts(pieces: Sequence[list[str]], tokenizer: Any) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    for tokens in token_rows(tokenizer, [text for (text,) in pieces], True):
        yield tokens, ()


def _pairs(
    pieces: Sequence[list[str]], tokenizer: Any, template: str
) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
    """Each part is tokenized by itself, so that what is cut is a number of whole tokens."""
    before, after = template.split(PROMPT)
    head, tail = tokenize_around(tokenizer, before, after)
    prompts = token_rows(tokenizer, [prompt for prompt, _ in pieces], False)
    targets = token_rows(tokenizer, [target for _, target in pieces], False)
    for prompt, target in zip(prompts, targets, strict=True):
        start, stop = len(head), len(head) + len(prompt)
        yield [*head, *prompt, *tail, *target], (start, stop, stop + len(tail))
