"""Measured times of attention, generation and training, as ratios in one run, beside the limits of the machine."""

from masformer.benchmarks.attention import bench_attention
from masformer.benchmarks.generation import bench_decode, bench_prefill
from masformer.benchmarks.models import random_model
from masformer.benchmarks.peers import PEERS
from masformer.benchmarks.rows import bench_tables, summary_line
from masformer.benchmarks.timing import DTYPES, Timing, compare_times, default_device, peak_memory
from masformer.benchmarks.training import bench_train

__all__ = [
    "DTYPES",
    "PEERS",
    "Timing",
    "bench_attention",
    "bench_decode",
    "bench_prefill",
    "bench_tables",
    "bench_train",
    "compare_times",
    "default_device",
    "peak_memory",
    "random_model",
    "summary_line",
]
