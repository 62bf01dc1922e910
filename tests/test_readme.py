"""What the README shows is run: its Python on a tiny model, and the options of its commands through their parsers."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from masformer import AttentionPlan, cli, models
from masformer.cli.parser import all_commands, example
from masformer.reports import update_tables
from tiny import tiny

FILE = Path(__file__).parent.parent / "README.md"
README = FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["README.md", "docs/evaluation.md", "docs/placement.md", "docs/sinks.md", "docs/speed.md"]
)
def test_tables_are_those_of_the_records(name):
    file = FILE.parent / name
    assert "<!-- table: " in file.read_text(encoding="utf-8")
    update_tables(file, FILE.parent / "benchmarks" / "results", check=True)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_first_python_block_runs(tmp_path, monkeypatch, capsys):
    class Tokenizer:
        def __call__(self, text, return_tensors):
            return {"input_ids": torch.arange(3, 3 + len(text.split()))[None]}

        def decode(self, tokens):
            return " ".join(map(str, tokens.tolist()))

        def get_vocab(self):
            return {"words": 3}

        def save_pretrained(self, path):
            Path(path, "vocabulary.txt").write_text("words")

    tiny("llama", num_hidden_layers=30).save_pretrained(tmp_path / "SmolLM2-135M")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.checkpoint, "load_tokenizer", lambda model, **hub: Tokenizer())
    code = blocks("python")[0].replace("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M")
    names: dict = {}
    exec(code, names)
    assert names["plan"] == AttentionPlan.parse("full@11-18; window:512+4", 30)
    assert names["model"].config.masformer == names["plan"].to_dict()
    assert len(capsys.readouterr().out.split()) == 22


@pytest.mark.parametrize("page", ["plans"])
def test_the_python_of_a_page_runs(page, capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (FILE.parent / f"docs/{page}.md").read_text(), re.DOTALL):
        exec(block, names)
    assert names["out"].shape == (1, 9, 4096, 64)
    assert capsys.readouterr().out.splitlines()[-1] == "True"


PAGES = [FILE, *sorted((FILE.parent / "docs").rglob("*.md"))]


WORKED_ON = r"\b(MODEL|FILE|OUT|[\w-]+\.(gguf|jsonl|yaml))\b"


def commands(page):
    """Those that stand in blocks of code, each a line; what is said of them behind at least four spaces is left out.

    Those in the text as well where they have what they work on: MODEL, FILE, OUT or a file's name. N stands for a
    number.
    """
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    fenced = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    indented = "\n".join(re.findall(r"^ {4}(masformer .*)$", text, re.MULTILINE))
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(each.split()) for each in re.findall(r"`(masformer [^`]*)`", plain)]
    whole = [each for each in inline if re.search(WORKED_ON, each) and not re.search(r" N\b", each)]
    lines = [line.removeprefix("$ ") for line in f"{fenced}\n{indented}".splitlines()]
    return [line for line in lines + whole if line.startswith("masformer ")]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
EXAMPLES = [example(command).replace("\\\n", " ") for command in all_commands(cli.COMMANDS)]


@pytest.mark.parametrize("line", COMMANDS + EXAMPLES)
def test_every_command_line_is_understood(line):
    words = shlex.split(re.split(r"\s{4,}(?!--)", line)[0])
    if words[-1] in ("--list", "--settings", "--schema"):  # which are printed
        with pytest.raises(SystemExit, match="0"):
            cli.parse(words[1:])
    else:
        assert callable(cli.parse(words[1:])[0])


def test_there_are_command_lines():
    assert len(COMMANDS) >= 40
