import gguf
import pytest
import yaml

from masformer import AttentionPlan, MasformerError, apply_plan, cli, load_model, save_model
from masformer.export import export_model
from masformer.models import card
from masformer.models.card import Origin, origin_of
from tiny import PLAN, tiny, write_gguf

LICENSED = """---
license: other
license_name: strict
license_link: https://example.org/strict
base_model: org/older
language: [en]
model-index: nothing
---
# A model
"""
STRICT = {"license": "other", "license_name": "strict", "license_link": "https://example.org/strict"}


def header(folder):
    """The data between the dashes of a card."""
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny("llama", sliding_window=None).save_pretrained(folder)
    (folder / "README.md").write_text(LICENSED)
    return folder


@pytest.mark.parametrize(
    ("words", "library", "tags", "plan"),
    [
        (["convert"], "masformer", [], "full@1; window:9+4"),
        (["export", "--target", "transformers"], "transformers", ["transformers"], "full@1; window:9"),
    ],
)
def test_a_written_folder_has_the_header_that_a_hub_reads(capsys, source, tmp_path, words, library, tags, plan):
    out = tmp_path / "out"
    assert cli.main([words[0], str(source), str(out), *words[1:], "--plan", plan]) == 0
    assert header(out) == {
        "base_model": "org/older",
        "language": ["en"],
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["masformer", "mixed-attention-spans", *tags],
        "attention_plan": plan,
        **STRICT,
    }
    assert plan in (out / "README.md").read_text().split("---\n")[2]
    said = capsys.readouterr().out
    count = sum(weight.numel() for weight in load_model(out)[0].parameters())
    assert f"{out}: {plan}" in said
    assert f"{count:,} weights in float32, " in said


def test_python_writes_the_same_card_without_being_told_the_source(source, tmp_path):
    plan = "full@1; window:9+4"
    model, tokenizer = load_model(source, plan)
    save_model(model, tmp_path / "python", tokenizer)
    assert cli.main(["convert", str(source), str(tmp_path / "command"), "--plan", plan]) == 0
    assert header(tmp_path / "python") == header(tmp_path / "command")
    apply_plan(model, "full@1; window:9")
    export_model(model, tmp_path / "export", "vllm")
    assert header(tmp_path / "export") == header(tmp_path / "python") | {
        "library_name": "vllm",
        "tags": ["masformer", "mixed-attention-spans", "vllm"],
        "attention_plan": "full@1; window:9",
    }
    save_model(load_model(tmp_path / "python")[0], tmp_path / "again")
    assert header(tmp_path / "again") == header(tmp_path / "python")


def test_nothing_is_made_up_where_nothing_is_known(tmp_path):
    save_model(apply_plan(tiny("llama"), PLAN), tmp_path / "new")
    assert header(tmp_path / "new").keys() == {"library_name", "pipeline_tag", "tags", "attention_plan"}
    for source in (None, "", tmp_path, tmp_path / "gone", "org/never-loaded", "a folder/that is/gone"):
        assert origin_of(source) == Origin()
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert origin_of(tmp_path) == Origin()


