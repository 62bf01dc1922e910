"""What the pages show is run or parsed: each block of code by its language, and whatever begins with a command.

A block without a language holds command lines, or what a terminal shows: commands after `$` and what they print.
"""

import argparse
import copy
import doctest
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import jsonargparse
import pytest
import small
from markdown_it import MarkdownIt

import masformer
from masformer import AttentionPlan, MasformerError, cli
from masformer.cli.parser import all_commands, example, option_names
from masformer.reports import update_tables
from masformer.settings import parse_yaml
from masformer.training.recipe import Recipe
from tiny import plain_tokenizer, tiny

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for pattern in ("*.md", ".github/**/*.md", "benchmarks/**/*.md", "docs/**/*.md", "examples/**/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"  # of the past
}
SHOWN = ("bibtex", "html", "text")
"""Languages of blocks that nothing runs: a reference, what stands in a page, a formula."""


def codes(text):
    """(language, code) of each block; language None: code within a line."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("fence", "code_block"):
            yield token.info.strip(), token.content
        for part in token.children or ():
            if part.type == "code_inline":
                yield None, part.content


def lines(code):
    """The command lines of a block."""
    found = re.sub(r"\\\n\s*", "", code).splitlines()
    typed = [line.removeprefix("$ ") for line in found if line.startswith("$ ")]
    return typed or found


BLOCKS = [(page, language, code) for page, text in PAGES.items() for language, code in codes(text)]
WHOLE = {line: page for page, language, code in BLOCKS if language == "" for line in lines(code) if line}
WITHIN = {code: page for page, language, code in BLOCKS if language is None and code.startswith("masformer ")}
EXAMPLES = [example(command).replace("\\\n", " ") for command in all_commands(cli.COMMANDS)]


def parsed(words):
    """The command of masformer's own words, which are all there and right."""
    try:
        if words[0] == "--print_completion":
            pytest.importorskip("shtab", reason="the extra completion is not installed")
        if words[0] in cli.PASSED_ON:
            parse_lm_eval(words[1:])
        else:
            assert callable(cli.parse(words)[0])
    except SystemExit as end:
        if end.code:  # else it printed what was asked for
            raise


def parse_lm_eval(words):
    harness = pytest.importorskip("lm_eval._cli", reason="the extra lm-eval is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lm_eval", *words])
        harness.HarnessCLI().parse_args()


def launched(parser, words):
    """What a launcher of processes is to run, its own options being right."""
    found = parser.parse_args(words)
    assert (found.module, found.training_script) == (True, "masformer")
    parsed(found.training_script_args)


