import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from masformer import AttentionPlan, FullSpan, MasformerError, apply_plan, load_model, save_model
from masformer.models.checkpoint import load_tokenizer
from masformer.models.positions import (
    ROTARY_METHODS,
    TABLE_METHODS,
    extend_positions,
    parse_max_positions,
    position_limit,
)
from tiny import PLAN, VOCABULARY, letter_tokenizer, tiny

TRAINED, LONGER = 32, 80
FACTOR = LONGER / TRAINED
TOKENS = torch.arange(3, 3 + LONGER)[None] % VOCABULARY
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED // 2,
}
CHANGES = {
    "gpt_neox": {"hidden_size": 64},  # a quarter of each head's 16 dimensions is rotary
    "gemma3_text": {"layer_types": LAYER_TYPES},
    "olmo3": {"layer_types": LAYER_TYPES},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
ROTARY = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "olmo2", "gpt_neox", "gemma3_text", "olmo3"]
TABLES = {"gpt2": "wpe", "gpt_neo": "wpe", "opt": "decoder.embed_positions"}


def short(kind, **changes):
    """A tiny model of 32 positions; GPT-Neo with a plan, which it needs."""
    model = tiny(kind, **({"max_position_embeddings": TRAINED} | CHANGES.get(kind, {}) | changes))
    return apply_plan(model, PLAN) if kind == "gpt_neo" else model


def bare(kind, **changes):
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **special, **changes))


def logits(model, tokens=TOKENS, **given):
    with torch.no_grad():
        return model(tokens, **given).logits


def scaled(rope, method):
    """The rope settings that transformers documents for the method; those of the full layers where types differ."""
    own = {"rope_type": method, "factor": FACTOR}
    if method == "yarn":
        own["original_max_position_embeddings"] = TRAINED
    if "full_attention" in rope:
        return rope | {"full_attention": rope["full_attention"] | own}
    return rope | own


def test_repeat_and_interpolate_small_tables():
    rows = torch.tensor([[0.0, 10.0], [1.0, 30.0], [2.0, 20.0]])
    assert TABLE_METHODS["repeat"](rows, 7)[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert TABLE_METHODS["interpolate"](rows, 5).T.tolist() == [[0, 0.5, 1, 1.5, 2], [10, 20, 30, 25, 20]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("method", TABLE_METHODS)
def test_tables_keep_their_module_dtype_and_gradient_flag(kind, method, dtype):
    model = short(kind).to(dtype)
    table = model.base_model.get_submodule(TABLES[kind])
    table.weight.requires_grad_(False)
    offset = 2 if kind == "opt" else 0
    old = table.weight.clone()
    assert extend_positions(model, LONGER, method) is model
    assert model.base_model.get_submodule(TABLES[kind]) is table
    assert (table.weight.dtype, table.weight.requires_grad) == (dtype, False)
    assert table.weight.shape == (LONGER + offset, 32) == (table.num_embeddings, table.embedding_dim)
    assert model.config.max_position_embeddings == position_limit(model.config) == LONGER
    assert torch.equal(table.weight[:offset], old[:offset])
    trained, longer = old[offset:], table.weight[offset:]
    if method == "repeat":
        assert torch.equal(longer, torch.cat([trained, trained, trained[: LONGER - 2 * TRAINED]]))
    else:
        at = np.linspace(0, TRAINED - 1, LONGER)
        columns = [np.interp(at, np.arange(TRAINED), column) for column in trained.double().T.numpy()]
        expected = torch.tensor(np.stack(columns, 1))
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(longer.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(longer[[0, -1]], trained[[0, -1]])


@pytest.mark.parametrize("kind", TABLES)
def test_repeat_is_the_default_and_keeps_the_trained_length(kind):
    model = short(kind)
    before = logits(model, TOKENS[:, :TRAINED])
    table = model.base_model.get_submodule(TABLES[kind])
    extend_positions(model, LONGER)
    assert torch.equal(table.weight[-1], table.weight[-1 - TRAINED])
    assert torch.equal(logits(model, TOKENS[:, :TRAINED]), before)
    table(TOKENS.new_ones(1, LONGER)).sum().backward()
    assert table.weight.grad.shape == table.weight.shape
    torch.testing.assert_close(logits(model)[:, :TRAINED], before, rtol=0, atol=1e-6)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("method", ["yarn", "linear", "dynamic"])
@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_methods_equal_a_stock_model_with_those_settings(kind, method):
    model = short(kind)
    plain, settings = logits(model), scaled(model.config.rope_parameters, method)
    positions = TRAINED if method == "dynamic" else LONGER
    stock = short(kind, rope_parameters=copy.deepcopy(settings), max_position_embeddings=positions)
    extend_positions(model, LONGER, method)
    assert model.config.rope_parameters == settings
    assert model.config.max_position_embeddings == positions
    assert position_limit(model.config) == LONGER
    assert torch.equal(logits(model), logits(stock))
    assert not torch.allclose(logits(model), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [*ROTARY, "phi3"])
def test_none_changes_no_logit(kind):
    model = short(kind)
    rope, plain = copy.deepcopy(model.config.rope_parameters), logits(model)
    extend_positions(model, LONGER, "none")
    assert (model.config.max_position_embeddings, model.config.rope_parameters) == (LONGER, rope)
    assert torch.equal(logits(model), plain)


def test_yarn_is_the_default_of_rotary_positions():
    assert extend_positions(short("llama"), LONGER).config.rope_parameters["rope_type"] == "yarn"


def test_dynamic_keeps_the_trained_length():
    model = short("llama")
    before = logits(model, TOKENS[:, :TRAINED])
    assert torch.equal(logits(extend_positions(model, LONGER, "dynamic"), TOKENS[:, :TRAINED]), before)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_linear_divides_positions(kind):
    positions = torch.arange(TRAINED)[None]
    model = short(kind)
    plain = logits(model, TOKENS[:, :TRAINED], position_ids=positions)
    extend_positions(model, 2 * TRAINED, "linear")
    stretched = logits(model, TOKENS[:, :TRAINED], position_ids=2 * positions)
    torch.testing.assert_close(stretched, plain, rtol=0, atol=1e-5)


def test_sliding_layers_with_rotary_positions_of_their_own_keep_them():
    model = short("gemma3_text")
    rotary, sliding = model.model.rotary_emb, model.model.rotary_emb.sliding_attention_inv_freq.clone()
    full = rotary.full_attention_inv_freq.clone()
    extend_positions(model, LONGER, "linear")
    assert torch.equal(model.model.rotary_emb.sliding_attention_inv_freq, sliding)
    torch.testing.assert_close(model.model.rotary_emb.full_attention_inv_freq, full / FACTOR)


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in ("gpt2", "gpt_neo", "opt") for method in TABLE_METHODS]
    + [(kind, method) for kind in ("llama", "gemma3_text", "gpt_neox") for method in ROTARY_METHODS],
)
def test_a_saved_extension_reloads_to_identical_logits(tmp_path, kind, method):
    model = extend_positions(apply_plan(short(kind), PLAN), LONGER, method)
    save_model(model, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    assert position_limit(again.config) == LONGER
    assert getattr(again.config, "rope_parameters", None) == getattr(model.config, "rope_parameters", None)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "interpolate"), ("llama", "yarn"), ("gpt_neo", "repeat")])
