"""Constant sinks: every backend, forward and backward, against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aten_flash
from masformer import BlockSpan, FullSpan, MasformerError, WindowSpan, attend
from masformer.attention import BACKENDS, ConstantSinks, constant
from masformer.attention.call import Call
from masformer.attention.layout import Layout
from masformer.attention.reference import Reference, visible_mask
from masformer.attention.stored import attend_stored
from masformer.attention.tiled import Tiled
from masformer.spans import UnitSpans
from strategies import constant_spans


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    library = aten_flash.register()
    yield
    library._destroy()


def inputs_of(batch, heads, group, query_len, key_len, dim=4, value_dim=4, dtype=torch.float64, with_value=True):
    """Query, key and value, and logit and value of the sinks."""
    make = torch.Generator().manual_seed(key_len * 31 + query_len)
    shapes = [(batch, heads * group, query_len, dim), (batch, heads, key_len, dim), (batch, heads, key_len, value_dim)]
    shapes += [(heads * group,), (heads, value_dim)][: 1 + with_value]
    return [torch.randn(shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_formula(query, key, value, logit, u, span, scale, layout, softcap=None):
    """exp(c) beside the exponentials of the visible scores, written out."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if layout is None:
        layout = Layout(torch.zeros(key.shape[0], key.shape[2], dtype=torch.long), ())
    seen = visible_mask(span, query.shape[2], layout)[:, None]
    weights = scores.exp() * seen
    sink = logit.exp()[:, None, None].expand_as(weights[..., :1])
    total = weights.sum(-1, keepdim=True) + sink
    out = weights / total @ value.repeat_interleave(group, 1)
    if u is not None:
        out = out + sink / total * u.repeat_interleave(group, 0)[:, None]
    return out * seen.any(-1, keepdim=True)


def grads(out, inputs):
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True, allow_unused=True)


def drawn_layout(data, batch, key_len, holes=True):
    mask = documents = None
    token = st.lists(st.lists(st.integers(0, 2), min_size=key_len, max_size=key_len), min_size=batch, max_size=batch)
    if data.draw(st.booleans()):
        mask = (torch.tensor(data.draw(token)) > 0).long()
        if not holes:
            mask = mask.sort(-1)[0]
    if data.draw(st.booleans()):
        documents = torch.tensor(data.draw(token)).sort(-1)[0]
    return Layout.of(mask, documents)


