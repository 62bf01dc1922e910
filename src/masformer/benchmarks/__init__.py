"""Measured times: attention alone, and generation with a whole model, as ratios in one run."""

from masformer.benchmarks.attention import attention_table, bench_attention
from masformer.benchmarks.generation import STOCK, bench_decode, bench_prefill, generation_table
from masformer.benchmarks.timing import DTYPES, Timing, compare_times, default_device, peak_memory

__all__ = [
    "DTYPES",
    "STOCK",
    "Timing",
    "attention_table",
    "bench_attention",
    "bench_decode",
    "bench_prefill",
    "compare_times",
    "default_device",
    "generation_table",
    "peak_memory",
]
