"""What a folder holds is kept or refused: heads, shared tensors, ends of texts, layers beyond any model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from masformer import FullSpan, MasformerError, WindowSpan, apply_plan, load_model, save_model
from masformer.models.checkpoint import load_config
from masformer.models.native import native_plan
from tiny import PLAN, VOCABULARY, tiny, tiny_config

TOKENS = torch.arange(3, 43)[None]


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def change(folder, changes):
    file = folder / "model.safetensors"
    save_file(changes(load_file(file)), file, {"format": "pt"})


def share_head(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def share_layers(model):
    model.model.layers[3].mlp = model.model.layers[0].mlp


def share_a_storage(model):
    both = torch.randn(2, *model.lm_head.weight.shape)
    model.model.embed_tokens.weight, model.lm_head.weight = map(torch.nn.Parameter, both)


@pytest.mark.parametrize("share", [share_head, share_layers, share_a_storage])
def test_tensors_shared_by_hand_are_written_for_each_place(tmp_path, share):
    model = apply_plan(tiny("llama"), PLAN)
    share(model)
    save_model(model, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), logits(model))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_head_beside_a_config_that_ties_it_is_kept(tmp_path, kind):
    tiny(kind, tie_word_embeddings=True).save_pretrained(tmp_path / "in")
    head = torch.randn(VOCABULARY, 32)
    change(tmp_path / "in", lambda weights: weights | {"lm_head.weight": head})
    model, _ = load_model(tmp_path / "in")
    assert torch.equal(model.lm_head.weight, head)
    save_model(model, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), logits(model))


@pytest.mark.parametrize("part", ["model.norm", "layers.2.", "lm_head"])
def test_transformers_too_loads_no_checkpoint_with_a_plan_that_lacks_weights(tmp_path, part):
    save_model(apply_plan(tiny("llama"), PLAN), tmp_path / "out")
    change(tmp_path / "out", lambda weights: {name: each for name, each in weights.items() if part not in name})
    with pytest.raises(MasformerError, match=f"does not hold the weights of its model: missing from it .*{part}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_weight_of_another_shape_is_named(tmp_path, name):
    tiny("llama").save_pretrained(tmp_path)
    change(tmp_path, lambda weights: weights | {name: weights[name][:20].clone()})
    with pytest.raises(MasformerError, match=rf"of another shape is {name} \[20.*\] instead of \[32.*\]$"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ['{"eos_token_id": 2', "[]", "", '{"eos_token_id": 2}\x00'])
def test_a_damaged_generation_config_is_refused_for_it_says_where_texts_end(tmp_path, text):
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(MasformerError, match=r"cannot read .*generation_config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("layers", [10**6, 2**63])
def test_more_layers_than_any_model_has_are_refused_at_once(tmp_path, layers):
    tiny("llama").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": layers, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(MasformerError, match="num_hidden_layers must be at most 1024"):
        load_config(tmp_path)


def test_a_window_beyond_every_text_is_full_attention_and_chunks_are_named():
    assert native_plan(tiny_config("mistral", sliding_window=2**40)).spans == (FullSpan(),) * 4
    assert native_plan(tiny_config("mistral", sliding_window=2**31 - 1))[0] == WindowSpan(2**31 - 1)
    with pytest.raises(MasformerError, match="no mask that is causal"):
        native_plan(tiny_config("llama4_text", attention_chunk_size=7, num_local_experts=2, sliding_window=None))
