"""A checkpoint whose weights or tokenizer are not those of its model is refused, whatever way it comes in."""

import copy
import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from masformer import AttentionPlan, MasformerError, apply_plan, load_model, save_model
from masformer.cli import main
from masformer.export.twins import stock_twin
from masformer.models.checkpoint import load_tokenizer
from masformer.models.weights import load_trained, load_weights
from tiny import PLAN, VOCABULARY, letter_tokenizer, tiny, write_gguf

HEAD = "lm_head.weight"


def rewrite(folder, change):
    """Lets a function of name -> tensor change a folder's weights."""
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})


def reconfigure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(old, new):
    return lambda weights: {re.sub(old, new, name): tensor for name, tensor in weights.items()}


DAMAGES = {
    "a compiled model": (
        renamed("^", "_orig_mod."),
        {},
        r"missing from it are .* and 36 more; left over .*_orig_mod\.",
    ),
    "a wrapped model": (renamed("^", "module."), {}, r"left over in it are module\.lm_head"),
    "a layer less": (without("layers.3."), {}, r"missing from it are model\.layers\.3\.input_layernorm\.weight"),
    "a tensor less": (without("2.mlp.up_proj"), {}, r"missing from it is model\.layers\.2\.mlp\.up_proj\.weight$"),
    "no head": (without("lm_head"), {}, r"missing from it is lm_head\.weight$"),
    "no embedding": (without("embed_tokens"), {}, r"missing from it is model\.embed_tokens\.weight$"),
    "a deeper config": (dict, {"num_hidden_layers": 6, "layer_types": None}, r"model\.layers\.4\..* and 15 more$"),
    "a flatter config": (
        dict,
        {"num_hidden_layers": 3, "layer_types": None},
        r"left over in it are model\.layers\.3\.",
    ),
    "biases unknown to the config": (
        lambda weights: weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        {},
        r"left over in it is model\.layers\.0\.self_attn\.q_proj\.bias$",
    ),
    "biases that only the config has": (
        dict,
        {"attention_bias": True},
        r"missing .*layers\.0\.self_attn\.k_proj\.bias",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_weights_that_are_missing_or_left_over_are_named(tmp_path, name):
    change, settings, message = DAMAGES[name]
    tiny("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    reconfigure(tmp_path, **settings)
    with pytest.raises(MasformerError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_commands_refuse_them_and_so_do_checkpoints_with_a_plan(tmp_path, capsys, kind):
    save_model(apply_plan(tiny(kind), PLAN), tmp_path / "in")
    rewrite(tmp_path / "in", without("2.mlp"))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--plan", "window:5"]) == 2
    assert "does not hold the weights of its model: missing from it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "names"), [
    ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
    ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias",
                  "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
    ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
    ("gpt_neo", ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"]),
    ("mistral", ["model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.0.self_attn.rotary_emb.sin_cached"]),
])  # fmt: skip
def test_what_a_model_computes_itself_may_be_left_over(tmp_path, kind, names):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {name: torch.ones(1, 1, 4, 4) for name in names})
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)[0](tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_tied_head_may_be_there_or_not(tmp_path, kind):
    model = tiny(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    load_model(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {HEAD: weights["model.embed_tokens.weight"].clone()})
    assert torch.equal(load_model(tmp_path)[0].lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("damage", ["a file less", "a file and its lines less", "a line less"])
def test_shards_are_all_needed(tmp_path, damage):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    lost = data["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    assert len(set(data["weight_map"].values())) > 3
    load_model(tmp_path)
    if damage != "a line less":
        (tmp_path / lost).unlink()
    if damage != "a file less":
        kept = {name: file for name, file in data["weight_map"].items() if file != lost}
        index.write_text(json.dumps(data | {"weight_map": kept}))
    with pytest.raises(MasformerError, match=r"cannot load|missing from it"):
        load_model(tmp_path)


def test_a_gguf_file_has_all_weights_or_is_refused(tmp_path):
    assert str(load_plan(write_gguf(tmp_path / "whole.gguf", 4))) == "full"
    part = write_gguf(tmp_path / "part.gguf", 4, ["blk.3.ffn_up.weight", "blk.3.attn_q.weight"])
    with pytest.raises(MasformerError, match=r"part\.gguf does not hold .*missing .*layers\.3\.mlp\.up_proj\.weight"):
        load_model(part)
    with pytest.raises(MasformerError, match=r"does not hold .*missing .*embed_tokens"):
        load_model(write_gguf(tmp_path / "bare.gguf", 4, ["token_embd.weight"]))


@pytest.mark.parametrize(("name", "shape"), [("rope_freqs.weight", (4,)), ("blk.1.attn_q.bias", (32,))])
def test_a_gguf_file_with_more_than_transformers_reads_is_refused(tmp_path, name, shape):
    with pytest.raises(MasformerError, match=f"left over in it is {name}$"):
        load_model(write_gguf(tmp_path / "more.gguf", 4, extra={name: shape}))


def test_merges_that_do_not_fit_the_vocabulary_are_one_line(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate("abcx")}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(MasformerError, match=r"cannot read the tokenizer of"):
        load_model(tmp_path)


def load_plan(path):
    return AttentionPlan.from_dict(load_model(path)[0].config.masformer)


@pytest.mark.parametrize("number", [1, 2])
def test_one_part_of_several_gguf_files_is_named(tmp_path, capsys, number):
    path = write_gguf(tmp_path / f"tiny-0000{number}-of-00002.gguf", 4)
    with pytest.raises(MasformerError, match=r"is one part of 2; join them first"):
        load_model(path)
    assert main(["plan", str(path)]) == 2
    assert load_plan(path.rename(tmp_path / "tiny-00001-of-00001.gguf")).is_full


def test_adapters_beside_a_model_are_named(tmp_path):
    peft = pytest.importorskip("peft")
    tiny("llama").save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MasformerError, match="holds an adapter; merge it"):
        load_model(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "adapter", dirs_exist_ok=True)
    with pytest.raises(MasformerError, match="holds an adapter; merge it"):
        load_model(tmp_path / "adapter")


def test_trained_weights_are_all_of_them_and_no_others():
    model = tiny("llama")
    names = [name for name, _ in model.named_parameters() if "q_proj" in name]
    weights = {name: torch.ones_like(model.get_parameter(name)) for name in names}
    load_trained(model, weights, names, "a run")
    assert all(bool((model.get_parameter(name) == 1).all()) for name in names)
    with pytest.raises(MasformerError, match=r"^a run does not hold .*missing from it is model\.layers\.0"):
        load_trained(model, {name: weights[name] for name in names[1:]}, names, "a run")
    with pytest.raises(MasformerError, match=rf"left over in it is {names[0]}$"):
        load_trained(model, weights, names[1:], "a run")


@pytest.mark.parametrize("tied", [False, True])
def test_whole_states_fill_every_weight(tied):
    model = apply_plan(tiny("llama", tie_word_embeddings=tied), PLAN)
    twin = stock_twin(model)
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}
    if tied:
        load_weights(twin, state, "a state")
    else:
        with pytest.raises(MasformerError, match=rf"missing from it is {HEAD}$"):
            load_weights(twin, state, "a state")
    with pytest.raises(MasformerError, match="left over in it is odd"):
        load_weights(twin, model.state_dict() | {"odd": torch.zeros(1)}, "a state")


MERGES, LETTERS = "#version: 0.2\na b\n", ["a", "b", "c", "Ġ", "ab", "<|endoftext|>"]
VOCAB = json.dumps({letter: index for index, letter in enumerate(LETTERS)})


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gpt_neox"])
def test_vocabulary_files_alone_are_a_tokenizer(tmp_path, kind):
    tiny(kind).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text(VOCAB)
    with pytest.raises(MasformerError, match=r"cannot read the tokenizer of|has no vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text(MERGES)
    assert load_model(tmp_path)[1].encode("abc ab") == [4, 2, 3, 4]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gpt_neox", "llama"])
def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path, kind):
    tiny(kind).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 99}')
    with pytest.raises(MasformerError, match=r"cannot read the tokenizer of|has no vocabulary: its files are missing"):
        load_model(tmp_path)


@pytest.fixture
def beyond(tmp_path):
    """A folder whose tokenizer has one token more than its model, and a text with that token."""
    tiny("llama", vocab_size=257).save_pretrained(tmp_path / "in")
    tokenizer = letter_tokenizer(eos_token="<e>")
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "in")
    (tmp_path / "text.txt").write_text("a<|extra|>b " * 40)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "IN", "--raw", "--prompt", "a<|extra|>b", "--max-new-tokens", "2"],
        ["eval", "perplexity", "IN", "--data", "TEXT", "--lengths", "32"],
        ["search", "IN", "--data", "TEXT", "--length", "32", "--budget", "1", "--local", "window:16", "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_a_text_with_a_token_that_the_model_lacks_is_refused(beyond, capsys, words):
    places = {"TEXT": beyond / "text.txt", "OUT": beyond / "out.yaml", "IN": beyond / "in"}
    code = main([str(places.get(word, word)) for word in words])
    assert code == 2
    assert "the text has the token '<|extra|>', number 257, but the model has rows" in capsys.readouterr().err


def test_a_token_that_the_model_lacks_harms_no_other_text(beyond):
    _, tokenizer = load_model(beyond / "in")
    for one in (tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert one.encode("ab") == letter_tokenizer().encode("ab")
        assert one(["ab", ""], return_tensors=None)["input_ids"] == [one.encode("ab"), []]
        for text in ("<|extra|>", ["ab", "a<|extra|>"]):
            with pytest.raises(MasformerError, match="number 257"):
                one(text)
    tokenizer.save_pretrained(beyond / "again")
    assert len(AutoTokenizer.from_pretrained(beyond / "again")) == 258


def test_a_larger_embedding_than_the_vocabulary_is_as_good(tmp_path):
    tiny("llama", vocab_size=320).save_pretrained(tmp_path)
    letter_tokenizer(eos_token="<e>").save_pretrained(tmp_path)
    assert len(load_model(tmp_path)[1]) == 257 > VOCABULARY
