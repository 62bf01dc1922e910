"""A checkpoint with a plan: an ordinary object to everybody, that nobody runs without its plan."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    pipeline,
)

from masformer import AttentionPlan, MasformerError, SpanCache, WindowSpan, apply_plan, load_model, save_model
from masformer.models.checkpoint import load_config
from masformer.models.sealing import CODE_FILE, is_sealed, stock_config
from tiny import ARCHITECTURES, GPTS, PLAN, letter_tokenizer, tiny

TOKENS = torch.arange(3, 43)[None]
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def planned(kind="llama", **changes):
    return apply_plan(tiny(kind, **changes), PLAN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a plan and a tokenizer."""
    path = tmp_path_factory.mktemp("sealed") / "model"
    save_model(planned(vocab_size=256), path, letter_tokenizer(eos_token="a"))
    return path


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_transformers_loads_a_checkpoint_with_its_plan_at_work_and_no_class_loads_it_without(tmp_path, kind):
    model = planned(kind)
    save_model(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(TOKENS, **GREEDY), model.generate(TOKENS, **GREEDY))
    assert again.config.to_json_string() == model.config.to_json_string()
    with pytest.raises(Exception, match="needs its attention plan: import masformer"):
        type(model).from_pretrained(tmp_path / "out")


def test_every_head_has_the_plan_and_a_config_alone_can_make_a_model_with_it(tmp_path):
    save_model(planned(), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.num_hidden_layers, is_sealed(config)) == ("llama", 4, True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        for model in (auto.from_pretrained(tmp_path / "out"), auto.from_config(config)):
            cache = model.eval()(TOKENS, use_cache=True).past_key_values
            assert isinstance(cache, SpanCache)
            assert cache.text == str(PLAN)
            assert model.config.architectures == [type(model).__name__]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not info["missing_keys"]
    with pytest.raises(MasformerError, match="call apply_plan first"):
        LlamaForCausalLM(config)(TOKENS)
    assert "LlamaForCausalLM" not in config.architectures  # other programs would run this class, and not the plan
    assert AutoConfig.from_pretrained(tmp_path / "out", return_unused_kwargs=True, other=3)[1] == {"other": 3}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_another_attention_is_refused_rather_than_ignored(folder, attention):
    for load in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(MasformerError, match=f"attn_implementation='{attention}' must go"):
            load(folder, attn_implementation=attention)
    with pytest.raises(MasformerError, match="must go"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation=attention)


def test_tokenizer_pipeline_and_config_files_are_read(folder):
    text = AutoTokenizer.from_pretrained(folder)("the plan")
    assert text["input_ids"] == letter_tokenizer()("the plan")["input_ids"]
    model, tokenizer = load_model(folder)
    answer = pipeline("text-generation", model=str(folder))("the plan", **GREEDY, return_full_text=False)
    expected = model.generate(**tokenizer("the plan", return_tensors="pt"), **GREEDY)[0, 8:]
    assert answer[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert PretrainedConfig.from_json_file(folder / "config.json").transformers_version
    for config in (
        type(model.config).from_pretrained(folder),
        type(model.config).from_json_file(folder / "config.json"),
    ):
        assert config.masformer == PLAN.to_dict()
    again = type(model.config).from_dict(model.config.to_dict())
    assert again.to_json_string() == model.config.to_json_string()


STRANGER = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

folder = sys.argv[1]

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "masformer":
            raise ModuleNotFoundError("No module named 'masformer'", name=name)

def message(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return str(error)
    raise SystemExit(f"{call} went through")

sys.meta_path.insert(0, Missing())
assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]
assert PreTrainedConfig.from_json_file(folder + "/config.json").transformers_version
for call in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
    assert "custom code" in message(call, folder)
    said = message(call, folder, trust_remote_code=True)
    assert "pip install masformer" in said, said
    assert "trust_remote_code=True" in message(call, folder, trust_remote_code=False)
for call in (LlamaForCausalLM.from_pretrained, LlamaConfig.from_pretrained):
    assert "needs its attention plan: import masformer" in message(call, folder)
sys.meta_path.pop(0)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
cache = model(torch.arange(3, 43)[None], use_cache=True).past_key_values
assert cache.text == sys.argv[2], cache
model.save_pretrained(sys.argv[3])
assert sorted(path.name for path in __import__("pathlib").Path(sys.argv[3]).glob("*.py")) == ["masformer_checkpoint.py"]
"""


def test_transformers_alone_reads_the_tokenizer_and_says_what_is_missing(folder, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, str(folder), str(PLAN), str(tmp_path / "saved")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert str(load_config(tmp_path / "saved")[1]) == str(PLAN)


@pytest.mark.parametrize("kind", ["llama", *GPTS])
def test_copies_and_pickles_of_a_model_have_its_plan(kind):
    model = planned(kind)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = {
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
        "deepcopy": copy.deepcopy(model),
    }
    for name, again in copies.items():
        assert torch.equal(logits(again), logits(model)), name
        assert torch.equal(again.generate(TOKENS, **GREEDY), model.generate(TOKENS, **GREEDY)), name
        assert isinstance(again.generate(TOKENS, **GREEDY, return_dict_in_generate=True).past_key_values, SpanCache)
        assert again.config.to_json_string() == model.config.to_json_string(), name
        apply_plan(again, AttentionPlan.uniform(4, WindowSpan(3)))  # it is a copy: nothing is shared
        assert model.config.masformer == PLAN.to_dict(), name


def test_a_config_is_copied_in_every_way_and_shows_what_it_is():
    config = planned().config
    for again in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
        assert type(again) is type(config)
        assert again.to_dict() == config.to_dict()
    shown = repr(config)
    assert '"model_type": "llama"' in shown
    assert str(PLAN) in shown
    assert type(stock_config(config)) is LlamaConfig
    assert not hasattr(stock_config(config), "masformer")


def test_a_spawned_process_takes_a_model():
    code = (
        "import pickle, sys, torch; model = pickle.load(sys.stdin.buffer); "
        "sys.stdout.write(str(model(torch.arange(3, 43)[None], use_cache=True).past_key_values.text))"
    )
    run = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(planned()), capture_output=True)
    assert run.stdout.decode() == str(PLAN), run.stderr.decode()


@pytest.mark.parametrize("kind", ["llama", *GPTS])
def test_folders_of_earlier_versions_load(tmp_path, kind):
    model = planned(kind)
    save_model(model, tmp_path / "out")
    file = tmp_path / "out/config.json"
    data, (stock, plan) = json.loads(file.read_text()), load_config(tmp_path / "out")
    hidden = ("model_type", "architectures", "layer_types")
    seal = plan.to_dict() | {f"stock_{key}": getattr(stock, key, None) for key in hidden}
    layers = {
        key: data["masformer"][f"stock_{key}"] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in data
    }
    data |= {**layers, "masformer": seal, "architectures": ["masformer: load with masformer.load_model"]}
    data["layer_types"] = [f"masformer:{span}" for span in plan]
    del data["auto_map"]
    file.write_text(json.dumps(data))
    (tmp_path / "out" / CODE_FILE).unlink()
    for again in (load_model(tmp_path / "out")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert torch.equal(logits(again), logits(model))
        assert again.config.to_json_string() == model.config.to_json_string()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data["masformer"].pop("stock_model_type"), "lacks stock_model_type"),
        (lambda data: data["masformer"].update(stock_model_type="nothing"), "knows no model type 'nothing'"),
        (lambda data: data.pop("masformer"), "not a plan"),
        (lambda data: data["masformer"].pop("stock_num_hidden_layers"), "num_hidden_layers"),
        (lambda data: data["masformer"].update(num_layers=3), "the plan has 4 layers, but the model has 3"),
    ],
)
def test_a_damaged_seal_is_named_whoever_reads_it(tmp_path, damage, message):
    planned().config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    with pytest.raises(MasformerError, match=message):
        load_model(tmp_path)
    with pytest.raises(Exception, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_in_shards_and_one_pushed_come_with_all_that_reads_them(tmp_path, monkeypatch):
    model = planned()
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path / "shards")[0]), logits(model))
    pushed = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: type("Repo", (), {"repo_id": "me/mine"}))
    upload = lambda self, folder, *_, **__: pushed.append({path.name for path in Path(folder).iterdir()})  # noqa: E731
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr(PretrainedConfig, "_upload_modified_files", upload)
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    model.config.save_pretrained(str(tmp_path / "config"), push_to_hub=True)
    for files in pushed:
        assert {"config.json", CODE_FILE} <= files
    assert len(pushed) == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_set_later_is_named(attention):
    model = apply_plan(tiny("llama"), PLAN)
    model.set_attn_implementation(attention)
    with pytest.raises(
        MasformerError, match=f"attention implementation was set to '{attention}', which follows no plan"
    ):
        model(torch.arange(3, 9)[None])
    apply_plan(model, PLAN)
    model(torch.arange(3, 9)[None])
