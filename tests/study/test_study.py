"""Studies: every stage, what is done once stays, and what cannot be done is named."""

import json
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from rich.console import Console

from masformer import MasformerError, cli, study
from masformer.data.sources import Source
from masformer.study import works
from masformer.study.models import unpacked
from masformer.study.run import Stage, run_study
from masformer.study.units import Estimate, Place, Unit, in_order
from masformer.study.verdicts import FAILS
from masformer.training.dry_run import matrix_rate
from masformer.training.recipe import ModelRecipe, load_recipe
from masformer.training.run import Outcome

SHAPE = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
PYTHON = {"builtin": "python-topics", "limit": 3}
SOME = ["heads by tail", "layers by tail"]
MINI = {
    "about": "Seconds.",
    "where": {
        "model": {"source": "@model"},
        "choose": {"papers": {"files": ["@papers"], "field": "document"}},
        "texts": {"papers": {"files": ["@papers"], "field": "document", "limit": 3}},
        "budgets": [1],
        "searches": {
            "heads by tail": {"by": "heads", "criteria": "tail"},
            "layers by tail": {"by": "layers", "criteria": "tail"},
            "layers one by one": {"by": "layers", "method": "sensitivity"},
            "layers of before": {"by": "layers", "known": {"1": {"papers": "full@2; window:8"}}},
        },
        "better": [["heads by tail", "layers by tail"]],
        "as_good": [["layers by tail", "layers one by one"]],
        "local": "window:8",
        "length": 32,
        "windows": 2,
        "random": 2,
        "controls": 2,
        "retrieval": {"tasks": ["passkey"], "depths": [50], "examples": 2, "length": 800, "searches": SOME},
    },
    "spans": {
        "model": {"source": "@model"},
        "text": {"files": ["@papers"], "field": "document", "limit": 3},
        "groups": {"sizes": ["block:16", "window:8"], "sinks": ["window:8", "window:8+2"]},
        "equal": [["block:16", "window:8"], ["block:16", "window:8+2"]],
        "length": 32,
        "full": "1",
    },
    "data": {"papers": "JSON lines with document and summary"},
    "language": {
        "start": {
            "model": {"config": SHAPE, "tokenizer": "bytes"},
            "data": {"sources": {"python": PYTHON}, "length": 32},
            "training": {"steps": 2, "rows": 2},
        },
        "recipe": {
            "model": {"max_positions": 1024, "position_method": "linear"},
            "data": {"sources": {"python": PYTHON}, "length": 64},
            "training": {"steps": 2, "rows": 2},
            "evaluation": {"sources": {"python": PYTHON}, "lengths": [64], "every": 1, "max_tokens": 128},
        },
        "plans": {"all full": "full", "all local": "block:32", "1 full": "full@1; block:32"},
        "seeds": [0],
        "text": PYTHON,
        "lengths": [32, 64],
        "max_tokens": 128,
        "long": ["1 full"],
    },
    "pretrained": {
        "recipe": {
            "model": {"source": "@model", "config": {"hidden_size": 16, "model_type": "llama"}},
            "data": {"sources": {"papers": {"files": ["@papers"], "field": "document"}}, "length": 48},
            "training": {"steps": 2, "rows": 1},
            "evaluation": {"sources": {"python": PYTHON}, "lengths": [48], "every": 1, "max_tokens": 96},
        },
        "plans": {"all full": "full", "all local": "window:4", "all block": "block:8"},
        "curves": {
            "heads by gain": {"50%": "full@0:0,1:1; window:4", "80%": "full@0:0,1,2:1; window:4"},
            "layers": {"50%": "full@1; window:4", "80%": "full@0-1; window:4"},
            "windows": {"80%": "window:24"},
        },
        "better": [["heads by gain", "layers"], ["heads by gain", "windows"]],
        "untrained": True,
        "untouched": ["windows", "heads by gain, 80%"],
        "once": ["all block"],
        "models_stay": False,
        "equal": [["all block", "all local"]],
        "seeds": [0, 1],
        "text": PYTHON,
        "lengths": [48],
        "max_tokens": 96,
        "retrieval": {
            "tasks": ["passkey"],
            "depths": [50],
            "examples": 2,
            "length": 800,
            "plans": ["all full", "all local", "layers, 50%"],
            "seeds": [0],
        },
    },
    "generation": {
        "beside": {
            "model": {"source": "@model"},
            "plans": {"all full": "full", "all local": "window:8", "1 head": "full@1:0; window:8"},
            "text": {"files": ["@papers"], "field": "document", "limit": 3},
            "length": 32,
            "retrieval": {
                "tasks": ["passkey", "niah_multiquery"],
                "depths": [50],
                "examples": 2,
                "length": 1000,
                "room": 8,
            },
            "answers": {
                "text": {"files": ["@papers"], "prompt": "document", "target": "queries.answer"},
                "query": "queries.query",
                "template": "{document} ? {query}",
                "length": 64,
                "max_new_tokens": 4,
            },
        },
        "retrieval": {
            "model": {"source": "@model"},
            "plans": {"all full": "full", "all local": "window:8"},
            "lengths": [800],
            "depths": [50],
            "examples": 2,
        },
        "summarization": {
            "recipe": {
                "model": {"source": "@model", "config": {"hidden_size": 16, "model_type": "llama"}},
                "data": {
                    "sources": {"papers": {"files": ["@papers"], "prompt": "document", "target": "summary"}},
                    "length": 48,
                },
                "training": {"steps": 1, "rows": 1},
            },
            "plans": {"all full": "full", "all local": "window:8", "1 full": "full@1; window:8"},
            "text": {"files": ["@papers"], "prompt": "document", "target": "summary", "limit": 3},
            "template": "{document} :",
            "lengths": [24, 48],
            "max_new_tokens": 4,
        },
    },
    "cost": {
        "model": {"source": "@model"},
        "plans": {"1 full": "full@1; window:8"},
        "counted": [32, 64],
        "benches": {"prefill": [32]},
        "repeats": 2,
    },
}