@pytest.mark.parametrize("backend", ["reference", "tiled", "flex", "flash"])
@settings(deadline=None, max_examples=60)
@given(constant_spans | st.just(FullSpan()), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.data())
def test_every_backend_is_the_formula_forward_and_backward(backend, span, batch, heads, group, data):
    key_len = data.draw(st.integers(1, 50))
    alone = backend == "flash"  # it has no gradients after a past for every span
    query_len = key_len if alone else data.draw(st.integers(1, key_len))
    layout = drawn_layout(data, batch, key_len, holes=not alone)
    softcap = None if alone else data.draw(st.none() | st.just(1.5))
    inputs = inputs_of(batch, heads, group, query_len, key_len, with_value=data.draw(st.booleans()))
    given_value = inputs[4] if len(inputs) == 5 else None
    expected = by_formula(*inputs[:4], given_value, span, 0.6, layout, softcap)
    chosen = Tiled(data.draw(st.integers(1, 9))) if backend == "tiled" else BACKENDS[backend]
    call = Call(*inputs[:3], span, 0.6, layout, 0.0, softcap, ConstantSinks(*inputs[3:]))
    with torch.no_grad():
        torch.testing.assert_close(call.run(chosen), expected, atol=1e-12, rtol=0)
    actual = call.run(chosen)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(grads(actual, inputs), grads(expected, inputs), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("trained", [(3,), (4,), (3, 4), (0,)])
@pytest.mark.parametrize("backend", ["tiled", "flex", "flash"])
def test_the_weights_of_sinks_train_alone(backend, trained):
    inputs = [x.detach() for x in inputs_of(2, 2, 3, 31, 31)]
    for index in trained:
        inputs[index].requires_grad_()
    wanted = [inputs[index] for index in trained]
    span = WindowSpan(7, constant_sink=True)
    expected = by_formula(*inputs, span, 0.6, None)
    actual = Call(*inputs[:3], span, 0.6, sinks=ConstantSinks(*inputs[3:])).run(BACKENDS[backend])
    torch.testing.assert_close(grads(actual, wanted), grads(expected, wanted), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("backend", ["tiled", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [WindowSpan(100, 0, True), WindowSpan(70, 4, True), BlockSpan(64, 1, True)])
def test_past_the_tile_in_single_and_half_precision(span, dtype, backend):
    inputs = inputs_of(2, 1, 3, 401, 401, 16, 16, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_formula(*exact, span, 0.25, None)
    actual = attend(*inputs[:3], span, scale=0.25, sinks=ConstantSinks(*inputs[3:]), backend=backend)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)
    for found, wanted in zip(grads(actual, inputs), grads(expected, exact), strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=5 * tolerance * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("backend", ["tiled", "flex"])
@pytest.mark.parametrize("value_dim", [3, 16])
def test_values_of_any_width_after_a_past(value_dim, backend):
    inputs = inputs_of(2, 2, 3, 60, 111, 16, value_dim)
    span = WindowSpan(9, constant_sink=True)
    expected = by_formula(*inputs, span, 0.25, None)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            actual = attend(*inputs[:3], span, scale=0.25, sinks=ConstantSinks(*inputs[3:]), backend=backend)
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_units_have_the_sinks_that_their_span_says():
    query, key, value, logit, u = inputs_of(2, 3, 2, 40, 40)
    spans = UnitSpans((WindowSpan(5, constant_sink=True), FullSpan(), WindowSpan(9, constant_sink=True)))
    whole = attend(query, key, value, spans, sinks=ConstantSinks(logit, u))
    found = grads(whole, [logit, u])
    for head, span in enumerate(spans.spans):
        two, one = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        own = ConstantSinks(logit[two], u[one]) if span.constant_sink else None
        alone = attend(query[:, two], key[:, one], value[:, one], span, sinks=own, backend="reference")
        torch.testing.assert_close(whole[:, two], alone, atol=1e-12, rtol=0)
    assert not found[0][2:4].any()
    assert not found[1][1].any()
    assert bool(found[0][:2].all() and found[0][4:].all())
    own = attend(query, key, value, spans, sinks=ConstantSinks(logit, None, always=True))
    expected = by_formula(query[:, 2:4], key[:, 1:2], value[:, 1:2], logit[2:4], None, FullSpan(), 0.5, None)
    torch.testing.assert_close(own[:, 2:4], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("hidden", [False, True])
def test_one_query_over_stored_keys(hidden, backend, softcap):
    query, key, value, logit, u = inputs_of(2, 2, 3, 1, 40)
    visible = (torch.rand(2, 1, 1, 40, generator=torch.Generator().manual_seed(0)) > 0.5) if hidden else None
    seen = torch.ones(1, dtype=torch.bool) if visible is None else visible
    sinks = ConstantSinks(logit, u)
    with torch.no_grad():
        actual = attend_stored(query, key, value, visible, scale=0.5, softcap=softcap, sinks=sinks, backend=backend)
        scores = query @ key.repeat_interleave(3, 1).mT * 0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.exp() * seen
        sink = logit.exp()[:, None, None]
        expected = weights @ value.repeat_interleave(3, 1) + sink * u.repeat_interleave(3, 0)[:, None]
        torch.testing.assert_close(actual, expected / (weights.sum(-1, keepdim=True) + sink), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_dropout_takes_no_sink(backend):
    query, key, value, logit, u = (x.detach() for x in inputs_of(1, 2, 2, 20, 20))
    sinks = ConstantSinks(torch.full_like(logit, 50.0), u)  # the whole share
    out = attend(query, key, value, WindowSpan(4, constant_sink=True), sinks=sinks, dropout=0.5, backend=backend)
    torch.testing.assert_close(out, u.repeat_interleave(2, 0)[None, :, None].expand_as(out), atol=1e-9, rtol=0)


@pytest.mark.parametrize("with_value", [True, False])
@pytest.mark.parametrize("span", [WindowSpan(5, 2, True), BlockSpan(6, 1, True)])
def test_the_operator_of_compiled_models(span, with_value):
    torch._dynamo.reset()
    inputs = inputs_of(2, 2, 2, 23, 23, with_value=with_value)
    sinks = ConstantSinks(*inputs[3:])
    run = torch.compile(lambda q, k, v, s: attend(q, k, v, span, sinks=s), backend="aot_eager", fullgraph=True)
    expected = attend(*inputs[:3], span, sinks=sinks, backend="reference")
    actual = run(*inputs[:3], sinks)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(grads(actual, inputs), grads(expected, inputs), atol=1e-11, rtol=1e-11)


def test_under_autocast_logits_stay_exact():
    inputs = inputs_of(1, 1, 2, 50, 50, 16, 16, torch.float32)
    inputs[3] = (inputs[3].detach() + 20).requires_grad_()
    sinks = ConstantSinks(*inputs[3:])
    span = WindowSpan(9, constant_sink=True)
    expected = attend(*inputs[:3], span, sinks=sinks, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        actual = attend(*inputs[:3], span, sinks=sinks)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=3e-2, rtol=0)


def test_a_sink_of_no_weight_changes_nothing_and_has_no_gradient():
    query, key, value, logit, u = inputs_of(1, 2, 2, 20, 20)
    none = torch.full_like(logit, -torch.inf).requires_grad_()
    span = WindowSpan(4, constant_sink=True)
    for backend in ("reference", "tiled", "flex"):
        out = attend(query, key, value, span, sinks=ConstantSinks(none, u), backend=backend)
        torch.testing.assert_close(out, attend(query, key, value, WindowSpan(4)), atol=1e-12, rtol=0)
        assert not any(bool(grad.any()) for grad in grads(out, [none, u]))


@pytest.mark.parametrize(
    ("span", "sinks", "message"),
    [
        ("window:4+sink", None, "window:4+sink has a constant sink, but its weights are missing"),
        ("block:4+sink", None, "block:4+sink has a constant sink, but its weights are missing"),
        ("window:4", ConstantSinks(torch.zeros(4)), "constant sinks are given, but window:4 has none"),
        (UnitSpans((FullSpan(), WindowSpan(4))), ConstantSinks(torch.zeros(4)), "but full,window:4 has none"),
        ("window:4+sink", ConstantSinks(torch.zeros(2)), "the logit of constant sinks must be [4], got [2]"),
        ("window:4+sink", ConstantSinks(torch.zeros(4), torch.zeros(4, 8)), "value of constant sinks must be [2, 8]"),
    ],
)
def test_what_does_not_go_together_is_named(span, sinks, message):
    query, key = torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 9, 8)
    with pytest.raises(MasformerError) as error:
        attend(query, key, key, span, sinks=sinks)
    assert message in str(error.value)


def test_the_backward_pass_is_exact_with_what_is_joined():
    query, key, value, logit, u = inputs_of(1, 1, 1, 9, 9)
    span = WindowSpan(4, constant_sink=True)
    out = Reference().run(Call(query, key, value, span, 0.5, sinks=ConstantSinks(logit, u)))
    scores = (query @ key.mT * 0.5).masked_fill(
        ~visible_mask(span, 9, Layout(torch.zeros(1, 9).long(), ())), -torch.inf
    )
    total = torch.logaddexp(scores.logsumexp(-1), logit)
    of_logit, of_u = constant.gradients(torch.ones_like(out), out, total, logit, u[:, None])
    exact = torch.autograd.grad(out.sum(), [logit, u])
    torch.testing.assert_close((of_logit.sum(), of_u.sum((0, 2))), (exact[0][0], exact[1]), atol=1e-12, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "flex", "tiled"])
@pytest.mark.parametrize("span", [WindowSpan(100, 0, True), WindowSpan(70, 4, True), BlockSpan(64, 1, True)])
def test_kernels_on_a_gpu_against_float64(span, backend):
    cuts = torch.tensor([[60, 200, 410], [128, 256, 499]])
    packed = (torch.arange(500)[None, :, None] >= cuts[:, None]).sum(-1).cuda()
    inputs = [x.detach().cuda().requires_grad_() for x in inputs_of(2, 2, 3, 500, 500, 64, 64, torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for options in ({}, {"document_ids": packed}):
        found = []
        for tensors, name in ((exact, "reference"), (inputs, backend)):
            out = attend(*tensors[:3], span, sinks=ConstantSinks(*tensors[3:]), backend=name, **options)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
            found.append((out, *torch.autograd.grad((out * weight).sum(), tensors)))
        for wanted, actual in zip(*found, strict=True):
            assert (actual.double() - wanted).norm() / wanted.norm() < 1e-2
