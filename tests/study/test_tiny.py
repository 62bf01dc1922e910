"""The scale tiny from end to end, as the command leaves it."""

import json
import re

import pytest

from masformer import cli
from masformer.records import read_records
from masformer.study import works
from masformer.study.verdicts import HOLDS


def run(*words):
    return cli.main(["reproduce", *map(str, words)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of the study at scale tiny, as the command leaves it."""
    folder = tmp_path_factory.mktemp("tiny")
    assert run("--scale", "tiny", "--out", folder / "study", "--json", folder / "record.json") == 0
    return folder / "study"


def test_in_recall_the_mix_does_what_full_attention_does_and_local_attention_fails(tiny):
    rows = json.loads((tiny / "recall.json").read_text())["results"]
    scores = {row["name"]: row["score"] for row in rows if row["depth"] is None}
    assert all(score["count"] == 3 for score in scores.values()), "three seeds"
    assert scores["mixed"]["low"] >= 95
    assert scores["all full"]["low"] >= 95
    assert scores["all local"]["high"] <= 20
    for row in rows:
        assert (row["score"]["high"] <= 30) == (row["name"] == "all local"), "at every depth"
    (verdict,) = json.loads((tiny / "recall.json").read_text())["verdicts"]
    assert verdict["answer"] == HOLDS


def test_full_and_mixed_spans_reach_the_whole_length_and_local_ones_none(tiny):
    units = {path.stem: json.loads(path.read_text()) for path in (tiny / "units").glob("recall-test-*.json")}
    reach = {name: unit["result"]["effective_length"] for name, unit in units.items() if "settings" not in name}
    assert reach == {
        f"recall-test-{plan}-seed-{seed}": 0 if plan == "all-local" else 84
        for plan in ("all-full", "all-local", "mixed")
        for seed in range(3)
    }


def test_the_report_of_tiny_shows_every_stage_and_its_records_are_read_by_masformer_report(tiny):
    text = (tiny / "report.md").read_text()
    for title in ("Verdicts", "Recall", "Language modelling", "Cost", "How it was made"):
        assert f"## {title}\n" in text
    assert "Missing" not in text
    units = sum("settings" not in path.name for path in (tiny / "units").glob("*.json"))
    assert re.search(rf"^{units} units in [\d.]+ minutes: python [\d.]+, torch .*, threads: \d+\.$", text, re.MULTILINE)
    assert str(tiny) not in text
    assert (tiny / "pareto.png").exists()
    assert (tiny / "report.html").exists()
    records, _ = read_records(tiny)
    kinds = {record.name: record.kind for record in records}
    assert kinds == {"cost": "reproduce", "language": "reproduce", "recall": "reproduce"}
    assert cli.main(["report", str(tiny), "--out", str(tiny.parent / "again")]) == 0


def test_a_done_study_is_not_done_again(tiny, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (tiny / "units").iterdir()}
    monkeypatch.setattr(works, "train", None)
    assert run("--scale", "tiny", "--out", tiny) == 0
    assert {path: path.stat().st_mtime_ns for path in (tiny / "units").iterdir()} == before
