"""Bootstrap intervals: coverage, weights, pairs, edges."""

from __future__ import annotations

import numpy as np
import pytest

from masformer.errors import MasformerError
from masformer.evaluation.intervals import bootstrap


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    made = [bootstrap(random.normal(3.0, 1.0, 40).tolist(), seed=trial) for trial in range(200)]
    covered = np.mean([each.low <= 3.0 <= each.high for each in made])
    assert 0.88 <= covered <= 0.99
    assert all(each.count == 40 and each.low < each.mean < each.high for each in made)


def test_a_weight_counts_like_so_many_units():
    assert bootstrap([1.0, 4.0], [3, 1]).mean == bootstrap([1.0, 1.0, 1.0, 4.0]).mean == 1.75


def test_paired_differences_are_narrower_than_what_they_are_made_of():
    random = np.random.default_rng(2)
    base = random.normal(0, 5, 50)
    other = base + random.normal(0.3, 0.1, 50)
    difference = bootstrap((other - base).tolist())
    assert 0.2 < difference.low < difference.high < 0.4
    assert bootstrap(base.tolist()).high - bootstrap(base.tolist()).low > 1


def test_the_same_seed_gives_the_same_interval():
    assert bootstrap([1.0, 2.0, 5.0], seed=3) == bootstrap([1.0, 2.0, 5.0], seed=3)


def test_one_unit_or_equal_units_have_no_width():
    for values in ([2.0], [2.0] * 7):
        made = bootstrap(values)
        assert (made.low, made.mean, made.high, made.count) == (2.0, 2.0, 2.0, len(values))


@pytest.mark.parametrize(("values", "weights"), [([], None), ([1.0], [0]), ([1.0, 2.0], [1]), ([1.0, 2.0], [2, -1])])
def test_nothing_to_average_is_an_error(values, weights):
    with pytest.raises(MasformerError, match="at least one value"):
        bootstrap(values, weights)
