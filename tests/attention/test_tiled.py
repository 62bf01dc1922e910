import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masformer import BlockSpan, FullSpan, MasformerError, WindowSpan, attend
from masformer.attention import BACKENDS
from masformer.attention.tiled import tiled_attention
from strategies import spans


def tensors(batch, heads, group, query_len, key_len, dim=4, dtype=torch.float64):
    make = torch.Generator().manual_seed(key_len * 31 + query_len)
    shapes = [(batch, heads * group, query_len, dim), (batch, heads, key_len, dim), (batch, heads, key_len, dim)]
    return [torch.randn(shape, generator=make, dtype=dtype).requires_grad_() for shape in shapes]


@settings(deadline=None, max_examples=150)
@given(spans, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 50), st.integers(1, 9), st.data())
def test_tiled_equals_reference_forward_and_backward(span, batch, heads, group, key_len, tile, data):
    query_len = data.draw(st.integers(1, key_len))
    inputs = tensors(batch, heads, group, query_len, key_len)
    token = st.lists(st.lists(st.integers(0, 2), min_size=key_len, max_size=key_len), min_size=batch, max_size=batch)
    options = {}
    if data.draw(st.booleans()):
        options["padding_mask"] = (torch.tensor(data.draw(token)) > 0).long()
    if data.draw(st.booleans()):
        options["document_ids"] = torch.tensor(data.draw(token)).sort(-1)[0]
    expected = attend(*inputs, span, backend="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            BACKENDS,
            "tiled",
            lambda *args: tiled_attention(*args, tile=tile),
        )
        actual = attend(*inputs, span, backend="tiled", **options)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
    if actual.requires_grad:
        right = torch.autograd.grad((actual * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(b, a, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(100), WindowSpan(70, 4), BlockSpan(200, 1), BlockSpan(32)])
def test_past_the_tile_in_single_and_half_precision(span, dtype):
    inputs = tensors(2, 1, 3, 701, 701, 16, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = attend(*inputs, span, backend="reference")
    torch.testing.assert_close(attend(*inputs, span), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("span", [WindowSpan(3), WindowSpan(2, 2), BlockSpan(3, 1)])
def test_gradcheck(span):
    inputs = tensors(1, 1, 2, 11, 11, 2)
    assert torch.autograd.gradcheck(lambda q, k, v: tiled_attention(q, k, v, span, 0.7, None, tile=2), inputs)


def test_left_padding_moves_nothing_and_padding_gives_zeros():
    query, key, value = tensors(1, 1, 1, 20, 20)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :7] = 0
    out = attend(query, key, value, BlockSpan(4), padding_mask=mask)
    alone = attend(query[:, :, 7:], key[:, :, 7:], value[:, :, 7:], BlockSpan(4))
    torch.testing.assert_close(out[:, :, 7:], alone)
    assert not out[:, :, :7].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "unknown backend 'fast'; allowed: auto, reference, tiled"),
        ({"padding_mask": torch.ones(1, 3)}, "padding_mask must be [batch, key_len] = [1, 4], got [1, 3]"),
        ({"query": torch.ones(1, 3, 4, 4)}, "3 query heads are no multiple of 2 key heads"),
        ({"query": torch.ones(1, 2, 5, 4)}, "5 queries, but only 4 keys"),
        ({"query": torch.ones(1, 2, 4)}, "query must be [batch, heads, length, head_dim], got [1, 2, 4]"),
    ],
)
def test_wrong_values_are_named(change, message):
    inputs = {name: torch.ones(1, 2, 4, 4) for name in ("query", "key", "value")}
    with pytest.raises(MasformerError) as error:
        attend(**(inputs | {"span": WindowSpan(2)} | change))
    assert message in str(error.value)
