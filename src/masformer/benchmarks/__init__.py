"""Measured times of attention and whole models, as ratios in one run, beside the limits of the machine."""

from masformer.benchmarks.attention import bench_attention
from masformer.benchmarks.evaluation import bench_eval
from masformer.benchmarks.generation import bench_decode, bench_prefill
from masformer.benchmarks.llama_cpp import bench_llama_cpp
from masformer.benchmarks.models import random_model
from masformer.benchmarks.peers import PEERS
from masformer.benchmarks.rows import bench_tables, summary_line
from masformer.benchmarks.timing import DTYPES, Timing, compare_times, default_device, peak_memory
from masformer.benchmarks.training import bench_train
from masformer.defaults import LOSS_CHUNK

__all__ = [
    "DTYPES",
    "LOSS_CHUNK",
    "PEERS",
    "Timing",
    "bench_attention",
    "bench_decode",
    "bench_eval",
    "bench_llama_cpp",
    "bench_prefill",
    "bench_tables",
    "bench_train",
    "compare_times",
    "default_device",
    "peak_memory",
    "random_model",
    "summary_line",
]