def understood(line):
    """Raises, or fails, where a line is none that can be typed."""
    words = shlex.split(line, comments=True)
    if "&&" in words:
        place = words.index("&&")
        understood(shlex.join(words[place + 1 :]))
        words = words[:place]
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if not words or (words[0] == "export" and all("=" in word for word in words[1:])):
        return
    tool, rest = words[0].rpartition("/")[2], words[1:]
    if tool == "masformer":
        parsed(rest)
    elif tool == "torchrun":
        from torch.distributed.run import get_args_parser

        launched(get_args_parser(), rest)
    elif tool == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        launched(launch_command_parser(), rest[1:])
    elif tool == "lm_eval":
        parse_lm_eval(rest)
    elif tool == "make":
        assert set(rest) <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    elif tool == "pip":
        asked = [each for word in rest for found in re.findall(r"\[(.*)\]", word) for each in found.split(",")]
        assert rest[0] in ("install", "uninstall")
        assert set(asked) <= set(re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    elif tool == "pytest":
        assert all((ROOT / word).exists() for word in rest)
    elif words[:3] != ["python3", "-m", "venv"]:
        assert tool in ("llama-server",), f"nothing here knows {tool}"


@pytest.mark.parametrize("line", [*WHOLE, *EXAMPLES])
def test_every_command_line_is_understood(line):
    understood(line)


@pytest.mark.parametrize("line", WITHIN)
def test_what_names_a_command_in_a_sentence_names_one_and_its_options(line):
    words = shlex.split(" ".join(line.split()))[1:]
    try:
        parsed(words)
    except (jsonargparse.ArgumentError, MasformerError):  # not all of it is there
        command = cli.COMMANDS | cli.PASSED_ON
        while not callable(command) and words:
            command = command[words.pop(0)]
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert set(options) <= set(option_names(command) if callable(command) else ())


def test_there_is_something_to_look_at():
    assert len(WHOLE) >= 60
    assert len(WITHIN) >= 30
    assert len({page for page, _, _ in BLOCKS}) >= 15
    assert {"README.md", "docs/evaluation.md", "docs/placement.md", "docs/speed.md"} <= set(TABLES)


@pytest.mark.parametrize(
    "line",
    [
        "masformer plan MODEL --sq 8",
        "masformer export MODEL OUT",
        "masformer train --config RECIPE    shapes and steps",
        "pip install . && masformer pln",
        "torchrun --nproc-per-nodes 8 -m masformer train --config RECIPE",
        "torchrun -m masformer train --confg RECIPE",
        "make dinner",
        "pip install 'masformer[plot]'",
        "pytest tests/nothing",
        "frobnicate --all",
    ],
)
def test_wrong_lines_are_noticed(line):
    with pytest.raises((AssertionError, SystemExit, jsonargparse.ArgumentError, argparse.ArgumentError)):
        understood(line)


def test_blocks_are_of_languages_that_are_looked_at():
    strange = [(page, language) for page, language, _ in BLOCKS if language not in (None, "", "python", "yaml", *SHOWN)]
    assert strange == []


@pytest.mark.parametrize(("page", "code"), [(page, code) for page, language, code in BLOCKS if language == "yaml"])
def test_what_a_page_sets_is_part_of_a_recipe(tmp_path, page, code):
    assert page
    whole = copy.deepcopy(small.settings(tmp_path))
    for name, value in parse_yaml(code).items():
        whole[name] = {**whole[name], **value} if isinstance(value, dict) else value
    Recipe.from_dict(whole)


def run_page(page, folder, monkeypatch):
    """Runs the Python of a page, one block after the other, where there are a model and records; returns its names."""
    tokenizer = plain_tokenizer()
    for name in ("HuggingFaceTB/SmolLM2-135M", "MODEL"):
        tiny("llama", num_hidden_layers=30, vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "runs").mkdir()
    shutil.copy(RESULTS / "perplexity-smollm2-pubmed.json", folder / "runs")
    monkeypatch.chdir(folder)
    names: dict = {}
    for place, language, code in BLOCKS:
        if (place, language) == (page, "python"):
            exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", sorted({page for page, language, _ in BLOCKS if language == "python"}))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    if page == "docs/evaluation.md":
        pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    names = run_page(page, tmp_path, monkeypatch)
    out = capsys.readouterr().out
    if page == "README.md":
        plan = AttentionPlan.parse("full@4,7:0,18:0-1; window:256+4", 30, names["model"].config.num_key_value_heads)
        assert names["model"].config.masformer == plan.to_dict()
        assert out.startswith("Long documents")
    elif page == "docs/plans.md":
        assert names["out"].shape == (1, 9, 4096, 64)
        assert out.splitlines()[-1] == "True"
    elif page == "docs/generate.md":
        assert names["model"].config.masformer["plan"] == "full@11-18; window:512+4"
    elif page == "docs/evaluation.md":
        assert "Two windows" in Path("report", "report.html").read_text(encoding="utf-8")


SESSIONS = [code for _, language, code in BLOCKS if language == "" and code.startswith("$ ")]


@pytest.mark.parametrize("code", SESSIONS)
def test_what_a_page_shows_of_a_terminal_is_printed(code, tmp_path, monkeypatch, capsys):
    tiny("llama", num_hidden_layers=30, sliding_window=None).save_pretrained(tmp_path / "SmolLM2-135M")
    monkeypatch.chdir(tmp_path)
    typed, _, shown = code.partition("\n")
    cli.main(shlex.split(typed)[2:])
    out, err = capsys.readouterr()
    assert (out + err).split() == shown.split()


TABLES = [page for page, text in PAGES.items() if "\n<!-- table: " in text]


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_those_of_the_records(page):
    update_tables(ROOT / page, RESULTS, check=True)


MODULES = sorted(path for path in Path(masformer.__file__).parent.rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_what_docstrings_show_is_so(path):
    name = ".".join(path.relative_to(Path(masformer.__file__).parent.parent).with_suffix("").parts)
    found = doctest.testmod(import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
