"""Real processes that are killed, stopped, or run out of room."""

import os
import random
import resource
import signal

import forked
import pytest
import torch
from safetensors.torch import load_file
from small import metrics, recipe, recipe_file

from masformer.training.checkpoints import steps_saved
from masformer.training.evaluation import evaluate
from masformer.training.run import train

STEPS = 40
LONG = {"training__steps": STEPS, "checkpoints__every": 3}


def weights(folder):
    return load_file(folder / "out" / "model" / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    result = forked.run(forked.command, "train", "--config", recipe_file(folder, **LONG))
    assert result.returncode == 0, result.stderr
    return folder


def interrupted(folder, number, step, *words):
    words = ("train", "--config", str(folder / "recipe.yaml"), *words)
    return forked.run(forked.interrupted, int(number), step, STEPS, *words)


def test_killed_twice_at_random_steps_and_resumed_it_ends_with_the_same_bits(whole, tmp_path):
    choose = random.Random()
    recipe_file(tmp_path, **LONG)
    kills = sorted(choose.sample(range(4, STEPS - 2), 2))
    for step in kills:
        killed = interrupted(tmp_path, signal.SIGKILL, step, "--resume")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "model").exists()
    result = forked.run(forked.command, "train", "--config", tmp_path / "recipe.yaml", "--resume")
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
    assert same(weights(tmp_path), weights(whole)), f"killed at {kills}"
    assert metrics(tmp_path) == metrics(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_exits_and_goes_on_with_the_same_bits(whole, tmp_path, number, code):
    recipe_file(tmp_path, **LONG, checkpoints__keep=1)
    stopped = interrupted(tmp_path, number, 5, "--checkpoints.every", "1000")
    out = stopped.stdout
    assert stopped.returncode == code, stopped.stderr
    assert "stopping after this step, with a checkpoint" in out
    assert "Traceback" not in stopped.stderr
    ((step, _),) = steps_saved(tmp_path / "out")
    assert f"stopped after step {step}; --resume goes on from there" in out
    train(recipe(tmp_path, **LONG), resume=True)
    assert same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize("step", [0, 3, 6])
def test_an_evaluation_that_was_stopped_is_made_on_resuming(tmp_path, monkeypatch, step):
    """Before the first step, at a step without a checkpoint of its own, and after the last step."""
    text = {"builtin": "python-topics", "limit": 1}
    settings = {"evaluation": {"sources": {"pages": text, "more": text}, "every": 3, "max_tokens": 200}}
    expected = train(recipe(tmp_path / "whole", **settings))
    assert sorted(expected.evaluations) == [0, 3, 6]

    def stopped(model, tasks, *rest):
        if len(begun) * 3 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        begun.append(evaluate(model, tasks, *rest))
        return begun[-1]

    begun = []
    with monkeypatch.context() as patch:
        patch.setattr("masformer.training.trainer.evaluate", stopped)
        outcome = train(recipe(tmp_path, **settings))
    assert (outcome.model, outcome.steps, outcome.signal) == (None, step, signal.SIGTERM)
    assert step not in outcome.evaluations
    assert begun[-1] is None
    resumed = train(recipe(tmp_path, **settings), resume=True)
    assert resumed.evaluations == expected.evaluations
    assert same(weights(tmp_path), weights(tmp_path / "whole"))
    name = "eval_more_64_loss"
    assert metrics(tmp_path, name) == metrics(tmp_path / "whole", name)
    assert metrics(tmp_path) == metrics(tmp_path / "whole")


def test_a_full_disk_is_said_and_the_checkpoint_before_is_kept(whole, tmp_path):
    """The kernel refuses to let files grow, as it does on a full disk."""
    file = recipe_file(tmp_path, **LONG)
    train(recipe(tmp_path, **LONG | {"training__steps": 8, "training__warmup_steps": 2}))
    (tmp_path / "out" / "model").rename(tmp_path / "away")
    before = [step for step, _ in steps_saved(tmp_path / "out")]
    words = ["train", "--config", str(file), "--resume", "--training.steps", "12"]
    result = forked.run(forked.limited, 20_000, *words)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("masformer: error: ")]
    assert "cannot write the checkpoint of step 9" in line
    assert "checkpoint-8" in line.split("the newest is still")[1]
    assert [step for step, _ in steps_saved(tmp_path / "out")] == before
    assert not list((tmp_path / "out" / "checkpoints").glob(".*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
