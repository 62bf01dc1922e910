"""Parts that an installation may lack: one line that names the package and the extra, whatever asks first."""

import sys

import pytest

from masformer import MasformerError
from masformer.data import read_rows
from masformer.data.sources import Source
from masformer.evaluation.rouge import _scorer, longbench_rouge_l, rouge_scores
from masformer.extras import need
from masformer.plots import checked_figure, plot_plan
from masformer.reports.figures import curves
from masformer.training.model import add_adapters
from masformer.training.recipe import LoraRecipe
from tiny import PLAN, tiny


def parquet(folder):
    (folder / "rows.parquet").write_bytes(b"PAR1")
    list(read_rows([folder / "rows.parquet"], ("text",)))


ASKED = {
    "a plan's drawing": (
        "matplotlib",
        "plots",
        lambda folder: plot_plan(PLAN, folder / "a.png"),
    ),
    "a figure's name": ("matplotlib", "plots", lambda folder: checked_figure(folder / "a.png")),
    "a report's drawing": ("matplotlib", "plots", lambda folder: curves({"a": ([1], [1])}, "x", "y")),
    "ROUGE": ("rouge_score", "rouge", lambda folder: rouge_scores("a", "a")),
    "LongBench's": ("rouge", "rouge", lambda folder: longbench_rouge_l("a", "a")),
    "Parquet": ("pyarrow", "datasets", parquet),
    "a dataset": ("datasets", "datasets", lambda folder: Source(hub="x/y", hub_split="train")._stream),
    "adapters": ("peft", "train", lambda folder: add_adapters(tiny("llama"), LoraRecipe())),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, asked):
    package, extra, ask = ASKED[asked]
    _scorer.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MasformerError) as caught:
        ask(tmp_path)
    text = str(caught.value)
    assert text.endswith(f" needs {package.replace('_', '-')}: pip install 'masformer[{extra}]'")
    assert "\n" not in text


def test_what_is_there_is_not_named(monkeypatch):
    need("plots", "a drawing")
    for package in ("rouge_score", "rouge"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MasformerError, match=r"^this needs rouge-score, rouge: pip install 'masformer\[rouge\]'$"):
        need("rouge", "this")
    need("train", "an adapter", "peft")