def scale_file(folder, **changes):
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(MINI | changes, sort_keys=False))
    return path


def mini(folder, *stages):
    """A scale of these stages alone, that needs neither data nor a model."""
    path = folder / "mini.yaml"
    found = {"about": "Seconds."} | {name: MINI[name] for name in stages}
    path.write_text(yaml.safe_dump(found, sort_keys=False))
    return path


def run(*words):
    return cli.main(["reproduce", *map(str, words)])


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """The stage language and what trains on from it, done once."""
    folder = tmp_path_factory.mktemp("language")
    words = ("--scale", mini(folder, "language"), "--out", folder / "study", "--stage", "language", "training")
    assert run(*words) == 0
    return folder / "study"


def test_every_stage_runs_and_reports(language, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = [f"{word} and {word} again, and so on without an end to it. " * 4 for word in ("one", "two", "three")]
    queries = [{"query": "what?", "answer": "one and two"}, {"query": "who?", "answer": "three"}]
    rows = [{"document": text, "summary": f"about {text[:5]}", "queries": queries} for text in documents]
    (tmp_path / "papers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(language, tmp_path / "start")
    model = tmp_path / "start/models/language-train-1-full-seed-0/model"
    words = ["--data", "papers.jsonl", "--model", model, "--out", "study"]
    assert run("--scale", scale_file(tmp_path), *words) == 0
    text = (tmp_path / "study/report.md").read_text()
    titles = ["Where", "Which local span", "Cost", "Language modelling", "Continual training", "Generation"]
    for title in (*titles, "Language modelling, from a pretrained model"):
        assert f"## {title}\n" in text
    assert "Missing" not in text
    assert "nan" not in text
    ways = json.loads((tmp_path / "study/training.json").read_text())["ways"]
    assert ways[0]["training_flops"] < ways[1]["training_flops"], "short sequences cost less"
    differences = json.loads((tmp_path / "study/generation.json").read_text())["differences of summaries"]
    assert {row["length"] for row in differences} == {24, 48}
    verdicts = json.loads((tmp_path / "study/spans.json").read_text())["verdicts"]
    assert [verdict["claim"].split(" are ")[1].split(" of ")[0] for verdict in verdicts] == [
        "as good as windows",
        "as good as windows with sinks",
    ]
    assert "less window:8 (" in verdicts[0]["why"]
    assert "less window:8+2 (" in verdicts[1]["why"]
    where = json.loads((tmp_path / "study/where.json").read_text())
    found = where["papers"]
    assert {row["full_bytes"] for row in found} == {0, 1 / 3, 1}
    (lost,) = where["lost by what is full"]
    assert lost["full"] == "2 heads or 1 layer"
    assert set(lost) == {
        "full",
        "heads_by_tail",
        "layers_by_tail",
        "layers_one_by_one",
        "layers_of_before",
        "best_rule_or_random",
    }
    pretrained = json.loads((tmp_path / "study/pretrained.json").read_text())
    assert {row["step"] for row in pretrained["curves"]} >= {1, 2}
    claims = {verdict["claim"]: verdict["why"] for verdict in pretrained["verdicts"]}
    blocks = next(each for each in pretrained["verdicts"] if each["claim"].startswith("Blocks"))
    assert blocks["why"].startswith("all block less all local (")
    assert ("one seed of all block" in blocks["why"]) == (blocks["answer"] != "not decidable at this scale")
    assert [(row["name"], row["task"], row["length"]) for row in pretrained["retrieval"]] == [
        (name, "passkey", 800) for name in ("all full", "all local", "layers, 50%")
    ]
    seeds = {row["name"]: row["seeds"] for row in pretrained["results"]}
    assert seeds == dict.fromkeys(seeds, 2) | {"all block": 1}
    names = {key: {row["name"] for row in pretrained[key]} for key in ("results", "before training")}
    assert names["before training"] - names["results"] == {"windows, 80%", "heads by gain, 80%"}, (
        "these are not trained on"
    )
    assert [row["share"] for row in pretrained["lost by cost"]] == ["50%", "80%"]
    cells = {
        row["share"]: [" \u2192 " in row.get(line, "") for line in ("heads_by_gain", "layers", "windows")]
        for row in pretrained["lost by cost"]
    }
    assert cells == {"50%": [True, True, False], "80%": [True, True, True]}
    assert pretrained["lost by cost"][1]["windows"].endswith("\u2192 -"), "of what is not trained on there is no figure"
    compared = {claim: why for claim, why in claims.items() if claim.startswith("At equal cost")}
    assert [claim.split("cost, ")[1] for claim in compared] == [
        "heads by gain lose less than layers (before training).",
        "heads by gain lose less than layers (after training).",
        "heads by gain lose less than windows (before training).",
    ]
    before, after, *_ = compared.values()
    assert ("at 80%" in before, "at 80%" in after) == (True, False)
    first = text.split("## Verdicts")[0]
    sentences = first.split("## In short\n")[1].split("![")[0].split("\n\n")
    sentences = [each.strip() for each in sentences if each.strip()]
    assert 3 < len(sentences) <= 5, "read in a minute"
    assert sentences[0].startswith("As the model is, on papers, window:8 everywhere loses")
    assert re.findall(r"\]\((.*)\)", first) == ["lost-by-cost.png"], "one figure"
    assert re.findall(r"^\*\*(.*)\*\*$", first, re.MULTILINE) == ["lost by cost"], "one table"
    records = [json.loads(path.read_text()) for path in (tmp_path / "study").glob("*.json")]
    every = [verdict for record in records for verdict in record["verdicts"]]
    failed = [verdict["claim"] for verdict in every if verdict["answer"] == FAILS]
    assert sentences[-1].startswith(f"Of {len(every)} claims {len(failed)} do")
    claims = re.findall(r"^\| (.*?) \|", text.split("## Verdicts")[1].split("\n## ")[0], re.MULTILINE)[2:]
    assert len(claims) == len(every)
    assert set(claims[: len(failed)]) == set(failed), "these come first"
    assert text.count("**lost by cost**") == text.count("](where-papers.png)") == 1
    left = {path.name for path in (tmp_path / "study/models").iterdir()}
    assert not any(name.startswith("pretrained") for name in left), "models are removed once they were measured"
    generation = json.loads((tmp_path / "study/generation.json").read_text())
    asked = [verdict["claim"] for verdict in generation["verdicts"] if verdict["claim"].startswith("What comes close")]
    assert [claim.split(": ")[1] for claim in asked] == [
        "passkey.",
        "niah_multiquery.",
        "ROUGE-L of answers.",
        "exact spans of answers.",
    ]
    assert len(generation["found as it is"]) == 3 * 2
    assert {row["answers"] for row in generation["answers"]} == {6}, "two queries about each of three documents"
    assert all(0 <= row["blank"] <= 6 for row in generation["answers"])
    assert len(where["retrieval"]) == 2 + 2
    asked = [each["claim"] for each in where["verdicts"] if each["claim"].startswith("Of passkey")]
    assert [claim.split("what ")[1].split(" finds")[0] for claim in asked] == ["heads by tail", "layers by tail"]
    assert str(tmp_path) not in text
    assert all(str(tmp_path) not in path.read_text() for path in (tmp_path / "study").glob("*.json"))


def test_an_interrupted_study_goes_on_and_reports_what_is_there(tmp_path, monkeypatch, capsys):
    scale, real, ran = mini(tmp_path, "language"), works.Train.run, []

    def interrupted(self, place, name):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(name)
        return real(self, place, name)

    monkeypatch.setattr(works.Train, "run", interrupted)
    assert run("--scale", scale, "--out", tmp_path / "study") == 130
    assert ran == ["language/start/seed 0", "language/train/all full/seed 0"]
    monkeypatch.setattr(works.Train, "run", lambda self, place, name: ran.append(name) or real(self, place, name))
    assert run("--scale", scale, "--out", tmp_path / "study", "--stage", "language") == 0
    assert len(ran) == len(set(ran)) == 4
    text = (tmp_path / "study/report.md").read_text()
    assert "Missing, not run yet: training/long/1 full/seed 0, training/long/1 full/seed 0/perplexity" in text


@dataclass(frozen=True)
class Slow(works.Work):
    """A unit that takes a while, and may write to a file that others write to."""

    shared: str | None = None
    ran: ClassVar = []

    def estimate(self):
        return Estimate()

    def writes(self):
        return self.shared

    def run(self, place, name):
        self.ran.append(name)
        time.sleep(0.05)
        return {"found": name}


def slow_stage(*units):
    return Stage("slow", None, lambda settings, place: list(units), None)


def test_processes_share_the_units_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("masformer.study.run.WAIT", 0.01)
    monkeypatch.setattr(Slow, "ran", ran := [])
    first = Unit("first", "slow", Slow())
    stage = slow_stage(first, *(Unit(f"then {number}", "slow", Slow(), ("first",)) for number in range(5)))
    places = [Place(tmp_path / "study") for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(run_study, [stage], place) for place in places]:
            done.result()
    assert ran[0] == "first"
    assert sorted(ran) == sorted(unit.name for unit in stage.units(None, places[0]))
    assert {path.suffix for path in (tmp_path / "study/units").iterdir()} == {".json"}


@pytest.mark.parametrize("shared", [None, "journal"])
def test_what_another_process_is_doing_is_left_to_it(shared, tmp_path, monkeypatch):
    """And what writes to the same file."""
    monkeypatch.setattr("masformer.study.run.WAIT", 0.01)
    monkeypatch.setattr(Slow, "ran", ran := [])
    one, other = (Unit(name, "slow", Slow(shared)) for name in ("one", "other"))
    units = {unit.name: unit for unit in (one, other, Unit("free", "slow", Slow()))}
    place = Place(tmp_path / "study")
    place.make()
    with ThreadPoolExecutor() as pool:
        with place.claim(one) as mine:
            assert mine
            done = pool.submit(run_study, [slow_stage(*units.values())], Place(place.folder))
            while "free" not in ran:
                time.sleep(0.01)
            place.keep(one, units, {"found": "here"}, 1.0)
            assert ran == (["free"] if shared else ["other", "free"])
        done.result()
    assert sorted(ran) == ["free", "other"]


def test_a_unit_that_fails_is_free_again(tmp_path, monkeypatch):
    unit = Unit("one", "slow", Slow())
    place = Place(tmp_path / "study")
    with monkeypatch.context() as broken:
        broken.setattr(Slow, "run", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_study([slow_stage(unit)], place)
    run_study([slow_stage(unit)], place)
    assert place.kept(unit, {"one": unit})["result"] == {"found": "one"}


def test_a_model_that_is_gone_is_trained_again_where_something_is_still_to_be_measured_of_it(language, tmp_path):
    words = ("--scale", mini(tmp_path, "language"), "--out", tmp_path / "study", "--stage", "language")
    shutil.copytree(language, tmp_path / "study")
    units, models = tmp_path / "study/units", tmp_path / "study/models"
    before = {path: path.stat().st_mtime_ns for path in units.glob("language-train-*.json")}
    gone = "language-train-1-full-seed-0", "language-train-all-local-seed-0"
    for name in gone:
        shutil.rmtree(models / name)
    (units / f"{gone[0]}-perplexity.json").unlink()
    assert run(*words) == 0
    assert (models / gone[0] / "model").exists()
    assert not (models / gone[1]).exists(), "all was measured of it"
    changed = {path.stem for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {gone[0], f"{gone[0]}-perplexity"}


def test_training_that_is_stopped_by_a_signal_stops_the_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(works, "train", lambda recipe, **options: Outcome(None, 1, signal.SIGTERM, {}))
    assert run("--scale", mini(tmp_path, "language"), "--out", tmp_path / "study") == 143
    assert "language/start/seed 0 was stopped; the same command goes on" in capsys.readouterr().err


def test_perplexities_of_unequal_precision_are_refused_by_name(language, tmp_path, capsys):
    words = ("--scale", mini(tmp_path, "language"), "--out", tmp_path / "study", "--stage", "language")
    shutil.copytree(language, tmp_path / "study")
    units = tmp_path / "study/units"
    one, other = (units / f"language-train-{plan}-seed-0-perplexity.json" for plan in ("all-full", "all-local"))
    kept = json.loads(other.read_text())
    kept["result"]["results"][0]["autocast"] = "bfloat16"
    other.write_text(json.dumps(kept))
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert (
        "all local/seed 0/perplexity was measured in bfloat16, language/train/all full/seed 0/perplexity in the" in err
    )
    assert f"with another --out or without {one}" in err.replace("\n", "")
    one.unlink()
    assert run(*words) == 2, "what is measured now is of the weights' precision"
    assert not one.exists()
    assert run(*words, "--precision", "bfloat16") == 2, "the other plans were measured in that of the weights"
    other.unlink()
    assert run(*words, "--precision", "float32") == 0
    for path in units.glob("*-perplexity.json"):
        path.unlink()
    assert run(*words, "--precision", "bfloat16") == 0
    assert json.loads(one.read_text())["result"]["results"][0]["autocast"] == "bfloat16"


@pytest.mark.parametrize(
    ("device", "dtype", "precision", "backend"),
    [
        ("cuda", torch.float32, "float32", "tiled"),
        ("cuda", torch.float32, "auto", "auto"),
        ("cuda", torch.bfloat16, "float32", "auto"),
        ("cpu", torch.float32, "float32", "auto"),
    ],
)
def test_no_kernel_is_compiled_for_a_plan_that_is_measured_once(device, dtype, precision, backend):
    model = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert works.backend_of(model, precision) == backend


def test_other_settings_are_refused_by_name(language, tmp_path, capsys):
    path = mini(tmp_path, "language")
    changed = yaml.safe_load(path.read_text())
    changed["language"]["recipe"]["training"]["steps"] = 3
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    assert run("--scale", path, "--out", language, "--stage", "language") == 2
    err = capsys.readouterr().err
    assert "was made with other settings: training.steps was 2 and is 3; give another --out" in err


def test_another_model_of_the_same_name_is_refused(tmp_path):
    work = works.Perplexity(
        ModelRecipe(source=str(tmp_path / "model")), "full", Source(builtin="python-topics"), (8,), 8
    )
    unit = Unit("u", "s", work)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"one")
    place = Place(tmp_path / "study")
    place.make()
    place.keep(unit, {"u": unit}, {"loss": 1.0}, 2.0)
    assert Place(place.folder).kept(unit, {"u": unit})["result"] == {"loss": 1.0}
    (tmp_path / "model/weights").write_bytes(b"two")
    with pytest.raises(MasformerError, match="what it was made from has changed"):
        Place(place.folder).kept(unit, {"u": unit})


def test_the_weights_of_a_gguf_file_are_unpacked_once_and_those_of_another_of_its_name_anew(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("masformer.study.models.load_model", lambda path, **options: (path, "tokenizer"))
    monkeypatch.setattr(
        "masformer.study.models.save_model", lambda model, folder, tokenizer: (made.append(folder), folder.mkdir())
    )
    place, file = Place(tmp_path / "study"), tmp_path / "Some.Q4.gguf"
    place.make()
    file.write_bytes(b"one")
    recipe = ModelRecipe(source=str(file), dtype="bfloat16")
    first = unpacked(recipe, place)
    assert unpacked(recipe, Place(place.folder)) == first == replace(recipe, source=str(made[0]))
    file.write_bytes(b"two")
    assert unpacked(recipe, place) != first
    assert len(made) == 2
    assert unpacked(first, place) == first


def test_a_stage_alone_needs_its_own_texts_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scale = study.load_scale("small", data={"meetings": ["m.jsonl"]}, model="m", parts=study.parts_of(["spans"]))
    assert scale.spans is not None
    assert (scale.where, scale.language) == (None, None), "they need papers and books"
    assert run("--scale", "small", "--out", "study", "--model", "m", "--data", "papers=p", "--stage", "training") == 2
    assert "scale small needs --data books=FILE for its part language" in capsys.readouterr().err


@pytest.mark.parametrize("scale", study.SCALES)
def test_every_scale_is_dry_run_without_a_network_data_or_weights(scale, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", "HuggingFaceTB/SmolLM2-135M-Instruct"] if scale == "small" else []
    assert run("--scale", scale, "--out", "study", "--dry-run", "--json", "record.json", *model) == 0
    units = json.loads((tmp_path / "record.json").read_text())["units"]
    assert list(tmp_path.iterdir()) == [tmp_path / "record.json"]
    trained = [unit for unit in units if "/train/" in unit["name"] and not unit["name"].endswith("/perplexity")]
    assert len(trained) >= 3
    assert all(unit["flops"] > 0 and unit["memory_bytes"] > 0 for unit in trained)
    without = {"small": {"recall"}, "paper": {"recall", "pretrained"}}
    if scale in without:
        assert {unit["stage"] for unit in units} | {"training"} == set(study.STAGES) - without[scale]
    if scale == "paper":
        sizes = {unit["name"]: unit["memory_bytes"] for unit in units}
        assert sizes["language/train/8 full/seed 0"] > 16 * 1.3e9, "weights, gradients and AdamW of 1.3B weights"


def test_recipes_of_the_paper_are_written_for_other_machines(tmp_path):
    assert run("--scale", "paper", "--out", tmp_path, "--stage", "language", "--recipes") == 0
    recipe = load_recipe(tmp_path / "recipes/language-train-8-full-seed-0.yaml")
    assert (recipe.model.plan, recipe.data.length, recipe.training.sharding) == ("full@8-15; block:1024", 8192, "fsdp")
    assert recipe.output == str(tmp_path / "models/language-train-8-full-seed-0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "huge"], "unknown scale 'huge'; allowed: tiny, small, gpu, paper, or a .yaml file"),
        (["--scale", "no.yaml"], "scale no.yaml does not exist"),
        (["--scale", "tiny", "--stage", "why"], "--stage 'why' is not allowed; allowed: recall, where"),
        (["--scale", "tiny", "--stage", "where"], "this scale has no stage where; it has recall, cost, language"),
        (["--scale", "tiny", "--data", "papers=a.jsonl"], "uses no data named 'papers'"),
        (["--scale", "tiny", "--model", "m"], "--model does nothing at scale tiny"),
        (["--scale", "small", "--model", "m"], "scale small needs --data papers=FILE"),
        (["--scale", "small", "--model", "m", "--data", "a.jsonl"], "--data a.jsonl: which texts are these?"),
        (["--scale", "tiny", "--dry-run", "--recipes"], "give either --dry-run or --recipes"),
        (["--scale", "tiny", "--dry-run", "--precision", "float32"], "--precision does nothing where nothing is"),
        (["--scale", "tiny", "--stage", "recall", "--precision", "float32"], "--precision does nothing: these stages"),
    ],
)
def test_what_cannot_be_done_is_named_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--out", "study", *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


ASKED = {"tasks": ["passkey"], "depths": [50], "examples": 1}
ONCE = {"all full": "full", "all local": "window:4", "2 full": "full@0-1; window:4"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plans": {"all full": "full"}}, "language.plans needs a plan named 'all local'"),
        ({"seeds": []}, "language.seeds must be different whole numbers"),
        ({"long": ["2 full"]}, "language.long '2 full' is not allowed"),
        ({"lengthz": [3]}, "unknown setting language.lengthz; did you mean lengths?"),
        ({"start": None}, "language.long is held against training that starts short"),
        ({"equal": [["all local", "2 full"]]}, "language.equal must hold pairs of plans, got ['all local', '2 full']"),
        ({"vocabulary": 300}, "vocabulary and vocabulary_text are given together"),
        ({"untouched": ["1 full"]}, "language.untouched plans are measured before training; set language.untrained"),
        ({"untrained": True}, "language.untrained is of a pretrained model; leave out language.start"),
        ({"untouched": ["2 full"]}, "language.untouched '2 full' is not allowed; allowed: all full"),
        ({"once": ["2 full"]}, "language.once '2 full' is not allowed; allowed: all full"),
        ({"once": ["1 full"]}, "language.once does nothing with one seed; leave it out"),
        ({"retrieval": ASKED | {"seeds": [0, 7]}}, "language.retrieval.seeds must be of 0, got [0, 7]"),
        (
            {"seeds": [0, 1], "once": ["2 full"], "plans": ONCE, "long": [], "retrieval": ASKED | {"seeds": [1]}},
            "language.retrieval.seeds [1] holds no seed of 2 full: 0",
        ),
        ({"retrieval": ASKED | {"seeds": []}}, "language.retrieval.seeds must be different whole numbers"),
        ({"better": [["heads", "layers"]]}, "language.better must hold pairs of lines, got ['heads', 'layers']"),
    ],
)
def test_wrong_scales_are_named_in_one_line(change, message, tmp_path):
    path = mini(tmp_path, "language")
    settings = yaml.safe_load(path.read_text())
    settings["language"] |= change
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(MasformerError) as error:
        study.load_scale(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "part", "setting", "message"),
    [
        ("where", (), "plans", "where.retrieval.plans is of stages that train; name searches in searches"),
        ("where", (), "seeds", "where.retrieval.seeds is of stages that train; name searches in searches"),
        (
            "generation",
            ("beside",),
            "seeds",
            "generation.beside.retrieval.seeds is of other stages; every plan is asked",
        ),
        ("language", (), "searches", "language.retrieval.searches is of the stage where; name trained plans in plans"),
    ],
)
def test_what_retrieval_of_another_stage_takes_is_refused(stage, part, setting, message, tmp_path):
    path = mini(tmp_path, stage)
    settings = yaml.safe_load(path.read_text())
    owner = settings[stage]
    for name in part:
        owner = owner[name]
    owner["retrieval"] = owner.get("retrieval", ASKED) | {setting: [0] if setting == "seeds" else ["all full"]}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(MasformerError) as error:
        study.load_scale(str(path), check=False)
    assert str(error.value).endswith(message)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MasformerError, match="one process"):
        study.run_study([], Place(tmp_path))


def test_units_come_by_turn_and_after_what_they_need():
    def unit(name, *needs, turn=0):
        return Unit(name, "s", None, needs, turn)

    units = [unit("c", "b"), unit("late", turn=1), unit("b", "a"), unit("a", turn=1)]
    assert [each.name for each in in_order(units)] == ["a", "b", "c", "late"]
    with pytest.raises(MasformerError, match="two units"):
        in_order([unit("a"), unit("a", turn=1)])
    with pytest.raises(MasformerError, match="no unit"):
        in_order([unit("a", "b")])


def test_a_vocabulary_gives_a_tokenizer_that_keeps_every_byte(tmp_path):
    from transformers import AutoTokenizer

    work = works.Vocabulary(Source(builtin="python-topics", limit=5), 400, tmp_path / "tokenizer")
    assert work.run(Place(tmp_path), "v")["tokens"] == 400
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = "for each café:\n\tpass  # £"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())


