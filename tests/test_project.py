"""The files that a public project is made of: workflows that name what is there, and forms that can be read."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import masformer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def jobs():
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            yield path.stem, name, job


def pythons():
    return [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]


def test_the_suite_runs_on_every_python_that_is_named():
    matrix = {name: job["strategy"]["matrix"] for _, name, job in jobs() if "strategy" in job}
    assert matrix["pinned"]["python"] == pythons()
    assert PROJECT["requires-python"] == f">={pythons()[0]}"


def test_the_oldest_of_the_ranges_is_what_they_begin_with():
    (oldest,) = (
        each["versions"]
        for _, name, job in jobs()
        if name == "ranges"
        for each in job["strategy"]["matrix"]["include"]
        if each["name"] == "oldest"
    )
    ranges = dict(each.split(">=") for each in PROJECT["dependencies"] if ">=" in each)
    assert oldest.split() == [f"{name}=={ranges[name]}.*" for name in ("torch", "transformers")]


def test_what_workflows_call_is_there():
    commands = [step["run"] for _, _, job in jobs() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    made = [target for command in commands for target in re.findall(r"\bmake ([a-z]+)", command)]
    assert made
    assert set(made) <= set(targets)
    extras = re.findall(r"extras: \"?([a-z,-]+)", "".join(path.read_text() for path in WORKFLOWS))
    assert {extra for each in extras for extra in each.split(",")} <= set(PROJECT["optional-dependencies"])
    assert all("timeout-minutes" in job for _, name, job in jobs() if name != "release")


def test_whoever_runs_the_suite_has_a_browser():
    for _, name, job in jobs():
        steps = [step.get("run", "") for step in job["steps"]]
        suite = [place for place, run in enumerate(steps) if re.search(r"make test|pytest --", run)]
        assert all(any("google-chrome" in run for run in steps[:place]) for place in suite), name


def test_no_step_finds_the_token_of_the_checkout():
    used = [step for _, _, job in jobs() for step in job["steps"] if "checkout" in step.get("uses", "")]
    assert used
    assert all(step["with"]["persist-credentials"] is False for step in used)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_can_be_read(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids)) > 1
    assert all(part["attributes"]["label"] for part in form["body"])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (str(citation["version"]), citation["license"]) == (masformer.__version__, PROJECT["license"])
    assert "arXiv:2310.12442" in citation["preferred-citation"]["identifiers"][0]["value"]


def test_the_changelog_has_a_section_for_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]( - \d{4}-\d\d-\d\d)?$", text, re.M)
    assert len(versions) == len(re.findall("^## ", text, re.M))
    assert [name for name, _ in versions][:2] == ["Unreleased", masformer.__version__]
    assert {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"} >= {
        *re.findall(r"^### (.*)$", text, re.M)
    }
    assert versions[1][1]
