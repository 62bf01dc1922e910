import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from masformer import AttentionPlan, FullSpan, MasformerError, SpanCache, WindowSpan, apply_plan
from masformer.models.adapters import GPTNeoSpanAttention
from masformer.models.bridge import cache_name
from tiny import ARCHITECTURES, PLAN, VOCABULARY, kv_heads_of, random_plan, random_unit_plan, tiny, tiny_config


def inputs(case):
    tokens = torch.randint(3, VOCABULARY, (2, 41), generator=torch.Generator().manual_seed(1))
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


def dense_masks(plan, real, documents):
    """One additive mask [batch, query heads, query, key] per layer, made pair by pair from `visible`."""
    index = torch.arange(real.shape[1])
    masks = []
    for spans in plan.units(plan.kv_heads):
        mask = torch.zeros(len(real), 4, len(index), len(index), dtype=torch.bool)
        for row in range(len(real)):
            for document in documents[row].unique():
                mine = ((documents[row] == document) & real[row].bool()).nonzero()[:, 0]
                place = mine - mine[0]
                for head in range(4):
                    seen = spans[head * len(spans) // 4].visible(place[:, None], place)
                    mask[row, head, mine[:, None], mine] = seen
        masks.append(torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min))
    return masks


@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_and_gradients_equal_dense_attention(kind, case):
    model, plan = tiny(kind), random_unit_plan(f"{kind} {case}", kv_heads_of(kind))
    given, real, documents = inputs(case)
    weight = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))

    def run(model, dtype=torch.float32):
        model = model.to(dtype)
        model.zero_grad()
        logits = model(**given).logits
        (logits * weight.to(dtype))[real.bool()].sum().backward()
        return logits[real.bool()].detach(), model.get_input_embeddings().weight.grad.clone()

    eager = copy.deepcopy(model)
    eager.config._attn_implementation = "eager"
    masks = dense_masks(plan, real, documents)
    for module in eager.modules():
        if isinstance(module, GPTNeoSelfAttention):
            module.bias.copy_(torch.ones_like(module.bias).tril())  # local layers too: the explicit mask says it all
        elif type(module).__name__.endswith("Attention"):

            def replace(module, args, kwargs):
                mask = masks[module.layer_id if kind == "gpt_neo" else module.layer_idx]
                if len(args) > 1:
                    args = (args[0], mask, *args[2:]) if kind == "gpt_neox" else args
                return args, kwargs | {"attention_mask": mask}

            module.register_forward_pre_hook(replace, with_kwargs=True)
    expected, expected_grad = run(eager)
    actual, actual_grad = run(apply_plan(copy.deepcopy(model), plan))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(actual_grad, expected_grad, atol=2e-4, rtol=1e-4)

    expected, expected_grad = run(apply_plan(copy.deepcopy(model), plan, backend="reference"), torch.float64)
    actual, actual_grad = run(apply_plan(copy.deepcopy(model), plan), torch.float64)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(actual_grad, expected_grad, atol=1e-9, rtol=1e-9)


INDEX = torch.arange(24)
ONE_DOCUMENT = {
    "a jump": torch.where(INDEX < 10, INDEX, INDEX + 50),
    "two jumps": INDEX + 7 * (INDEX > 3) + 20 * (INDEX > 15),
    "strides": 2 * INDEX,
    "a repeat": INDEX - (INDEX > 1).long(),
    "pairs": INDEX // 2,
    "triples from 5 on": 5 + INDEX // 3,
}
RESTARTS = {
    "to 0": (11, torch.where(INDEX < 11, INDEX, INDEX - 11)),
    "to 0, in the middle of a text": (11, torch.where(INDEX < 11, INDEX + 30, INDEX - 11)),
    "to a smaller number": (11, torch.where(INDEX < 11, INDEX + 30, INDEX)),
    "jumps on both sides": (11, torch.where(INDEX < 11, 3 * INDEX, 2 * INDEX)),
    "after one token": (1, (INDEX - 1).clamp(0)),
}


