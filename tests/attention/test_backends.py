import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from masformer import BlockSpan, FullSpan, MasformerError, WindowSpan, attend
from masformer.attention import BACKENDS
from masformer.attention.call import Call, spread
from masformer.attention.tiled import Kernel, Tiled
from strategies import spans


def tensors(batch, heads, group, query_len, key_len, dim=4, dtype=torch.float64):
    make = torch.Generator().manual_seed(key_len * 31 + query_len)
    shapes = [(batch, heads * group, query_len, dim), (batch, heads, key_len, dim), (batch, heads, key_len, dim)]
    return [torch.randn(shape, generator=make, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", ["tiled", "flex"])
@settings(deadline=None, max_examples=120)
@given(spans, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 50), st.integers(1, 9), st.data())
def test_equal_to_reference_forward_and_backward(backend, span, batch, heads, group, key_len, tile, data):
    query_len = data.draw(st.integers(1, key_len))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    inputs = tensors(batch, heads, group, query_len, key_len, dtype=dtype)
    token = st.lists(st.lists(st.integers(0, 2), min_size=key_len, max_size=key_len), min_size=batch, max_size=batch)
    options = {}
    if data.draw(st.booleans()):
        options["padding_mask"] = (torch.tensor(data.draw(token)) > 0).long()
    if data.draw(st.booleans()):
        options["document_ids"] = torch.tensor(data.draw(token)).sort(-1)[0]
    options["softcap"] = data.draw(st.none() | st.floats(0.5, 5))
    expected = attend(*inputs, span, backend="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            BACKENDS,
            "tiled",
            Tiled(tile),
        )
        actual = attend(*inputs, span, backend=backend, **options)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
    with torch.no_grad():
        actual_alone = attend(*inputs, span, backend=backend, **options)
    torch.testing.assert_close(actual_alone, expected, atol=tolerance, rtol=0)
    weight = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    left = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
    if actual.requires_grad:
        right = torch.autograd.grad((actual * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(b, a, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(10), WindowSpan(10, 4), BlockSpan(16, 1)])
def test_under_autocast_everything_is_in_its_dtype(span):
    query, key, value = tensors(2, 1, 3, 61, 70, 16, torch.float32)
    expected = attend(query, key, value, span, backend="reference")
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, torch.autocast("cpu", torch.bfloat16):
            # as in models: positions are turned in float32, values come out of a layer
            actual = attend(query, key, value.bfloat16(), span)
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.float(), expected, atol=3e-2, rtol=0)


@pytest.mark.parametrize("backend", ["tiled", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(100), WindowSpan(70, 4), BlockSpan(200, 1), BlockSpan(32)])
def test_past_the_tile_in_single_and_half_precision(span, dtype, backend):
    inputs = tensors(2, 1, 3, 701, 701, 16, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = attend(*inputs, span, backend="reference")
    torch.testing.assert_close(attend(*inputs, span, backend=backend), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", ["tiled", "flex"])
@pytest.mark.parametrize("value_dim", [3, 16, 20])
@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(9), WindowSpan(7, 4), BlockSpan(8, 1)])
def test_without_gradients_after_a_past_with_values_of_any_width(span, value_dim, backend):
    query, key, _ = (tensor.detach() for tensor in tensors(2, 2, 3, 150, 211, 16))
    value = torch.randn(2, 2, 211, value_dim, dtype=torch.float64)
    expected = attend(query, key, value, span, backend="reference")
    torch.testing.assert_close(attend(query, key, value, span, backend=backend), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_full_attention_after_a_past_in_wide_tiles_as_on_cuda(monkeypatch, padded):
    """There, tiles of full attention are launched one by one: few and wide ones, not a tile for 64 queries."""
    query, key, value = tensors(2, 2, 3, 2300, 2500, 8)
    mask = torch.ones(2, 2500, dtype=torch.bool)
    mask[1, :700] = not padded
    expected = attend(query, key, value, "full", padding_mask=mask, backend="reference")
    for name, answer in (("takes_wide_tiles", True), ("tells_sums", False), ("groups_heads", False)):
        monkeypatch.setattr(Kernel, name, lambda *args, answer=answer: answer)
    calls, real = [], Kernel.masked
    monkeypatch.setattr(Kernel, "masked", lambda *args: calls.append(1) or real(*args))
    torch.testing.assert_close(
        attend(query, key, value, "full", padding_mask=mask, backend="tiled"), expected, atol=1e-12, rtol=0
    )
    assert len(calls) <= 6


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 9), (torch.bfloat16, 3)])
def test_keys_are_repeated_for_the_float32_kernel_of_cuda(dtype, heads):
    """Given grouped heads in float32, torch falls back to writing all scores to memory."""
    with FakeTensorMode():
        query, key = (torch.empty(1, count, 32, 64, dtype=dtype, device="cuda") for count in (9, 3))
        assert [x.shape[1] for x in spread(query, key, key)] == [heads, heads]


