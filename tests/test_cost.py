import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from masformer import AttentionPlan, FullSpan, MasformerError, WindowSpan, apply_plan
from masformer.cost import FIGURES, ModelShape, _matmul_weights, bytes_text, compare, cost, cost_table, flops_text
from masformer.spans import Span
from strategies import plans

COMMON = {"vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE_HEADS = LLAMA | {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": WIDE_HEADS,
    "qwen2": LLAMA,
    "qwen3": WIDE_HEADS,
    "smollm3": LLAMA,
    "gemma2": WIDE_HEADS,
    "gemma3_text": WIDE_HEADS,
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "gpt2": COMMON | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neo": COMMON
    | {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "mixtral": LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": WIDE_HEADS | EXPERTS | {"num_experts": 5, "mlp_only_layers": [1]},
    "mimo_v2_flash": LLAMA
    | EXPERTS
    | {"head_dim": 12, "v_head_dim": 8, "n_routed_experts": 4, "layer_types": ["full_attention"] * 4},
}
SHAPE = ModelShape(
    24, query_heads=16, kv_heads=16, head_dim=128, value_dim=128, matmul_weights=10**9, parameters=10**9, widest=8192
)


def config(kind):
    return AutoConfig.for_model(kind, **ARCHITECTURES[kind])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_torch_counts_the_same_flops(kind):
    """Eager attention multiplies all length * length pairs; the rotary angles, a product too, are left out."""
    length = 23
    shape = ModelShape.of(config(kind))
    model = AutoModelForCausalLM.from_config(config(kind), attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False, depth=9) as counter, torch.no_grad():
        model.eval()(torch.randint(3, 61, (1, length)), use_cache=False)
    rotary = sum(
        sum(operations.values())
        for module, operations in counter.get_flop_counts().items()
        if module.endswith("rotary_emb")
    )
    attention = 2 * (shape.head_dim + shape.value_dim) * shape.query_heads * shape.num_layers * length**2
    dense = cost(shape, AttentionPlan.uniform(shape.num_layers, FullSpan()), length).dense_flops
    assert dense + attention == counter.get_total_flops() - rotary
    assert shape.parameters == model.num_parameters()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_cache_of_a_full_plan_is_what_transformers_keeps(kind):
    length = 9  # far below the default sliding windows
    model = AutoModelForCausalLM.from_config(config(kind)).eval()
    cache = model(torch.randint(3, 61, (1, length)), use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    plan = AttentionPlan.uniform(4, FullSpan())
    assert cost(ModelShape.of(config(kind)), plan, length, cache_bytes_per_value=4).kv_cache_bytes == size


def test_a_config_that_carries_a_plan_has_the_same_shape():
    model = AutoModelForCausalLM.from_config(config("llama"))
    apply_plan(model, AttentionPlan.uniform(4, WindowSpan(8)))
    assert ModelShape.of(model.config) == ModelShape.of(config("llama"))
    assert model.config._attn_implementation == "masformer"


@given(plans, st.integers(1, 40))
def test_attention_is_the_visible_pairs_and_the_cache_what_is_still_seen(plan, length):
    shape = ModelShape(
        len(plan), query_heads=6, kv_heads=2, head_dim=5, value_dim=3, matmul_weights=70, parameters=100, widest=9
    )
    positions = torch.arange(length)
    pairs = sum(int(span.visible(positions[:, None], positions).sum()) for span in plan)
    seen_by_one_query = sum(int(span.visible(positions[:, None], positions).sum(1).max()) for span in plan)
    result = cost(shape, plan, length)
    assert result.attention_flops == pairs * 6 * (2 * 5 + 2 * 3)
    assert result.dense_flops == 2 * 70 * length
    assert result.forward_flops == result.attention_flops + result.dense_flops
    assert result.training_flops == 3 * result.forward_flops
    assert result.kv_cache_bytes == seen_by_one_query * 2 * (5 + 3) * 2
    assert cost(shape, plan, length, cache_bytes_per_value=4).kv_cache_bytes == 2 * result.kv_cache_bytes


@pytest.mark.parametrize(
    ("local", "percentages"),
    [
        ("block:1024", [19.8, 27.1, 34.4, 41.7]),
        ("block:1024x2", [39.9, 45.3, 50.8, 56.3]),
        ("window:512", [19.5, 26.8, 34.1, 41.4]),
    ],
)
def test_attention_of_the_papers_settings(local, percentages):
    """MASFormer, section 4: 24 layers, 8192 tokens, 2, 4, 6 and 8 full layers."""
    for full, percentage in zip((2, 4, 6, 8), percentages, strict=True):
        plan = AttentionPlan.mixed(24, full, "top", local=Span.parse(local))
        fraction = compare(SHAPE, plan, [8192])[0].fractions["attention_flops"]
        assert 100 * fraction == pytest.approx(percentage, abs=0.1)


def test_gpt_neo_1_3b():
    """The paper's model, from its published config: attention is 23.5 % of the forward pass at 8192 tokens."""
    settings = AutoConfig.for_model(
        "gpt_neo", hidden_size=2048, num_layers=24, num_heads=16, attention_types=[[["global", "local"], 12]]
    )
    shape = ModelShape.of(settings)
    assert shape.parameters == 1_315_575_808
    assert shape.matmul_weights == 24 * (4 * 2048**2 + 2 * 2048 * 8192) + 2048 * 50257
    full = cost(shape, AttentionPlan.uniform(24, FullSpan()), 8192)
    assert full.attention_flops / full.forward_flops == pytest.approx(0.235, abs=5e-4)


def test_a_million_tokens_are_counted_exactly():
    shape = ModelShape(30, query_heads=1, kv_heads=1, head_dim=1, value_dim=1, matmul_weights=1, parameters=1, widest=1)
    full, mixed = AttentionPlan.uniform(30, FullSpan()), AttentionPlan.mixed(30, 1, local=WindowSpan(1))
    assert cost(shape, full, 1_000_000).attention_flops == 4 * 30 * 500_000_500_000
    assert cost(shape, mixed, 1_000_000).attention_flops == 4 * (500_000_500_000 + 29 * 1_000_000)


def test_table_and_dict_hold_every_figure():
    comparisons = compare(SHAPE, AttentionPlan.mixed(24, 4, "top", local=WindowSpan(512)), [2048, 8192])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(cost_table(comparisons))
    text = console.export_text()
    assert "2,048" in text
    assert "8,192" in text
    for comparison in comparisons:
        data = comparison.to_dict()
        assert data["length"] == comparison.plan.length == comparison.full.length
        for figure, (name, written) in FIGURES.items():
            plan, full = getattr(comparison.plan, figure), getattr(comparison.full, figure)
            assert (data["plan"][figure], data["full"][figure]) == (plan, full)
            assert data["fractions"][figure] == plan / full
            row = next(line for line in text.splitlines() if name in line and written(plan) in line)
            assert written(full) in row
            assert f"{plan / full:.1%}" in row
    assert comparisons[0].to_dict()["fractions"]["kv_cache_bytes"] == pytest.approx((4 + 20 * 512 / 2048) / 24)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (flops_text(0), "0 FLOP"),
        (flops_text(999), "999 FLOP"),
        (flops_text(1000), "1.00 KFLOP"),
        (flops_text(1.5e12), "1.50 TFLOP"),
        (flops_text(99.96e9), "100 GFLOP"),
        (flops_text(999.9e9), "1.00 TFLOP"),
        (flops_text(3e25), "30000000 EFLOP"),
        (bytes_text(1023), "1023 B"),
        (bytes_text(1024), "1.00 KiB"),
        (bytes_text(3 * 2**29), "1.50 GiB"),
        (bytes_text(45.2 * 2**20), "45.2 MiB"),
    ],
)
def test_units(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cost(SHAPE, AttentionPlan.uniform(24, FullSpan()), 0), "length must be at least 1, got 0"),
        (lambda: cost(SHAPE, AttentionPlan.uniform(24, FullSpan()), 2.0), "length must be a whole number, got 2.0"),
        (
            lambda: cost(SHAPE, AttentionPlan.uniform(23, FullSpan()), 8),
            "the plan has 23 layers, but the model has 24",
        ),
        (
            lambda: compare(SHAPE, AttentionPlan.uniform(23, FullSpan()), [8]),
            "the plan has 23 layers, but the model has 24",
        ),
        (
            lambda: cost(SHAPE, AttentionPlan.uniform(24, FullSpan()), 8, cache_bytes_per_value=0),
            "cache bytes per value must be at least 1, got 0",
        ),
        (lambda: ModelShape(0, 1, 1, 1, 1, 1, 1, 1), "num_layers must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(MasformerError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("t5", {}, "t5 is not a causal language model that transformers knows"),
        ("rwkv", {"num_hidden_layers": 2}, "the cost of rwkv models is not known: they have no attention heads"),
        ("qwen3_next", {"num_hidden_layers": 4}, "qwen3_next models is not known: they have linear_attention layers"),
        ("deepseek_v3", {"num_hidden_layers": 4}, "deepseek_v3 models is not known: they compress the KV cache"),
        ("gemma3n_text", {}, "gemma3n_text models is not known: some of their layers share keys and values"),
        ("gemma3", {}, "the cost of gemma3 models is not known: they are not text-only"),
        ("gemma4_text", {}, "gemma4_text models is not known: their layers differ in shape"),
        ("falcon", {}, "falcon models is not known: they name their key and value heads in a way of their own"),
        ("mimo_v2_flash", {}, "mimo_v2_flash models is not known: model.layers.1.self_attn.k_proj has an unusual size"),
    ],
)
def test_models_of_another_kind_are_refused(kind, settings, message):
    with pytest.raises(MasformerError) as error:
        ModelShape.of(AutoConfig.for_model(kind, **settings))
    assert message in str(error.value)


def test_weights_that_are_no_experts_are_refused():
    with pytest.raises(MasformerError, match="the cost of llama models is not known: weight is no plain matrix"):
        _matmul_weights(torch.nn.Conv1d(4, 4, 3), config("llama"))
