"""The spans of a stock model are those that its class runs, whatever keys its config carries."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from masformer import AttentionPlan, MasformerError, apply_plan, load_model
from masformer.cost import ModelShape
from masformer.models.checkpoint import load_config
from masformer.models.native import native_plan, stock_layers
from masformer.models.sealing import kv_heads
from tiny import ARCHITECTURES, VOCABULARY, tiny, tiny_config

TOKENS = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
MIXED = ["sliding_attention", "full_attention"] * 2
STRAY = {
    "a window": {"sliding_window": 7},
    "a window that is off": {"sliding_window": 7, "use_sliding_window": False},
    "a window that is on": {"sliding_window": 7, "use_sliding_window": True},
    "layer types": {"sliding_window": 7, "layer_types": MIXED},
    "a pattern": {"sliding_window": 7, "sliding_window_pattern": 2, "max_window_layers": 1},
    "other names": {"window_size": 7, "attention_window": 7, "attention_layers": ["local"] * 4},
}
IGNORING = ["llama", "olmo2", "gpt_neox", "gpt2", "granite", "stablelm", "phi", "cohere", "gemma", "olmoe"]


def reread(kind, folder, extra):
    """The config of a tiny model, with more keys, as a file gives it."""
    config = tiny_config(kind) if kind in ARCHITECTURES else small(kind)
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    return AutoConfig.from_pretrained(folder)


def small(kind):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "moe_intermediate_size": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(kind, vocab_size=VOCABULARY, **shape, **special)


def stock(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(3)  # far tokens matter
    return model


@pytest.mark.parametrize("kind", IGNORING)
@pytest.mark.parametrize("name", STRAY)
def test_a_key_that_the_class_does_not_read_changes_no_plan(tmp_path, kind, name):
    assert native_plan(reread(kind, tmp_path, STRAY[name])).is_full


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mixtral", "qwen3_moe", "starcoder2", "cohere2"])
@pytest.mark.parametrize("name", ["nothing", "a window", "a window that is off", "a window that is on", "layer types"])
def test_the_plan_gives_the_logits_of_the_stock_class(tmp_path, kind, name):
    extra = STRAY.get(name, {})
    try:
        model = stock(reread(kind, tmp_path, extra))
        with torch.no_grad():
            expected = model(TOKENS, use_cache=False).logits
    except Exception:  # the stock class refuses these settings
        with pytest.raises(MasformerError):
            load_config(tmp_path)
        return
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)[0](TOKENS).logits, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "plan"),
    [
        ("mistral", {"sliding_window": 7}, "window:7"),
        ("mistral", {"sliding_window": None}, "full"),
        ("qwen2", {"sliding_window": 7}, "full"),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}, "full@0-2; window:7"),
        ("gemma2", {"sliding_window": 7}, "full@1,3; window:7"),
        ("gemma3_text", {"sliding_window": 1 << 40, "layer_types": MIXED}, "full"),
        ("phi3", {"sliding_window": 9, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
         "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}}, "window:9"),
        ("gpt_neo", {}, "full@0,2; window:7"),
    ],
)  # fmt: skip
def test_windows_types_and_switches_are_those_of_the_class(kind, changes, plan):
    assert native_plan(tiny_config(kind, **changes)) == AttentionPlan.parse(plan, 4)


def test_experts_that_read_values_and_scaled_rotary_frequencies_do_not_matter():
    assert native_plan(small("jetmoe")).is_full
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    assert native_plan(tiny_config("llama", rope_parameters=yarn)).is_full


def test_a_class_that_takes_no_plan_says_why(tmp_path):
    for kind, message in [
        ("openai-gpt", "does not use the attention interface"),
        ("mamba", "mamba models cannot take"),
    ]:
        AutoConfig.for_model(kind, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)
        with pytest.raises(MasformerError, match=message):
            load_config(tmp_path)


def test_the_config_stays_as_it_was():
    config = tiny("qwen3").config
    before = config.to_json_string(use_diff=False)
    native_plan(config)
    assert config.to_json_string(use_diff=False) == before


@pytest.mark.parametrize("change", [{"sliding_window": 9}, {"layer_types": MIXED[::-1]}, {"num_key_value_heads": 1}])
def test_a_config_that_was_changed_is_asked_again(change):
    def found(config):
        plan, layers = native_plan(config), stock_layers(config).values()
        return plan, plan.kv_heads, [(layer.window, layer.kv_heads) for layer in layers]

    settings = {"layer_types": MIXED}
    config = tiny_config("ministral", **settings)
    before = found(config)
    for name, value in change.items():
        setattr(config, name, value)
    assert found(config) == found(tiny_config("ministral", **settings | change)) != before
    assert before[2] == [(7, 2), (None, 2)] * 2


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 99), ("num_hidden_layers", 3), ("num_key_value_heads", 1)])
def test_so_is_the_shape_of_a_changed_config_and_each_class_has_its_own(name, value):
    config = tiny_config("llama")
    before = ModelShape.of(config)
    setattr(config, name, value)
    assert ModelShape.of(config) == ModelShape.of(tiny_config("llama", **{name: value})) != before
    assert ModelShape.of(tiny_config("llama")) == before != ModelShape.of(tiny_config("qwen2"))


def test_the_heads_of_a_model_with_a_plan_are_those_of_its_config_as_it_is_now():
    config = apply_plan(tiny("llama"), AttentionPlan.parse("full@1; window:9", 4)).config
    kept = config.to_json_string()
    assert kv_heads(config) == 2
    assert config.to_json_string() == kept
    config.num_key_value_heads = 4
    assert kv_heads(config) == 4
