"""Constant sinks in models: their weights, and models that were made with sinks of their own."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from masformer import AttentionPlan, MasformerError, SpanCache, apply_plan, load_model, save_model
from masformer.cost import ModelShape, cost
from masformer.export.twins import stock_twin
from masformer.models.bridge import add_sinks
from masformer.models.fingerprint import model_fingerprint
from masformer.models.native import native_plan
from masformer.models.sinks import is_sink, named_sinks, sink_layers
from tiny import ARCHITECTURES, VOCABULARY, kv_heads_of, tiny, tiny_config

TEXT = "window:5+sink,full,block:6x2+sink,window:4+2+sink"
PLAN = AttentionPlan.parse(TEXT)
TOKENS = torch.randint(3, VOCABULARY, (2, 41), generator=torch.Generator().manual_seed(1))


def by_heads(kind):
    heads = kv_heads_of(kind)
    return AttentionPlan.parse("full@1,2:0; window:4@3; window:5+sink", 4, heads)


def with_sinks(kind="llama", plan=PLAN, **changes):
    """A tiny model whose constant sinks matter."""
    model = tiny(kind, **changes)
    add_sinks(model, plan)
    make = torch.Generator().manual_seed(5)
    for name, weight in named_sinks(model):
        weight.data = torch.randn(weight.shape, generator=make) + (1 if name.endswith("logit") else 0)
    return apply_plan(model, plan)


def logits(model, **options):
    with torch.no_grad():
        return model(TOKENS, **options).logits


def packed():
    index = torch.arange(41)
    documents = (index >= 11).long() + (index >= 30).long()
    return {"position_ids": (index - torch.tensor([0, 11, 30])[documents]).expand(2, -1)}


def padded(side):
    real = torch.ones(2, 41, dtype=torch.long)
    if side == "left":
        real[0, :13] = 0
    else:
        real[1, 30:] = 0
    return {"attention_mask": real}


CASES = {"plain": dict, "left": lambda: padded("left"), "right": lambda: padded("right"), "packed": packed}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_and_gradients_equal_the_reference(kind, case):
    given = CASES[case]()
    real = given.get("attention_mask", torch.ones(2, 41)).bool()
    found = []
    for backend in ("reference", "auto"):
        plan = by_heads(kind) if case in ("plain", "left") else PLAN
        model = apply_plan(with_sinks(kind, plan).double(), plan, backend)
        out = model(TOKENS, use_cache=False, **given).logits[real]
        weight = torch.randn(out.shape[-1], dtype=out.dtype, generator=torch.Generator().manual_seed(2))
        (out * weight).sum().backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if is_sink(name)}
        assert len(grads) == 2 * len(sink_layers(plan))
        assert all(bool(grad.any()) for grad in grads.values())
        found.append((out.detach(), model.get_input_embeddings().weight.grad, grads))
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(found[0][0], logits(apply_plan(model, "full"), use_cache=False, **given)[real], atol=1e-2)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_cache_gives_the_same_past_three_windows_in_chunks_and_token_by_token(kind):
    for plan in (PLAN, by_heads(kind)):
        model = with_sinks(kind, plan)
        expected = logits(model, use_cache=False)
        cache, found = SpanCache(plan), []
        with torch.no_grad():
            for start, stop in [(0, 7), (7, 8), (8, 19), *((at, at + 1) for at in range(19, 41))]:
                found.append(model(TOKENS[:, start:stop], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neo"])
def test_generation_of_padded_rows_equals_passes_without_a_cache(kind):
    model, options = with_sinks(kind), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = padded("left")["attention_mask"][:, :20]
    out = model.generate(TOKENS[:, :20], attention_mask=mask, max_new_tokens=20, **options)
    tokens = TOKENS[:, :20]
    for _ in range(20):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            last = model(tokens, attention_mask=mask, position_ids=places, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(out, tokens)


def test_a_sink_without_a_value_and_two_biases_are_the_same():
    """out = u + sum p (v - u): what tools run that know the logit alone."""
    model = with_sinks("llama", attention_bias=True)
    expected = logits(model)
    other = copy.deepcopy(model)
    for layer in sink_layers(PLAN):
        part = other.model.layers[layer].self_attn
        u = part.sink_value.data
        part.v_proj.bias.data -= u.flatten()
        part.o_proj.bias.data += part.o_proj.weight.data @ u.repeat_interleave(2, 0).flatten()
        part.sink_value.data = torch.zeros_like(u)
    torch.testing.assert_close(logits(other), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_checkpoint_holds_them_and_every_way_to_load_it_finds_them(tmp_path, kind):
    plan = by_heads(kind)
    model = with_sinks(kind, plan)
    expected = logits(model)
    save_model(model, tmp_path / "saved")
    held = {name for name in load_file(tmp_path / "saved" / "model.safetensors") if is_sink(name)}
    assert held == {name for name, _ in named_sinks(model)}
    assert len(held) == 2 * 2
    loaded, _ = load_model(tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)
    save_model(loaded, tmp_path / "again")
    for folder in ("saved", "again"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), expected)
    loaded.save_pretrained(tmp_path / "stock")
    assert torch.equal(logits(load_model(tmp_path / "stock")[0]), expected)


def test_the_base_alone_has_them_and_copies_and_pickles_too(tmp_path):
    model = with_sinks()
    save_model(model, tmp_path / "saved")
    with torch.no_grad():
        base = AutoModel.from_pretrained(tmp_path / "saved")(TOKENS).last_hidden_state
        torch.testing.assert_close(base, model.model(TOKENS).last_hidden_state, atol=0, rtol=0)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(again), logits(model))
        assert type(again).__name__ == "LlamaForCausalLM"
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "saved"))
    assert {name: weight.shape for name, weight in made.named_parameters()} == {
        name: weight.shape for name, weight in model.named_parameters()
    }


def damage_sinks(folder, keep):
    weights = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in weights.items() if keep(name)}, folder / "model.safetensors", {"format": "pt"})


def test_sinks_without_weights_and_weights_without_sinks_are_named(tmp_path):
    save_model(with_sinks(), tmp_path / "saved")
    for name in ("lacks", "more", "stock"):
        save_model(with_sinks(), tmp_path / name)
    damage_sinks(tmp_path / "lacks", lambda name: "layers.2.self_attn.sink_value" not in name)
    text = (tmp_path / "more" / "config.json").read_text()
    (tmp_path / "more" / "config.json").write_text(text.replace("+sink,full", ",full"))
    stock = tmp_path / "other"
    save_model(apply_plan(tiny("llama"), "window:5"), stock)
    save_model(with_sinks(plan=by_heads("llama")), tmp_path / "heads")
    assert logits(load_model(tmp_path / "heads", "full@1,2; window:4@3; window:5+sink")[0]).isfinite().all()
    needs = "the plan has constant sinks in layers [0, 2, 3], but"
    for act, message in {
        lambda: load_model(tmp_path / "lacks"): "missing from it is model.layers.2.self_attn.sink_value",
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "lacks"): "missing from it is",
        lambda: AutoModel.from_pretrained(tmp_path / "lacks"): "missing from it is layers.2.self_attn.sink_value",
        lambda: load_model(tmp_path / "more"): "left over in it are model.layers.0.self_attn.sink_logit, ",
        lambda: load_model(stock, TEXT): f"{needs} {stock} has no weights for them; fit them: masformer convert",
        lambda: load_model(
            tmp_path / "heads", "full@1; window:4@3; window:5+sink"
        ): "constant sinks in layers [2], but",
        lambda: apply_plan(tiny("llama"), TEXT): f"{needs} the model has no weights for them; fit them",
        lambda: apply_plan(tiny_own("gpt_oss"), TEXT): "in layers [0, 2, 3], which have sinks of their own",
    }.items():
        with pytest.raises(MasformerError) as error:
            act()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_under_another_plan_they_are_kept_aside_and_not_written(tmp_path):
    model = with_sinks()
    expected, fingerprint = logits(model), model_fingerprint(model)
    apply_plan(model, "window:5")
    assert not any(is_sink(name) for name in model.state_dict())
    assert not any(is_sink(name) for name, _ in model.named_parameters())
    assert model_fingerprint(model) == fingerprint
    save_model(model, tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")[0]), logits(model))
    copied = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    for again in (model, copied):
        apply_plan(again, PLAN)
        torch.testing.assert_close(logits(again), expected, atol=0 if again is model else 0.2, rtol=0)
        assert len(list(named_sinks(again))) == 6
    model.model.layers[0].self_attn.sink_logit.data += 1
    assert model_fingerprint(model) != fingerprint


def test_they_cost_no_cache_and_no_matrix_product():
    with_them, without = with_sinks().config, apply_plan(tiny("llama"), "window:5").config
    shape, stock = ModelShape.of(with_them), ModelShape.of(without)
    assert shape.matmul_weights == stock.matmul_weights
    assert shape.parameters == stock.parameters + 3 * (4 + 2 * 8)
    assert cost(shape, "window:5+sink", 100) == cost(stock, "window:5", 100)


def test_a_stock_twin_leaves_them_out():
    model = with_sinks()
    full = apply_plan(copy.deepcopy(model), native_plan(tiny_config("llama")))
    torch.testing.assert_close(logits(stock_twin(model)), logits(full), atol=2e-5, rtol=0)


def test_a_training_step_moves_them_and_compiled_layers_too(monkeypatch):
    model = with_sinks().train()
    before = {name: weight.detach().clone() for name, weight in named_sinks(model)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    optimizer.step()
    for name, weight in named_sinks(model):
        assert not torch.equal(weight, before[name]), name


# Models with sinks of their own


OWN = ["gpt_oss", "granite_swa", "granitemoe_swa", "flint", "mimo_v2_flash"]


def tiny_own(kind):
    """A tiny model of a class that has sinks of its own, and values in them."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "sliding_window": 7}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    shape["num_experts_per_tok"] = 2
    shape |= {
        "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "rope_parameters": rope},
        "flint": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
        "mimo_v2_flash": {"n_routed_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "v_head_dim": 4},
    }.get(kind, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if name.endswith(".sinks"):
            weight.data = torch.randn(weight.shape) + 1
        elif weight.ndim > 1:
            weight.data = torch.randn(weight.shape) * 0.2
    return model


@pytest.mark.parametrize("kind", OWN)
def test_sinks_of_their_own_give_what_the_stock_model_gives(kind, tmp_path):
    stock = tiny_own(kind)
    real = padded("left")["attention_mask"]
    expected, hidden = logits(stock, use_cache=False), logits(stock, attention_mask=real, use_cache=False)
    model = apply_plan(copy.deepcopy(stock), native_plan(stock.config))
    assert str(native_plan(stock.config)) == "full@1,3; window:7"
    torch.testing.assert_close(logits(model, use_cache=False), expected, atol=2e-5, rtol=2e-5)
    padded_logits = logits(model, attention_mask=real, use_cache=False)
    torch.testing.assert_close(padded_logits[real.bool()], hidden[real.bool()], atol=2e-5, rtol=2e-5)
    cache, found = SpanCache(native_plan(stock.config)), []
    with torch.no_grad():
        for start, stop in [(0, 9), *((at, at + 1) for at in range(9, 41))]:
            found.append(model(TOKENS[:, start:stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=0)
    save_model(model, tmp_path / "saved")
    torch.testing.assert_close(logits(load_model(tmp_path / "saved")[0]), logits(model), atol=0, rtol=0)


@pytest.mark.parametrize("kind", OWN)
def test_sinks_of_their_own_join_under_every_plan_and_are_trained(kind):
    stock = tiny_own(kind)
    heads = native_plan(stock.config).kv_heads
    plans = ["full@0; window:5+2", "block:6x2"]
    plans += [AttentionPlan.parse("full@1,2:0; window:5", 4, heads)] if heads else []  # else they differ by layer
    for plan in plans:
        found = []
        for backend in ("reference", "auto"):
            model = apply_plan(copy.deepcopy(stock), plan, backend)
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
            grads = [weight.grad for name, weight in model.named_parameters() if name.endswith(".sinks")]
            assert all(bool(grad.any()) for grad in grads)
            found.append((logits(model), grads))
        torch.testing.assert_close(*found, atol=2e-5, rtol=1e-3)
        for name, weight in model.named_parameters():
            if name.endswith(".sinks"):
                weight.data -= 100
        assert not torch.allclose(logits(model), found[0][0], atol=1e-3)
