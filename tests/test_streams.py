"""Commands end in order whatever standard output is: of a narrow encoding, closed early, or full."""

import io
import subprocess
import sys
import types

import pytest

from masformer import cli
from masformer.cli.options import console
from masformer.streams import READER_GONE
from tiny import letter_tokenizer, tiny

PLANS = ["--plan", "full@0,2; window:16+2", "--plan", "full,window:3,window:9,window:20"]
COMMANDS = {
    "plan": ["plan", "MODEL", "--seq", "64", *PLANS],
    "generate": ["generate", "MODEL", "--raw", "--prompt", "日本", "--max-new-tokens", "8"],
    "perplexity": ["eval", "perplexity", "MODEL", "--data", "TEXT", "--lengths", "16", *PLANS],
    "convert": ["convert", "MODEL", "OUT/日本", "--plan", "window:9"],
    "attention": ["bench", "attention", "--lengths", "32", "--repeats", "1", "--forward-only", "--peers", "none"],
    "targets": ["export", "--list"],
    "help": ["search", "--help"],
    "error": ["plan", "MODEL", "--plan", "window:日本"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama", vocab_size=257, eos_token_id=256, sliding_window=None).save_pretrained(path)
    letter_tokenizer(eos_token="<e>").save_pretrained(path)
    (path / "text.txt").write_text("日本 and more, " * 9, encoding="utf-8")
    return path


def run(folder, out, command, stdout, stderr):
    places = {"MODEL": str(folder), "TEXT": str(folder / "text.txt")}
    words = [places.get(word, word).replace("OUT", str(out)) for word in COMMANDS[command]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        try:
            return cli.main(words)
        except SystemExit as stop:  # of --help and --list
            return stop.code or 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "shift_jis", "utf-16"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_character_finds_a_way_through_an_encoding(folder, tmp_path, command, encoding):
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    assert run(folder, tmp_path, command, stdout, stderr) == (2 if command == "error" else 0)
    said = stdout.buffer.getvalue().decode(encoding)
    assert said or command == "error"
    if encoding == "ascii":
        assert "\\u25" not in said  # a drawing stays one
    if command == "convert":
        assert (
            f"{tmp_path}/{'日本' if encoding in ('utf-16', 'shift_jis') else chr(92) + 'u65e5' + chr(92) + 'u672c'}"
            in said
        )
    if command == "error" and encoding == "ascii":
        assert "unknown span 'window:\\u65e5\\u672c'" in stderr.buffer.getvalue().decode()


def test_a_sketch_without_its_characters_still_tells_spans_apart(folder, tmp_path):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    assert run(folder, tmp_path, "plan", stdout, sys.stderr) == 0
    said = stdout.buffer.getvalue().decode()
    assert "# 2 # 2" in said
    assert "# 2 , 6" in said
    assert "#...'####," in said


class Broken(io.RawIOBase):
    """A file that takes no byte."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.file = kind, open(__file__)  # noqa: SIM115 - a number for it, that may be given to another file

    def writable(self):
        return True

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        raise self.kind


@pytest.mark.parametrize("command", ["plan", "generate", "perplexity", "help"])
def test_a_reader_that_goes_or_a_full_disk_ends_a_command_without_a_traceback(folder, tmp_path, command):
    for kind, code, said in [
        (BrokenPipeError(32, "Broken pipe"), READER_GONE, ""),
        (OSError(28, "No space left on device"), 2, "masformer: error: [Errno 28] No space left on device\n"),
    ]:
        stdout, stderr = io.TextIOWrapper(io.BufferedWriter(Broken(kind))), io.TextIOWrapper(io.BytesIO())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.dup2", lambda old, new: None)
            patch.setattr(console, "quiet", False)  # as rich leaves it
            assert run(folder, tmp_path, command, stdout, stderr) == code
        stderr.flush()
        found = stderr.buffer.getvalue().decode()
        assert "Traceback" not in found
        assert found.endswith(said)
        stdout.buffer.raw.write = len  # so that it can be closed


def test_a_real_pipe_that_is_closed_early(folder):
    words = [sys.executable, "-m", "masformer", "plan", str(folder), "--seq", "64"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == (b"", READER_GONE)


def test_the_harness_has_the_same_care(monkeypatch):
    words = types.ModuleType("lm_eval.__main__")
    words.cli_evaluate = lambda: print("日本")
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", words)
    monkeypatch.setitem(sys.modules, "masformer.evaluation.harness.model", types.ModuleType("model"))
    monkeypatch.setattr("masformer.extras.find_spec", lambda name: words)
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main(["lm-eval"]) == 0
    assert stdout.buffer.getvalue() == b"\\u65e5\\u672c\n"
