"""Two processes on CPUs (gloo): the same recipe, the same curve, and checkpoints that move."""

import json
import shutil
import subprocess
import sys

import forked
import pytest
from safetensors.torch import load_file
from small import environment, metrics, recipe_file, torchrun, trained

from masformer import load_model
from masformer.training.checkpoints import steps_saved

HELD = {"held": {"builtin": "python-topics", "skip": 3, "limit": 1}}
TIED = {
    "training__steps": 12,
    "checkpoints__every": 5,
    "checkpoints__keep": 3,
    "model__config__tie_word_embeddings": True,
    "data__packing": "separate",
    "evaluation__sources": HELD,
    "evaluation__max_tokens": 200,
    "evaluation__every": 5,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def single(place):
    trained(place / "single", TIED)
    return place / "single"


def check_follows(folder, single):
    for name in ("loss", "grad_norm", "eval_held_64_loss"):
        expected, actual = metrics(single, name), metrics(folder, name)
        assert expected.keys() == actual.keys()
        for step in expected:
            # sums in another order, over 12 steps: norms of gradients are far above 1
            assert actual[step] == pytest.approx(expected[step], rel=1e-4, abs=1e-4), (name, step)
    one, two = (load_file(each / "out" / "model" / "model.safetensors") for each in (single, folder))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3
    load_model(folder / "out" / "model")


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_follow_the_curve_of_one_and_their_checkpoints_move(place, single, sharding):
    folder = place / sharding
    out = trained(
        folder, TIED, "--training.sharding", sharding, processes=2, start=torchrun if sharding == "fsdp" else None
    )
    check_follows(folder, single)
    assert ("shared by 2 processes (FSDP2)" in out) == (sharding == "fsdp")
    # mid-run from one process to two, and from two shards to one
    to_two = (single, ["--training.sharding", sharding], 2)
    for start, words, processes in [to_two, (folder, [], 1)] if sharding == "fsdp" else [to_two]:
        moved = place / f"{sharding}-to-{processes}"
        shutil.copytree(start, moved)
        shutil.rmtree(moved / "out" / "model")
        for step, path in steps_saved(moved / "out"):
            if step > 5:
                shutil.rmtree(path)
        assert "going on from" in trained(moved, TIED, "--resume", *words, processes=processes)
        check_follows(moved, single)


def test_adapters_are_sharded_and_merged_whole(place):
    losses = []
    for name, processes in (("adapters", 1), ("sharded", 2)):
        words = ["--lora.rank", "2", "--lora.train", "[norm]", "--training.steps", "4", "--training.sharding", "fsdp"]
        trained(place / name, TIED, *words, processes=processes)
        losses.append(metrics(place / name))
        assert len(load_file(place / name / "out" / "model" / "model.safetensors")) == 38
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, abs=1e-4)
    one, two = (load_file(place / name / "out" / "model" / "model.safetensors") for name in ("adapters", "sharded"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_rows_that_cannot_be_shared_are_named(tmp_path):
    file = recipe_file(tmp_path, training__rows=3)
    result = forked.run(forked.command, "train", "--config", file, count=2)
    assert result.returncode != 0
    assert "training.rows 3 cannot be shared by 2 processes of 1 rows at a time; give a multiple of 2" in result.stderr


def test_accelerate_launch_shards_and_shares_rows_as_well(place, single):
    folder = place / "accelerate"
    folder.mkdir()
    file = recipe_file(folder, **TIED, data__cache=str(place / "cache"))
    options = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    options += " --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --rdzv_backend c10d"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "-m", "masformer"]
    result = subprocess.run(
        [*launch, "train", "--config", str(file), "--training.sequence_devices", "2"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    check_follows(folder, single)
    assert "(FSDP2)" in result.stdout
    assert "each row is shared by 2 of 2 processes" in result.stdout
    assert json.loads((folder / "out" / "data.json").read_text())["separate"]
