"""The wheel: it holds the package, runs beside its declared dependencies alone, and says what an extra would bring."""

import json
import os
import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import masformer
from masformer.extras import EXTRAS
from test_project import PROJECT
from tiny import tiny_config

ROOT = Path(__file__).parent.parent
ALONE = """
import importlib.metadata as metadata, json, re, sys
from packaging.requirements import Requirement

def named(name):
    return re.sub("[-_.]+", "-", name).lower()

def needed(name, extras, found):
    if (named(name), *extras) in found:
        return
    found.add((named(name), *extras))
    for text in metadata.requires(name) or ():
        each = Requirement(text)
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            needed(each.name, sorted(each.extras), found)

found = set()
needed("masformer", [], found)
allowed = {name for name, *_ in found}
for package, owners in metadata.packages_distributions().items():
    if not allowed & {named(owner) for owner in owners}:
        sys.modules.setdefault(package, None)  # cannot be imported

import masformer
from masformer import cli
print(json.dumps([masformer.__file__, sorted(name for name, module in sys.modules.items() if module is None)]))
for words in json.loads(sys.argv[1]):
    print("exit code", cli.main(words))
"""
"""Runs command lines where nothing can be imported but what masformer's dependencies, and theirs, bring."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source]
    subprocess.run([sys.executable, *words], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run([sys.executable, *words], check=True)
    return folder


def test_it_holds_the_package_and_says_what_it_needs(wheel):
    with ZipFile(wheel) as content:
        names = set(content.namelist())
        (text,) = (content.read(name).decode() for name in names if name.endswith("/METADATA"))
    package = ROOT / "src" / "masformer"
    kinds = (".py", ".yaml", ".json")
    own = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.suffix in kinds}
    assert {name for name in names if name.startswith("masformer/")} == {*own, "masformer/py.typed"}
    about = Parser().parsestr(text)
    assert about["Version"] == masformer.__version__
    assert sorted(about.get_all("Provides-Extra")) == sorted(PROJECT["optional-dependencies"])
    plain = [each for each in about.get_all("Requires-Dist") if "extra ==" not in each]
    assert sorted(map(Requirement, plain), key=str) == sorted(map(Requirement, PROJECT["dependencies"]), key=str)


def test_what_extras_bring_is_what_is_asked_for():
    brought = {
        extra: {Requirement(each).name.replace("-", "_") for each in needed}
        for extra, needed in PROJECT["optional-dependencies"].items()
    }
    for extra, packages in EXTRAS.items():
        known = {*packages} if extra != "serve" else {"transformers"}  # its own extra brings them
        assert known <= brought[extra], extra
    core = {Requirement(each).name.replace("-", "_") for each in PROJECT["dependencies"]}
    for extra in ("plots", "rouge", "datasets"):
        assert not brought[extra] & core


def test_it_runs_with_its_dependencies_alone_and_names_the_extra_that_is_missing(installed, tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    plan = ["plan", str(tmp_path / "config.json"), "--full", "1", "--local", "window:8", "--seq", "64"]
    data = ["--data", "x.jsonl", "--document-field", "a", "--target-field", "b", "--out", str(tmp_path / "out.jsonl")]
    missing = {
        "plots": [[*plan, "--plot", str(tmp_path / "x.png")], ["report", str(tmp_path)]],
        "rouge": [["eval", "summarization", "MODEL", *data]],
        "serve": [["serve", "MODEL"]],
        "lm-eval": [["lm-eval", "--tasks", "x"]],
        "completion": [["--print_completion", "bash"]],
    }
    asked = [plan, *(words for each in missing.values() for words in each)]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(asked)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    file, blocked = json.loads(done.stdout.splitlines()[0])
    assert Path(file).is_relative_to(installed)
    assert {"matplotlib", "datasets", "rouge_score", "pytest"} <= {*blocked}
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert ("window:8" in done.stdout, codes) == (True, ["exit code 0", *["exit code 2"] * (len(asked) - 1)])
    extras = [extra for extra, each in missing.items() for _ in each]
    for line, extra in zip(done.stderr.splitlines(), extras, strict=True):
        assert line.startswith("masformer: error: ")
        assert line.endswith(f": pip install 'masformer[{extra}]'")
