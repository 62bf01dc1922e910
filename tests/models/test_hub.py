import json

import pytest

from masformer import MasformerError, load_model
from masformer.models import hub
from masformer.models.checkpoint import load_config, load_tokenizer
from masformer.training.model import recipe_tokenizer
from masformer.training.recipe import ModelRecipe
from tiny import tiny_config


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with models, and a hub that nobody may ask more than once."""
    monkeypatch.chdir(tmp_path)
    asked = []

    class Session:
        def head(self, endpoint, timeout):
            asked.append(endpoint)
            raise ConnectionError

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(hub.constants, "is_offline_mode", lambda: False)
    answers = hub._answers
    answers.cache_clear()
    for name in ("tiny-llama", "runs/first-run"):
        (tmp_path / name).mkdir(parents=True)
        tiny_config("llama").save_pretrained(tmp_path / name)
    yield asked
    answers.cache_clear()


def of_a_recipe(name):
    return recipe_tokenizer(ModelRecipe(source="tiny-llama", tokenizer=name))


@pytest.mark.parametrize("read", [load_config, load_model, load_tokenizer, of_a_recipe])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-lama", "no folder tiny-lama here; near: tiny-llama (a model of the hub is named as OWNER/tiny-lama)"),
        ("./tiny-lama", "no folder ./tiny-lama here; near: tiny-llama"),
        ("runs/firstrun", "no folder runs/firstrun here; near: runs/first-run"),
        ("/nowhere/at/all", "no folder /nowhere/at/all here"),
        ("tiny-lama/", "no folder tiny-lama/ here; near: tiny-llama"),
        ("~/tiny-llama", "no folder ~/tiny-llama here"),
    ],
)
def test_a_mistyped_folder_is_told_without_asking_the_hub(here, read, name, message):
    with pytest.raises(MasformerError) as error:
        read(name)
    assert str(error.value) == message
    assert here == []


@pytest.mark.parametrize("name", ["owner/model", "gpt2"])
def test_a_hub_out_of_reach_is_asked_once(here, name):
    for _ in range(2):
        with pytest.raises(
            MasformerError, match=f"no folder {name} here; as a model of the hub it is not in the cache"
        ):
            load_config(name)
        with pytest.raises(MasformerError, match=f"no folder {name} here; as a model of the hub"):
            of_a_recipe(name)
    assert len(here) == 1


@pytest.mark.parametrize("name", ["owner/model", "tiny-lama"])
def test_a_model_in_the_cache_is_read_from_there_while_the_hub_is_out_of_reach(here, name, tmp_path, monkeypatch):
    kept = tmp_path / "cached.json"
    kept.write_text(json.dumps(tiny_config("llama").to_dict()))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **options: str(kept))
    assert hub.is_cached_alone(name)
    assert len(here) == 1


def test_a_hub_that_answers_is_asked_for_the_model(here, monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda endpoint: True)
    assert not hub.is_cached_alone("owner/model")
    assert not hub.is_cached_alone("gpt2")
