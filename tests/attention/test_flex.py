"""FlexAttention beyond what test_backends.py asks of every backend: its blocks, its kernels, and what `auto` takes.

Tests that take `device` run on the CPU without kernels where they can, and with them on a GPU.
"""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from masformer import BlockSpan, FullSpan, MasformerError, SpanCache, WindowSpan, apply_plan, attend
from masformer.attention import flash, flex
from masformer.attention.auto import Auto
from masformer.attention.call import Call
from masformer.attention.layout import Layout
from masformer.attention.reference import Reference, visible_mask
from masformer.benchmarks.timing import peak_memory
from strategies import spans
from tiny import PLAN, VOCABULARY, tiny

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPANS = [FullSpan(), WindowSpan(100), WindowSpan(70, 4), BlockSpan(96, 1)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_blocks():
    yield
    flex._plain_blocks.cache_clear()
    torch._dynamo.reset()


def tensors(query_len, key_len, device, dtype=torch.float32, heads=(6, 2), dims=(64, 64), batch=2):
    make = torch.Generator().manual_seed(key_len * 31 + query_len)
    shapes = [(heads[0], query_len, dims[0]), (heads[1], key_len, dims[0]), (heads[1], key_len, dims[1])]
    return [torch.randn(batch, *shape, generator=make).to(device, dtype).requires_grad_() for shape in shapes]


def compare(inputs, span, **options):
    """Forward and backward against the oracle in float64; errors in units of the dtype's precision."""
    dtype = inputs[0].dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = attend(*exact, span, backend="reference", **options)
    actual = attend(*inputs, span, backend="flex", **options)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.device)
    left = torch.autograd.grad((expected * weight).sum(), exact)
    right = torch.autograd.grad((actual * weight.to(dtype)).sum(), inputs)
    for exact_grad, grad in zip(left, right, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, atol=tolerance * max(1, exact_grad.abs().max()), rtol=0)


# Blocks


def dense(counts, indices):
    """[batch, rows, columns] bool, from counts and indices as FlexAttention reads them."""
    assert counts.dtype == indices.dtype == torch.int32
    found = torch.zeros(indices[:, 0].shape, dtype=torch.bool)
    for batch in range(len(found)):
        for row in range(found.shape[1]):
            found[batch, row, indices[batch, 0, row, : counts[batch, 0, row]].long()] = True
    return found


def check_blocks(span, query_len, layout, key_len, size, exact):
    """The blocks hold exactly what `visible_mask` says, by queries and by keys."""
    blocks = flex.blocks_of(span, query_len, key_len, layout, CPU)
    partial, full = dense(*blocks.partial[:2]), dense(*blocks.full[:2])
    assert torch.equal(partial.mT, dense(*blocks.partial[2:]))
    assert torch.equal(full.mT, dense(*blocks.full[2:]))
    assert not (partial & full).any()
    known = Layout(torch.zeros(1, key_len, dtype=torch.long), ()) if layout is None else layout
    visible = visible_mask(span, query_len, known)
    rows, columns = partial.shape[1:]
    wide = torch.zeros(len(visible), rows * size, columns * size, dtype=torch.bool)
    wide[:, :query_len, :key_len] = visible
    wide = wide.view(len(visible), rows, size, columns, size)
    some, every = wide.any(-1).any(2), wide.all(-1).all(2)
    assert not (some & ~(partial | full)).any()
    assert not (full & ~every).any()
    if exact:
        assert torch.equal(partial | full, some)
        assert torch.equal(full, every)


