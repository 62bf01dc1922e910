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
from ready_python import ready_python

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what the script does without a GPU")


def run(*arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A Python that runs masformer at once, compiling off as the script says at tiny sizes."""
    with ready_python(tmp_path_factory.mktemp("python"), TORCH_COMPILE_DISABLE="1") as python:
        yield python


@WITHOUT_GPU
def test_a_part_that_fails_does_not_stop_the_rest(tmp_path, ready):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"bench decode"*) echo no >&2; exit 3;; esac\nexec "{ready}" "$@"\n')
    python.chmod(0o755)
    parts = "(train-smollm2|decode-llama-1b|attention-llama-1b|eval-smollm2|prefill-llama-1b)$"
    done = run("--dry-run", str(tmp_path / "out"), PYTHON=str(python), PARTS=parts)
    lines = summary(done)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"=== summary: 5 parts, 1 failed, 0 not begun, \d+ s; records in .*out", lines[0])
    assert [re.sub(r"\d+ s$", "N s", line) for line in lines[1:]] == [
        "passed  train-smollm2, N s",
        "FAILED  decode-llama-1b, exit status 3",
        "passed  attention-llama-1b, N s",
        "passed  eval-smollm2, N s",
        "passed  prefill-llama-1b, N s",
    ]
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert sorted(records) == [
        "attention-llama-1b-cpu",
        "eval-smollm2-cpu",
        "prefill-llama-1b-cpu",
        "train-smollm2-cpu",
    ]
    assert all(record["results"] and record["device"].startswith("CPU") for record in records.values())
    assert {row["length"] for row in records["prefill-llama-1b-cpu"]["results"]} == {96, 160}
    assert records["train-smollm2-cpu"]["precision"] == "bfloat16"


FAKE = """#!{python}
import json, os, shlex, sys, time
words, code = sys.argv[1:], os.environ.get("CODE", "first")
if words[0] == "-c":  # which device, torch and code
    print("cpu", "CPU, fake|2.0|" + code, sep="\\n")
elif words[:2] == ["-m", "masformer"]:
    time.sleep(float(os.environ.get("SLEEP", "0")))
    record = {{"command": shlex.join(words[1:]), "device": "CPU, fake", "versions": {{"torch": "2.0"}}, "code": code}}
    open(words[-1], "w").write(json.dumps(record))
elif words[:2] != ["-m", "pytest"]:
    os.execv("{python}", ["{python}", *words])
"""


@pytest.fixture
def fake(tmp_path):
    """Runs the script with a Python that measures nothing."""
    python = tmp_path / "python"
    python.write_text(FAKE.format(python=sys.executable))
    python.chmod(0o755)
    parts = "tests-flash|attention-(smollm2|llama-1b)$"

    def run_fake(**variables):
        done = run("--dry-run", str(tmp_path / "out"), **({"PYTHON": str(python), "PARTS": parts} | variables))
        return done, [line.partition(",")[0] for line in summary(done)[1:]]

    return run_fake


def summary(done):
    return done.stdout[done.stdout.index("=== summary") :].splitlines()


PASSED = ["passed  tests-flash", "passed  attention-smollm2", "passed  attention-llama-1b"]
KEPT = [line.replace("passed", "kept  ") for line in PASSED]


def test_a_second_run_goes_on_where_the_first_ended(fake, tmp_path):
    assert fake()[1] == PASSED
    done, lines = fake()
    assert lines == KEPT
    assert done.returncode == 0
    (tmp_path / "out" / "attention-smollm2-cpu.json").unlink()
    assert fake()[1] == [KEPT[0], PASSED[1], KEPT[2]]
    assert fake(FORCE="1")[1] == PASSED


def test_a_record_of_other_code_another_device_or_other_options_does_not_count(fake, tmp_path):
    fake()
    assert fake(CODE="second")[1] == PASSED
    record = tmp_path / "out" / "attention-smollm2-cpu.json"
    right = json.loads(record.read_text())
    for change in (
        {"device": "CPU, other"},
        {"versions": {"torch": "2.1"}},
        {"command": right["command"].replace("96", "97")},
        {"code": None},
    ):
        record.write_text(json.dumps(right | change))
        assert fake(CODE="second")[1] == [KEPT[0], PASSED[1], KEPT[2]], change
    record.write_text("{")
    assert fake(CODE="second")[1] == [KEPT[0], PASSED[1], KEPT[2]]


def test_no_part_begins_when_the_time_is_up(fake):
    done, lines = fake(LIMIT="1", SLEEP="30")
    assert lines == [PASSED[0], "TIMEOUT attention-smollm2", "waits   attention-llama-1b"]
    assert "3 parts, 1 failed, 1 not begun" in done.stdout
    assert done.returncode == 1


@WITHOUT_GPU
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), {}, "torch sees no NVIDIA GPU; SCALE=tiny tries this script without one"),
        ((), {"SCALE": "big"}, "SCALE is 'big'; allowed: full, tiny"),
        ((), {"LIMIT": "8m"}, "LIMIT is '8m'; allowed: whole seconds from 1"),
        (("--help",), {}, "benchmarks/gpu.sh [FOLDER]"),
        ((), {"PYTHON": "false"}, "masformer does not run with false"),
    ],
)
def test_what_it_cannot_do_is_said(ready, arguments, variables, message):
    done = run(*arguments, **{"PYTHON": ready} | variables)
    assert done.returncode == 2
    assert message in done.stderr


def test_what_matters_most_fits_into_the_limit():
    script = SCRIPT.read_text()
    first = script[script.index("# What matters most") : script.index("# What a second run")]
    for text, count in ((first, 7), (script, 20)):
        limits = re.findall(r"^(?:tests|whole|attention) (\d+) ([\w.-]+) ", text, re.MULTILINE)
        assert len({name for _, name in limits}) == len(limits) == count
        assert all(int(limit) <= 90 for limit, _ in limits)
        if text is first:
            assert sum(int(limit) for limit, _ in limits) <= int(re.search(r"LIMIT:-(\d+)", script)[1]) <= 8 * 60


@pytest.mark.parametrize(
    ("shape", "parameters", "positions", "heads"),
    [
        ("gpt-neo-1.3b", 1.3e9, 8192 + 128, (16, 16, 128)),
        ("llama-1b", 1.24e9, 131072 + 128, (32, 8, 64)),
        ("smollm2-135m", 1.345e8, 8192, (9, 3, 64)),
    ],
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
    name = {"gpt-neo-1.3b": "neo", "llama-1b": "llama", "smollm2-135m": "smollm2"}[shape]
    plan = re.search(rf"^.*\b{name}_plan='(full@\d[^']+)'", SCRIPT.read_text(), re.MULTILINE)[1]
    assert sum(str(span) == "full" for span in AttentionPlan.load(plan, config.num_hidden_layers)) >= 4
