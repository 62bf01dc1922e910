"""Constant sinks in closed form, and trained alone."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from masformer import AttentionPlan, MasformerError, apply_plan, attend, fit_sinks
from masformer.fitting import FIRST, with_first_tokens
from masformer.models.bridge import attending_by
from masformer.models.sinks import is_sink, named_sinks
from tiny import letter_tokenizer, tiny

LETTERS = [chr(97 + number) for number in range(26)] + [" "]
TOKENIZER = letter_tokenizer(LETTERS)
TEXTS = ["the quick brown fox jumps over the lazy dog " * 3, "too short", "sphinx of black quartz judge my vow " * 4]
LENGTH = 48


def by_hand(model, plan, layer, start):
    """Loops over what a layer is given under the plan with first tokens: logits by query head, values by KV head."""
    seen = []

    def note(number, query, key, value, span, *, sinks, scale, softcap=None, **options):
        if number == layer:
            seen.append((query[0].tolist(), key[0].tolist(), value[0].tolist(), scale, softcap))
        return attend(query, key, value, span, scale=scale, softcap=softcap, **options)

    apply_plan(model, with_first_tokens(plan))
    with torch.no_grad(), attending_by(model, note):
        for text in (TEXTS[0], TEXTS[2]):
            model.base_model(torch.tensor([TOKENIZER(text)["input_ids"][:LENGTH]]), use_cache=False)
    query, key, value, scale, softcap = seen[0]
    heads, kv_heads, dim = len(query), len(key), len(value[0][0])
    logits, values = [0.0] * heads, [[0.0] * dim for _ in range(kv_heads)]
    for query, key, value, *_ in seen:
        count = len(query[0]) - start
        for head in range(heads):
            own = head * kv_heads // heads
            shares = [0.0] * FIRST
            for q in query[head][start:]:
                scores = [scale * sum(a * b for a, b in zip(q, k, strict=True)) for k in key[own][:FIRST]]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                total = sum(math.exp(score) for score in scores)
                logits[head] += math.log(total) / count / len(seen)
                shares = [share + math.exp(s) / total / count for share, s in zip(shares, scores, strict=True)]
            for share, v in zip(shares, value[own], strict=False):
                for index in range(dim):
                    values[own][index] += share * v[index] * kv_heads / heads / len(seen)
    return torch.tensor(logits), torch.tensor(values)


@pytest.mark.parametrize(
    ("kind", "text", "starts"),
    [
        ("llama", "full@1; window:6+sink", {0: 10, 2: 10, 3: 10}),
        ("gemma2", "window:6+sink,full,block:5x2+sink,window:6+2", {0: 10, 2: 14}),
        ("gpt2", "full@1,2:0,3; window:6+sink", {0: 10, 2: 10}),
    ],
)
def test_the_closed_form_is_the_formula(kind, text, starts):
    model = tiny(kind)
    plan = AttentionPlan.parse(text, 4, 4 if kind == "gpt2" else 2)
    fit_sinks(model, TOKENIZER, TEXTS, plan, length=LENGTH)
    assert model.config.masformer["plan"] == str(plan)
    found = {name: weight.detach().clone() for name, weight in named_sinks(model)}
    assert len(found) == 2 * len(starts)
    for layer, start in starts.items():
        logit, value = by_hand(model, plan, layer, start)
        mine = [weight for name, weight in found.items() if f".{layer}." in name]
        torch.testing.assert_close(mine, [logit, value], atol=1e-5, rtol=1e-4)


def divergence(model, plan):
    """Of the predictions past the window from those with the first tokens."""
    tokens = torch.tensor([TOKENIZER(TEXTS[0])["input_ids"][:LENGTH]])
    found = []
    for each in (plan, with_first_tokens(AttentionPlan.parse("window:6+sink", 4))):
        with torch.no_grad():
            found.append(apply_plan(model, each)(tokens, use_cache=False).logits[0, 10:].log_softmax(-1))
    return torch.nn.functional.kl_div(*found, reduction="batchmean", log_target=True).item()


def test_training_the_constants_alone_comes_nearer_to_the_first_tokens():
    model = tiny("llama", initializer_range=0.4)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    without = divergence(model, "window:6")
    fit_sinks(model, TOKENIZER, TEXTS, "window:6+sink", length=LENGTH)
    closed = divergence(model, "window:6+sink")
    fit_sinks(model.train(), TOKENIZER, TEXTS, "window:6+sink", length=LENGTH, steps=30)
    assert model.training
    trained = divergence(model.eval(), "window:6+sink")
    assert trained < closed < without
    apply_plan(model, "window:6+sink")
    for name, weight in model.named_parameters():
        assert weight.requires_grad
        assert weight.grad is None
        assert is_sink(name) or torch.equal(weight, before[name])


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ("window:6", {}, "the plan window:6 has no constant sink to fit; allowed: spans like window:512+sink"),
        ("window:6+2+sink", {}, "window:6+2+sink keeps first tokens, so there is nothing to fit in their place"),
        ("window:60+sink", {}, "length must be at least 65, got 48"),
        ("window:6+sink", {"length": 4096}, "length must be at most 128, got 4096"),
        ("window:6+sink", {"length": 128, "texts": ["abc"]}, "none of the 1 texts has 128 tokens; give longer ones"),
        ("window:6+sink", {"steps": -1}, "steps must be at least 0"),
        ("window:6+sink", {"rate": 0.0}, "rate must be above 0"),
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
