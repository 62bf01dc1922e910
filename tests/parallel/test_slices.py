"""What a slice needs: exactly the keys before it that its queries see."""

import random
import runpy
import sys
from pathlib import Path

import pytest
import torch

from across import random_span
from masformer import AttentionPlan, BlockSpan, FullSpan, MasformerError, WindowSpan
from masformer.cost import ModelShape, communication, communication_table
from masformer.parallel.slices import Traffic, fetched, needed, ring_queries, tokens_sent, traffic

ROOT = Path(__file__).parents[2]
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


def test_full_heads_go_by_heads_where_devices_share_them_evenly_and_that_is_less_and_local_ones_likewise():
    found = traffic(FullSpan(), 32, 8, 8, 1000)
    assert found == Traffic("by heads", *[([5 * 1000 * 7] * 8,) * 2] * 2)
    assert traffic(FullSpan(), 32, 8, 16, 1000).forward[0] == [3 * 1000 * 15] * 16, "each KV head goes to two"
    assert traffic(FullSpan(), 36, 9, 8, 1000).way == "ring", "36 heads on 8 devices"
    assert traffic(FullSpan(), 8, 1, 2, 1000).way == "by heads"
    assert traffic(FullSpan(), 8, 1, 4, 1000).way == "ring", "one KV head is less to pass around than 8 query heads"
    window = traffic(WindowSpan(100), 8, 8, 8, 1000)
    assert (window.way, window.forward) == ("edge", ([8 * 99] * 7 + [0], [0] + [8 * 99] * 7))
    assert window.backward == window.forward[::-1]
    assert traffic(WindowSpan(7001), 8, 8, 8, 1000) == traffic(FullSpan(), 8, 8, 8, 1000)
    assert traffic(WindowSpan(100), 9, 9, 1, 1000).total == traffic(FullSpan(), 9, 9, 1, 1000).total == 0


@pytest.mark.parametrize("span", [WindowSpan(8000), WindowSpan(7000, 1000), BlockSpan(4000, 1), BlockSpan(9000)])
def test_spans_as_long_as_the_row_are_full_ones(span):
    assert traffic(span, 9, 3, 8, 1000) == traffic(FullSpan(), 9, 3, 8, 1000)
    assert traffic(span, 9, 3, 8, 1251) != traffic(FullSpan(), 9, 3, 8, 1251)


@pytest.mark.parametrize("devices", range(2, 8))
def test_in_a_ring_all_devices_do_the_same_work_and_each_query_is_computed_once(devices):
    for length in (1, 7, 1000):
        parts = [ring_queries(device, devices, length) for device in range(devices)]
        assert sorted(token for each in parts for part in each for token in part) == list(range(devices * length))
        work = [sum(FullSpan().visible_pairs(part.stop, part.start) for part in each) for each in parts]
        even = length % 2 == 0
        assert max(work) - min(work) <= (0 if even else devices * length)
        assert all(part.start // length == (part.stop - 1) // length for each in parts for part in each)


def test_what_a_ring_sends():
    found = traffic(FullSpan(), 6, 2, 4, 10)
    keys = [3, 3, 3, 1], [3, 2, 2, 3]  # the last slice is seen by the device alone that has the last one's second half
    swapped = 6 * 5
    assert found.way == "ring"
    assert found.forward == tuple([20 * slices + swapped for slices in each] for each in keys)
    assert found.backward[0] == found.backward[1] == [20 * (a + b) + swapped for a, b in zip(*keys, strict=True)]
    middle = traffic(FullSpan(), 2, 2, 3, 10)
    assert middle.forward == ([2 * 2 * 10 + 10, 2 * 2 * 10, 2 * 10 + 10], [2 * 2 * 10 + 10, 2 * 10, 2 * 2 * 10 + 10])
    assert [fetched(FullSpan(), 9, 3, devices, 10) for devices in (2, 4, 7)] == [10, 20, 20]


def test_recomputation_and_the_ways_of_others_are_counted():
    once, again = (communication(SHAPE, PLAN, 8192, 8, recompute=each) for each in (False, True))
    assert again.total * 2 == once.total * 3
    assert sum(once.spans.values()) == once.total == sum(once.layers)
    keys = 16 * 8 * 128 * 2 * 8192 * 7
    assert (once.gathered, once.ring, again.gathered, again.ring) == (2 * keys, 3 * keys, 3 * keys, 4 * keys)
    assert communication(SHAPE, PLAN, 8189, 8) == once
    assert communication_table([once]).row_count == 6
    assert once.ways == {"full": "by heads", "window:1024+4": "edge"}
    assert communication(SHAPE, "full@0:0-6,1; window:90", 8192, 8).ways["full"] == "ring and by heads"
    with pytest.raises(MasformerError, match="devices must be at least 2, got 1"):
        communication(SHAPE, PLAN, 8192, 1)


def test_the_reckoning_in_the_docs_is_what_its_script_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["simulate_devices.py"])
    runpy.run_path(str(ROOT / "benchmarks" / "simulate_devices.py"), run_name="__main__")

    def rows(text):
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        return [row for row in cells if row and row[0].isdecimal() and row[-1].endswith(" s")]

    printed = [[*row[:1], *row[2:4], *row[5:]] for row in rows(capsys.readouterr().out)]
    assert len(printed) == 8
    assert [row[:1] + row[2:] for row in rows((ROOT / "docs" / "training.md").read_text())] == printed
