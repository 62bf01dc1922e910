"""Every script of examples/ does what its first line says, on a tiny model."""

import runpy
from pathlib import Path

import gguf
import pytest

from masformer import AttentionPlan, load_model
from tiny import plain_tokenizer, tiny

EXAMPLES = Path(__file__).parent.parent / "examples"
PLAN = "full@1; window:9"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A stock model, and a text."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = plain_tokenizer()
    tiny("llama", vocab_size=len(tokenizer), sliding_window=None).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away from it . " * 30)
    return str(folder / "model"), str(folder / "text.txt")


def example(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_a_model_is_converted_and_measured(made, tmp_path, capsys):
    model, text = made
    example("convert_and_measure.py")(model, text, tmp_path / "out", PLAN, length=64)
    out = capsys.readouterr().out
    assert "full: perplexity " in out
    assert f"{PLAN}: perplexity " in out
    assert load_model(tmp_path / "out")[0].config.masformer == AttentionPlan.parse(PLAN, 4).to_dict()


def test_heads_are_searched_for(made, tmp_path, capsys):
    model, text = made
    example("search_by_head.py")(model, text, tmp_path / "plan.yaml", "3", "window:9", 64, "tail")
    plan = AttentionPlan.load(tmp_path / "plan.yaml")
    assert f"found: {plan}\n" in capsys.readouterr().out
    full = sum(span.max_visible is None for layer in plan.units(2) for span in layer)
    assert full == 3


def test_a_model_is_trained_on(made, tmp_path, capsys):
    model, text = made
    settings = ["--data.length=64", "--training.steps=4", "--training.warmup_steps=0", "--evaluation.lengths=[64]"]
    example("train_on.py")(model, text, text, str(tmp_path / "out"), PLAN, *settings, "--evaluation.max_tokens=128")
    assert load_model(tmp_path / "out" / "model")[0].config.masformer["plan"] == PLAN


def test_a_file_for_llama_cpp_is_written_or_another_plan_is_named(made, tmp_path):
    model, _ = made
    example("export_to_llama_cpp.py")(model, str(tmp_path / "out.gguf"), PLAN)
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.architecture").contents() == "granite_swa"
    with pytest.raises(SystemExit, match=r"llama\.cpp"):
        example("export_to_llama_cpp.py")(model, str(tmp_path / "no.gguf"), "full@1; window:9+4")


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{path.name}]({path.name})" in listed for path in EXAMPLES.glob("*.py"))
