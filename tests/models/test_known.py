"""What is kept of a model is what its classes say, found by all that it follows from."""

import json
import shutil

import pytest

from masformer import AttentionPlan, MasformerError, apply_plan, cli
from masformer.cost import ModelShape
from masformer.models import known
from masformer.models.checkpoint import check_plan, load_config
from masformer.models.known import find_model, kept_model
from masformer.models.positions import position_limit
from tiny import ARCHITECTURES, tiny, tiny_config, write_gguf

OWN_SINKS = ["gpt_oss"]
HEADS = "full@1:0; window:4"


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """Where facts are kept, and nothing is yet."""
    monkeypatch.setattr(known, "user_cache", lambda name: tmp_path / "cache" / name)
    return tmp_path


def the_kept_file(places):
    (path,) = (places / "cache" / "models").iterdir()
    return path


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *OWN_SINKS])
def test_what_is_kept_is_what_the_classes_say(places, kind):
    tiny_config(kind).save_pretrained(places)
    assert kept_model(places) is None
    found = find_model(places)
    config, own = load_config(places)
    assert (found.kind, found.own, found.own.kv_heads) == (config.model_type, own, own.kv_heads)
    assert (found.shape, found.positions) == (ModelShape.of(config), position_limit(config))
    for plan in ("window:4", "window:4+sink", "full@1; window:4+sink@3; window:4"):
        plan, said = AttentionPlan.parse(plan, 4), []
        for check in (found.check, kept_model(places).check, lambda plan: check_plan(config, plan)):
            try:
                said.append(check(plan) and None)
            except MasformerError as error:
                said.append(str(error))
        assert said[0] == said[1] == said[2]
        assert (said[0] is None) == (kind not in OWN_SINKS or "sink" not in str(plan))
    for name in (places, places / "config.json"):  # the same bytes
        assert kept_model(name) == found
        assert kept_model(name).own.kv_heads == own.kv_heads


def test_plans_that_checkpoints_carry_are_kept_too(places):
    apply_plan(tiny("llama"), HEADS).save_pretrained(places)
    assert find_model(places) == kept_model(places)
    assert str(kept_model(places).own) == HEADS


def test_a_gguf_file_is_known_by_place_size_and_time(places):
    path = write_gguf(places / "a.gguf", 3)
    assert find_model(path) == kept_model(path)
    moved = shutil.copy(path, places / "b.gguf")
    assert kept_model(moved) is None
    write_gguf(path, 2)
    assert kept_model(path) is None


@pytest.mark.parametrize("change", ["config", "masformer", "transformers"])
def test_nothing_is_known_of_what_has_changed(places, monkeypatch, change):
    config = places / "config.json"
    tiny_config("llama").save_pretrained(places)
    find_model(places)
    assert kept_model(config) is not None
    if change == "config":
        config.write_text(config.read_text().replace("48", "64"))
    elif change == "masformer":
        monkeypatch.setattr(known.masformer, "__version__", "0.0")
    else:
        monkeypatch.setattr(known, "version", lambda name: f"another {name}")
    assert kept_model(config) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "",
        lambda data: "[]",
        lambda data: json.dumps(data | {"own": "full"}),
        lambda data: json.dumps(data | {"own": {"plan": "full@9; window:4", "num_layers": 4}}),
        lambda data: json.dumps(data | {"shape": data["shape"] | {"num_layers": 0}}),
        lambda data: json.dumps(data | {"positions": "many"}),
        lambda data: json.dumps({name: value for name, value in data.items() if name != "shape"}),
    ],
    ids=range(7),
)
def test_what_is_no_such_file_is_found_out_again(places, damage):
    tiny_config("llama").save_pretrained(places)
    found = find_model(places)
    path = the_kept_file(places)
    path.write_text(damage(json.loads(path.read_text())))
    assert kept_model(places) is None
    assert find_model(places) == kept_model(places) == found


def test_what_cannot_be_kept_is_still_found(places):
    tiny_config("llama").save_pretrained(places)
    (places / "cache").write_text("a file where a folder should be")
    assert find_model(places).kind == "llama"
    assert kept_model(places) is None


def test_the_command_says_the_same_of_both(places, capsys):
    tiny_config("gpt_oss").save_pretrained(places)
    said = []
    for _ in range(2):
        assert cli.main(["plan", str(places), "--plan", HEADS, "--seq", "64", "--devices", "2"]) == 0
        said.append(capsys.readouterr().out)
    assert cli.main(["plan", str(places), "--plan", "window:4+sink"]) == 2
    assert "have sinks of their own" in capsys.readouterr().err
    assert said[0] == said[1]
    assert "gpt_oss, 4 layers" in said[0]
