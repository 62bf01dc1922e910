"""Constant sinks by least squares."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from masformer import AttentionPlan, MasformerError, WindowSpan, apply_plan, attend, fit_sinks
from masformer.attention import ConstantSinks
from masformer.fitting import FIRST, FIRST_WEIGHT, with_first_tokens
from masformer.models.bridge import attending_by
from masformer.models.sinks import by_layer, is_sink, named_sinks, sink_layers
from tiny import letter_tokenizer, tiny

LETTERS = [chr(97 + number) for number in range(26)] + [" "]
TOKENIZER = letter_tokenizer(LETTERS)
TEXTS = ["the quick brown fox jumps over the lazy dog " * 3, "too short", "sphinx of black quartz judge my vow " * 4]
LENGTH = 48
ROWS = [TOKENIZER(TEXTS[number])["input_ids"][:LENGTH] for number in (0, 2)]


def misses(model, plan, layer, sinks):
    """By the oracle, in float64: how far constants leave a layer from what it gives with first tokens, as a sum of
    squares over the queries of both texts, of which that of the first token has a weight."""
    seen = []

    def note(number, query, key, value, span, *, sinks, scale, softcap=None, **options):
        if number == layer:
            seen.append(([x.double() for x in (query, key, value)], {"scale": scale, "softcap": softcap}))
        return attend(query, key, value, span, scale=scale, softcap=softcap, **options)

    beside = with_first_tokens(plan)
    apply_plan(model, beside)
    with torch.no_grad(), attending_by(model, note):
        for row in ROWS:
            model.base_model(torch.tensor([row]), use_cache=False)
    alone = beside.changed(lambda span: WindowSpan(span.size, constant_sink=True) if span.sinks == FIRST else span)
    total = torch.zeros((), dtype=torch.float64)
    for tensors, options in seen:
        options["backend"] = "reference"
        wanted = attend(*tensors, beside.layers[layer], **options)
        miss = (attend(*tensors, alone.layers[layer], sinks=sinks, **options) - wanted).square().sum((0, 1, 3))
        total = total + miss[0] * FIRST_WEIGHT * LENGTH + miss[1:].sum()
    return total


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llama", "full@1; window:6+sink"),
        ("gemma2", "window:6+sink,full,block:5x2+sink,window:6+2"),
        ("gpt2", "full@1,2:0,3; window:6+sink"),
    ],
)
def test_the_constants_are_the_nearest_to_first_tokens(kind, text):
    model = tiny(kind, initializer_range=0.4)
    plan = AttentionPlan.parse(text, 4, 4 if kind == "gpt2" else 2)
    fit_sinks(model, TOKENIZER, TEXTS, plan, length=LENGTH)
    assert model.config.masformer["plan"] == str(plan)
    found = by_layer({name: weight.detach().double() for name, weight in named_sinks(model)})
    assert list(found) == sink_layers(plan)
    for layer, sinks in found.items():
        least = misses(model, plan, layer, sinks)
        assert least < misses(model, plan, layer, ConstantSinks(sinks.logit - 1e4, sinks.value))
        for name, tensor in zip(("logit", "value"), sinks.tensors, strict=True):
            for step in (0.1, -0.1):
                for place in range(tensor.numel()):
                    moved = tensor.clone()
                    moved.view(-1)[place] += step
                    assert misses(model, plan, layer, replace(sinks, **{name: moved})) > least * (1 - 1e-3)


def test_every_other_text_begins_as_evaluation_begins_it():
    model, seen = tiny("llama"), []
    tokenizer = letter_tokenizer([*LETTERS, "<s>"], bos_token="<s>")
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    fit_sinks(model, tokenizer, TEXTS, "window:6+sink", length=LENGTH)
    hook.remove()
    assert seen[0].tolist() == [ROWS[0], [tokenizer.bos_token_id, *ROWS[1][:-1]]]


def divergence(model, plan):
    """Of the predictions past the window from those with the first tokens."""
    tokens = torch.tensor([TOKENIZER(TEXTS[0])["input_ids"][:LENGTH]])
    found = []
    for each in (plan, with_first_tokens(AttentionPlan.parse("window:6+sink", 4))):
        with torch.no_grad():
            found.append(apply_plan(model, each)(tokens, use_cache=False).logits[0, 10:].log_softmax(-1))
    return torch.nn.functional.kl_div(*found, reduction="batchmean", log_target=True).item()


def test_they_come_nearer_to_the_first_tokens_than_windows_alone_and_nothing_else_changes():
    model = tiny("llama", initializer_range=0.4)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    without = divergence(model, "window:6")
    fit_sinks(model.train(), TOKENIZER, TEXTS, "window:6+sink", length=LENGTH)
    assert model.training
    assert divergence(model.eval(), "window:6+sink") < without
    apply_plan(model, "window:6+sink")
    for name, weight in model.named_parameters():
        assert weight.requires_grad
        assert is_sink(name) or torch.equal(weight, before[name])


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ("window:6", {}, "the plan window:6 has no constant sink to fit; allowed: spans like window:512+sink"),
        ("window:6+2+sink", {}, "window:6+2+sink keeps first tokens, so there is nothing to fit in their place"),
        ("window:60+sink", {}, "length must be at least 65, got 48"),
        ("window:6+sink", {"length": 4096}, "length must be at most 128, got 4096"),
        ("window:6+sink", {"length": 128, "texts": ["abc"]}, "none of the 1 texts has 128 tokens; give longer ones"),
        ("window:6+sink", {"windows": 0}, "windows must be at least 1"),
    ],
)
def test_wrong_values_are_named_and_leave_the_model_as_it_was(plan, options, message):
    model = apply_plan(tiny("llama"), "full")
    with pytest.raises(MasformerError) as error:
        fit_sinks(model, TOKENIZER, plan=plan, **({"texts": TEXTS, "length": LENGTH} | options))
    assert message in str(error.value)
    assert not list(named_sinks(model))
    assert model.config.masformer["plan"] == "full"


def test_models_with_sinks_of_their_own_have_nothing_to_fit():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 61, "layer_types": ["full_attention"] * 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite_swa", **shape))
    with pytest.raises(MasformerError, match=r"in layers \[0, 1\], which have sinks of their own"):
        fit_sinks(model, TOKENIZER, TEXTS, "window:6+sink", length=LENGTH)
    assert not list(named_sinks(model))
