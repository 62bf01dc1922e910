"""Settings that editors know: schemas are current, and say of every setting what its class does."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
import yaml
from small import recipe_file, settings

from masformer import AttentionPlan, MasformerError, cli
from masformer.attention import BACKENDS
from masformer.data.packing import PACKINGS
from masformer.data.pairs import CUTS
from masformer.plan import PLAN_SUFFIXES, SCHEMA
from masformer.plan_file import PlanFile
from masformer.schema import build, schema_text
from masformer.study import Scale
from masformer.study import settings as stages
from masformer.training import recipe as recipes
from masformer.training.recipe import Recipe, load_recipe
from masformer.training.trainer import SCHEDULES

ROOT = Path(__file__).parent.parent.parent
SCALES = ROOT / "src" / "masformer" / "study" / "scales"
RESULTS = ROOT / "benchmarks" / "results"
KEPT = {
    "train": (Recipe, ROOT / "recipes" / "recipe.schema.json"),
    "reproduce": (Scale, SCALES / "scale.schema.json"),
    "plan": (PlanFile, SCHEMA),
}
FILES = {
    "train": sorted((ROOT / "recipes").glob("*.yaml")),
    "reproduce": sorted(SCALES.glob("*.yaml")),
    "plan": sorted(RESULTS.glob("*.yaml")),
}


@pytest.mark.parametrize("command", KEPT)
def test_the_schema_that_is_kept_is_the_one_that_is_printed(capsys, command):
    cls, path = KEPT[command]
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--schema"])
    printed = capsys.readouterr().out
    assert printed == schema_text(cls)
    assert json.loads(printed) == json.loads(path.read_text())


@pytest.mark.parametrize("command", KEPT)
def test_files_name_their_schema_in_the_first_line(command):
    _, schema = KEPT[command]
    assert FILES[command]
    for path in FILES[command]:
        first, _, place = path.read_text().splitlines()[0].partition("=")
        assert first == "# yaml-language-server: $schema"
        assert (path.parent / place).samefile(schema)


@pytest.mark.parametrize("suffix", PLAN_SUFFIXES)
def test_plan_files_that_are_written_name_their_schema(tmp_path, suffix):
    path = tmp_path / f"plan{suffix}"
    plan = AttentionPlan.parse("full@1:0; window:8", 4, 2)
    plan.save(path, found={"by": "hand"})
    assert AttentionPlan.load(path) == plan
    lines = path.read_text().splitlines()
    named = json.loads(path.read_text())["$schema"] if suffix == ".json" else lines[0].partition("$schema=")[2]
    assert Path(url2pathname(urlparse(named).path)).samefile(SCHEMA)
    assert named in lines[1 if suffix == ".json" else 0]


@pytest.mark.parametrize(("cls", "count"), [(Recipe, 6), (Scale, 6), (PlanFile, 1)])
def test_every_setting_is_described_and_no_other_allowed(cls, count):
    schema = json.loads(schema_text(cls))
    modules = [*vars(recipes).values(), *vars(stages).values(), Scale, PlanFile]
    classes = {each.__name__: each for each in modules if is_dataclass(each)}
    known = {cls.__name__: schema} | schema.get("$defs", {})
    assert len(known) >= count
    for name, part in known.items():
        assert list(part["properties"]) == [field.name for field in fields(classes[name])]
        assert part.get("additionalProperties") is (None if cls is PlanFile else False)  # plan files have notes beside
        assert all(option["description"] for option in part["properties"].values())
        assert part["description"]


def test_choices_are_those_that_the_work_knows():
    assert set(get_args(recipes.Backend)) == {*BACKENDS}
    assert set(get_args(recipes.Schedule)) == {*SCHEDULES}
    assert (get_args(recipes.Packing), get_args(recipes.Cut)) == (PACKINGS, CUTS)
    options = json.loads(schema_text(Recipe))["$defs"]["TrainingRecipe"]["properties"]
    assert options["schedule"]["enum"] == [*SCHEDULES]


def test_names_that_yaml_takes_for_numbers_are_names(tmp_path):
    sources = {1: {"files": "a.txt"}}
    assert list(load_recipe(recipe_file(tmp_path, data__sources=sources)).data.sources) == ["1"]
    with pytest.raises(MasformerError, match=r"^unknown setting 3; allowed: output, model"):
        Recipe.from_dict(settings(tmp_path) | {3: 4})


def test_what_is_no_text_number_or_day_is_refused(tmp_path):
    for value in (yaml.safe_load("2020-01-01"), b"x", {"a": 1}):
        with pytest.raises(MasformerError, match=r"^output must be text, got "):
            Recipe.from_dict(settings(tmp_path) | {"output": value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[full]", "it must hold settings, got ['full']"),
        ("num_layers: 4", "setting plan is missing"),
        ("plan: 8", "plan must be text, got 8"),
        ("plan: full\nnum_layers: '4'", "num_layers must be a whole number, got '4'"),
        ("plan: full\nnum_layers: true", "num_layers must be a whole number, got True"),
        ("plan: full\nkv_heads: 0", "kv_heads must be at least 1, got 0"),
        ("plan: full\nnum_layers: 3", "the plan has 3 layers, but the model has 4"),
    ],
)
def test_a_wrong_plan_file_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(MasformerError) as caught:
        AttentionPlan.load(path, 4)
    assert str(caught.value) == f"plan file {path}: {message}"


def test_a_plan_file_keeps_what_else_it_holds(tmp_path):
    AttentionPlan.parse("full@1; window:8", 4).save(tmp_path / "plan.yaml", found={"by": "hand"})
    data = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert data["found"] == {"by": "hand"}
    assert build(PlanFile, data) == PlanFile("full@1; window:8", 4)
