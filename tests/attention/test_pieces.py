"""Pieces of full attention, joined by their log-sum-exps: dense attention and its gradients."""

import random

import pytest
import torch

import aten_flash
from masformer import FullSpan, MasformerError, attend
from masformer.attention import Layout, flash
from masformer.attention.call import Call
from masformer.attention.pieces import attend_piece, piece_gradients
from masformer.attention.tiled import joined


@pytest.fixture
def kernels(monkeypatch):
    """FlashAttention by its stand-in, on the CPU."""
    library = aten_flash.register()
    monkeypatch.setattr(flash, "_objection", lambda *given: None)
    monkeypatch.setattr(flash, "_is_right", lambda *given: True)
    yield
    library._destroy()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", ["flash", "tiled"])
def test_a_rectangle_and_a_triangle_together_are_causal_attention(seed, backend, kernels):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    rows, kv_heads, group = choose.choice([1, 2]), choose.choice([1, 2]), choose.choice([1, 3])
    wide = 4 if backend == "flash" else choose.choice([4, 6])
    softcap = choose.choice([None, 2.0]) if backend == "tiled" else None
    past, length = choose.choice([1, 5, 150]), choose.choice([1, 6, 140])
    sizes = (kv_heads * group, length, 4), (kv_heads, past + length, 4), (kv_heads, past + length, wide)
    query, key, value = inputs = [torch.randn(rows, *size, dtype=torch.double, requires_grad=True) for size in sizes]
    expected = attend(*inputs, "full", scale=0.7, softcap=softcap, backend="reference")
    grad = torch.randn_like(expected)
    parts = [(slice(0, past), False), (slice(past, past + length), True)]
    calls = [
        (
            Call(query.detach(), key.detach()[:, :, at], value.detach()[:, :, at], FullSpan(), 0.7, softcap=softcap),
            causal,
        )
        for at, causal in parts
    ]
    (left, left_sums), (right, right_sums) = [attend_piece(*call, backend) for call in calls]
    out, sums = joined(left, left_sums, right, right_sums), torch.logaddexp(left_sums, right_sums)
    found = [piece_gradients(*call, grad, out, sums, backend) for call in calls]
    of_query = found[0][0] + found[1][0]
    of_key, of_value = (torch.cat([each[number] for each in found], 2) for number in (1, 2))
    mine = out, of_query, of_key, of_value
    for one, two in zip(mine, (expected, *torch.autograd.grad(expected, inputs, grad)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["flash", "tiled"])
@pytest.mark.parametrize("documents", [[[0] * 4 + [1] * 5, [-1] * 3 + [0] * 6], [[0] * 3 + [1] * 3 + [2] * 3] * 2])
def test_a_triangle_of_documents_is_each_of_them_alone(backend, documents, kernels):
    torch.manual_seed(0)
    layout = Layout.known(torch.tensor(documents))
    inputs = [torch.randn(2, heads, 9, 4, dtype=torch.double, requires_grad=True) for heads in (2, 1, 1)]
    expected = attend(*inputs, "full", layout=layout, backend="reference")
    real = (layout.documents >= 0)[:, None, :, None]
    grad = torch.randn_like(expected) * real
    call = Call(*(x.detach() for x in inputs), FullSpan(), 0.5, layout)
    out, sums = attend_piece(call, True, backend)
    assert bool(sums.isfinite().all())
    grads = piece_gradients(call, True, grad, out, sums, backend)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    for one, two in zip((out * real, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


def test_backends_that_cannot_are_named():
    call = Call(*(torch.zeros(1, 1, 2, 4) for _ in range(3)), FullSpan(), 0.5)
    with pytest.raises(MasformerError, match=r"backend flex does not compute full heads in pieces.*auto, flash, tiled"):
        attend_piece(call, True, "flex")
    with pytest.raises(MasformerError, match="backend flash runs on NVIDIA GPUs, not on cpu"):
        attend_piece(call, True, "flash")