def test_the_table_of_a_dry_run_adds_up_the_times_of_a_stage():
    scale = study.load_scale("gpu", check=False)
    rows = [
        {"name": name, "stage": "language", "flops": 1e15, "memory_bytes": None, "seconds": 60.0, "note": ""}
        for name in "ab"
    ]
    console = Console(width=100, record=True)
    console.print(study.forecast_table(rows, scale))
    assert "120 s" not in console.export_text(clear=False)
    assert "2 min" in console.export_text()


def test_a_scale_without_rates_is_timed_here(tmp_path, capsys):
    scale = study.load_scale("tiny", check=False)
    units = study.units_of(study.stages_of(scale, ["language"]), Place(tmp_path))
    rate = matrix_rate(8, 8, 8)
    for row in study.forecast_rows(units, scale, rate):
        assert row["seconds"] == (None if row["flops"] is None else row["flops"] / rate.flops_per_second)
    assert all(row["seconds"] is None for row in study.forecast_rows(units, scale))
    assert run("--scale", "tiny", "--out", tmp_path, "--dry-run") == 0
    assert "times are the least there can be" in " ".join(capsys.readouterr().out.split())


def test_every_scale_is_a_file_of_the_package():
    files = {path.name for path in (resources.files("masformer.study") / "scales").iterdir()}
    assert files == {*(f"{name}.yaml" for name in study.SCALES), "scale.schema.json"}
