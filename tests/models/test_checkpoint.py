import io
import json
from pathlib import Path

import pytest
import torch

from masformer import AttentionPlan, MasformerError, apply_plan, load_model, save_model
from masformer.models.checkpoint import load_config, load_tokenizer
from tiny import ARCHITECTURES, PLAN, letter_tokenizer, tiny, tiny_config


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_checkpoint_reloads_to_identical_logits_and_carries_its_plan(tmp_path, kind):
    model = apply_plan(tiny(kind), PLAN)
    tokens = torch.arange(3, 43)[None]
    save_model(model, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert not torch.equal(tiny(kind)(tokens).logits, model(tokens).logits)
    save_model(again, tmp_path / "twice")
    assert AttentionPlan.from_dict(again.config.masformer) == PLAN
    assert (tmp_path / "twice/config.json").read_text() == (tmp_path / "out/config.json").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "twice"]


def test_wrong_values_are_named(tmp_path):
    with pytest.raises(MasformerError, match="the model has no plan"):
        save_model(tiny("llama"), tmp_path / "out")
    with pytest.raises(MasformerError, match="exists already"):
        save_model(apply_plan(tiny("llama"), PLAN), tmp_path)
    with pytest.raises(MasformerError, match=r"model file missing\.gguf does not exist"):
        load_model("missing.gguf")


def test_overwriting_replaces_a_model_folder_and_nothing_else(tmp_path, monkeypatch):
    other = AttentionPlan.uniform(4, PLAN[0])
    save_model(apply_plan(tiny("llama"), PLAN), tmp_path / "out")
    model = apply_plan(tiny("llama"), other)
    with pytest.raises(MasformerError, match="exists already"):
        save_model(model, tmp_path / "out")
    with pytest.raises(MasformerError, match="is no model folder"):
        save_model(model, tmp_path, overwrite=True)
    before = sorted((file.name, file.read_bytes()) for file in (tmp_path / "out").iterdir())
    rename = Path.rename

    def fail(self, target):
        if self.name == "model":
            raise OSError("disk full")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(MasformerError, match=r"cannot write .*disk full"):
            save_model(model, tmp_path / "out", overwrite=True)
    assert sorted((file.name, file.read_bytes()) for file in (tmp_path / "out").iterdir()) == before
    save_model(model, tmp_path / "out", overwrite=True)
    assert load_config(tmp_path / "out")[1] == other
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_config_alone_tells_the_plan(tmp_path):
    tiny_config("gpt_neo").save_pretrained(tmp_path)
    assert str(load_config(tmp_path / "config.json")[1]) == "full@0,2; window:7"
    with pytest.raises(MasformerError, match="is a config alone"):
        load_model(tmp_path / "config.json")


def test_a_damaged_seal_is_named(tmp_path):
    save_model(apply_plan(tiny("llama"), PLAN), tmp_path / "out")
    file = tmp_path / "out/config.json"
    data = json.loads(file.read_text())
    del data["masformer"]["stock_model_type"]
    file.write_text(json.dumps(data))
    with pytest.raises(MasformerError, match="lacks stock_model_type"):
        load_model(tmp_path / "out")


def test_pickled_weights_are_never_loaded(tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(MasformerError, match="safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("read", [load_config, load_model, load_tokenizer])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_never_run_nor_asked_for(tmp_path, monkeypatch, read, file):
    tiny("llama", vocab_size=257).save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text("open('ran', 'w')")
    data = json.loads((tmp_path / file).read_text())
    code = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": [None, "code.Tokenizer"],
    }
    data |= {"model_type": "strange", "tokenizer_class": "Strange", "auto_map": code}
    (tmp_path / file).write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    if read is load_config and file != "config.json":
        read(tmp_path)
    else:
        with pytest.raises(MasformerError, match="needs code of its own, which is not run here"):
            read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_models_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    for name, message in [
        (tmp_path, "holds no config.json"),
        (tmp_path / "notes.txt", "is a file; allowed"),
        ("nobody/nothing", "no folder nobody/nothing here; as a model of the hub it is not in the cache"),
    ]:
        with pytest.raises(MasformerError, match=message):
            load_model(name)
