import fcntl
import io
import pty
import struct
import sys
import termios

import pytest
from rich.console import Console
from transformers import modeling_gguf_pytorch_utils as reader

from masformer.models import checkpoint
from masformer.progress import EVERY, NEW_STAGE, Lines, progress_bar, time_left


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def lines(clock, quiet=False):
    file = io.StringIO()
    progress = Lines(Console(file=file, width=40), quiet, clock)
    task = progress.add_task("", total=None)

    def step(seconds, stage, done, total=100):
        clock.now += seconds
        progress.update(task, description=stage, completed=done, total=total)
        return file.getvalue().splitlines()

    return step


def test_a_stage_speaks_when_it_begins_and_then_seldom():
    step = lines(Clock())
    assert step(0, "full at 64 tokens", 0) == ["full at 64 tokens"]
    assert len(step(EVERY / 2, "full at 64 tokens", 5)) == 1
    assert step(EVERY / 2, "full at 64 tokens", 10)[1] == "full at 64 tokens: 10%, 0:00:10 passed, 0:01:30 left"
    assert len(step(NEW_STAGE / 2, "window:8 at 64 tokens", 11)) == 2
    assert len(step(NEW_STAGE / 2, "window:8 at 64 tokens", 12)) == 3


def test_the_lines_of_a_long_run_become_rare():
    step = lines(Clock())
    for second in range(1, 10_001):
        found = step(1, "choosing", second, 20_000)
    assert 20 < len(found) < 150


def test_quiet_says_nothing_and_a_line_is_never_broken():
    assert lines(Clock(), quiet=True)(0, "full", 1) == []
    name = "full@" + ",".join(f"{layer}:0" for layer in range(30)) + "; window:8"
    assert lines(Clock())(0, name, 0) == [name]


def test_time_left_is_said_only_where_it_is_known():
    clock = Clock()
    progress = Lines(Console(file=io.StringIO()), clock=clock)
    task = progress.add_task("bench", total=None)
    assert time_left(progress.tasks[0]) == ""
    progress.update(task, total=10)
    assert time_left(progress.tasks[0]) == ""
    for done in (1, 2):
        clock.now += 3
        progress.update(task, completed=done)
    assert time_left(progress.tasks[0]) == "0:00:24 left"
    progress.update(task, completed=10)
    assert time_left(progress.tasks[0]) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_a_bar_and_a_pipe_has_lines(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    assert isinstance(progress_bar(console), Lines) is not terminal
    assert isinstance(progress_bar(console, quiet=True), Lines)


def test_the_bar_of_a_gguf_file_is_for_terminals(monkeypatch):
    monkeypatch.setattr(reader, "tqdm", reader.tqdm)  # put back afterwards
    checkpoint._show_bars_in_terminals_alone()
    there, here = pty.openpty()
    fcntl.ioctl(here, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(there, "rb", buffering=0) as terminal, open(here, "w") as screen, io.StringIO() as log:
        for stream in (log, screen):
            monkeypatch.setattr(sys, "stderr", stream)
            list(reader.tqdm([1, 2], desc="weights"))
        assert log.getvalue() == ""
        said = b""
        while b"weights" not in said:
            said += terminal.read(1000)
