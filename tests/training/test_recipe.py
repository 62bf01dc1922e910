import copy

import pytest
import yaml
from small import SETTINGS, recipe_file, settings

from masformer import MasformerError
from masformer.data.sources import Source
from masformer.training.recipe import Recipe, load_recipe


def test_a_recipe_reads_back_what_it_writes(tmp_path):
    recipe = load_recipe(recipe_file(tmp_path, lora__rank=4, evaluation__sources={"a": {"files": ["b.txt"]}}))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert recipe.evaluation_lengths == [64]


def test_settings_of_the_command_line_take_the_place_of_those_in_the_file(tmp_path):
    words = ["--training.steps", "9", "--data.sources.python.limit=5", "--training.learning-rate", "3e-4"]
    words += ["--lora.rank", "2", "--evaluation.sources.held.files", "[a.txt, b.txt]", "--output", "elsewhere"]
    recipe = load_recipe(recipe_file(tmp_path), words)
    assert (recipe.training.steps, recipe.training.learning_rate, recipe.output) == (9, 3e-4, "elsewhere")
    assert recipe.data.sources["python"].limit == 5
    assert recipe.evaluation.sources["held"].files == ["a.txt", "b.txt"]
    assert recipe.lora.rank == 2
    assert load_recipe(recipe_file(tmp_path, lora__rank=2), ["--lora", "null"]).lora is None


def test_one_value_is_a_list_of_one(tmp_path):
    files = {"a": {"files": "a.txt"}}
    recipe = load_recipe(recipe_file(tmp_path, data__sources=files), ["--evaluation.sources.a.files", "b.txt"])
    assert recipe.data.sources["a"] == Source(files=["a.txt"]) == Source(files="a.txt")
    assert recipe.evaluation.sources["a"].files == ["b.txt"]
    words = ["--evaluation.lengths", "32", "--evaluation.sources.a.files", "[b.txt]", "--lora.targets", "q_proj"]
    recipe = load_recipe(recipe_file(tmp_path), words)
    assert (recipe.evaluation.lengths, recipe.lora.targets) == ([32], ["q_proj"])


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, text):
    assert load_recipe(recipe_file(tmp_path), ["--training.learning_rate", text]).training.learning_rate == 1e-4


