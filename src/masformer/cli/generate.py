"""`masformer generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from masformer import records
from masformer.cli.options import Figures, OneModelOptions
from masformer.defaults import PREFILL_CHUNK, SEED
from masformer.errors import MasformerError
from masformer.files import decode_text, read_text
from masformer.progress import stage_progress

if TYPE_CHECKING:
    from masformer.generation import Chat


def generate(
    model: str,
    options: OneModelOptions,
    *,
    prompt: str | None = None,
    file: str | None = None,
    system: str | None = None,
    raw: bool = False,
    chat: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    beams: int = 1,
    prefill_chunk: int = PREFILL_CHUNK,
    compile: bool = False,
    seed: int = SEED,
    quiet: bool = False,
) -> Figures:
    """Streams a continuation of a prompt, and says what it took; a chat template is used where the tokenizer has one.

    Args:
        prompt: the prompt; without it and --file, standard input is read.
        file: UTF-8 text file with the prompt, also as .gz, .xz, .bz2; with --prompt, it comes before that, as the
            document a question is about.
        system: system message of the chat.
        raw: take the prompt as it is, without the chat template.
        chat: a conversation: a line of standard input is a turn, --prompt and --file begin the first one; /exit or the
            end of the input ends it, Ctrl-C an answer.
        max_new_tokens: the most tokens to generate.
        temperature: 0 takes the most likely token; above, tokens are sampled.
        top_p: sample from the most likely tokens that together have this probability.
        top_k: sample from so many of the most likely tokens.
        beams: beam search with so many beams; its text is not streamed.
        prefill_chunk: prompt tokens in one forward pass; memory beside the cache does not grow with the prompt.
        compile: on an NVIDIA GPU, compile what a token does beside attention: some seconds once, faster from the
            ninth token on.
        seed: of sampling.

    Example:
        masformer generate MODEL --file report.txt --prompt 'What was decided?' --plan 'full@11-18; window:512+4'
    """
    from masformer import generation
    from masformer.models.checkpoint import load_config, load_tokenizer
    from masformer.models.graphs import compile_tokens

    if chat and (raw or beams > 1):
        raise MasformerError(f"{'--raw' if raw else '--beams'} does not go with --chat")
    given = _given(prompt, file)
    text = "" if chat else _prompt(given)
    chosen = options.one(load_config(model)[1])
    if chat:
        generation.uses_chat(load_tokenizer(model), True)  # before the weights
    loaded, tokenizer = options.load_both(model, chosen)
    if compile:
        compile_tokens(loaded)
    device = records.device_name(loaded.device)
    figures = {"model": model, "plan": str(chosen), "device": device}
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    how |= {"chunk": prefill_chunk, "seed": seed}
    if chat:
        talk = generation.Chat(loaded, tokenizer, system=system, **how)
        return {**figures, "turns": _converse(talk, given, prompt is not None, quiet)}
    tokens = generation.prompt_tokens(tokenizer, text, chat=False if raw else None, system=system)
    with stage_progress(f"{model} on {device}", quiet=quiet) as progress:
        result = generation.generate(
            loaded,
            tokenizer,
            tokens,
            beams=beams,
            **how,
            on_text=_show,
            on_prompt=lambda done: progress(f"reading {len(tokens):,} prompt tokens", done, len(tokens)),
        )
    print()
    print(result.summary(), file=sys.stderr)
    return {**figures, **result.to_dict()}


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _given(prompt: str | None, file: str | None) -> list[str]:
    document = [] if file is None else [read_text(file, "the prompt file")]
    return document if prompt is None else [*document, prompt]


def _prompt(given: list[str]) -> str:
    if not given and sys.stdin.isatty():
        raise MasformerError("no prompt: give --prompt or --file, or pipe text into standard input")
    return "\n\n".join(given or [decode_text(sys.stdin.buffer.read(), "standard input")])


def _converse(chat: Chat, begun: list[str], whole: bool, quiet: bool) -> list[Figures]:
    """Answers turn by turn, the first of which has begun, or is whole; gives their figures."""
    turns = []
    for line in chain([""] if whole else [], _lines()):
        text = "\n\n".join(part for part in (*begun, line) if part)
        begun = []
        try:
            with stage_progress(quiet=quiet) as progress:
                result = chat.answer(text, _show, partial(_read, progress))
        except KeyboardInterrupt:
            print()
            print("stopped; /exit ends the chat", file=sys.stderr)
            continue
        print()
        print(result.summary(), file=sys.stderr)
        turns.append({"message": text, **result.to_dict()})
    return turns


def _read(progress: Callable[[str, int, int], None], done: int, new: int) -> None:
    progress(f"reading {new:,} new tokens", done, new)


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line, without blank ones."""
    watched = sys.stdin.isatty()
    if watched:
        with suppress(ImportError):
            import readline  # noqa: F401  # the line can then be edited
        print("a line is a turn; /exit or end of file ends the chat, Ctrl-C an answer", file=sys.stderr)
    for number in count(1):
        try:
            line = input("> ").encode(errors="surrogateescape") if watched else sys.stdin.buffer.readline()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            if not watched:
                raise
            print("\n/exit ends the chat", file=sys.stderr)
            continue
        text = decode_text(line, "standard input", number).strip()
        if text == "/exit" or not (watched or line):
            return
        if text:
            yield text
