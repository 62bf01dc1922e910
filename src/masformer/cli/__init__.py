"""The command line: each command parses, calls what does the work, and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jsonargparse

import masformer
from masformer import records
from masformer.cli import (
    bench,
    evaluate,
    export,
    generate,
    harness,
    model,
    report,
    reproduce,
    retrieval,
    search,
    serve,
    summarization,
    tour,
    train,
)
from masformer.cli.options import LINE, say
from masformer.cli.parser import SHELLS, Command, Complete, Help, add_commands, error_line, grouped, option_name
from masformer.cli.preparing import prepare
from masformer.errors import MasformerError, beyond_memory, check_text
from masformer.settings import check_plain
from masformer.streams import guarded

DESCRIPTION = """\
Mixed attention spans for pretrained language models (MASFormer, arXiv
2310.12442): full attention at a few layers, local attention at all the others,
for a fraction of the cost of attention and of the KV cache.

A plan says what each layer sees: full@11-18,window:512+4 is full attention at
layers 11 to 18 and, at the others, the 512 newest tokens and the first 4
(attention sinks). 'full@11-18; window:512+4' says the same, in quotes, for a
shell ends a command at ';'. Spans: full, window:SIZE, window:SIZE+SINKS,
block:SIZE, block:SIZExBLOCKS.

look:
  masformer demo                      see it work, in minutes on a laptop
  masformer plan MODEL --full 8 --local window:512+4            what it saves
find and write a plan:
  masformer search MODEL --data FILE --budget 8 --local window:512+4 \\
      --out plan.yaml                 which layers need full attention
  masformer convert MODEL OUT --plan plan.yaml
  masformer export MODEL OUT --target vllm --plan full@11-18,window:512
                                      for the tools people use
train:
  masformer train --config RECIPE     train on, with long sequences
  masformer pairs MODEL OUT --count 10000     what to train retrieval with
run:
  masformer generate OUT --file report.txt    from long prompts
  masformer serve OUT                 to OpenAI clients
measure:
  masformer eval perplexity OUT --data FILE --lengths 1024,4096
  masformer eval summarization OUT --data FILE ...     by ROUGE
  masformer eval retrieval OUT --lengths 1024,4096     pass keys and needles
  masformer lm-eval --model masformer --tasks TASK ... of lm-evaluation-harness
  masformer bench prefill OUT --lengths 2048,8192      and: attention, decode,
                                      train, eval, llama-cpp
report:
  masformer report FOLDER             of what --json recorded
  masformer reproduce --scale tiny --out DIR  the paper's experiments"""

COMMANDS: dict[str, Any] = {
    "demo": tour.run_demo,
    "plan": model.show_plan,
    "search": search.search,
    "convert": model.convert,
    "export": export.export,
    "train": train.train,
    "pairs": retrieval.write_pairs,
    "generate": generate.generate,
    "serve": serve.serve,
    "eval": {
        "perplexity": evaluate.eval_perplexity,
        "summarization": summarization.eval_summarization,
        "retrieval": retrieval.eval_retrieval,
    },
    "bench": {
        "attention": bench.bench_attention,
        "prefill": bench.bench_prefill,
        "decode": bench.bench_decode,
        "train": bench.bench_train,
        "eval": bench.bench_eval,
        "llama-cpp": bench.bench_llama_cpp,
    },
    "report": report.report,
    "reproduce": reproduce.reproduce,
}
PASSED_ON: dict[str, Any] = {"lm-eval": harness.lm_eval}
"""Commands of other packages, which read their words themselves."""
UNPREPARED = (report.report, model.show_plan)
"""Commands that need neither torch nor transformers, or not always: they call `prepare` themselves."""


def whole_parser(words: Sequence[str] | None = None) -> jsonargparse.ArgumentParser:
    """Of all commands; given the words of a command line, with the options of the command alone that they name."""
    parser = jsonargparse.ArgumentParser(
        prog="masformer",
        usage="masformer COMMAND [options]",
        description=DESCRIPTION,
        formatter_class=Help,
        exit_on_error=False,
    )
    version = f"masformer {masformer.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version, help="show the version and exit")
    text = f"print a script that completes commands in {', '.join(SHELLS)}, and exit"
    names = "--print_completion", "--print_shtab"
    parser.add_argument(*names, action=Complete, const=whole_parser, choices=SHELLS, metavar="SHELL", help=text)
    add_commands(parser, COMMANDS, PASSED_ON, words=words)
    return parser


def parse(words: Sequence[str]) -> tuple[Command, dict[str, Any]]:
    """The command that the words name, and its options.

    Raises:
        jsonargparse.ArgumentError: they name none, or an option is wrong.
        MasformerError: a word is no text, or a number beyond what a machine holds.
    """
    parser = whole_parser(list(words))
    if not words:
        parser.print_help()
        parser.exit()
    for number, word in enumerate(words, start=1):
        check_text(f"argument {number}", word)
    if words and words[0] in PASSED_ON:
        return PASSED_ON[words[0]], {"words": list(words[1:])}
    options = parser.parse_args(train.gathered(list(words))).as_dict()
    command: Any = COMMANDS
    while not callable(command):
        name = options["command"]
        command, options = command[name], options[name]
    for name, value in options.items():
        check_plain(option_name(name), value)
    return command, grouped(command, options)


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 2, with one line on standard error, for a wrong value, and 1 for a
    failed check or where nobody reads the output any more."""
    return guarded(lambda: _run(sys.argv[1:] if words is None else words))


def _run(words: Sequence[str]) -> int:
    try:
        command, options = parse(words)
        if command not in UNPREPARED:
            prepare()
        json = options.pop("json", None)
        records.check_writable(json)
        figures = command(**options) or {}
        line = figures.pop(LINE, None)
        if json is not None:
            records.write_record(json, ["masformer", *words], masformer.__version__, **figures)
            say(f"figures: {json}")
        if line is not None:
            print(line)
    except (MasformerError, jsonargparse.ArgumentError) as error:
        print(f"masformer: error: {error_line(error, COMMANDS, words)}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except (MemoryError, RuntimeError) as error:
        if not beyond_memory(error):
            raise
        print(f"masformer: error: not enough memory: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return MasformerError.exit_code
    except KeyboardInterrupt:
        print("masformer: interrupted", file=sys.stderr)
        return 130
    return 0