PAIRS = {"pairs": {"files": ["p.jsonl"], "prompt": "p", "target": "t"}}
CHATS = {"chats": {"files": ["c.jsonl"], "messages": "messages"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__stepz": 3}, "unknown setting training.stepz; did you mean steps?"),
        ({"training__stop": 3}, "unknown setting training.stop; allowed: "),  # nothing is near enough
        ({"trainings": {}}, "unknown setting trainings; did you mean training?"),
        ({"data__sources__python__where_": {}}, "unknown setting data.sources.python.where_; did you mean where?"),
        ({"training__steps": "many"}, "training.steps must be a whole number, got 'many'"),
        ({"training__steps": 2.5}, "training.steps must be a whole number, got 2.5"),
        ({"training__steps": True}, "training.steps must be a whole number, got True"),
        ({"training__steps": 0}, "training.steps must be at least 1, got 0"),
        ({"training__learning_rate": -1}, "training.learning_rate must be above 0, got -1.0"),
        ({"training__learning_rate": "fast"}, "training.learning_rate must be a number, got 'fast'"),
        ({"training__epochs": 1}, "training needs either steps or epochs"),
        ({"training__warmup_steps": 9}, "warmup_steps 9 is more than the 6 steps; give at most 6, or for a"),
        ({"training__schedule": "step"}, "training.schedule 'step' is not allowed; allowed: cosine, constant, linear"),
        ({"training__precision": "int8"}, "training.precision 'int8' is not allowed; allowed: float32, bfloat16"),
        ({"training__rows": 3, "training__device_rows": 2}, "must be a multiple of training.device_rows 2"),
        ({"training__report_to": ["slack"]}, "training.report_to 'slack' is not allowed; allowed: wandb, mlflow"),
        ({"training__betas": [0.9]}, "training.betas must be two numbers"),
        ({"training__checkpointing": 1}, "training.checkpointing must be true or false, got 1"),
        ({"model__config": None}, "model needs a source"),
        ({"model__config": {"hidden_size": 3}}, "model.config needs a model_type"),
        ({"model__tokenizer": None}, "model.tokenizer is needed to start from scratch"),
        ({"model__full": 2}, "give either plan or full, placement and local"),
        ({"model__plan": None, "model__full": 2}, "full and placement need local"),
        ({"model__plan": None, "model__local": "window:4"}, "local needs full or placement"),
        ({"model__position_method": "yarn"}, "model.position_method does nothing without max_positions"),
        ({"model__max_positions": 256}, "model.max_positions does nothing from scratch"),
        ({"model__backend": "fast"}, "model.backend 'fast' is not allowed"),
        ({"data__sources": {}}, "data.sources needs at least one source"),
        ({"data__sources": {"a": {}}}, "data.sources.a: a source needs one of files, hub and builtin, got none"),
        ({"data__sources": {"a": {"files": {"a": "b"}}}}, "data.sources.a.files must be a list, got"),
        ({"data__sources": {"a": {"files": 3}}}, "data.sources.a.files must be text, got 3"),
        (
            {"data__sources": {"a": {"files": ["b"], "messages": "m", "field": "f"}}},
            "do nothing where messages is given",
        ),
        ({"data__sources": {"a": {"builtin": "python-topics", "messages": "m"}}}, "has no fields"),
        ({"data__sources": CHATS, "data__packing": "across"}, "data.packing across is for texts; chats are always"),
        ({"data__sources": CHATS, "data__cut": "middle"}, "data.cut does nothing for chats"),
        ({"data__sources": CHATS | PAIRS}, "data.sources mixes prompt/target pairs and conversations; give one kind"),
        ({"evaluation__sources": CHATS}, "evaluation.sources must be of the kind that is trained on"),
        ({"data__length": 1}, "data.length must be at least 2, got 1"),
        ({"data__cut": "middle"}, "data.cut does nothing for texts"),
        ({"data__template": "{prompt}!"}, "data.template does nothing for texts"),
        ({"data__sources": PAIRS, "data__packing": "across"}, "data.packing across is for texts"),
        (
            {"data__sources": PAIRS | SETTINGS["data"]["sources"]},
            "data.sources mixes plain texts and prompt/target pairs",
        ),
        ({"evaluation__every": 3}, "evaluation does nothing without evaluation.sources"),
        ({"evaluation__sources": PAIRS}, "evaluation.sources must be of the kind that is trained on"),
        ({"checkpoints__keep": 0}, "checkpoints.keep must be at least 1, got 0"),
        ({"lora__dropout": 1}, "lora.dropout must be at least 0 and below 1"),
        ({"output": ""}, "output must name a folder"),
        ({"output": None}, "setting output is missing"),
        ({"model": "gpt2"}, "model must hold settings, got 'gpt2'"),
    ],
)
def test_wrong_settings_are_named_in_one_line(tmp_path, changes, message):
    with pytest.raises(MasformerError) as error:
        load_recipe(recipe_file(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("a: [", [], "cannot read the recipe"),
        ("- a", [], "must hold settings"),
        ("output: a\noutput: b", [], "'output' is there twice"),
        ("{}", ["--training.steps"], "--training.steps needs a value"),
        ("{}", ["training.steps=3"], "cannot read 'training.steps=3'; settings are written --name.name VALUE"),
        ("{}", ["--a", "[1"], "cannot read the value of --a"),
        ("output: a", ["--output.b", "1"], "--output.b: output holds no settings"),
    ],
)
def test_files_and_words_that_cannot_be_read_are_named(tmp_path, content, words, message):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(MasformerError) as error:
        load_recipe(tmp_path / "recipe.yaml", words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named():
    with pytest.raises(MasformerError, match=r"recipe nowhere\.yaml does not exist"):
        load_recipe("nowhere.yaml")


def test_every_default_stands_in_what_is_written(tmp_path):
    written = yaml.safe_load(Recipe.from_dict(settings(tmp_path)).to_yaml())
    assert written["training"]["clip"] == 1.0
    assert written["logging"] == {"every": 1, "tensorboard": False}
    assert "report_to" not in written["training"], "recipes without it keep their fingerprints"
    assert "messages" not in written["data"]["sources"]["python"]
    before = copy.deepcopy(written)
    assert Recipe.from_dict(written).to_dict() == before
