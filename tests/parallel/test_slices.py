"""What a slice needs: exactly the keys before it that its queries see."""

import random

import pytest
import torch

from across import random_span
from masformer import AttentionPlan, FullSpan, MasformerError, WindowSpan
from masformer.cost import ModelShape, communication, communication_table
from masformer.parallel.slices import needed, tokens_sent, traffic

SHAPE = ModelShape(
    16, query_heads=32, kv_heads=8, head_dim=64, value_dim=64, matmul_weights=10**9, parameters=10**9, widest=8192
)
PLAN = AttentionPlan.mixed(16, 4, local=WindowSpan(1024, sinks=4))


@pytest.mark.parametrize("seed", range(100))
def test_a_slice_needs_the_keys_that_its_first_query_sees_and_later_ones_see_no_others(seed):
    choose = random.Random(seed)
    span, first, start = random_span(choose), choose.randint(0, 9), choose.randint(0, 60)
    found = [token for part in needed(span, first, start) for token in part]
    assert found == sorted(set(found))

    def seen(query):
        return {
            key for key in range(first, start) if span.visible(torch.tensor(query - first), torch.tensor(key - first))
        }

    if start > first:
        assert set(found) == seen(start)
        assert all(seen(query) <= set(found) for query in range(start, start + 20))
    else:
        assert not found


def test_a_window_longer_than_a_slice_comes_from_several_devices_and_sinks_from_the_first():
    assert tokens_sent(WindowSpan(8, sinks=2), 4, 5) == ((0, 5, 4, 2), (0, 0, 5, 2), (0, 0, 0, 5), (0, 0, 0, 0))
    assert tokens_sent(FullSpan(), 3, 5) == ((0, 5, 5), (0, 0, 5), (0, 0, 0))


def test_what_a_window_sends_does_not_grow_with_the_sequence():
    local = AttentionPlan.uniform(16, WindowSpan(1024, sinks=4))
    totals = [communication(SHAPE, local, length, 8) for length in (16384, 131072)]
    assert totals[0].total == totals[1].total == 16 * 8 * 7 * (1023 + 4) * 128 * 2 * 2
    assert totals[0].gathered * 8 == totals[1].gathered
    assert all(each.total < 0.02 * each.gathered for each in totals[1:])


def test_full_heads_go_by_heads_where_devices_share_them_evenly_and_local_ones_where_that_is_less():
    leaves, comes = traffic(FullSpan(), 32, 8, 8, 1000)
    assert leaves == comes == [5 * 1000 * 7] * 8
    assert traffic(FullSpan(), 32, 8, 16, 1000)[0] == [3 * 1000 * 15] * 16, "each KV head goes to two"
    leaves, comes = traffic(FullSpan(), 36, 9, 8, 1000)
    assert leaves == [9 * 1000 * later for later in reversed(range(8))]
    assert comes == leaves[::-1]
    assert traffic(WindowSpan(100), 8, 8, 8, 1000)[0] == [8 * 99] * 7 + [0]
    assert traffic(WindowSpan(7001), 8, 8, 8, 1000) == traffic(FullSpan(), 8, 8, 8, 1000)


def test_recomputation_and_the_ways_of_others_are_counted():
    once, again = (communication(SHAPE, PLAN, 8192, 8, recompute=each) for each in (False, True))
    assert again.total * 2 == once.total * 3
    assert sum(once.spans.values()) == once.total == sum(once.layers)
    keys = 16 * 8 * 128 * 2 * 8192 * 7
    assert (once.gathered, once.ring, again.gathered, again.ring) == (2 * keys, 3 * keys, 3 * keys, 4 * keys)
    assert communication(SHAPE, PLAN, 8189, 8) == once
    assert communication_table([once]).row_count == 6
    with pytest.raises(MasformerError, match="devices must be at least 2, got 1"):
        communication(SHAPE, PLAN, 8192, 1)
