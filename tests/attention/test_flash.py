"""FlashAttention: exact through a stand-in for torch's two operators on the CPU, and on a GPU with its kernels."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aten_flash
from masformer import BlockSpan, FullSpan, SpanCache, WindowSpan, attend
from masformer.attention import flash, parts
from masformer.attention.call import Call
from masformer.attention.flash import Flash
from masformer.attention.layout import Layout
from masformer.attention.reference import Reference
from masformer.spans import UnitSpans
from strategies import spans
from tiny import PLAN

SPANS = [FullSpan(), WindowSpan(100), WindowSpan(70, 4), BlockSpan(96), BlockSpan(64, 1), BlockSpan(32, 2)]


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    library = aten_flash.register()
    yield
    library._destroy()


def tensors(batch, heads, group, query_len, key_len, dim=4, device="cpu", dtype=torch.float64, by_head=False):
    """In memory as models have them, token by token, or head by head."""
    make = torch.Generator().manual_seed(key_len * 31 + query_len)
    shapes = [(heads * group, query_len), (heads, key_len), (heads, key_len)]
    made = [torch.randn(batch, length, count, dim, generator=make).to(device, dtype) for count, length in shapes]
    made = [x.transpose(1, 2) for x in made]
    return [(x.contiguous() if by_head else x).requires_grad_() for x in made]


def ends(batch, length, data):
    """Padding at both ends of each row."""
    mask = torch.ones(batch, length)
    for row in mask:
        row[: data.draw(st.integers(0, length // 2))] = 0
        row[length - data.draw(st.integers(0, length // 2)) :] = 0
    return mask


@settings(deadline=None, max_examples=300)
@given(spans, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 50), st.data())
def test_equal_to_reference_in_float64(span, batch, heads, group, key_len, data):
    query_len = data.draw(st.one_of(st.just(key_len), st.integers(1, key_len)))
    mask = ends(batch, key_len, data) if data.draw(st.booleans()) else None
    token = st.lists(st.lists(st.integers(0, 3), min_size=key_len, max_size=key_len), min_size=batch, max_size=batch)
    documents = torch.tensor(data.draw(token)).sort(-1)[0] if data.draw(st.booleans()) else None
    layout = Layout.of(mask, documents)
    inputs = tensors(batch, heads, group, query_len, key_len, by_head=data.draw(st.booleans()))
    call = Call(*inputs, span, 0.6, layout)
    expected = Reference().run(call)
    with torch.no_grad():
        torch.testing.assert_close(Flash().run(call), expected, atol=1e-12, rtol=0)
    if query_len == key_len or (layout is None and not isinstance(span, BlockSpan)):
        actual = Flash().run(call)
        weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
        left, right = (torch.autograd.grad((out * weight).sum(), inputs) for out in (expected, actual))
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(b, a, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_tensors_that_lie_head_by_head(span, padded, batch):
    """The kernels write output and gradients in the order of what they are given."""
    inputs = tensors(batch, 2, 3, 301, 301, by_head=True)
    mask = torch.ones(batch, 301)
    mask[-1, :40] = not padded
    call = Call(*inputs, span, 0.6, Layout.of(mask, None))
    outs = [backend.run(call) for backend in (Reference(), Flash())]
    weight = torch.randn_like(outs[0])
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in outs]
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(b, a, atol=1e-12, rtol=1e-12)


def test_tokens_end_to_end_lie_at_one_distance_through_all_rows():
    whole = torch.randn(3, 6, 5, 8)
    one = torch.randn(3, 1, 6, 8).as_strided((3, 1, 6, 8), (48, 8, 8, 1))  # a query a row, as rotary positions give it
    for x in (whole.transpose(1, 2), whole[:, :, :1].transpose(1, 2), whole[:1].expand(3, 6, 5, 8), one):
        found = flash._end_to_end(x)
        assert torch.equal(found, x)
        assert found.stride(0) == found.shape[1] * found.stride(1)


def test_parts_lie_where_their_calls_do():
    layout = Layout.of((torch.arange(40) >= torch.tensor([[7], [0]])).long(), None)
    for device in ("cpu", "meta"):
        q, k, v = (torch.zeros(2, heads, 40, 8, device=device) for heads in (6, 2, 2))
        made = parts.parts_of(Call(q, k, v, WindowSpan(9, 3), 0.5, layout))
        assert made.sinks.chunks.device.type == made.parts[0].ends[0].device.type == device


@pytest.mark.parametrize("span", [WindowSpan(9, 3), WindowSpan(5), BlockSpan(6, 1)])
def test_keys_out_of_a_cache_that_has_dropped_some(span):
    real = torch.ones(2, 61, dtype=torch.long)
    real[0, :17] = 0
    cache = SpanCache(PLAN)
    layer = cache.layers[0]
    layer.span = span
    skipped = []
    for start, stop in ((0, 30), (30, 47), (47, 61)):
        cache.begin(2, stop - start, real[:, :stop])
        new = torch.randn(2, 1, stop - start, 8, dtype=torch.float64)
        key, value = layer.update(new, new, cache._step)
        for other in cache.layers[1:]:
            other.update(new, new, cache._step)
        layout = layer.view(cache._step).layout
        query = torch.randn(2, 2, stop - start, 8, dtype=torch.float64)
        call = Call(query, key, value, span, 0.3, layout)
        torch.testing.assert_close(Flash().run(call), Reference().run(call), atol=1e-12, rtol=0)
        skipped += [] if layout is None or layout.skipped is None else layout.skipped
    assert any(skipped)


@pytest.mark.parametrize("span", SPANS)
def test_tensors_with_gaps_between_rows_and_heads(span):
    """As caches hold keys, and as one projection gives queries, keys and values."""
    whole = torch.randn(2, 130, 3, 2, 12, dtype=torch.float64, requires_grad=True)
    query, key, value = (x.transpose(1, 2)[:, :, :120, 2:10] for x in whole.unbind(2))
    assert not query.is_contiguous()
    outs = [backend.run(Call(query, key, value, span, 0.4)) for backend in (Reference(), Flash())]
    weight = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, whole, weight, retain_graph=True)[0] for out in outs]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-12, rtol=0)
    with torch.no_grad():
        calls = [Call(query[:, :, -1:], key, value, span, 0.4)] * 2
        expected, actual = (each.run(call) for each, call in zip((Reference(), Flash()), calls, strict=True))
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_how_a_span_is_cut():
    def cut(span, batch, length, layout=None, past=0):
        inputs = tensors(batch, 1, 1, length - past, length)
        return parts.parts_of(Call(*inputs, span, 1.0, layout))

    window = cut(WindowSpan(8), 3, 50)
    assert [(part.alike, part.left, part.causal) for part in window.parts] == [((3, 50, 50), 7, True)]
    assert cut(WindowSpan(8), 3, 50, past=10).parts[0].alike == (3, 40, 50)
    assert cut(BlockSpan(10), 3, 50).parts[0].alike == (15, 10, 10)
    back = cut(BlockSpan(10, 1), 3, 50).parts
    assert [part.alike for part in back] == [(15, 10, 10), (14, 10, 10)]
    assert back[1].alive.view(14, 10)[:, 0].tolist() == [number % 5 > 0 for number in range(1, 15)]
    assert cut(BlockSpan(10, 1), 1, 50).parts[1].alive is None
    ragged = cut(BlockSpan(20), 1, 50).parts[0]
    assert ragged.alike is None
    assert ragged.ends[0].tolist() == [0, 20, 40, 50]
    packed = Layout.of(torch.tensor([[0] * 5 + [1] * 45]), torch.tensor([[0] * 30 + [1] * 20]))
    assert cut(FullSpan(), 1, 50, packed).parts[0].ends[0].tolist() == [0, 5, 30, 50]
    assert cut(WindowSpan(8, 2), 1, 50, packed).sinks.chunks.tolist() == [[13, 17, 8, 5], [38, 12, 8, 30]]
    assert cut(WindowSpan(8, 2), 2, 100).sinks.ends.tolist() == [0, 2, 4]
    assert cut(WindowSpan(60, 2), 1, 50).sinks is None


def test_parts_are_made_once_for_all_layers():
    layout = Layout.of(torch.tensor([[0, 1, 1, 1]]), None)
    call = Call(*tensors(1, 1, 1, 4, 4), WindowSpan(2), 1.0, layout)
    made = parts.parts_of(call)
    again = Layout.known(layout.documents)
    assert parts.parts_of(Call(*tensors(1, 1, 1, 4, 4), WindowSpan(2), 1.0, again)) is made
    before = len(parts._known)
    del layout, again, call
    assert len(parts._known) == before - 1


def test_a_kernel_that_is_wrong_is_found_out_and_named(monkeypatch):
    """On the CPU in float64, with a fault planted in the stand-in."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    arguments = torch.device("cpu"), torch.float64, 8, 2
    flash._tried.cache_clear()
    for span in (FullSpan(), WindowSpan(20, 4), BlockSpan(16, 1)):
        assert flash._tried(*arguments, span)
    for fault in ("shifted", "nan"):
        flash._tried.cache_clear()
        right = flash._backward

        def wrong(*args, right=right, fault=fault):
            grads = right(*args)
            return (grads[0].roll(1, 1), *grads[1:]) if fault == "shifted" else (*grads[:2], grads[2] * torch.nan)

        with monkeypatch.context() as patch:
            patch.setattr(flash, "_backward", wrong)
            with pytest.warns(UserWarning, match="FlashAttention is wrong for window:20, head width 8"):
                assert not flash._tried(*arguments, WindowSpan(20))
    flash._tried.cache_clear()