def test_a_model_of_the_hub_is_the_base_and_gives_its_license(tmp_path, monkeypatch):
    monkeypatch.setattr(card.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--name").mkdir()
    (tmp_path / "card.md").write_text(LICENSED)
    monkeypatch.setattr(card, "hf_hub_download", lambda *names, **options: str(tmp_path / "card.md"))
    assert origin_of("org/name") == Origin("org/name", STRICT | {"language": ["en"]})
    monkeypatch.undo()
    monkeypatch.setattr(card.constants, "HF_HUB_CACHE", str(tmp_path))
    assert origin_of("org/name") == Origin("org/name")


@pytest.mark.parametrize("save", ["save_model", "export_model"])
def test_a_card_that_somebody_wrote_outlives_the_folder_and_one_of_ours_does_not(tmp_path, save):
    out = tmp_path / "out"

    def write(plan, **options):
        model = apply_plan(tiny("llama", sliding_window=None), plan)
        if save == "save_model":
            save_model(model, out, **options)
        else:
            export_model(model, out, "transformers", **options)

    write("full@1; window:9")
    write("full@2; window:9", overwrite=True)
    assert header(out)["attention_plan"] == "full@2; window:9"
    (out / "README.md").write_text("mine")
    write("full@3; window:9", overwrite=True)
    assert (out / "README.md").read_text() == "mine"
    assert AttentionPlan.from_dict(load_model(out)[0].config.masformer) == AttentionPlan.parse("full@3; window:9", 4)


def test_a_gguf_file_gives_what_its_metadata_says(tmp_path):
    def entries(writer):
        writer.add_license("other")
        writer.add_license_name("strict")
        writer.add_languages(["en"])
        writer.add_base_model_count(1)
        writer.add_base_model_repo_url(0, "https://huggingface.co/org/base")

    path = write_gguf(tmp_path / "model.gguf", 1, entries=entries)
    assert origin_of(path) == Origin("org/base", {"license": "other", "license_name": "strict", "language": ["en"]})
    assert origin_of(write_gguf(tmp_path / "bare.gguf", 1)) == Origin()


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (None, [], "float32"),
        (gguf.GGMLQuantizationType.F16, [], "float16"),
        (gguf.GGMLQuantizationType.Q8_0, [], "bfloat16"),
        (gguf.GGMLQuantizationType.Q8_0, ["--dtype", "float32"], "float32"),
    ],
)
@pytest.mark.parametrize("words", [["convert"], ["export", "--target", "transformers"]])
def test_weights_are_written_in_no_more_bits_than_they_need(capsys, tmp_path, words, stored, asked, written):
    path, out = write_gguf(tmp_path / "model.gguf", 2, stored=stored), tmp_path / "out"
    command = [words[0], str(path), str(out), *words[1:], "--plan", "full@1; window:9", *asked]
    assert cli.main(command) == 0
    assert f" weights in {written}, " in capsys.readouterr().out
    assert str(load_model(out)[0].dtype) == f"torch.{written}"


@pytest.mark.parametrize("words", [["convert"], ["export", "--target", "transformers"]])
def test_the_target_is_looked_at_before_the_model(capsys, tmp_path, words):
    assert cli.main([words[0], "no/model", str(tmp_path), *words[1:], "--plan", "full"]) == 2
    assert capsys.readouterr().err == (
        f"masformer: error: {tmp_path} exists already; choose another folder, or --overwrite (overwrite=True) it\n"
    )


def test_windows_without_sinks_are_exported_with_a_warning_unless_the_model_has_them(capsys, source, tmp_path):
    words = ["export", str(source), str(tmp_path / "out"), "--target", "transformers", "--overwrite", "--plan"]
    assert cli.main([*words, "full@1; window:9"]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("masformer: warning: 3 of 4 layers have a window without sinks")
    measure = "--plan 'full@1; window:9+4' --plan 'full@1; window:9'` measures it"
    assert measure in warning
    assert measure in (tmp_path / "out/README.md").read_text()
    assert cli.main([*("mlx-lm" if word == "transformers" else word for word in words), "full@1; window:9+2"]) == 2
    refusal = capsys.readouterr().err
    assert "(drop the sinks); without training, that costs much" in refusal
    assert "--plan 'full@1; window:9+2' --plan 'full@1; window:9'` measures it" in refusal
    assert cli.main([*words, "full"]) == 0
    tiny("qwen2", layer_types=["sliding_attention"] * 4, use_sliding_window=True).save_pretrained(tmp_path / "slides")
    words[1] = str(tmp_path / "slides")
    assert cli.main([*words, "window:7"]) == 0
    assert capsys.readouterr().err == ""


def test_a_gguf_file_is_read_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    path, real, reads = write_gguf(tmp_path / "model.gguf", 1), gguf.GGUFReader.__init__, []
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, *words: reads.append(words) or real(self, *words))
    first, _ = load_model(path)
    assert len(reads) == 1
    write_gguf(path, 2)
    assert (len(first.model.layers), len(load_model(path)[0].model.layers)) == (1, 2)
    assert len(reads) == 2
    assert gguf.GGUFReader.__module__ == "gguf.gguf_reader", "outside of a load it is as it was"
    with pytest.raises(MasformerError):
        load_model(tmp_path)
    assert gguf.GGUFReader.__module__ == "gguf.gguf_reader"
