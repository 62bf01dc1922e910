"""Timing that a noisy machine cannot turn into a verdict: calls take turns, and the median counts; peaks of memory."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from masformer.errors import check_int

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one call, in seconds, warm-up left out."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def compare_times(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    progress: Callable[[str], None] = lambda name: None,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Times calls in turn, round after round, so that a slow spell of the machine meets all of them alike.

    Args:
        calls: name -> what to time.
        repeats: timed rounds; at least 1.
        progress: called with the name before each call.
        warm_up: call each once more beforehand, untimed; not worth it where a call takes many seconds.
    """
    check_int("repeats", repeats, 1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for timed in [False] * warm_up + [True] * repeats:
        for name, call in calls.items():
            progress(name)
            _finish()
            start = time.perf_counter()
            call()
            _finish()
            if timed:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(name, tuple(each)) for name, each in seconds.items()}


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that a call holds at most, above what is held before it.

    On CUDA, of torch's allocator. On Linux, of the whole process, with what earlier calls left free given back
    beforehand; what the call frees and takes again is not counted twice, but some of it may stay. None elsewhere.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kibibytes(kind: str) -> int:
        return int(re.findall(rf"{kind}:\s+(\d+) kB", status.read_text())[0])

    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = kibibytes("VmRSS")
    except (OSError, AttributeError, IndexError):
        return None
    call()
    return 1024 * (kibibytes("VmHWM") - before)


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
