"""A sequence on 2, 3 and 4 processes (gloo): the loss and every gradient of one process."""

import forked
import pytest

import across


@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_slices_together_give_the_loss_and_the_gradients_of_one_process(world):
    result = forked.run(across.main, count=world)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert len(lines) > across.CASES
    for line in lines:
        error, _, name = line.partition(" ")
        assert float(error) < (0.1 if name.startswith(("memory", "rounding")) else 1e-10), name