def test_load_model_extends_and_the_plan_may_change_afterwards(tmp_path, kind, method):
    save_model(apply_plan(short(kind), PLAN), tmp_path / "out")
    model, _ = load_model(tmp_path / "out", max_positions=LONGER, position_method=method)
    expected = extend_positions(apply_plan(short(kind), PLAN), LONGER, method)
    assert torch.equal(logits(model), logits(expected))
    full = AttentionPlan.uniform(4, FullSpan())
    assert torch.equal(
        logits(apply_plan(model, full)), logits(extend_positions(apply_plan(short(kind), full), LONGER, method))
    )


def test_a_stock_checkpoint_of_an_extended_model_reloads_in_transformers(tmp_path):
    model = extend_positions(short("llama"), LONGER)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("bloom", {}), ("gptj", {"rotary_dim": 4}), ("falcon", {"alibi": True})],
)
def test_models_without_positions_to_extend_are_refused_by_name(kind, changes):
    with pytest.raises(MasformerError, match=f"positions of {kind} models cannot be extended"):
        extend_positions(bare(kind, **changes), LONGER)


@pytest.mark.parametrize(
    ("kind", "changes", "method", "message"),
    [
        ("llama", {"rope_parameters": LLAMA3}, None, "llama models whose rope type is llama3 .*'yarn'; allowed: none$"),
        ("llama", {"rope_parameters": LLAMA3}, "linear", "cannot take 'linear'; allowed: none$"),
        ("phi3", {}, None, "phi3 models whose rope type is default .* cannot take 'yarn'; allowed: none$"),
        ("cohere2", {}, None, "cannot take 'yarn'; allowed: none$"),
        (
            "gemma3_text",
            {"layer_types": LAYER_TYPES[:1] * 4},
            None,
            r"default \(sliding_attention\) .*; allowed: none$",
        ),
        ("gpt2", {}, "yarn", "gpt2 models have learned positions, which 'yarn' .*; allowed: repeat, interpolate$"),
        ("llama", {}, "repeat", "llama models have rotary .*; allowed: yarn, linear, dynamic, none$"),
        ("llama", {}, "ntk", "'ntk' cannot extend; allowed: yarn, linear, dynamic, none$"),
    ],
)
def test_methods_that_do_not_fit_are_refused(kind, changes, method, message):
    model = short(kind, **changes)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(MasformerError, match=message):
        extend_positions(model, LONGER, method)
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("method", "allowed"), [("yarn", "cannot take 'yarn'; allowed: none"), ("dynamic", "cannot be extended")]
)
def test_a_scaling_is_not_put_on_top_of_another(method, allowed):
    model = extend_positions(short("llama"), LONGER, method)
    with pytest.raises(MasformerError, match=f"whose rope type is {method} .* {allowed}$"):
        extend_positions(model, 2 * LONGER)
    with pytest.raises(MasformerError, match=f"max_positions {LONGER} does nothing: the model has {LONGER} already"):
        extend_positions(model, LONGER)