# On a GPU


def compare(inputs, span, **options):
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = attend(*exact, span, backend="reference", **options)
    actual = attend(*inputs, span, backend="flash", **options)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.device)
    left = torch.autograd.grad((expected * weight).sum(), exact)
    right = torch.autograd.grad((actual * weight.to(actual.dtype)).sum(), inputs)
    for a, b in zip((actual, *right), (expected, *left), strict=True):
        assert b.norm() > 0
        assert (a.double() - b).norm() / b.norm() < 8e-3


@pytest.mark.gpu
@pytest.mark.parametrize("span", [*SPANS, WindowSpan(1024, 4)])
def test_kernels_against_float64(span):
    for dim, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (80, torch.float16)):
        for batch, heads, group, length in ((2, 2, 4, 1111), (1, 1, 3, 1300), (3, 2, 1, 77)):
            for by_head in (False, True):
                compare(tensors(batch, heads, group, length, length, dim, "cuda", dtype, by_head), span)


@pytest.mark.gpu
@pytest.mark.parametrize("span", SPANS)
def test_kernels_on_padded_and_packed_rows_and_after_a_past(span):
    cuts = torch.tensor([[60, 200, 410], [128, 256, 499]])
    packed = (torch.arange(500)[None, :, None] >= cuts[:, None]).sum(-1).cuda()
    mask = torch.ones(2, 500, device="cuda")
    mask[0, :140] = mask[1, 333:] = 0
    inputs = tensors(2, 2, 3, 500, 500, 64, "cuda", torch.bfloat16)
    for options in ({"document_ids": packed}, {"padding_mask": mask}, {"document_ids": packed, "padding_mask": mask}):
        compare(inputs, span, **options)
        with torch.no_grad():
            query = inputs[0][:, :, -170:]
            expected = attend(query.double(), *(x.double() for x in inputs[1:]), span, backend="reference", **options)
            actual = attend(query, *inputs[1:], span, backend="flash", **options)
            assert (actual.double() - expected).norm() / expected.norm() < 8e-3


@pytest.mark.gpu
def test_a_layer_whose_heads_differ():
    for heads in ((0,), (1, 2), (0, 2), (1, 3)):
        spans = UnitSpans(tuple(FullSpan() if head in heads else WindowSpan(100, 4) for head in range(4)))
        compare(tensors(3, 4, 3, 700, 700, 64, "cuda", torch.bfloat16), spans)


@pytest.mark.gpu
def test_the_kernels_of_sinks_against_torch():
    import sinks_kernels  # it needs Triton

    for case in sinks_kernels.CASES:
        sinks_kernels.check(case, "cuda")


@pytest.mark.gpu
def test_auto_is_flash_on_this_gpu_and_trusts_it():
    assert importlib.util.find_spec("triton")
    for span in SPANS:
        query, key, value = tensors(1, 2, 4, 300, 300, 64, "cuda", torch.bfloat16)
        assert Flash().objection(Call(query, key, value, span, 0.1)) is None