def with_dense_mask(stock, tokens, positions, span, start=0):
    """Logits of a stock model under a span; what is before `start` is a document of its own."""
    index = torch.arange(tokens.shape[1])
    document = (index >= start).long()
    place = index - start * document
    seen = span.visible(place[:, None], place) & (document[:, None] == document)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    stock.set_attn_implementation("eager")
    return stock(tokens, attention_mask=mask.expand(2, 1, -1, -1), position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("span", [FullSpan(), WindowSpan(5, 2)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_document_starts_where_positions_fall_back_not_where_they_skip(kind, span):
    """With a mask or a cache, where transformers sees no packing at all. Spans count tokens, whatever the positions."""
    stock, tokens = tiny(kind, **({} if kind == "gpt2" else {"sliding_window": None})), inputs("plain")[0]["input_ids"]
    model = apply_plan(copy.deepcopy(stock), AttentionPlan.uniform(4, span))
    tokens, ones = tokens[:, :24], torch.ones(2, 24, dtype=torch.long)
    cases = [(0, positions) for positions in ONE_DOCUMENT.values()] + list(RESTARTS.values())
    for start, positions in cases:
        positions = positions.expand(2, -1)
        expected = with_dense_mask(stock, tokens, positions, span, start)
        if not start and span == FullSpan():
            plain = stock(tokens, attention_mask=ones, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(plain, expected)
        for options in (
            {"attention_mask": ones, "use_cache": False},
            {"attention_mask": ones},
            {"attention_mask": None},
            {"attention_mask": None, "past_key_values": DynamicCache()},
        ):
            actual = model(tokens, position_ids=positions, **options).logits
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_without_mask_and_cache_packing_is_what_transformers_takes_for_it():
    stock, tokens = tiny("llama", sliding_window=None), inputs("plain")[0]["input_ids"][:, :24]
    model = apply_plan(copy.deepcopy(stock), AttentionPlan.uniform(4, FullSpan()))
    for positions in [*ONE_DOCUMENT.values(), *(positions for _, positions in RESTARTS.values())]:
        given = {"position_ids": positions.expand(2, -1), "use_cache": False}
        torch.testing.assert_close(model(tokens, **given).logits, stock(tokens, **given).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("filling", [0, 1, 99])
def test_positions_of_padding_say_nothing(filling):
    """Before, between and after documents."""
    model = apply_plan(tiny("llama"), PLAN)
    tokens = torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    alone = [model(tokens[:, part], use_cache=False).logits for part in (slice(0, 9), slice(9, 20))]
    real = torch.ones(1, 30, dtype=torch.long)
    real[0, :4] = real[0, 13:17] = real[0, 28:] = 0
    padded, positions = torch.full_like(real, 3), torch.full_like(real, filling)
    padded[real.bool()] = tokens[0]
    positions[real.bool()] = torch.cat([torch.arange(9), torch.arange(11)])
    for options in ({"use_cache": False}, {}):
        logits = model(padded, attention_mask=real, position_ids=positions, **options).logits[real.bool()]
        torch.testing.assert_close(logits, torch.cat(alone, 1)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neo"])
def test_flex_attention_gives_a_model_the_same_logits_gradients_and_tokens(kind, case, device):
    """Grouped queries, a soft cap, scores without a scale; on the CPU in float64, on a GPU in kernels."""
    given, real, _ = inputs(case)
    given = {name: tensor.to(device) for name, tensor in given.items()}
    real = real.bool().to(device)
    dtype = torch.float64 if device == "cpu" else torch.float32
    tolerance = 1e-9 if device == "cpu" else 1e-4
    weight = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    plan = random_plan(f"{kind} {case}") if device == "cpu" else AttentionPlan((WindowSpan(5, 2), FullSpan()) * 2)
    results = []
    for backend in ("reference", "flex"):
        model = apply_plan(tiny(kind), plan, backend=backend).to(device, dtype)
        logits = model(**given, use_cache=False).logits
        (logits * weight)[real].sum().backward()
        tokens = None
        if case in ("plain", "left"):
            tokens = model.generate(**given, max_new_tokens=20, do_sample=False, eos_token_id=None)
        results.append((logits[real].detach(), model.get_input_embeddings().weight.grad, tokens))
    (expected, expected_grad, expected_tokens), (actual, actual_grad, actual_tokens) = results
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(actual_grad, expected_grad, atol=tolerance, rtol=1e-4)
    assert expected_tokens is actual_tokens is None or torch.equal(actual_tokens, expected_tokens)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_generation_past_the_window_equals_the_forward_without_cache(kind):
    model = apply_plan(tiny(kind), PLAN)
    tokens = inputs("plain")[0]["input_ids"]
    out = model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = model(out, use_cache=False).logits[:, 40:-1]
    logits[..., 2] = -torch.inf
    assert torch.equal(logits.argmax(-1), out[:, 41:])


def test_a_model_whose_head_calls_its_decoder_past_the_base():
    """OPT: the base's own forward never runs, and neither would hooks on it."""
    model = apply_plan(tiny("opt", ffn_dim=48, word_embed_proj_dim=32), PLAN)
    tokens = inputs("plain")[0]["input_ids"]
    out = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    assert isinstance(out.get("cache") or out.get("past_key_values"), SpanCache)
    with torch.no_grad():
        assert torch.equal(model(out.sequences, use_cache=False).logits[:, 40:-1].argmax(-1), out.sequences[:, 41:])
    model.model.decoder.layers[2].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(MasformerError, match=r"opt models cannot take a plan: layers \[2\] did not follow it"):
        model(tokens)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bloom", "alibi"), ("cpmant", "attention interface"), ("bert", "not causal")],
)
def test_what_cannot_be_done_right_is_refused_by_name(kind, reason):
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 61}
    config = AutoConfig.for_model(kind, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MasformerError, match=f"{kind} models cannot take a plan: .*{reason}"):
        apply_plan(model, PLAN)


TYPES = ["sliding_attention", "full_attention"] * 2
SHARED = {
    "num_kv_shared_layers": 2,
    "layer_types": TYPES,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
GEMMA3N = {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (
            "gemma3n_text",
            SHARED | GEMMA3N,
            r"layers \[2, 3\] use the keys",
        ),
        ("gemma4_text", SHARED, r"layers \[2, 3\] use the keys"),
        ("dory", {"layer_types": TYPES}, "its layers run several times"),
        ("inkling_text", {"layer_types": TYPES}, "keeps more than keys and values .*update_conv_state"),
        ("bart", {"is_decoder": True}, "a layer has several attention modules"),
    ],
)
def test_layers_whose_cache_is_not_theirs_alone_are_refused_by_name(kind, changes, reason):
    """Read from the classes of the model, before anything runs."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    with pytest.raises(MasformerError, match=f"{kind} models cannot take a plan: .*{reason}"):
        apply_plan(model, PLAN)


def test_the_same_class_without_shared_keys_takes_a_plan():
    changes = SHARED | GEMMA3N | {"num_kv_shared_layers": 0}
    stock, tokens = tiny("gemma3n_text", **changes), inputs("plain")[0]["input_ids"]
    model = apply_plan(copy.deepcopy(stock), AttentionPlan((WindowSpan(7), FullSpan()) * 2))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens, **options), stock.generate(tokens, **options))


def test_a_class_of_the_user_that_shares_keys_or_runs_layers_twice():
    tokens = inputs("plain")[0]["input_ids"]
    model = tiny("llama")
    del model.model.layers[3].self_attn.k_proj
    with pytest.raises(MasformerError, match=r"layers \[3\] use the keys of other layers"):
        apply_plan(model, PLAN)
    model = apply_plan(tiny("llama"), PLAN)
    layer = model.model.layers[2]
    once = layer.forward
    layer.forward = lambda hidden, **options: once(once(hidden, **options), **options)
    assert model(tokens, use_cache=False).logits.isfinite().all()
    with pytest.raises(MasformerError, match="runs twice in one pass"):
        model.generate(tokens, max_new_tokens=2)
    model = apply_plan(tiny("llama"), PLAN)
    attention = model.model.layers[2].self_attn
    bare = attention.forward
    attention.forward = lambda *args, **options: bare(*args, **(options | {cache_name(attention): None}))
    with pytest.raises(MasformerError, match="layer 2 keeps no keys of its own"):
        model.generate(tokens, max_new_tokens=2)


def test_a_plan_of_another_depth_is_refused():
    with pytest.raises(MasformerError, match="the plan has 2 layers, but the model has 4"):
        apply_plan(tiny("llama"), AttentionPlan.uniform(2, FullSpan()))


def test_a_layer_that_never_asks_for_its_span_is_an_error():
    model = apply_plan(tiny("llama"), PLAN)
    model.model.layers[2].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(MasformerError, match=r"llama models cannot take a plan: layers \[2\] did not follow it"):
        model(inputs("plain")[0]["input_ids"])


def test_gpt_neo_keeps_its_parameters_and_drops_the_masks_of_all_positions():
    model = tiny("gpt_neo", attention_dropout=0.1)
    before = dict(model.named_parameters())
    apply_plan(model.train(), PLAN)
    assert all(after is before[name] for name, after in model.named_parameters())
    adapters = [module for module in model.modules() if isinstance(module, GPTNeoSpanAttention)]
    assert len(adapters) == 4
    assert all(module.training and not list(module.buffers()) for module in adapters)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
def test_training_with_attention_dropout_is_random_and_differentiable(kind):
    name = "attn_pdrop" if kind == "gpt2" else "attention_dropout"
    model = apply_plan(tiny(kind, **{name: 0.5}), PLAN)
    tokens = inputs("plain")[0]["input_ids"]
    still = model(tokens).logits
    assert torch.equal(still, apply_plan(tiny(kind), PLAN)(tokens).logits)
    model.train()
    torch.manual_seed(0)
    first = model(tokens, labels=tokens)
    first.loss.backward()
    assert not torch.allclose(first.logits, model(tokens).logits, atol=1e-3)
    torch.manual_seed(0)
    torch.testing.assert_close(model(tokens).logits, first.logits)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradient_checkpointing_keeps_padding_and_packing():
    model = apply_plan(tiny("llama"), PLAN).train()
    for case in ("left", "packed"):
        given = inputs(case)[0]
        grads = []
        for on in (False, True):
            if on:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(**given, use_cache=False).logits.square().sum().backward()
            grads.append(model.get_input_embeddings().weight.grad.clone())
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gpt_neo"])
def test_decoding_by_hand_with_the_models_own_cache(kind):
    model = apply_plan(tiny(kind), PLAN)
    tokens = inputs("plain")[0]["input_ids"]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        out = model(tokens[:, :20], use_cache=True)
        steps = [out.logits]
        for at in range(20, 41, 3):
            out = model(tokens[:, at : at + 3], past_key_values=out.past_key_values)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=2e-6, rtol=0)


def test_what_the_spans_cannot_serve_is_refused_in_a_call():
    model = apply_plan(tiny("ministral", layer_types=["sliding_attention", "full_attention"] * 2), PLAN)
    tokens = inputs("plain")[0]["input_ids"]
    with pytest.raises(MasformerError, match="an explicit attention mask is not supported"):
        model(tokens, attention_mask=torch.ones(2, 1, 41, 41, dtype=torch.bool))
    with pytest.raises(MasformerError, match="StaticCache is not supported with a plan"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")
    filled = DynamicCache(config=tiny("ministral", layer_types=["sliding_attention"] * 4).config)
    for layer in filled.layers:
        layer.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8))
    with pytest.raises(MasformerError, match="the cache has dropped keys"):
        model(tokens, past_key_values=filled)
