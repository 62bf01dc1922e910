"""What a command line imports before it runs anything: not what takes seconds."""

import json
import os
import subprocess
import sys

import pytest

from masformer import cli
from masformer.cli.parser import all_commands
from tiny import tiny, tiny_config

OPTIONAL = ("matplotlib", "datasets", "pyarrow")
HEAVY = ("torch", "transformers", "numpy", "scipy", "gguf", "accelerate", "pydantic", *OPTIONAL)
SHOWN = """
import io, json, sys
from contextlib import redirect_stdout
from masformer import cli
for words in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out:
        try:
            cli.main(words)
        except SystemExit as end:
            assert not end.code, words
    assert out.getvalue(), words
    print(json.dumps([words, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


def fresh(code, *words, **variables):
    """What a new Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ | variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def helps():
    for name, command in cli.COMMANDS.items():
        yield [name, "--help"]
        yield from ([name, below, "--help"] for below in (() if callable(command) else command))


def test_help_and_version_import_nothing_heavy():
    asked = [[], ["--help"], ["--version"], *helps()]
    assert len(asked) > len(list(all_commands(cli.COMMANDS)))
    lines = [json.loads(line) for line in fresh(SHOWN, json.dumps(asked), json.dumps(HEAVY)).splitlines()]
    assert [words for words, _ in lines] == asked
    assert [(words, found) for words, found in lines if found] == []


def test_a_wrong_option_imports_nothing_heavy():
    for words in (["frobnicate"], ["plan", "--sq", "64"], ["train"], ["eval", "perplexity", "MODEL"]):
        code = f"import sys; from masformer import cli; print(cli.main({words}), end=' '); "
        code += f"print([name for name in {HEAVY} if name in sys.modules])"
        assert fresh(code) == "2 []\n"


def test_a_plan_from_a_config_needs_no_optional_part(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    words = ["plan", str(tmp_path / "config.json"), "--full", "1", "--local", "window:8", "--seq", "64"]
    code = f"import sys; from masformer import cli; print(cli.main({words}))"
    code += f"; print([name for name in {('torch', 'transformers', *OPTIONAL)} if name in sys.modules])"
    *first, _, loaded = fresh(code, XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert loaded == "['torch', 'transformers']"
    *again, code, loaded = fresh(code, XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert (again, code, loaded) == (first, "0", "['torch']")  # what the classes said is kept


def test_commands_stand_in_the_parser_of_one_as_in_that_of_all():
    one, whole = cli.whole_parser(["plan"]), cli.whole_parser()
    assert one.format_help() == whole.format_help()
    for words in (["plan"], ["bench", "decode"]):
        parsers = [cli.whole_parser(words), whole]
        for word in words:
            parsers = [each._subcommands_action._name_parser_map[word] for each in parsers]
        assert parsers[0].format_help() == parsers[1].format_help() != ""


@pytest.mark.parametrize("first", ["masformer", "transformers.AutoConfig"])
def test_auto_classes_read_a_checkpoint_with_a_plan_whatever_is_imported_first(tmp_path, first):
    from masformer import apply_plan

    apply_plan(tiny("llama"), "full@1; window:4").save_pretrained(tmp_path)
    module, _, name = first.partition(".")
    code = f"import sys; import {module}; {module}.{name or '__name__'}; import masformer; "
    code += "from transformers import AutoConfig, AutoModelForCausalLM as auto; "
    code += "config, model = (each.from_pretrained(sys.argv[1]) for each in (AutoConfig, auto)); "
    code += "print(type(config).__name__, model.config.masformer['plan'])"
    assert fresh(code, str(tmp_path)).splitlines()[-1] == "LlamaConfig full@1; window:4"
