"""How documents are cut into windows of input tokens and the tokens that they predict.

Either every token is predicted exactly once, in rolling windows as lm-eval cuts them (`get_rolling_token_windows`), or
the same few tokens of each document are predicted from contexts of several lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from masformer.data import Document
from masformer.data.tokens import part_tokens
from masformer.errors import MasformerError, check_int

Window = tuple[list[int], list[int]]
"""(inputs, targets): the targets are the tokens that follow the last `len(targets)` inputs."""


@dataclass(frozen=True)
class FixedTargets:
    """The tokens of each document that are predicted at every length: the last `count` of its first `end` tokens.

    Attributes:
        count: predicted tokens of a document.
        end: tokens of a document that are used; a shorter document is left out.
    """

    count: int
    end: int

    def check(self, length: int, prefix: int | None) -> None:
        """Raises MasformerError unless a window of `length` holds the targets."""
        check_int("target_tokens", self.count, 1)
        least = self.count + (prefix is None)
        if length < least:
            why = "" if prefix is not None else ", and one that the first is predicted from"
            raise MasformerError(f"length {length} is too short for {self.count} target tokens{why}; least: {least}")
        if length > self.end:
            raise MasformerError(f"length {length} is beyond the {self.end} tokens at which the targets end")


def rolling_windows(tokens: Sequence[int], prefix: int | None, length: int, context: int = 1) -> Iterator[Window]:
    """Cuts a document into windows that predict each of its tokens exactly once, as lm-eval's rolling windows.

    The first window predicts as much as it can; each later one predicts the next `length - context + 1` tokens, and the
    last one reaches back so that it is as long as the others.

    Args:
        tokens: token ids of the document.
        prefix: what the first token is predicted from; None: the first token is not predicted.
        length: the most input tokens of a window.
        context: the fewest tokens that a prediction sees, after the first window; 1 to `length`.

    Yields:
        (inputs, targets): the targets are the tokens that follow the last `len(targets)` inputs. Inputs before those
        (there are some in the last window, or with `context` > 1) are seen, but predict nothing.

    Raises:
        MasformerError: `length` or `context` is out of range.
    """
    check_window(length, context)
    stream = list(tokens) if prefix is None else [prefix, *tokens]
    done, last = 0, len(stream) - 1
    while done < last:
        end = min(done + (length - context + 1 if done else length), last)
        yield stream[max(0, end - length) : end], stream[done + 1 : end + 1]
        done = end


def target_window(tokens: Sequence[int], prefix: int | None, length: int, targets: FixedTargets) -> Window:
    """The window of a document that predicts its fixed targets from a context of a given length.

    Of the document's first `targets.end` tokens the model sees the last `length`, the targets among them: the
    `length - targets.count` tokens before the targets are the context. The prefix stands before them at every length,
    so that nothing but the context differs between lengths. The longest window, with `length` equal to `targets.end`,
    is the document's first rolling window.

    Args:
        tokens: token ids of the document, at least `targets.end`.
        prefix: what stands before the context; None: nothing.
        length: tokens of the document that are seen or predicted: `targets.count` to `targets.end`, one more than
            `targets.count` at least without a prefix.
        targets: what is predicted.

    Returns:
        (inputs, targets): `length` inputs with a prefix and one less without; `targets.count` targets.

    Raises:
        MasformerError: `length` is out of range, or the document too short.
    """
    targets.check(length, prefix)
    if len(tokens) < targets.end:
        raise MasformerError(f"the document has {len(tokens)} tokens, {targets.end} are needed")
    seen = list(tokens[targets.end - length : targets.end])
    return [*([] if prefix is None else [prefix]), *seen[:-1]], seen[-targets.count :]


def document_windows(
    tokens: Sequence[int], prefix: int | None, length: int, context: int, targets: FixedTargets | None
) -> Iterator[Window]:
    """The windows of a document: rolling ones, or the one that predicts fixed targets."""
    if targets is None:
        yield from rolling_windows(tokens, prefix, length, context)
    elif len(tokens) >= targets.end:
        yield target_window(tokens, prefix, length, targets)


def prefix_token(tokenizer: Any) -> int | None:
    """What a document's first token is predicted from: the tokenizer's BOS token, else its EOS token, else None."""
    bos: int | None = tokenizer.bos_token_id
    eos: int | None = tokenizer.eos_token_id
    return eos if bos is None else bos


def tokenize(
    tokenizer: Any, documents: Iterable[Document], *, max_tokens: int | None = None
) -> tuple[list[list[int]], int]:
    """Token ids of each document, without special tokens, and the UTF-8 bytes of text that they stand for.

    Args:
        tokenizer: of transformers.
        documents: what `read_documents` gives.
        max_tokens: keep at most the first `max_tokens` tokens of each document. The bytes of a document that was cut
            are those of its decoded tokens.

    Raises:
        MasformerError: `max_tokens` is below 1.
    """
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, 1)
    rows, text_bytes = [], 0
    for document in documents:
        tokens = part_tokens(tokenizer, document.text)
        kept = tokens[:max_tokens]
        rows.append(kept)
        text_bytes += len((document.text if len(kept) == len(tokens) else tokenizer.decode(kept)).encode())
    return rows, text_bytes


def check_window(length: int, context: int) -> None:
    """Raises MasformerError unless they are of a rolling window."""
    check_int("length", length, 1)
    check_int("context", context, 1)
    if context > length:
        raise MasformerError(f"context must be at most the length, {length}, got {context}")


def predicted_tokens(documents: Sequence[Sequence[int]], prefix: int | None, targets: FixedTargets | None) -> int:
    """Number of tokens that are predicted at one length."""
    if targets is not None:
        return targets.count * sum(len(document) >= targets.end for document in documents)
    return sum(max(0, len(document) - (prefix is None)) for document in documents)