@settings(deadline=None, max_examples=300)
@given(spans, st.integers(1, 5), st.integers(1, 60), st.data())
def test_blocks_hold_what_the_span_shows(span, size, key_len, data):
    query_len = data.draw(st.integers(1, key_len))
    kind = data.draw(st.sampled_from(["plain", "packed", "ends", "holes"]))
    token = st.lists(st.lists(st.integers(0, 2), min_size=key_len, max_size=key_len), min_size=2, max_size=2)
    documents = mask = None
    if kind != "plain":
        documents = torch.tensor(data.draw(token)).sort(-1)[0]
    if kind == "ends":
        left, right = (data.draw(st.integers(0, key_len // 2)) for _ in range(2))
        mask = torch.ones(2, key_len)
        mask[0, :left] = mask[1, key_len - right :] = 0
    if kind == "holes":
        mask = (torch.tensor(data.draw(token)) > 0).long()
    layout = Layout.of(mask, documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", size)
        flex._plain_blocks.cache_clear()
        check_blocks(span, query_len, layout, key_len, size, exact=kind in ("plain", "packed"))


@pytest.mark.parametrize("span", [WindowSpan(9, 3), WindowSpan(5), BlockSpan(6, 1)])
def test_keys_out_of_a_cache_that_has_dropped_some(span, monkeypatch):
    """Layouts with `skipped`, as SpanCache makes them for prompts in chunks with rows of different lengths."""
    monkeypatch.setattr(flex, "BLOCK", 4)
    real = torch.ones(2, 61, dtype=torch.long)
    real[0, :17] = 0
    real[1, 20:23] = 0
    cache = SpanCache(PLAN)
    layer = cache.layers[0]
    layer.span = span
    layouts = []
    for start, stop in ((0, 30), (30, 47), (47, 61)):
        cache.begin(2, stop - start, real[:, :stop])
        new = torch.randn(2, 1, stop - start, 8, dtype=torch.float64)
        key, value = layer.update(new, new, cache._step)
        for other in cache.layers[1:]:
            other.update(new, new, cache._step)
        layout = layer.view(cache._step).layout
        layouts.append(layout)
        query = torch.randn(2, 2, stop - start, 8, dtype=torch.float64)
        check_blocks(span, stop - start, layout, key.shape[2], 4, exact=False)
        call = Call(query, key, value, span, 0.3, layout)
        expected, actual = Reference().run(call), flex.Flex().run(call)
        torch.testing.assert_close(actual, expected)
    assert any(any(layout.skipped) for layout in layouts if layout.skipped is not None)


def test_layers_share_blocks_and_training_may_use_what_generation_made():
    layout = Layout.of(torch.tensor([[0, 1, 1, 1]]), None)
    with torch.inference_mode():
        made = flex.blocks_of(WindowSpan(2), 4, 4, layout, CPU)
        plain = flex.blocks_of(WindowSpan(2), 4, 4, None, CPU)
    assert flex.blocks_of(WindowSpan(2), 4, 4, layout, CPU) is made
    assert flex.blocks_of(WindowSpan(3), 4, 4, layout, CPU) is not made
    assert flex.blocks_of(WindowSpan(2), 3, 4, layout, CPU) is not made
    assert flex.blocks_of(WindowSpan(2), 4, 4, None, CPU) is plain
    given = [*made.partial, *made.full, *made.tokens, *plain.partial, *plain.full]
    assert not any(tensor.is_inference() for tensor in given)
    assert len(flex._known[layout.documents]) == 3
    before = len(flex._known)
    del layout
    assert len(flex._known) == before - 1


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_of_131072_tokens_never_hold_all_pairs(device):
    device = torch.device(device)
    blocks = flex.blocks_of(WindowSpan(512, 4), 1024, 1024, None, device)  # one-time allocations
    memory = peak_memory(lambda: flex.blocks_of(WindowSpan(512, 4), 131072, 131072, None, device))
    assert memory is None or memory < 2**28  # all pairs would be 2**34
    blocks = flex.blocks_of(WindowSpan(512, 4), 131072, 131072, None, device)
    partial, full = blocks.partial[0].flatten(), blocks.full[0].flatten()
    assert torch.equal(partial[5:].unique().cpu(), torch.tensor([3], dtype=torch.int32))  # both edges, and the sinks
    assert torch.equal(full[5:].unique().cpu(), torch.tensor([3], dtype=torch.int32))


# Results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("span", SPANS)
def test_forward_and_backward_over_many_blocks(span, dtype, device):
    lengths = ((400, 400), (256, 256), (90, 333)) if dtype == torch.bfloat16 else ((400, 400), (90, 333))
    for query_len, key_len in lengths:
        compare(tensors(query_len, key_len, device, dtype, dims=(32, 32)), span)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["left", "right", "holes", "packed", "packed and padded"])
@pytest.mark.parametrize("span", SPANS)
def test_padding_and_packing_over_many_blocks(span, case, device):
    mask = torch.ones(2, 500, dtype=torch.long)
    documents = None
    if case == "left":
        mask[0, :300] = 0
    if case == "right":
        mask[1, 111:] = 0
    if case == "holes":
        mask[0, 130:270] = mask[1, 3:5] = mask[1, 480:] = 0
    if case.startswith("packed"):
        cuts = torch.tensor([[60, 200, 410], [128, 256, 499]])
        documents = (torch.arange(500)[None, :, None] >= cuts[:, None]).sum(-1).to(device)
    if case == "packed and padded":
        mask[0, 450:] = mask[1, :7] = mask[1, 300:340] = 0
    mask = mask.to(device)
    compare(tensors(500, 500, device), span, padding_mask=mask, document_ids=documents)
    compare(tensors(210, 500, device), span, padding_mask=mask, document_ids=documents, softcap=1.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dims", [(80, 80), (8, 8), (96, 32), (128, 64), (256, 256)])
def test_heads_of_any_width(dims, device):
    dtype = torch.float32 if max(dims) < 256 else torch.bfloat16
    compare(tensors(300, 300, device, dtype, heads=(4, 2), dims=dims), WindowSpan(70, 4), scale=0.1)
    compare(tensors(300, 300, device, dtype, heads=(3, 3), dims=dims, batch=1), FullSpan(), softcap=5.0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(device):
    query, key, value = tensors(200, 200, device)
    mask = torch.ones(2, 200, dtype=torch.long, device=device)
    mask[0, :140] = 0
    mask[1] = 0
    out = attend(query, key, value, WindowSpan(30, 2), padding_mask=mask, backend="flex")
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert not out[0, :, :140].any()
    assert not out[1].any()
    for grad in grads:
        assert not grad[1].any()
        assert not grad[0, :, :140].any()
        assert grad.isfinite().all()
        assert grad[0, :, 140:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_dtypes_without_kernels_are_refused_on_cuda(dtype):
    with FakeTensorMode():
        query, key, value = (torch.empty(1, 2, 200, 64, device="cuda", dtype=dtype) for _ in range(3))
        with pytest.raises(MasformerError, match=f"backend flex has no {dtype} on cuda; allowed: float32, bfloat16"):
            attend(query, key, value, WindowSpan(8), backend="flex")


def test_other_devices_are_refused():
    query, key, value = (torch.empty(1, 2, 200, 64, device="meta") for _ in range(3))
    with pytest.raises(MasformerError, match="backend flex runs on cuda and cpu, not on meta; use backend tiled"):
        attend(query, key, value, WindowSpan(8), backend="flex")


# Kernels


def test_where_kernels_are_compiled(monkeypatch):
    monkeypatch.setattr(flex, "_has_cpp_compiler", lambda: True)
    layout = Layout.of(torch.tensor([[0, 1]]), None)

    def is_compiled(query, key, layout=None):
        return flex.is_compiled(Call(query, key, query, FullSpan(), 1.0, layout))

    with FakeTensorMode():
        small, large, double = (
            torch.empty(1, 2, length, 64, dtype=dtype)
            for length, dtype in ((100, torch.float32), (8192, torch.float32), (8192, torch.float64))
        )
        cuda = torch.empty(1, 2, 100, 64, device="cuda", requires_grad=True)
    assert is_compiled(cuda, cuda, layout)
    assert is_compiled(large, large)
    assert not is_compiled(large, large, layout)
    assert not is_compiled(small, small)
    assert not is_compiled(double, double)
    leaf = large.requires_grad_()
    assert not is_compiled(large, leaf)
    with torch.no_grad():
        assert is_compiled(large, leaf)
    monkeypatch.setattr(flex, "_has_cpp_compiler", lambda: False)
    with torch.no_grad():
        assert not is_compiled(large, leaf)


@pytest.fixture(params=DEVICES)
def graphs(request, monkeypatch):
    """The device, and how many kernels were traced so far; on the CPU they are traced, and run as they are."""
    if request.param == "cpu":
        traced = torch.compile(flex._run, backend="eager", fullgraph=True, dynamic=True)
        monkeypatch.setattr(flex, "_compiled", lambda: traced)
        monkeypatch.setattr(flex, "is_compiled", lambda *args: True)
    torch._dynamo.reset()
    counters.clear()
    return request.param, lambda: counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_one_kernel_for_all_lengths(graphs):
    device, traced = graphs
    for length in (300, 301, 517, 200, 129, 1000):
        inputs = tensors(length, length, device)
        expected = attend(*inputs, WindowSpan(40, 4), backend="reference")
        actual = attend(*inputs, WindowSpan(40, 4), backend="flex")
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    assert traced() == 1
    for length in (600, 700, 950, 1111):  # chunks of a prompt
        inputs = tensors(300, length, device)
        expected = attend(*inputs, FullSpan(), backend="reference")
        torch.testing.assert_close(attend(*inputs, FullSpan(), backend="flex"), expected, atol=2e-5, rtol=0)
    assert traced() == 2
    for length in (300, 444, 701):
        mask = torch.ones(2, length, device=device)
        mask[0, :50] = 0
        inputs = tensors(length, length, device)
        expected = attend(*inputs, FullSpan(), padding_mask=mask, backend="reference")
        actual = attend(*inputs, FullSpan(), padding_mask=mask, backend="flex")
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    assert traced() == 3


@torch.no_grad()
def test_many_spans_and_scales_in_one_process(graphs):
    """More kernels than torch compiles for one function by default, each with constants of its own."""
    device, traced = graphs
    inputs = tensors(150, 150, device)
    cases = [(WindowSpan(size), scale, cap) for size in (3, 4, 5) for scale in (0.1, 0.2) for cap in (None, 3.0)]
    for span, scale, softcap in cases:
        options = {"scale": scale, "softcap": softcap}
        expected = attend(*inputs, span, backend="reference", **options)
        torch.testing.assert_close(attend(*inputs, span, backend="flex", **options), expected, atol=2e-5, rtol=0)
    assert traced() == len(cases)


def test_decoding_compiles_nothing_token_by_token(graphs):
    device, traced = graphs
    model = apply_plan(tiny("llama"), PLAN, backend="flex").to(device)
    tokens = torch.randint(3, VOCABULARY, (2, 41), generator=torch.Generator().manual_seed(1)).to(device)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = model.generate(tokens, max_new_tokens=1, **settings)
    before = traced()
    assert before == len(set(PLAN))
    out = model.generate(tokens, max_new_tokens=30, **settings)
    model.generate(out[:, :57], max_new_tokens=20, **settings)
    assert traced() == before
    assert torch.equal(out[:, :42], first)
    with torch.no_grad():
        logits = model(out, use_cache=False).logits[:, 40:-1]
    assert torch.equal(logits.argmax(-1), out[:, 41:])


def test_a_kernel_compiled_on_the_cpu(monkeypatch):
    """The same code that a GPU runs, through inductor's template for CPUs: many blocks, some of them full."""
    if not flex._has_cpp_compiler():
        pytest.skip("needs a C++ compiler and AVX2")
    monkeypatch.setattr(flex, "FEW_SCORES", 0)
    counters.clear()
    for length in (700, 512):
        inputs = tensors(length, length, "cpu")
        expected = attend(*inputs, WindowSpan(300, 4), backend="reference", softcap=2.0)
        with torch.no_grad():
            actual = attend(*inputs, WindowSpan(300, 4), backend="flex", softcap=2.0)
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)
    assert counters["stats"]["unique_graphs"] in (1, 2)


# What `auto` takes


def chosen(span=None, lengths=(512, 512), dtype=torch.bfloat16, dim=64, layout=None, device="cuda", **options):
    with FakeTensorMode():
        query = torch.empty(1, 8, lengths[0], dim, dtype=dtype, device=device)
        key = torch.empty(1, 2, lengths[1], dim, dtype=dtype, device=device)
        return Auto().choose(Call(query, key, key, span or WindowSpan(64), 1.0, layout, **options)).name


@pytest.fixture
def gpu(monkeypatch):
    """What `objection` asks of a GPU; its tensors have no data."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "_is_right", lambda *args: True)
    for module in (flash, flex):
        monkeypatch.setattr(module, "has_triton", lambda: True)
    flash._objection.cache_clear()
    yield monkeypatch
    flash._objection.cache_clear()


def test_what_auto_takes(gpu):
    packed = Layout.of(None, torch.tensor([[0] * 200 + [1] * 312]))
    holes = Layout.of(torch.tensor([[1] * 200 + [0] * 12 + [1] * 300]), None)
    assert chosen() == chosen(dtype=torch.float16) == chosen(lengths=(100, 512)) == "flash"
    assert chosen(lengths=(1, 512)) == "flash"  # torch's own choice plans anew for every length (cuDNN, 50 ms)
    assert chosen(WindowSpan(64, 4)) == chosen(BlockSpan(64, 1)) == chosen(FullSpan()) == "flash"
    assert chosen(layout=packed) == chosen(FullSpan(), layout=packed) == "flash"
    assert chosen(device="cpu") == chosen(device="meta") == "tiled"
    assert chosen(dtype=torch.float32) == chosen(softcap=2.0) == chosen(layout=holes) == "flex"
    assert chosen(dim=320) == chosen(dim=100) == "flex"
    assert chosen(dtype=torch.float64) == chosen(dropout=0.1) == "tiled"
    gpu.setattr(flex, "has_triton", lambda: False)
    assert chosen(softcap=2.0) == "tiled"
    flash._objection.cache_clear()
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu.setattr(flex, "has_triton", lambda: True)
    assert chosen() == "flex"


def test_what_flash_says_of_calls_that_it_cannot_do(gpu):
    def objection(dtype=torch.bfloat16, dim=64, device="cuda", value_dim=None, **options):
        with FakeTensorMode():
            query = torch.empty(1, 4, 20, dim, dtype=dtype, device=device)
            value = torch.empty(1, 4, 20, value_dim or dim, dtype=dtype, device=device)
        return flash.Flash().objection(Call(query, query, value, WindowSpan(4), 1.0, **options))

    assert objection() is None
    assert "takes bfloat16 and float16, not torch.float32" in objection(dtype=torch.float32)
    assert "a multiple of 8 up to 256, not 60 and 60" in objection(dim=60)
    assert "not 64 and 32" in objection(value_dim=32)
    assert "neither dropout on attention weights nor soft caps" in objection(dropout=0.1)
    assert "no padding between the tokens" in objection(
        layout=Layout.of(torch.tensor([[1] * 9 + [0] + [1] * 10]), None)
    )
    flash._objection.cache_clear()
    gpu.setattr(torch.version, "hip", "6.4")
    assert "not on AMD GPUs" in objection()
    flash._objection.cache_clear()
    gpu.setattr(torch.version, "hip", None)
    gpu.setattr(flash, "_is_right", lambda *args: False)
    assert "gives wrong results for window:4 on this GPU" in objection()


# Whole models and memory, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neo"])
def test_a_training_step_in_bfloat16_with_checkpointing(kind):
    """The gradients of a packed and a padded batch come near those of dense attention in float32."""
    tokens = torch.randint(3, VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.cat([torch.arange(170), torch.arange(130)]).expand(2, -1).cuda()
    mask = torch.ones_like(tokens)
    mask[0, :40] = 0
    for given_options in ({"position_ids": positions}, {"attention_mask": mask}):
        grads = []
        for backend in ("reference", "auto"):
            changes = {"max_position_embeddings": 512}
            model = apply_plan(tiny(kind, **changes), PLAN, backend=backend).cuda().train()
            if backend == "auto":
                model.gradient_checkpointing_enable()
            half = backend == "auto"
            context = torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext()
            with context:
                loss = model(tokens, labels=tokens, use_cache=False, **given_options).loss
            loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]).float())
        assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(512, 4), BlockSpan(1024, 1)])
def test_memory_grows_with_the_length_alone(span):
    """Forward and backward at 16384 and 32768 tokens: twice the memory, not four times."""

    def peak(length):
        inputs = tensors(length, length, "cuda", torch.bfloat16, (4, 2), (64, 64), batch=1)
        run = lambda: attend(*inputs, span, backend="flex").sum().backward()  # noqa: E731
        run()
        for tensor in inputs:
            tensor.grad = None
        return peak_memory(run)

    short, long = peak(16384), peak(32768)
    assert long < 2.2 * short
    assert long < 2**28  # all scores would be 8 GiB
