"""benchmarks/gpu.sh at tiny sizes on the CPU, and the shapes that it measures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from masformer import AttentionPlan
from masformer.models.checkpoint import load_config
from masformer.models.positions import position_limit

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what the script does without a GPU")


def run(*arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=600)


@WITHOUT_GPU
def test_a_part_that_fails_does_not_stop_the_rest(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"bench decode"*) echo no >&2; exit 3;; esac\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    parts = "prefill-llama-1b$|decode-llama-1b$|train-gpt|attention-gpt-neo-1.3b-long"
    done = run("--dry-run", str(tmp_path / "out"), PYTHON=str(python), PARTS=parts)
    summary = done.stdout[done.stdout.index("=== summary") :].splitlines()
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"=== summary: 4 parts, 1 failed, \d+ s; records in .*out", summary[0])
    assert [re.sub(r"\d+ s$", "N s", line) for line in summary[1:]] == [
        "passed  prefill-llama-1b, N s",
        "FAILED  decode-llama-1b, exit status 3",
        "passed  train-gpt-neo-1.3b, N s",
        "passed  attention-gpt-neo-1.3b-long, N s",
    ]
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert sorted(records) == ["attention-gpt-neo-1.3b-long-cpu", "prefill-llama-1b-cpu", "train-gpt-neo-1.3b-cpu"]
    assert all(record["results"] and record["device"].startswith("CPU") for record in records.values())
    assert {row["length"] for row in records["prefill-llama-1b-cpu"]["results"]} == {96, 160}


@WITHOUT_GPU
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), {}, "torch sees no NVIDIA GPU; SCALE=tiny tries this script without one"),
        ((), {"SCALE": "big"}, "SCALE is 'big'; allowed: full, tiny"),
        (("--help",), {}, "benchmarks/gpu.sh [FOLDER]"),
        ((), {"PYTHON": "false"}, "masformer does not run with false"),
    ],
)
def test_what_it_cannot_do_is_said(arguments, variables, message):
    done = run(*arguments, **variables)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_time_limits_of_all_parts_together_are_below_25_minutes():
    limits = re.findall(r"^(?:part|whole|attention) (\d+) ([\w.-]+) ", SCRIPT.read_text(), re.MULTILINE)
    assert len({name for _, name in limits}) == len(limits) == 15
    assert sum(int(limit) for limit, _ in limits) < 25 * 60


@pytest.mark.parametrize(
    ("shape", "parameters", "positions", "heads"),
    [("gpt-neo-1.3b", 1.3e9, 8192 + 128, (16, 16, 128)), ("llama-1b", 1.24e9, 131072 + 128, (32, 8, 64))],
)
def test_the_shapes_are_those_of_the_models(shape, parameters, positions, heads):
    config, _ = load_config(str(ROOT / "benchmarks" / "shapes" / shape))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)
    assert position_limit(config) >= positions
    queries, keys, width = heads
    assert config.num_attention_heads == queries
    assert getattr(config, "num_key_value_heads", queries) == keys
    assert getattr(config, "head_dim", config.hidden_size // queries) == width
    name = "neo" if shape.startswith("gpt") else "llama"
    plan = re.search(rf"^.*\b{name}_plan='(full@\d[^']+)'", SCRIPT.read_text(), re.MULTILINE)[1]
    assert sum(str(span) == "full" for span in AttentionPlan.load(plan, config.num_hidden_layers)) >= 4
