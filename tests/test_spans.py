import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masformer import BlockSpan, FullSpan, MasformerError, WindowSpan
from masformer.spans import Span
from strategies import constant_spans, local_spans, spans


def pairs(span: Span, length: int) -> torch.Tensor:
    positions = torch.arange(length)
    return span.visible(positions[:, None], positions[None, :])


def test_a_window_counts_the_querys_own_key():
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert pairs(WindowSpan(2), 5).int().tolist() == expected


def test_sinks_stay_visible():
    assert pairs(WindowSpan(1, sinks=2), 5)[4].int().tolist() == [1, 1, 0, 0, 1]


def test_a_block_sees_its_own_block_and_those_it_looks_back_to():
    assert pairs(BlockSpan(2), 5)[3].int().tolist() == [0, 0, 1, 1, 0]
    assert pairs(BlockSpan(2, lookback=1), 7)[5].int().tolist() == [0, 0, 1, 1, 1, 1, 0]


def test_full_is_causal():
    assert torch.equal(pairs(FullSpan(), 9), torch.ones(9, 9).tril().bool())


@given(spans, st.integers(1, 60))
def test_geometry_follows_from_visible(span, length):
    visible = pairs(span, length)
    positions = torch.arange(length)
    assert torch.equal(span.visible_counts(positions), visible.sum(1))
    assert span.visible_pairs(length) == int(visible.sum())
    assert span.visible_pairs(length, start=length // 2) == int(visible[length // 2 :].sum())
    without_sinks = visible.clone()
    beyond = span.first_visible(positions)[:, None] > positions[None, :]
    assert not (without_sinks & beyond & (positions >= span.sinks)).any()
    assert (positions - span.first_visible(positions) >= 0).all()
    if span.max_visible is None:
        assert torch.equal(visible, pairs(FullSpan(), length))
    else:
        head = min(length, span.max_visible)
        assert torch.equal(visible[:head], pairs(FullSpan(), length)[:head])
        assert int(visible.sum(1).max()) <= span.max_visible
    assert span.cached_keys(length) >= int(visible.sum(1).max())


@given(local_spans, st.integers(1, 5), st.integers(0, 40))
def test_the_pattern_of_recent_keys_repeats_with_the_period(span, periods, offset):
    shift = span.period * periods
    query = span.max_visible + offset
    keys = torch.arange(span.sinks + shift, query + shift + 1)
    moved = span.visible(torch.tensor(query + shift), keys)
    assert torch.equal(moved, span.visible(torch.tensor(query), keys - shift) & (keys - shift >= span.sinks))


@given(spans | constant_spans)
def test_text_form_round_trips(span):
    assert Span.parse(str(span)) == span


@given(constant_spans, st.integers(1, 60))
def test_a_constant_sink_is_no_key(span, length):
    without = dataclasses.replace(span, constant_sink=False)
    assert span != without
    assert str(span) == f"{without}+sink"
    assert torch.equal(pairs(span, length), pairs(without, length))
    assert span.visible_pairs(length) == without.visible_pairs(length)
    assert span.cached_keys(length) == without.cached_keys(length)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowSpan(0), "window size must be at least 1, got 0"),
        (lambda: WindowSpan(2.5), "window size must be a whole number, got 2.5"),
        (lambda: WindowSpan(True), "window size must be a whole number, got True"),
        (lambda: WindowSpan(4, sinks=-1), "number of sinks must be at least 0, got -1"),
        (lambda: BlockSpan(0), "block size must be at least 1, got 0"),
        (lambda: BlockSpan(4, lookback=-1), "block lookback must be at least 0, got -1"),
        (lambda: Span.parse("window:0"), "window size must be at least 1, got 0"),
        (lambda: Span.parse("window:8+-1"), "number of sinks must be at least 0, got -1"),
        (lambda: Span.parse("block:8x0"), "number of blocks in a block span must be at least 1, got 0"),
        (lambda: Span.parse("sliding:8"), "unknown span 'sliding:8'; allowed: full, window:SIZE"),
        (lambda: Span.parse(""), "unknown span ''"),
        (lambda: Span.parse("full+sink"), "unknown span 'full+sink'; allowed: full, window:SIZE"),
        (lambda: Span.parse("window:8+sinks"), "a local span with a constant sink: window:SIZE+sink"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(MasformerError) as error:
        make()
    assert message in str(error.value)


def test_pairs_of_a_length_beyond_memory_are_counted_at_once():
    length = 10**12
    assert FullSpan().visible_pairs(length) == length * (length + 1) // 2
    assert WindowSpan(10).visible_pairs(length) == 55 + 10 * (length - 10)
    assert BlockSpan(4).visible_pairs(length + 1, start=4) == 10 * (length // 4 - 1) + 1