def test_settings_that_do_not_read_the_length_take_none():
    model = short("llama", rope_parameters=LLAMA3)
    plain = logits(model)
    assert torch.equal(logits(extend_positions(model, LONGER, "none")), plain)
    assert model.config.max_position_embeddings == LONGER


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("length", "message"),
    [
        (TRAINED, "max_positions 32 does nothing: the model has 32 already"),
        (7, "max_positions 7 does nothing: the model has 32 already"),
        (0, "max_positions must be at least 1, got 0"),
        (-5, "max_positions must be at least 1, got -5"),
        (64.0, "max_positions must be a whole number, got 64.0"),
        (True, "max_positions must be a whole number, got True"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(kind, length, message):
    with pytest.raises(MasformerError, match=message):
        extend_positions(short(kind), length)


def test_gpt_neo_needs_its_plan_first():
    with pytest.raises(MasformerError, match="masks of the trained length; call apply_plan first"):
        extend_positions(tiny("gpt_neo", max_position_embeddings=TRAINED), LONGER)


def test_the_text_form():
    assert parse_max_positions("8192") == (8192, None)
    assert parse_max_positions(" 8192 : yarn ") == (8192, "yarn")
    for text in ("", "yarn", "8k", "8192:", "8192:yarn:2", "8192.0"):
        with pytest.raises(MasformerError, match="as a number of positions; allowed: N or N:METHOD"):
            parse_max_positions(text)
    with pytest.raises(MasformerError, match=r"unknown position method 'ntk'; allowed: repeat, .* none \(rotary"):
        parse_max_positions("8192:ntk")
    with pytest.raises(MasformerError, match="max_positions must be at least 1, got -1"):
        parse_max_positions("-1")


def recipe(**changes):
    """A YaRN recipe as Qwen's documentation gives it: `max_position_embeddings` stays at the trained length."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": TRAINED}
    return {"rope_parameters": yarn | changes}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("positions", [TRAINED, TRAINED + 8, 4 * TRAINED])
def test_a_yarn_recipe_allows_its_factor_times_the_trained_length(kind, positions):
    model = short(kind, max_position_embeddings=positions, **recipe())
    assert position_limit(model.config) == 4 * TRAINED
    with pytest.raises(MasformerError, match=f"the model has {4 * TRAINED} already"):
        extend_positions(model, LONGER)
    plain = logits(model)
    assert torch.equal(logits(extend_positions(model, 5 * TRAINED, "none")), plain)
    assert position_limit(model.config) == 5 * TRAINED


def test_the_longest_of_what_a_config_says_is_its_limit():
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi3 = {"original_max_position_embeddings": TRAINED}
    nested = short("olmo3").config
    nested.rope_parameters = {"full_attention": recipe()["rope_parameters"], "sliding_attention": {}}
    for config, limit in [
        (short("llama", **recipe(original_max_position_embeddings=TRAINED // 4)).config, TRAINED),
        (short("llama", rope_parameters=LLAMA3 | {"factor": 32.0}).config, TRAINED),
        (short("phi3", max_position_embeddings=128, rope_parameters=dict(longrope), **phi3).config, 128),
        (short("phi3", rope_parameters=longrope | {"factor": 4.0}, **phi3).config, 128),
        (nested, 4 * TRAINED),
    ]:
        assert position_limit(config) == limit, config.rope_parameters


@pytest.mark.parametrize("stored", [TRAINED, 5 * LONGER, None])
def test_the_tokenizer_counts_as_far_as_the_positions(tmp_path, stored):
    options = {} if stored is None else {"model_max_length": stored}
    short("llama", vocab_size=256).save_pretrained(tmp_path / "in")
    letter_tokenizer(**options).save_pretrained(tmp_path / "in")
    model, tokenizer = load_model(tmp_path / "in", PLAN, max_positions=LONGER)
    save_model(model, tmp_path / "out", tokenizer)
    again = load_tokenizer(tmp_path / "out")
    assert again.model_max_length >= LONGER
    assert len(again("a" * LONGER, truncation=stored is not None)["input_ids"]) == LONGER
    as_it_was = load_model(tmp_path / "in")[1].model_max_length
    assert as_it_was == stored if stored else as_it_was > 10**9