@pytest.mark.parametrize(("threads", "heads"), [(1, 2), (2, 2), (2, 3), (8, 2), (2, 9)])
@pytest.mark.parametrize("group", [1, 3])
def test_full_attention_of_few_key_heads_on_any_number_of_threads(monkeypatch, threads, heads, group):
    """Where whole key heads leave threads idle for long, they are repeated for the backward pass."""
    inputs = tensors(1, heads, group, 41, 41)
    left = attend(*inputs, "full", backend="reference")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    repeated = group > 1 and (threads, heads) in ((2, 3), (8, 2))
    assert spread(*inputs)[0].shape[1] == heads * (group if repeated else 1)
    right = attend(*inputs, "full", backend="tiled")
    torch.testing.assert_close(right, left, atol=1e-12, rtol=0)
    weight = torch.randn_like(left)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (left, right)), strict=True):
        torch.testing.assert_close(b, a, atol=1e-11, rtol=0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(3), WindowSpan(2, 2), BlockSpan(3, 1)])
def test_gradcheck(span, softcap):
    def run(query, key, value):
        return Tiled(tile=2).run(Call(query, key, value, span, 0.7, softcap=softcap))

    assert torch.autograd.gradcheck(run, tensors(1, 1, 2, 11, 11, 2))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(40, 2)])
def test_dropout_removes_weights_and_keeps_their_mean(span, backend):
    torch.manual_seed(0)
    query, key, _ = tensors(1, 1, 2, 150, 150)
    value = torch.eye(150, dtype=torch.float64)[None, None]
    weights = attend(query, key, value, span)
    dropped = attend(query, key, value, span, dropout=0.25, backend=backend)
    visible = span.visible(torch.arange(150)[:, None], torch.arange(150)[None, :])
    kept = (dropped > 0)[:, :, visible]
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(dropped[dropped > 0], weights[dropped > 0] / 0.75)
    dropped.sum().backward()


@pytest.mark.parametrize("backend", ["tiled", "flex"])
def test_many_documents_in_a_row_with_empty_ends(backend):
    query, key, value = tensors(2, 1, 2, 40, 40)
    documents = torch.tensor([[3] * 7 + [1] * 20 + [9] * 13, [0] * 40])
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :4] = mask[0, 22:30] = mask[1, 33:] = 0
    for span in (FullSpan(), WindowSpan(4, 1), BlockSpan(3, 1)):
        options = {"padding_mask": mask, "document_ids": documents}
        actual = attend(query, key, value, span, backend=backend, **options)
        torch.testing.assert_close(actual, attend(query, key, value, span, backend="reference", **options))
        assert not actual[0, :, :4].any()
        assert not actual[1, :, 33:].any()


@pytest.mark.parametrize("backend", ["tiled", "flex"])
def test_left_padding_moves_nothing_and_padding_gives_zeros(backend):
    query, key, value = tensors(1, 1, 1, 20, 20)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :7] = 0
    out = attend(query, key, value, BlockSpan(4), padding_mask=mask, backend=backend)
    alone = attend(query[:, :, 7:], key[:, :, 7:], value[:, :, 7:], BlockSpan(4), backend=backend)
    torch.testing.assert_close(out[:, :, 7:], alone)
    assert not out[:, :, :7].any()


@pytest.mark.parametrize("backend", ["reference", "tiled", "flex"])
@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(3, 1), BlockSpan(4, 1)])
def test_a_batch_of_nothing_but_padding_can_be_trained_on(span, backend):
    inputs = tensors(2, 1, 2, 20, 20)
    out = attend(*inputs, span, padding_mask=torch.zeros(2, 20), backend=backend)
    assert not out.any()
    out.sum().backward()
    assert all(not tensor.grad.any() for tensor in inputs)
    frozen = [tensor.detach() for tensor in inputs]
    assert not attend(*frozen, span, padding_mask=torch.zeros(2, 20), backend=backend).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "unknown backend 'fast'; allowed: auto, reference, tiled, flash, flex"),
        ({"padding_mask": torch.ones(1, 3)}, "padding_mask must be [batch, key_len] = [1, 4], got [1, 3]"),
        ({"query": torch.ones(1, 3, 4, 4)}, "3 query heads are no multiple of 2 key heads"),
        ({"query": torch.ones(1, 2, 5, 4)}, "5 queries, but only 4 keys"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": 0.1, "backend": "flex"}, "backend flex has no dropout on attention weights; allowed: dropout 0"),
        ({"backend": "flash"}, "backend flash runs on NVIDIA GPUs, not on cpu; use backend flex or tiled"),
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        ({"document_ids": torch.tensor([[0, 1, 0, 0]])}, "document_ids must keep the tokens of a document together"),
        ({"query": torch.ones(1, 2, 4)}, "query must be [batch, heads, length, head_dim], got [1, 2, 4]"),
    ],
)
def test_wrong_values_are_named(change, message):
    inputs = {name: torch.ones(1, 2, 4, 4) for name in ("query", "key", "value")}
    with pytest.raises(MasformerError) as error:
        attend(**(inputs | {"span": WindowSpan(2)} | change))
    assert message in str(error.value)


@pytest.mark.parametrize("backend", ["reference", "tiled", "flex", "auto"])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 4, 4), (2, 0, 9), (1, 0, 0)])
@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(5, 2), BlockSpan(6)])
def test_no_row_and_no_query_give_nothing_that_a_backward_pass_goes_through(span, batch, queries, keys, backend):
    query, key, value = (torch.randn(batch, 2, n, 8, requires_grad=True) for n in (queries, keys, keys))
    out = attend(query, key, value, span, backend=backend)
    assert out.shape == query.shape
    out.sum().backward()
    assert not any(tensor.grad.any() for tensor in (query, key, value))
