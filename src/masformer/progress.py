"""Progress of long work, for people to watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console | None = None) -> Progress:
    """By default on standard error, so that standard output holds results alone; silent where nobody watches.

    Shows the time that has passed and, where the amount of work is known, the time left.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = console or Console(stderr=True)
    return Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,  # a step may take a minute
    )


@contextmanager
def plan_progress() -> Iterator[Callable[[str, int, int, int], None]]:
    """A bar for work under several plans at several lengths; gives what is called with (plan, length, done, total)."""
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        yield lambda name, length, done, total: progress.update(
            task, description=f"{name} at {length}", completed=done, total=total
        )
