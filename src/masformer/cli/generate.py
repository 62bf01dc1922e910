"""`masformer generate`."""

from __future__ import annotations

import sys

from masformer import generation, records
from masformer.cli.options import Figures, OneModelOptions
from masformer.errors import MasformerError
from masformer.files import decode_text, read_text
from masformer.models.checkpoint import load_config
from masformer.progress import stage_progress


def generate(
    model: str,
    options: OneModelOptions,
    *,
    prompt: str | None = None,
    file: str | None = None,
    system: str | None = None,
    raw: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    beams: int = 1,
    prefill_chunk: int = generation.CHUNK,
    seed: int = records.SEED,
    quiet: bool = False,
) -> Figures:
    """Streams a continuation of a prompt, and says what it took; a chat template is used where the tokenizer has one.

    Args:
        prompt: the prompt; without it and --file, standard input is read.
        file: UTF-8 text file with the prompt, also as .gz, .xz, .bz2; with --prompt, it comes before that, as the
            document a question is about.
        system: system message of the chat.
        raw: take the prompt as it is, without the chat template.
        max_new_tokens: the most tokens to generate.
        temperature: 0 takes the most likely token; above, tokens are sampled.
        top_p: sample from the most likely tokens that together have this probability.
        top_k: sample from so many of the most likely tokens.
        beams: beam search with so many beams; its text is not streamed.
        prefill_chunk: prompt tokens in one forward pass; memory beside the cache does not grow with the prompt.
        seed: of sampling.

    Example:
        masformer generate MODEL --file report.txt --prompt 'What was decided?' --plan 'full@11-18; window:512+4'
    """
    text = _prompt(prompt, file)
    chosen = options.one(load_config(model)[1])
    loaded, tokenizer = options.load_both(model, chosen)
    tokens = generation.prompt_tokens(tokenizer, text, chat=False if raw else None, system=system)
    with stage_progress(f"{model} on {records.device_name(loaded.device)}", quiet=quiet) as progress:
        result = generation.generate(
            loaded,
            tokenizer,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            beams=beams,
            chunk=prefill_chunk,
            seed=seed,
            on_text=lambda piece: print(piece, end="", flush=True),
            on_prompt=lambda done: progress(f"reading {len(tokens):,} prompt tokens", done, len(tokens)),
        )
    print()
    print(result.summary(), file=sys.stderr)
    figures = {"model": model, "plan": str(chosen), "device": records.device_name(loaded.device)}
    return {**figures, **result.to_dict()}


def _prompt(prompt: str | None, file: str | None) -> str:
    parts = []
    if file is not None:
        parts.append(read_text(file, "the prompt file"))
    if prompt is not None:
        parts.append(prompt)
    if not parts:
        if sys.stdin.isatty():
            raise MasformerError("no prompt: give --prompt or --file, or pipe text into standard input")
        parts.append(decode_text(sys.stdin.buffer.read(), "standard input"))
    return "\n\n".join(parts)
