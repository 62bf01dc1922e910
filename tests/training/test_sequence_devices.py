"""Rows that processes on CPUs (gloo) share: the curve of one process, and checkpoints that move between any numbers."""

import random
import shutil
import signal

import forked
import pytest
import torch
from safetensors.torch import load_file
from small import metrics, recipe, train_words, trained

from masformer import MasformerError, apply_plan
from masformer.data.packing import Schedule, Slices, collate
from masformer.models.across import across_devices
from masformer.training.checkpoints import steps_saved
from masformer.training.dry_run import forecast
from masformer.training.loss import use_chunked_loss
from masformer.training.trainer import training_arguments
from tiny import tiny

STEPS = 12
SETTINGS = {
    "training__steps": STEPS,
    "training__schedule": "constant",
    "training__checkpointing": True,
    "model__plan": "full@1,3:0; window:30+2",
    "data__length": 63,
    "data__packing": "separate",
    "checkpoints__every": 3,
    "evaluation__sources": {"held": {"builtin": "python-topics", "skip": 3, "limit": 1}},
    "evaluation__lengths": [63, 101],
    "evaluation__max_tokens": 202,
    "evaluation__every": 6,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def single(place):
    trained(place / "single", SETTINGS)
    return place / "single"


def check_follows(folder, single):
    for name, count in (("loss", STEPS), ("grad_norm", STEPS), ("eval_held_63_loss", 3), ("eval_held_101_loss", 3)):
        expected, actual = metrics(single, name), metrics(folder, name)
        assert len(expected) == count
        assert actual.keys() == expected.keys()
        rel = 3e-4 if name == "grad_norm" else 1e-4  # float32 on another CPU: 1.2e-4 seen
        for step in expected:
            assert actual[step] == pytest.approx(expected[step], rel=rel, abs=1e-4), (name, step)


def weights(folder):
    return load_file(folder / "out" / "model" / "model.safetensors")


def test_twelve_steps_follow_one_process_and_a_killed_run_goes_on_with_any_number_of_devices(place, single):
    two = ("--training.sequence_devices", 2)
    assert "each row is shared by 2 of 2 processes" in trained(place / "two", SETTINGS, *two, processes=2)
    check_follows(place / "two", single)

    step = random.randint(4, 9)
    killed = train_words(place / "killed", SETTINGS, *two)
    result = forked.run(forked.interrupted, int(signal.SIGKILL), step, STEPS, *killed, count=2)
    assert result.returncode == -signal.SIGKILL
    assert steps_saved(place / "killed" / "out")[0][0] >= 3
    for processes in (3, 4):
        shutil.copytree(place / "killed", place / f"moved-{processes}")
    assert "going on from" in trained(place / "killed", SETTINGS, "--resume", *two, processes=2)
    one, again = weights(place / "two"), weights(place / "killed")
    assert all(torch.equal(one[name], again[name]) for name in one)

    said = trained(place / "moved-3", SETTINGS, "--resume", "--training.sequence_devices", 3, processes=3)
    assert "training.sequence_devices was 2 and is 3" in said
    check_follows(place / "moved-3", single)
    # two rows at a time, by DDP
    said = trained(place / "moved-4", SETTINGS, "--resume", *two, processes=4)
    assert "each row is shared by 2 of 4 processes" in said
    check_follows(place / "moved-4", single)


@pytest.mark.parametrize(("processes", "devices", "sharding"), [(3, 3, "none"), (4, 4, "none"), (4, 2, "fsdp")])
def test_more_processes_follow_one_as_well(place, single, processes, devices, sharding):
    words = ("--training.sequence_devices", devices, "--training.sharding", sharding)
    folder = place / f"{processes}-{devices}"
    said = trained(folder, SETTINGS, *words, processes=processes)
    assert (f"shared by {processes} processes (FSDP2)" in said) == (sharding == "fsdp")
    check_follows(folder, single)


def test_slices_of_a_batch_are_the_batch():
    rows = [torch.arange(length) for length in (7, 5, 6, 2)]
    whole = [{"input_ids": row, "shift_labels": row + 1, "position_ids": row} for row in rows]
    schedule = Schedule(whole, 4, 0, shuffle=False)
    batches = Slices(schedule, 2, 3)
    assert len(batches) == 12
    for first in (0, 2):
        found = [collate([batches[3 * first + 2 * device + row] for row in (0, 1)], 9, 3) for device in range(3)]
        for name, values in collate(whole[first : first + 2], 9).items():
            together = torch.cat([each[name] for each in found], 1)
            assert together.shape[1] % 3 == 0
            assert torch.equal(together[:, : values.shape[1]], values)
    assert found[2]["shift_labels"].tolist() == [[5, 6], [-100, -100]]


def test_positions_count_on_over_slices_and_start_again_in_what_fills_up():
    example = {"input_ids": torch.arange(7), "shift_labels": torch.arange(7)}
    found = [
        collate([example | {"device": torch.tensor(device)}], 0, 3)["position_ids"].tolist() for device in range(3)
    ]
    assert found == [[[0, 1, 2]], [[3, 4, 5]], [[6, 0, 1]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__sequence_devices": 0}, "training.sequence_devices must be at least 1, got 0"),
        ({"training__sequence_devices": 2, "training__compile": True}, "training.compile is not possible with"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(MasformerError, match=message):
        recipe(tmp_path, **changes)


def test_too_few_processes_are_named(tmp_path):
    asked = recipe(tmp_path, training__sequence_devices=4)
    with pytest.raises(MasformerError, match=r"needs a multiple of 4 processes, not 1; .* torchrun --nproc-per-node 4"):
        training_arguments(asked, 1, False)


def test_a_loss_of_all_tokens_together_is_refused(tmp_path):
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 32, "output_router_logits": True}
    model = {"config": config, "tokenizer": "bytes", "plan": "full"}
    with pytest.raises(MasformerError, match="balances experts is one of all tokens together"):
        forecast(recipe(tmp_path, model=model, training__sequence_devices=2))


class Alone:
    """A mesh of one device."""

    def size(self):
        return 1


@pytest.mark.parametrize("chunked", [False, True])
def test_labels_that_are_not_shifted_and_caches_are_refused(chunked):
    model = apply_plan(tiny("llama"), "window:4")
    if chunked:
        use_chunked_loss(model)
    tokens = torch.ones(1, 8, dtype=torch.long)
    with across_devices(model, Alone()):
        with pytest.raises(MasformerError, match="there is no cache across devices; pass use_cache=False"):
            model(tokens, use_cache=True)
        if chunked:
            with pytest.raises(MasformerError, match="pass shift_labels, shifted before the sequence is cut"):
                model(tokens, labels=tokens)
        else:
            with pytest.raises(MasformerError, match="pass shift_labels, shifted before the sequence is cut"):
                model.loss_function(logits=torch.zeros(1, 8, 61), labels=tokens, vocab_size=61)
    model(tokens, labels=tokens)
    assert "_loss_function" not in vars(model)
