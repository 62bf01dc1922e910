"""Progress of long work, for people to watch: a bar in a terminal, and lines where nobody watches but a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

EVERY = 10.0
"""Seconds between two lines about one stage, at least."""
NEW_STAGE = 2.0
"""Seconds between two lines about two stages, at least."""
SHARE = 0.05
"""Of the time that has passed, at least, between two lines: the log of a long run stays short."""


def time_left(task: Task) -> str:
    """`0:08:30 left`; empty as long as nothing is known, or where nothing is left."""
    seconds = None if task.finished else task.time_remaining
    return "" if seconds is None else f"{timedelta(seconds=int(seconds))} left"


class _Left(ProgressColumn):
    """The time left."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(time_left(task))


class Lines(Progress):
    """The same as lines, each written once: what is being done, how much of it, and the time left."""

    def __init__(self, console: Console, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console=console, disable=True, auto_refresh=False, get_time=clock, speed_estimate_period=600)
        self._quiet = quiet
        self._last: tuple[float, str] | None = None

    def update(self, task_id: Any, **fields: Any) -> None:
        """As rich has it."""
        super().update(task_id, **fields)
        self._speak(self._tasks[task_id])

    def advance(self, task_id: Any, advance: float = 1) -> None:
        """As rich has it."""
        super().advance(task_id, advance)
        self._speak(self._tasks[task_id])

    def _speak(self, task: Task) -> None:
        now, passed = self.get_time(), task.elapsed or 0.0
        if self._quiet or not task.description or task.finished:
            return
        if self._last is not None:
            pause = NEW_STAGE if task.description != self._last[1] else EVERY
            if now - self._last[0] < max(pause, SHARE * passed):
                return
        self._last = now, task.description
        facts = [f"{task.percentage:.0f}%"] if task.total and task.completed else []
        facts += [f"{timedelta(seconds=int(passed))} passed"] if passed >= 1 else []
        facts += filter(None, [time_left(task)])
        line = f"{task.description}: {', '.join(facts)}" if facts else task.description
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_bar(console: Console | None = None, *, quiet: bool = False) -> Progress:
    """By default on standard error, so that standard output holds results alone.

    Shows the time that has passed and, where the amount of work is known, the time left; as lines, and seldom, where
    the console is no terminal.

    Args:
        console: where it is shown.
        quiet: show nothing.
    """
    console = console or Console(stderr=True)
    if quiet or not console.is_terminal:
        return Lines(console, quiet or console.quiet)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        _Left(),
        console=console,
        transient=True,
        speed_estimate_period=600,  # a step may take a minute
    )


@contextmanager
def stage_progress(heading: str | None = None, *, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work in stages; gives what is called with (stage, work done, work in all).

    Args:
        heading: a line that is printed when the work begins.
        quiet: show nothing.
    """
    with progress_bar(quiet=quiet) as progress:
        task = progress.add_task("", total=None)
        headings = [heading] if heading and not quiet else []

        def advance(stage: str, done: int, total: int) -> None:
            while headings:
                progress.console.print(headings.pop(), markup=False, highlight=False, soft_wrap=True)
            progress.update(task, description=stage, completed=done, total=total)
            if done >= total > 0:  # what is printed from here on must not wait for a bar
                progress.stop()

        yield advance


@contextmanager
def plan_progress(heading: str | None = None, *, quiet: bool = False) -> Iterator[Callable[[str, int, int, int], None]]:
    """The same under several plans at several lengths; gives what is called with (plan, length, done, total)."""
    with stage_progress(heading, quiet=quiet) as progress:
        yield lambda name, length, done, total: progress(f"{name} at {length:,} tokens", done, total)
