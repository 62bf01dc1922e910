"""A .gguf file in llama.cpp itself, with and without plans: the same weights, in one run."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from masformer.benchmarks.rows import Row, with_exponents
from masformer.errors import MasformerError, check_int
from masformer.export import check_export, export_gguf, gguf_config, llama_cpp
from masformer.export.llama_cpp.files import read_gguf
from masformer.export.verify import check_installed, run_script
from masformer.models.sinks import sink_layers
from masformer.plan import AttentionPlan

FULL = "all full"
PASSES = {"prompt": "prompt", "new tokens": "predicted"}
"""What is timed -> what llama.cpp's server calls it."""
_CACHE = re.compile(r"llama_kv_cache: size =\s*([\d.]+) MiB")


def bench_llama_cpp(
    source: str,
    plans: Mapping[str, AttentionPlan],
    lengths: Sequence[int],
    *,
    new: int = 32,
    repeats: int = 3,
    threads: int = 0,
    sinks: str | None = None,
    python: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times prompts and new tokens in llama.cpp, each round in a process of its own, the variants in turn.

    Args:
        source: a .gguf file without a plan.
        plans: those that are written of it, by name; full attention is always there, as the file is.
        lengths: of the whole texts: a prompt of random tokens, and the new ones.
        new: tokens after a prompt.
        repeats: rounds, after one for warming up.
        threads: of llama.cpp; 0: its own choice.
        sinks: folder with the weights of the constant sinks that some plan has, see `export_gguf`.
        python: interpreter of the environment that has xllamacpp; by default the running one.
        progress: called with a line before each call.

    Returns:
        `xllamacpp`, its version, and `results`: a row per pass (`PASSES`), length and variant: `seconds` (all rounds),
        `median`, `tokens_per_second`, `speedup` over full attention, `cache_bytes` as llama.cpp says them,
        `predicted_cache_bytes` and `exponent`.

    Raises:
        MasformerError: llama.cpp is not there, or cannot run a plan or the file.
    """
    for name, value in {"new": new, "repeats": repeats}.items():
        check_int(name, value, 1)
    check_int("threads", threads, 0)
    config = gguf_config(source)
    limit = config.max_position_embeddings
    for length in lengths:
        if not new < length <= limit:
            raise MasformerError(f"{length} tokens: allowed for {source} and {new} new ones: {new + 1} to {limit}")
    for plan in plans.values():
        check_export(config, plan, llama_cpp.NAME)
    with_sinks = [plan for plan in plans.values() if sink_layers(plan)]
    for plan in with_sinks or list(plans.values())[:1]:
        llama_cpp.sinks_for(plan, sinks)
    version = check_installed(llama_cpp.NAME, python)
    every = {FULL: AttentionPlan.parse("full", config.num_hidden_layers)}
    every |= {name: plan for name, plan in plans.items() if not plan.is_full}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=Path(source).absolute().parent, prefix=".masformer-bench.") as folder:
        files = {name: Path(folder) / f"{index}.gguf" for index, name in enumerate(every)}
        for name, plan in every.items():
            export_gguf(source, files[name], plan, sinks=sinks if plan in with_sinks else None)
        content = read_gguf(source)
        for length in lengths:
            tokens = torch.randint(3, 250, (length - new,), generator=torch.manual_seed(length)).tolist()
            seconds: dict[str, dict[str, list[float]]] = {name: {each: [] for each in PASSES} for name in every}
            caches: dict[str, int] = {}
            for round_ in range(repeats + 1):
                for name, file in files.items():
                    progress(f"{length:,} tokens: {name}, round {round_}" if round_ else f"{length:,} tokens: {name}")
                    job = {"folder": str(file), "tokens": tokens, "new_tokens": new, "threads": threads}
                    answer, said = run_script("time_llama_cpp.py", job, "llama.cpp", python)
                    timings = json.loads(answer.decode())
                    caches[name] = round(sum(map(float, _CACHE.findall(said))) * 2**20)
                    for each, key in PASSES.items():
                        if timings[f"{key}_n"] != (length - new if each == "prompt" else new):
                            raise MasformerError(f"llama.cpp ran {timings[f'{key}_n']} tokens in place of all: {each}")
                        if round_:
                            seconds[name][each].append(timings[f"{key}_ms"] / 1000)
            for each in PASSES:
                count = length - new if each == "prompt" else new
                base = statistics.median(seconds[FULL][each])
                for name, plan in every.items():
                    median = statistics.median(seconds[name][each])
                    rows.append(
                        {
                            "pass": each,
                            "length": length,
                            "name": name,
                            "plan": str(plan),
                            "seconds": seconds[name][each],
                            "median": median,
                            "tokens_per_second": count / median,
                            "speedup": base / median,
                            "cache_bytes": caches[name],
                            "predicted_cache_bytes": llama_cpp.cache_bytes(content, plan, length),
                        }
                    )
    return {"xllamacpp": version, "results": with_exponents(rows, ["name", "pass"])}
