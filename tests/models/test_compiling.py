"""Compiled layers are traced here and run as they are: whole graphs, few of them, the same figures."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from masformer import AttentionPlan, BlockSpan, FullSpan, MasformerError, WindowSpan, apply_plan
from masformer.models.compiling import compile_layers, is_compiled
from tiny import ARCHITECTURES, VOCABULARY, tiny

TWO_SPANS = AttentionPlan((FullSpan(), WindowSpan(5, 2), WindowSpan(5, 2), FullSpan()))
TOKENS = torch.randint(3, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(1))
PACKED = torch.cat([torch.arange(14), torch.arange(9)]).expand(2, -1)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Graphs without kernels: compiling those takes minutes, and they are not ours."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model, **options):
    model.zero_grad()
    out = model(TOKENS, labels=TOKENS, use_cache=False, **options)
    out.loss.backward()
    return out.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_graph_break_one_graph_for_each_span_and_the_same_figures(kind):
    model = apply_plan(tiny(kind), TWO_SPANS).train()
    options = {"position_ids": PACKED} if kind in ("qwen2", "gpt_neox") else {}
    expected = step(model, **options)
    assert not is_compiled(model)
    compile_layers(compile_layers(model))
    assert is_compiled(model)
    actual = step(model, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert not counters["graph_break"]
    own_kinds = 2 if kind == "smollm3" else 1  # layers with and without positions
    assert counters["stats"]["unique_graphs"] <= 1 + own_kinds


def test_heads_with_spans_of_their_own_are_compiled_as_well():
    model = apply_plan(tiny("llama"), "full@0:0,2; window:5+2@1:1; block:4").train()
    expected = step(model)
    torch.testing.assert_close(step(compile_layers(model)), expected, atol=1e-5, rtol=0)
    assert not counters["graph_break"]


def test_other_lengths_padding_and_checkpointing_stay_within_a_few_graphs():
    model = apply_plan(tiny("llama"), TWO_SPANS).train()
    compile_layers(model)
    model.gradient_checkpointing_enable()
    mask = torch.ones_like(TOKENS)
    mask[0, :6] = 0
    plain = apply_plan(tiny("llama"), TWO_SPANS).train()
    for length in (23, 17, 11):
        for given in ({}, {"attention_mask": mask[:, :length]}):
            tokens = TOKENS[:, :length]
            expected, actual = (each(tokens, labels=tokens, use_cache=False, **given) for each in (plain, model))
            torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=0)
            actual.loss.backward()
    assert counters["stats"]["unique_graphs"] <= 8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_that_are_all_padding_have_the_gradients_they_have_uncompiled(checkpointing):
    grads = []
    for compiled in (False, True):
        model = apply_plan(tiny("llama"), TWO_SPANS).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if compiled:
            compile_layers(model)
        for real in (0, 1):  # the batch, or one row of it
            mask = torch.ones(2, 11, dtype=torch.long)
            mask[real:] = 0
            model(TOKENS[:1, :11].expand(2, -1), attention_mask=mask, use_cache=False).logits.pow(2).sum().backward()
        grads.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_generation_goes_on_as_before():
    model = apply_plan(tiny("llama"), TWO_SPANS)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(TOKENS, **options)
    assert torch.equal(compile_layers(model).generate(TOKENS, **options), expected)
    assert not counters["stats"]["unique_graphs"]


def test_a_layer_that_leaves_its_plan_is_found_out_when_compiled_too():
    model = compile_layers(apply_plan(tiny("llama"), TWO_SPANS))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
        model.config._attn_implementation = "sdpa"
        with pytest.raises(MasformerError, match="set to 'sdpa', which follows no plan"):
            model(TOKENS, use_cache=False)


def test_a_copy_has_weights_of_its_own():
    model = compile_layers(apply_plan(tiny("llama"), TWO_SPANS))
    other = copy.deepcopy(model)
    assert not is_compiled(other)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(other(TOKENS, use_cache=False).logits, expected)
    assert pickle.dumps(model.state_dict())


def in_place(model):
    model.compile()
    return model


def in_its_forward(model):
    model.forward = torch.compile(model.forward)
    return model


MASK = torch.ones_like(TOKENS)
MASK[0, :6] = 0
MIXED = AttentionPlan((FullSpan(), WindowSpan(5, 2), BlockSpan(6), WindowSpan(40)))


def as_a_call(model):
    return torch.compile(model)


WAYS = [as_a_call, in_place, in_its_forward]
ALL_FULL = AttentionPlan.uniform(4, FullSpan())


@pytest.mark.parametrize(
    ("kind", "whole", "plan"),
    [
        *(("llama", way, MIXED) for way in WAYS),
        *((kind, as_a_call, ALL_FULL) for kind in ("llama", "gpt_neo")),
        ("gpt_neo", as_a_call, MIXED),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_model_that_torch_compiles_as_a_whole_keeps_its_plan_and_its_cache(kind, whole, plan):
    plain, model = apply_plan(tiny(kind), plan), whole(apply_plan(tiny(kind), plan))
    expected, actual = step(plain), step(model)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    for given in ({}, {"attention_mask": MASK}, {"position_ids": PACKED, "use_cache": False}):
        expected, actual = plain(TOKENS, **given).logits, model(TOKENS, **given).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected, actual = (each.generate(TOKENS, attention_mask=MASK, **options) for each in (plain, model))
    assert torch.equal(actual, expected)


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(MasformerError, match="the model has no plan; call apply_plan first"):
        compile_layers(tiny("llama"))
    with pytest.raises(MasformerError, match=r"the model's attention_dropout is 0.1; set it to 0, or do not compile"):
        compile_layers(apply_plan(tiny("llama", attention_dropout=0.1), TWO_SPANS))
