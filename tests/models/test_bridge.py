import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from masformer import AttentionPlan, BlockSpan, FullSpan, MasformerError, WindowSpan
from masformer.models.bridge import apply_plan

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "sliding_window": 7,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = ["llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "gemma3_text", "phi3", "olmo2", "olmo3"]
ARCHITECTURES += ["gpt_neox", "gpt2"]
PLAN = AttentionPlan((WindowSpan(5, 2), FullSpan(), BlockSpan(6, 1), WindowSpan(9)))


def tiny(kind):
    shape = dict(SHAPE)
    if kind in ("gpt2", "gpt_neox", "phi3", "olmo2"):
        shape.pop("head_dim")
    if kind in ("gpt2", "gpt_neox"):
        shape.pop("num_key_value_heads")
        shape.pop("sliding_window")
    if kind == "gpt2":
        shape.pop("intermediate_size")
        shape |= {"attn_pdrop": 0.0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()


def inputs(case):
    tokens = torch.randint(3, 61, (2, 41), generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 41, dtype=torch.long)
    index = torch.arange(41).expand(2, -1)
    documents = torch.zeros(2, 41, dtype=torch.long)
    if case == "left":
        real[0, :13] = 0
        return {"input_ids": tokens, "attention_mask": real}, real, documents
    if case == "right":
        real[1, 30:] = 0
        return {"input_ids": tokens, "attention_mask": real}, real, documents
    if case == "packed":
        documents = (index >= 11).long() + (index >= 30).long()
        start = torch.tensor([0, 11, 30])[documents]
        return {"input_ids": tokens, "position_ids": index - start}, real, documents
    return {"input_ids": tokens}, real, documents


def dense_masks(real, documents):
    """One additive mask [batch, 1, query, key] per layer, made pair by pair from `visible`."""
    index = torch.arange(real.shape[1])
    masks = []
    for span in PLAN:
        rows = []
        for row in range(len(real)):
            mask = torch.zeros(len(index), len(index), dtype=torch.bool)
            for document in documents[row].unique():
                mine = ((documents[row] == document) & real[row].bool()).nonzero()[:, 0]
                mask[mine[:, None], mine[None, :]] = span.visible((mine - mine[0])[:, None], (mine - mine[0])[None, :])
            rows.append(mask)
        mask = torch.stack(rows)[:, None]
        masks.append(torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min))
    return masks


@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_and_gradients_equal_dense_attention(kind, case):
    model = tiny(kind)
    given, real, documents = inputs(case)
    weight = torch.randn(61, generator=torch.Generator().manual_seed(2))

    def run(model, dtype=torch.float32):
        model = model.to(dtype)
        model.zero_grad()
        logits = model(**given).logits
        (logits * weight.to(dtype))[real.bool()].sum().backward()
        return logits[real.bool()].detach(), model.get_input_embeddings().weight.grad.clone()

    eager = copy.deepcopy(model)
    eager.config._attn_implementation = "eager"
    masks = dense_masks(real, documents)
    for module in eager.modules():
        if type(module).__name__.endswith("Attention"):

            def replace(module, args, kwargs):
                if len(args) > 1:
                    args = (args[0], masks[module.layer_idx], *args[2:]) if kind == "gpt_neox" else args
                return args, kwargs | {"attention_mask": masks[module.layer_idx]}

            module.register_forward_pre_hook(replace, with_kwargs=True)
    expected, expected_grad = run(eager)
    actual, actual_grad = run(apply_plan(copy.deepcopy(model), PLAN))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(actual_grad, expected_grad, atol=2e-4, rtol=1e-4)

    expected, expected_grad = run(apply_plan(copy.deepcopy(model), PLAN, backend="reference"), torch.float64)
    actual, actual_grad = run(apply_plan(copy.deepcopy(model), PLAN), torch.float64)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(actual_grad, expected_grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_generation_past_the_window_equals_the_forward_without_cache(kind):
    model = apply_plan(tiny(kind), PLAN)
    tokens = inputs("plain")[0]["input_ids"]
    out = model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = model(out, use_cache=False).logits[:, 40:-1]
    logits[..., 2] = -torch.inf
    assert torch.equal(logits.argmax(-1), out[:, 41:])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gemma2", "soft cap"), ("bloom", "alibi"), ("gpt_neo", "attention interface")],
)
def test_what_cannot_be_done_right_is_refused_by_name(kind, reason):
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 61}
    if kind == "gpt_neo":
        shape["attention_types"] = [[["global"], 4]]
    config = AutoConfig.for_model(kind, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MasformerError, match=f"{kind} models cannot take a plan: .*{reason}"):
        apply_plan(model, PLAN)


def test_a_plan_of_another_depth_is_refused():
    with pytest.raises(MasformerError, match="the plan has 2 layers, but the model has 4"):
        apply_plan(tiny("llama"), AttentionPlan.uniform(2, FullSpan()))
