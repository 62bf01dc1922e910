"""Attention of one query per row to what a cache stores, where tensors say which slots hold what."""

import random

import pytest
import torch

from masformer import BlockSpan, FullSpan, SpanCache, WindowSpan
from masformer.attention import ConstantSinks
from masformer.attention.reference import dense_attention
from masformer.attention.stored import Slots, attend_slots
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
    chosen = random.Random(0)
    for _ in range(14):
        rows, kv_heads, group = chosen.choice([1, 2, 3]), chosen.choice([1, 2, 8]), chosen.choice([1, 3, 4])
        dim, value_dim = chosen.choice([(64, 64), (80, 32), (256, 256)])
        length, full = chosen.choice([3, 60, 300, 1500, 9000]), chosen.random() < 0.5
        count, ring = (0, None) if full else (chosen.choice([0, 4]), chosen.choice([5, 70, 1024]))
        slots = length + 9 if full else min(length + 5, count + ring)
        newest = torch.tensor([length - 1 - chosen.randint(0, length // 2) for _ in range(rows)])
        low = torch.tensor([max(0, int(p) - chosen.randint(0, int(p) if full else ring - 1)) for p in newest])
        make = torch.Generator().manual_seed(length)
        query = torch.randn(rows, 1, kv_heads * group, dim, generator=make).transpose(1, 2).cuda().to(dtype)
        key = torch.randn(rows, kv_heads, slots, dim, generator=make).cuda().to(dtype)
        value = torch.randn(rows, kv_heads, slots, value_dim, generator=make).cuda().to(dtype)
        logit, fixed = torch.randn(kv_heads * group, generator=make), torch.randn(kv_heads, value_dim, generator=make)
        sinks = chosen.choice([None, ConstantSinks(logit.cuda(), fixed.cuda()), ConstantSinks(logit.cuda())])
        softcap = chosen.choice([None, 5.0])
        places = Slots(newest.cuda(), low.cuda(), count, ring)
        visible = Slots(newest, low, count, ring).visible(slots).cuda()
        options = {"scale": dim**-0.5, "softcap": softcap, "sinks": sinks}
        exact = dense_attention(query.double(), key.double(), value.double(), visible, dim**-0.5, 0.0, softcap, sinks)
        actual = attend_slots(query, key, value, places, **options)
        bound = 8e-3 if dtype == torch.bfloat16 else 1e-5
        assert (actual.double() - exact).norm() / exact.norm() < bound
