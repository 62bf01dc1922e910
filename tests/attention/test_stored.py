"""Attention of one query per row to what a cache stores, where tensors say which slots hold what."""

import pytest
import torch

import stored_kernels
from masformer import BlockSpan, FullSpan, SpanCache, WindowSpan
from masformer.attention import ConstantSinks
from masformer.attention.reference import dense_attention
from masformer.attention.stored import attend_slots
from masformer.cache.token import TokenCache

SPANS = [WindowSpan(5), WindowSpan(4, 3), BlockSpan(4), BlockSpan(3, 2), FullSpan()]


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_the_slots_of_a_cache_show_what_the_span_shows(span, recording):
    """Token after token, for rows that begin at different places."""
    rows, dim, length = 3, 8, 31
    starts = torch.tensor([0, 2, 5])
    make = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, rows, 2, length, dim, generator=make, dtype=torch.float64)
    queries = torch.randn(rows, 4, length, dim, generator=make, dtype=torch.float64)
    sinks = ConstantSinks(torch.randn(4, generator=make), torch.randn(2, dim, generator=make, dtype=torch.float64))
    real = torch.arange(length) >= starts[:, None]
    cache = SpanCache(str(span), num_layers=1)
    if recording:
        cache.activate_past_recording()
    cache.begin(rows, 7, real[:, :7])
    cache.update(keys[:, :, :7], values[:, :, :7], 0)
    position = torch.arange(length)[None] - starts[:, None]
    for at in range(7, length):
        cache.layers[0].make_room(at + 1)
        token = TokenCache(cache, rows)
        token.place(cache.row_starts(rows))
        here = slice(at, at + 1)
        token.update(keys[:, :, here], values[:, :, here], 0)
        ((kept, kept_values, view),) = token.seen(0, keys, values)
        visible = span.visible(position[:, here], position) & (position >= 0) & (torch.arange(length) <= at)
        expected = dense_attention(queries[:, :, here], keys, values, visible[:, None, None], 0.3, 0.0, 2.0, sinks)
        actual = attend_slots(queries[:, :, here], kept, kept_values, view.slots, scale=0.3, softcap=2.0, sinks=sinks)
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
        cache.begin(rows, 1, real[:, : at + 1])
        cache.count()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_of_slots_against_float64(dtype):
    for seed in range(10):
        stored_kernels.check(seed, "cuda", dtype)
