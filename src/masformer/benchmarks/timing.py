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

from masformer.errors import MasformerError, check_int

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH, MOST = 0.02, 50
"""A round of a short call on CUDA: seconds, and calls at most."""
AHEAD = 3_000_000
"""Cycles for which a CUDA device waits before such a call: 1.5 ms, in which the host launches all of its kernels."""


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
    prepare: Mapping[str, Callable[[], object]] | None = None,
    cap: float | None = None,
    short: bool = False,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Times calls in turn, round after round, so that a slow spell of the machine meets all of them alike.

    Args:
        calls: name -> what to time.
        repeats: timed rounds; at least 1.
        progress: called with the name and the round before each call.
        warm_up: call each once more beforehand, untimed; not worth it where a call takes many seconds.
        prepare: name -> what is done before such a call, untimed.
        cap: seconds after which a call takes no part in further rounds; it has been in one at least.
        short: on CUDA, time the kernels alone: each call between two events of the device, after its caches were
            emptied and with the host `AHEAD`, for `BATCH` seconds a round.
        device: where the calls compute; by default `default_device`.

    Raises:
        MasformerError: `repeats` or `cap` is out of range.
    """
    check_int("repeats", repeats, 1)
    check_cap(cap)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    device = device or default_device()
    timer = _device_seconds if short and device.type == "cuda" else _wall_seconds
    rounds = [False] * warm_up + [True] * repeats
    for number, timed in enumerate(rounds, start=1):
        for name, call in calls.items():
            if seconds[name] and cap is not None and spent[name] >= cap:
                continue
            progress(f"{name}, round {number} of {len(rounds)}")
            if prepare and name in prepare:
                prepare[name]()
            start = time.perf_counter()
            found = timer(call, device) if timed else call()
            if timed:
                seconds[name].append(found)  # type: ignore[arg-type]
                spent[name] += time.perf_counter() - start
    return {name: Timing(name, tuple(each)) for name, each in seconds.items()}


def prefixed(progress: Callable[[str], None], length: int, what: str = "") -> Callable[[str], None]:
    """What calls `progress` with the length before each name."""
    return lambda name: progress(f"{length:,} tokens{what}: {name}")


def check_cap(cap: float | None) -> None:
    """Raises a MasformerError unless the cap on a call's rounds is a number of seconds above 0, or None."""
    if cap is not None and not 0 < cap < float("inf"):
        raise MasformerError(f"cap must be above 0 seconds, got {cap}")


def _wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of the time that the kernels of a call take, without what the host needs to launch them."""
    count = max(1, min(MOST, int(BATCH / _wall_seconds(call, device))))
    other = torch.empty(2**29, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            other.zero_()
            torch.cuda._sleep(AHEAD)
            begin.record()
            call()
            end.record()
        _finish(device)
    return statistics.median(float(begin.elapsed_time(end)) / 1000 for begin, end in events)


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device | None = None) -> int | None:
    """Bytes that a call holds at most, above what is held before it.

    On CUDA, of torch's allocator. On the CPU under Linux, of the whole process, with what earlier calls left free given
    back beforehand; what the call frees and takes again is not counted twice, but some of it may stay. None elsewhere.

    Args:
        call: what is measured.
        device: where it computes; by default `default_device`.
    """
    device = device or default_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
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
