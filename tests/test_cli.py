import io
import json
import os
import shlex
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from masformer import AttentionPlan, benchmarks, cli, demo, extras, fitting
from masformer.benchmarks import Timing, timing
from masformer.cli.parser import SHELLS
from masformer.export import check_export
from masformer.export.llama_cpp.files import read_gguf
from masformer.generation import Chat
from masformer.models.checkpoint import load_config
from masformer.spans import FullSpan
from tiny import PLAN, letter_tokenizer, plain_tokenizer, tiny, tiny_config, write_gguf

SEARCH = ["--data", "TEXT", "--local", "window:4"]
BUDGET = ["--budget", "2", "--out", "p.yaml"]
PERPLEXITY = ["eval", "perplexity", "MODEL", "--data", "TEXT", "--lengths", "64"]
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it . " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock model with a byte-level tokenizer, as people have it."""
    path = tmp_path_factory.mktemp("stock") / "model"
    tokenizer = letter_tokenizer(bos_token="<s>")
    tiny("llama", vocab_size=len(tokenizer), sliding_window=None).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_prints_the_picture_and_records_the_cost(capsys, tmp_path):
    tiny_config("gpt_neo").save_pretrained(tmp_path)
    record, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    code, out, _ = run(
        capsys,
        *("plan", str(tmp_path / "config.json"), "--seq", "64,128", "--full", "1", "--local", "window:8+2"),
        *("--json", str(record), "--plot", str(plot)),
    )
    assert code == 0
    assert "window:8+2" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(record.read_text())
    assert figures["plans"][0]["plan"] == "full@1; window:8+2"
    assert [cost["length"] for cost in figures["plans"][0]["costs"]] == [64, 128]
    assert set(figures["versions"]) == {"python", "torch", "transformers"}
    assert figures["command"].startswith("masformer plan /")
    assert {"seed", "device", "threads"} <= set(figures)


def test_plan_says_what_devices_send_that_share_a_sequence(capsys, folder, tmp_path):
    words = ["--seq", "64,127", "--full", "1", "--local", "window:8+2", "--devices", "4"]
    code, out, _ = run(capsys, "plan", folder, *words, "--json", str(tmp_path / "plan.json"))
    assert code == 0
    assert "Sent for attention in a training step, 4 devices" in out
    assert "full, by heads" in out
    assert "window:8+2, edge" in out
    (figures,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    sent = figures["communication"]
    assert [(each["length"], each["devices"]) for each in sent] == [(64, 4), (128, 4)]
    assert sent[0]["spans"]["window:8+2"] == sent[1]["spans"]["window:8+2"]
    assert 2 * sent[0]["spans"]["full"] == sent[1]["spans"]["full"]
    assert sent[0]["total"] < sent[0]["gathered"] < sent[0]["ring"]


def test_plan_says_what_to_try_and_what_the_model_cannot_reach(capsys, folder):
    for words, tried, beyond in (
        (["--seq", "64"], True, False),
        (["--seq", "64,129"], True, True),
        (["--seq", "128", "--plan", "window:8"], False, False),
    ):
        code, out, _ = run(capsys, "plan", folder, *words)
        assert (code, "try --full 1 --placement middle" in out, "has 128 positions" in out) == (0, tried, beyond)


def test_several_plans_in_one_run(capsys, folder):
    code, out, _ = run(capsys, "plan", folder, "--seq", "64", "--plan", "full", "--plan", "full@1; block:8")
    assert code == 0
    assert out.count("Cost of one sequence") == 2


def test_a_plan_file_is_told_with_its_plan(capsys, folder, text, tmp_path):
    PLAN.save(tmp_path / "found.yaml")
    plans = ["--plan", str(tmp_path / "found.yaml"), "--plan", "full"]
    for words in (["eval", "perplexity", folder, "--data", text, "--max-tokens", "40"], ["bench", "prefill", folder]):
        code, out, _ = run(capsys, *words, *plans, "--lengths", "32", "--quiet")
        assert (code, out.splitlines()[0]) == (0, f"{tmp_path / 'found.yaml'}: {PLAN}")


def test_convert_then_eval_gives_the_perplexity_of_the_plan(capsys, folder, text, tmp_path):
    out_folder, direct, converted = tmp_path / "out", tmp_path / "direct.json", tmp_path / "converted.json"
    options = ["--data", text, "--lengths", "32,96", "--max-tokens", "300"]
    code, out, _ = run(capsys, "eval", "perplexity", folder, *options, "--plan", str(PLAN), "--json", str(direct))
    assert code == 0
    assert str(PLAN) in " ".join(out.split()) or "window:5+2" in out
    assert run(capsys, "convert", folder, str(out_folder), "--plan", str(PLAN))[0] == 0
    assert load_config(out_folder)[1] == PLAN
    assert run(capsys, "eval", "perplexity", str(out_folder), *options, "--json", str(converted))[0] == 0
    left, right = (json.loads(file.read_text())["results"] for file in (direct, converted))
    assert [result["nll"] for result in left] == [result["nll"] for result in right]
    assert [result["tokens"] for result in left] == [300, 300]


def test_convert_fits_constant_sinks_and_the_folder_holds_them(capsys, folder, text, tmp_path):
    out, record = str(tmp_path / "out"), tmp_path / "record.json"
    words = ["convert", folder, out, "--plan", "full@1; window:8+sink", "--sinks", "fit", "--data", text]
    assert run(capsys, *words, "--length", "64")[0] == 0
    weights = load_file(f"{out}/model.safetensors")
    held = [name for name in weights if name.endswith(("sink_logit", "sink_value"))]
    assert len(held) == 2 * (len(load_config(out)[1]) - 1)
    assert all(bool(weights[name].any()) for name in held)
    options = ["--data", text, "--lengths", "96", "--max-tokens", "300", "--json", str(record)]
    assert run(capsys, "eval", "perplexity", out, *options, "--plan", "full@1; window:8+sink", "--plan", "full")[0] == 0
    first, second = (result["nll"] for result in json.loads(record.read_text())["results"])
    assert first != second
    assert run(capsys, "convert", out, f"{out} 2", "--plan", "window:8")[0] == 0
    assert not any("sink" in name for name in load_file(f"{out} 2/model.safetensors"))


@pytest.mark.parametrize(("words", "count"), [((), 8), (("--documents", "3"), 3), (("--documents", "11"), 11)])
def test_convert_fits_on_as_many_texts_as_asked(capsys, folder, tmp_path, monkeypatch, words, count):
    text, seen, rows = tmp_path / "texts.jsonl", [], fitting._rows
    text.write_text("".join(json.dumps({"text": TEXT[start:]}) + "\n" for start in range(12)))
    monkeypatch.setattr(fitting, "_rows", lambda *args: seen.append(rows(*args)) or seen[0])
    fit = ["--plan", "full@1; window:8+sink", "--sinks", "fit", "--data", str(text), "--length", "64"]
    assert run(capsys, "convert", folder, str(tmp_path / "out"), *fit, *words)[0] == 0
    assert len(seen[0]) == count


def test_plans_are_compared_on_the_same_targets_with_intervals(capsys, folder, tmp_path):
    text, record = tmp_path / "texts.jsonl", tmp_path / "record.json"
    text.write_text("".join(json.dumps({"text": TEXT[start:]}) + "\n" for start in (0, 7, 20, len(TEXT) - 50)))
    words = ["eval", "perplexity", folder, "--data", str(text), "--lengths", "24,96", "--target-tokens", "16"]
    words += ["--plan", "full", "--plan", "window:8", "--plan", str(PLAN), "--against", "window:8", "--batch-size", "2"]
    code, out, _ = run(capsys, *words, "--json", str(record))
    assert code == 0
    assert "1 shorter document left out" in " ".join(out.split())
    assert "Mean loss less that of window:8" in out
    figures = json.loads(record.read_text())
    assert figures["settings"]["target_tokens"] == 16
    assert [(row["name"], row["length"], row["tokens"], row["left_out"]) for row in figures["results"]] == [
        (name, length, 48, 1) for name in ("full", "window:8", str(PLAN)) for length in (24, 96)
    ]
    nll = {(row["name"], row["length"]): row["nll"] for row in figures["results"]}
    assert [(row["name"], row["against"], row["length"]) for row in figures["differences"]] == [
        (name, "window:8", length) for name in ("full", str(PLAN)) for length in (24, 96)
    ]
    for row in figures["differences"]:
        expected = nll[row["name"], row["length"]] - nll["window:8", row["length"]]
        assert row["difference"]["mean"] == pytest.approx(expected)
        assert row["difference"]["count"] == 3


def test_convert_extends_positions(capsys, folder, text, tmp_path):
    longer = str(tmp_path / "longer")
    assert (
        run(capsys, "convert", folder, longer, "--local", "window:16", "--full", "2", "--max-positions", "256")[0] == 0
    )
    code, _, err = run(capsys, "eval", "perplexity", folder, "--data", text, "--lengths", "256")
    assert (code, "--max-positions 256" in err) == (2, True)
    assert run(capsys, "eval", "perplexity", longer, "--data", text, "--lengths", "256", "--max-tokens", "300")[0] == 0


def test_search_writes_the_plan_it_found_and_goes_on_from_its_journal(capsys, folder, text, tmp_path):
    out, record, plot = tmp_path / "found.yaml", tmp_path / "search.json", tmp_path / "map.png"
    words = ["search", folder, "--data", text, "--test", text, "--budget", "2", "--local", "window:4+1"]
    words += [
        "--criteria",
        "tail",
        "--length",
        "64",
        "--windows",
        "2",
        "--held-out-windows",
        "2",
        "--random-placements",
        "3",
    ]
    words += ["--out", str(out), "--json", str(record), "--plot", str(plot)]
    assert run(capsys, *words)[0] == 0
    plan = AttentionPlan.load(out)
    assert len(plan.full_layers) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    first = out.read_text(), len((tmp_path / "found.yaml.journal").read_text().splitlines())
    assert run(capsys, *words)[0] == 0
    again = AttentionPlan.load(out), len((tmp_path / "found.yaml.journal").read_text().splitlines())
    assert again == (plan, first[1])


def test_search_by_pairs_of_your_own_looks_at_the_end_of_the_path_too(capsys, folder, text, tmp_path):
    pairs, out, record = tmp_path / "pairs.jsonl", tmp_path / "found.yaml", tmp_path / "search.json"
    rows = [
        {"prompt": f"{word} is a word. The word is", "target": f" {word}."} for word in ("hill", "lake", "road", "wood")
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--by", "heads", "--budget", "2", "--local", "window:4+1", "--length", "64", "--windows", "1"]
    words += ["--held-out-windows", "0", "--pairs", str(pairs), "--out", str(out), "--json", str(record)]
    passes = []
    for ends in ([], ["--ends"]):
        assert run(capsys, "search", folder, "--data", text, *words, *ends)[0] == 0
        gradient = json.loads(record.read_text())["gradient"]
        passes.append(gradient["passes"])
        assert gradient["ends"] == bool(ends)
    assert passes == [2 + 2 * 4, 2], "one more for each prompt; the others stand in the journal"
    assert "full@" in str(AttentionPlan.load(out))


@pytest.mark.parametrize(("local", "target"), [("window:4+sink", "transformers"), ("window:4", "llama.cpp")])
def test_search_finds_a_plan_that_the_tool_runs(capsys, folder, text, tmp_path, local, target):
    model, out = folder, tmp_path / "found.yaml"
    if "sink" in local:
        model = str(tmp_path / "fitted")
        fit = ["--sinks", "fit", "--data", text, "--length", "64"]
        assert run(capsys, "convert", folder, model, "--plan", local, *fit)[0] == 0
    words = ["--criteria", "tail", "--length", "64", "--windows", "1", "--held-out-windows", "0", "--for", target]
    words += ["--local", local, "--budget", "2", "--out", str(out)]
    assert run(capsys, "search", model, "--data", text, *words)[0] == 0
    check_export(load_config(model)[0], AttentionPlan.load(out), target)
    if target == "transformers":
        code, printed, _ = run(capsys, "export", model, str(tmp_path / "out"), "--target", target, "--plan", str(out))
        assert code == 0, printed
        assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "granite_swa"


def test_bench_attention_records_raw_figures(capsys, tmp_path):
    record = tmp_path / "bench.json"
    code, out, _ = run(
        capsys,
        *(
            "bench",
            "attention",
            "--lengths",
            "80",
            "--peers",
            "hf-sdpa,hf-eager",
            "--heads",
            "2",
            "--kv-heads",
            "1",
            "--head-dim",
            "8",
            "--repeats",
            "2",
        ),
        *("--span", "window:16", "--span", "block:16x2", "--json", str(record)),
    )
    assert code == 0
    assert "window:16" in out
    rows = json.loads(record.read_text())["results"]
    assert len(rows) == 2 * (1 + 2 * 3)
    assert json.loads(out.splitlines()[-1])["results"][0]["median"] == rows[0]["median"]
    assert all(len(row["seconds"]) == 2 for row in rows)
    pairs = 80 * 81 / 2
    assert rows[1]["ideal"] == pytest.approx(pairs / (16 * 17 / 2 + 64 * 16))


def test_generate_streams_a_continuation_of_any_prompt(capsys, folder, tmp_path, monkeypatch):
    file, record = tmp_path / "prompt.txt", tmp_path / "record.json"
    file.write_text(TEXT[:70])
    words = ["generate", folder, "--max-new-tokens", "9", "--plan", str(PLAN), "--prefill-chunk", "16"]
    code, out, err = run(capsys, *words, "--file", str(file), "--prompt", "go on", "--json", str(record))
    figures = json.loads(record.read_text())
    assert (code, figures["prompt_tokens"], figures["plan"]) == (0, 77, str(PLAN))
    assert out.startswith(figures["text"] + "\n")
    assert "77 prompt tokens, " in err
    assert "of all-full's" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{TEXT[:70]}\n\ngo on".encode())))
    assert run(capsys, *words)[1] == figures["text"] + "\n"


def test_bench_prefill_and_decode_compare_with_transformers_own_caches(capsys, folder, tmp_path):
    for what, options in (("prefill", []), ("decode", ["--new", "2"])):
        record = tmp_path / f"{what}.json"
        words = ["bench", what, folder, "--lengths", "16,48", "--plan", "full@1; window:8+2", "--plan", "full"]
        code, out, _ = run(capsys, *words, *options, "--repeats", "2", "--json", str(record))
        rows = json.loads(record.read_text())["results"]
        assert code == 0
        assert "speed-up" in out
        names = [row["name"] for row in rows if row["length"] == 48]
        assert names == [
            "full@1; window:8+2",
            "all full, masformer",
            "transformers, DynamicCache",
            "transformers, StaticCache",
            "transformers, sliding layers of full@1; window:8+2",
        ]
        assert all(len(row["seconds"]) == 2 and row["tokens_per_second"] > 0 for row in rows)
        assert all(row["speedup"] == 1 for row in rows if row["name"] == "transformers, DynamicCache")
        held = {row["name"]: row["cache_bytes"] for row in rows if row["length"] == 48}
        assert held["full@1; window:8+2"] < held["all full, masformer"]


def test_bench_train_and_models_of_a_config_alone(capsys, folder, tmp_path):
    config, record, picture = tmp_path / "config.json", tmp_path / "train.json", tmp_path / "train.png"
    shutil.copy(Path(folder) / "config.json", config)
    words = ["bench", "train", str(tmp_path), "--random-weights", "--lengths", "16,32", "--plan", "full@1; window:8+2"]
    code, out, err = run(capsys, *words, "--repeats", "1", "--json", str(record), "--plot", str(picture))
    assert (code, err.splitlines()[0]) == (0, "16 tokens: full@1; window:8+2, memory")
    figures = json.loads(record.read_text())
    assert figures["random_weights"] is True
    assert {row["length"] for row in figures["results"]} == {16, 32}
    assert picture.stat().st_size > 1000
    assert json.loads(out.splitlines()[-1])["bench"] == "train"


@pytest.mark.parametrize("form", ["folder", "file"])
def test_demo_on_another_model_and_text(capsys, monkeypatch, tmp_path, form):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT.upper())  # all letters that the tokenizer of the file has
    model, record = Path("own model" if form == "folder" else "own model.gguf"), Path("demo.json")
    if form == "folder":
        tokenizer = plain_tokenizer()
        tiny("llama", vocab_size=len(tokenizer), sliding_window=None).save_pretrained(model)
        tokenizer.save_pretrained(model)
    else:
        write_gguf(model, 4)
    words = ["--model", str(model), "--data", "text.txt", "--length", "64", "--json", str(record)]
    code, out, err = run(capsys, "demo", *words)
    assert code == 0, err
    figures = json.loads(record.read_text())
    assert (
        figures["conclusion"].split()
        == " ".join(out.split("What was seen")[1].split("The plan found:")[0].split()).split()[1:]
    )
    plans = {result["name"]: AttentionPlan.parse(result["plan"], 4, 2) for result in figures["perplexity"]}
    assert plans["all full"] == AttentionPlan.uniform(4, FullSpan())
    assert list(plans)[4] == "found: 2 of 8 KV heads"
    assert not plans.get("the 2 as whole layers", plans["all full"]).by_heads
    assert plans["found: 2 of 8 KV heads"].unit_counts(2)[FullSpan()] == 2
    assert len(figures["forward"]["seconds"]) == 4
    plan, running = out.split("The plan found:")[1].split("llama.cpp", 1)
    assert plan.strip().splitlines()[0] == figures["found"][0]
    commands = [shlex.split(line) for line in (plan + running).splitlines() if line.startswith("masformer ")]
    assert [words[1] for words in commands] == ["convert", "convert", "export"]
    for words in commands:  # as they stand there
        code, _, err = run(capsys, *words[1:])
        assert code == 0, (words, err)
    assert str(load_config("mixed")[1]) == figures["found"][0]
    file = read_gguf("mixed.gguf")
    assert (file.architecture, file.get("attention.sliding_window")) == ("granite_swa", 8)


@pytest.mark.parametrize(("seconds", "busy"), [((3.0, 1.0, 1.1), True), ((1.0, 1.2, 1.1), False)])
def test_the_demo_counts_the_fastest_rounds_where_the_machine_is_busy(seconds, busy):
    times = {"all full": Timing("all full", seconds), "mix": Timing("mix", (0.5, 0.5, 0.6))}
    assert demo.counted_seconds(times) == (busy, {"all full": 1.0 if busy else 1.1, "mix": 0.5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "MODEL", "--plan", "full@9; window:4"], "layer 9 is out of range: the model has layers 0 to 3"),
        (["plan", "MODEL", "--plan", "window:0"], "window size must be at least 1, got 0"),
        (["plan", "MODEL", "--plan", "windw:4"], "unknown span 'windw:4'; allowed: full, window:SIZE"),
        (["plan", "MODEL", "--plan", "missing.yaml"], "plan file missing.yaml does not exist"),
        (["plan", "MODEL", "--plan", "full", "--plan", "full"], "--plan 'full' is given twice"),
        (["plan", "MODEL", "--full", "9", "--local", "window:4"], "9 full layers asked for, but the model has only 4"),
        (["plan", "MODEL", "--full", "2"], "--full and --placement need --local SPAN"),
        (["plan", "MODEL", "--local", "window:4"], "--local needs --full N or --placement LAYERS"),
        (["plan", "MODEL", "--full", "2", "--local", "full", "--plan", "full"], "give either --plan or --full"),
        (["plan", "MODEL", "--full", "2", "--local", "window:4", "--placement", "left"], "unknown placement 'left'"),
        (["plan", "MODEL", "--full", "two", "--local", "window:4"], "--full 'two' is not allowed; allowed: a whole"),
        (["plan", "MODEL", "--seq", "12,x"], "--seq '12,x' is not allowed; allowed: whole numbers from 1"),
        (["plan", "MODEL", "--plot", "plan.bmpx"], "plan.bmpx"),
        (["plan", "MODEL", "--json", "nowhere/plan.json"], "cannot write nowhere/plan.json: folder"),
        (["plan", "MODEL", "--cache-dtype", "int8"], "--cache-dtype 'int8' is not allowed; allowed: float32, bfloat16"),
        (["plan", "MODEL", "--devices", "1"], "devices must be at least 2, got 1"),
        (
            ["generate", "MODEL", "--prompt", "a", "--sequence-devices", "2"],
            "generate does not take '--sequence-devices 2': devices share a sequence in training alone",
        ),
        (["serve", "MODEL", "--sequence-devices=2"], "a cache across them would need another layout"),
        ([*PERPLEXITY, "--sequence-devices", "2"], "eval perplexity does not take '--sequence-devices 2': devices"),
        (["plan", "MODEL", "--plan", "full@0-2"], "does not say what the other layers do"),
        (["plan", "missing.gguf"], "model file missing.gguf does not exist"),
        (["plan"], "masformer plan needs MODEL; see masformer plan --help"),
        (["frobnicate"], "no command 'frobnicate'; allowed: demo, plan, search"),
        (["genrate"], "no command 'genrate'; did you mean generate?"),
        (["eval", "perpelxity"], "no command 'perpelxity'; did you mean perplexity?"),
        (["plan", "MODEL", "--sq", "64"], "masformer plan does not take '--sq 64'; did you mean --seq?"),
        (["export", "MODEL", "OUT", "--target", "vllm", "--lst"], "does not take '--lst'; did you mean --list?"),
        (["plan", "MODEL", "--quiet"], "masformer plan does not take '--quiet'; see masformer plan --help"),
        (["convert", "MODEL", "OUT", "--device", "cpu"], "masformer convert does not take '--device cpu'"),
        (["plan", "MODEL", "--seq", "8k"], "allowed: whole numbers from 1, separated by commas, as in 2048,8192"),
        (["generate", "MODEL", "--prompt", "x", "--device", "gpu"], "allowed: cpu, cuda, cuda:1, mps"),
        (["generate", "MODEL", "--prompt", "x", "--device", "cuda:77"], "--device cuda:77: torch sees"),
        (["eval", "perplexity", "MODEL", "--data", "txt.txt"], "data file txt.txt does not exist; near: text.txt"),
        (["eval"], "masformer eval needs a command: perplexity, summarization, retrieval"),
        (["convert", "MODEL", "OUT"], "nothing to convert: give --plan"),
        (["convert", "MODEL", "OUT", "--max-positions", "8"], "8"),
        (["convert", "MODEL", "MODEL", "--plan", "window:4"], "exists already"),
        (["convert", "MODEL", "OUT", "--plan", "window:4+sink"], "has no weights for them; fit them: masformer"),
        (["convert", "MODEL", "OUT", "--plan", "window:4+sink", "--sinks", "fit"], "--sinks fit needs --data FILE"),
        (
            ["convert", "MODEL", "OUT", "--plan", "window:4+sink", "--sinks", "fit", "--data", "TEXT", "--length", "0"],
            "length must be at least 9, got 0",
        ),
        (["convert", "MODEL", "OUT", "--plan", "window:4", "--data", "TEXT"], "--data does nothing without --sinks"),
        (
            ["convert", "MODEL", "OUT", "--plan", "window:4", "--sinks", "fit", "--data", "TEXT"],
            "has no constant sink to fit",
        ),
        (["convert", "MODEL", "OUT", "--plan", "window:4+sink", "--sinks", "x"], "'x' is not allowed; allowed: fit"),
        (
            [
                "search",
                "MODEL",
                *["--data", "TEXT", "--budget", "1", "--local", "window:8", "--out", "p.yaml", "--for", "x"],
            ],
            "--for 'x' is not allowed; allowed: transformers, vllm",
        ),
        (["generate", "MODEL", "--prompt", "x", "--plan", "window:4+sink"], "has no weights for them"),
        (["eval", "perplexity", "MODEL"], "masformer eval perplexity needs --data; see"),
        (["eval", "perplexity", "MODEL", "--data", "missing.txt"], "data file missing.txt does not exist"),
        (
            ["eval", "perplexity", "MODEL", "--data", "TEXT", "--documents", "0"],
            "limit of documents must be at least 1",
        ),
        ([*PERPLEXITY, "--against", "full"], "--against does nothing with one plan"),
        (
            [*PERPLEXITY, "--plan", "full", "--plan", "window:4", "--against", "window:5"],
            "--against 'window:5' is no plan of this run; allowed: 'full', 'window:4'",
        ),
        ([*PERPLEXITY, "--target-tokens", "8", "--max-tokens", "99"], "--max-tokens does nothing with --target-tokens"),
        ([*PERPLEXITY, "--target-tokens", "65"], "length 64 is too short for 65 target tokens"),
        ([*PERPLEXITY, "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["search", "MODEL", "--data", "TEXT"], "masformer search needs --budget, --local, --out; see"),
        (["search", "MODEL", *SEARCH, "--budget", "much", "--out", "p.yaml"], "much"),
        (["search", "MODEL", *SEARCH, "--budget", "2", "--out", "plan.txt"], "cannot tell the format of plan file"),
        (["search", "MODEL", *SEARCH, "--budget", "9", "--out", "p.yaml", "--length", "64"], "9"),
        (
            [
                "search",
                "MODEL",
                *SEARCH,
                "--budget",
                "2",
                "--out",
                "p.yaml",
                "--criteria",
                "tail",
                "--probes",
                "4",
                "--length",
                "32",
            ],
            "probes do nothing",
        ),
        (
            ["search", "MODEL", *SEARCH, "--budget", "2", "--out", "p.yaml", "--by", "heads", "--for", "vllm"],
            "no plan by heads; use --by layers",
        ),
        (
            [
                "search",
                "MODEL",
                "--data",
                "TEXT",
                "--local",
                "window:4+1",
                "--budget",
                "2",
                "--out",
                "p.yaml",
                "--for",
                "vllm",
            ],
            "vllm cannot run full@",
        ),
        (
            [
                "search",
                "MODEL",
                *SEARCH,
                "--budget",
                "2",
                "--out",
                "p.yaml",
                "--span",
                "window:8",
                "--for",
                "llama.cpp",
            ],
            "llama.cpp cannot run window:8,full",
        ),
        (
            ["search", "MODEL", "--data", "TEXT", "--local", "block:4", *BUDGET, "--for", "mlx-lm"],
            "window:4 (use windows in place of blocks)",
        ),
        (
            ["search", "MODEL", "--data", "TEXT", "--local", "window:4+sink", *BUDGET, "--for", "sglang"],
            "drops the biases that hold the values of constant sinks",
        ),
        (["bench", "attention", "--heads", "3", "--kv-heads", "2"], "3 query heads are no multiple of 2 kv heads"),
        (["bench", "attention", "--span", "block:-1"], "block size must be at least 1, got -1"),
        (["generate", "MODEL", "--file", "missing.txt"], "cannot read the prompt file missing.txt"),
        (["generate", "MODEL", "--prompt", " "], "the prompt is empty"),
        (["generate", "MODEL", "--prompt", "x", "--system", "y"], "a system message needs a chat template"),
        (["generate", "MODEL", "--prompt", "x", "--top-k", "3"], "top_p and top_k do nothing without"),
        (["generate", "MODEL", "--prompt", "x", "--beams", "0"], "beams must be at least 1, got 0"),
        (
            ["generate", "MODEL", "--prompt", "x", "--plan", "full", "--plan", "window:4"],
            "--plan is given twice; generate takes one",
        ),
        (["bench", "prefill", "MODEL", "--lengths", "256"], "beyond the 128 positions of the model"),
        (["bench", "decode", "MODEL", "--lengths", "64", "--new", "0"], "new tokens must be at least 1, got 0"),
        (["bench", "attention", "--peers", "x"], "unknown peer 'x'; allowed: hf-sdpa"),
        (["bench", "prefill", "MODEL", "--plot", "x.txt"], "cannot tell the format of figure x.txt"),
        (["bench", "train", "MODEL", "--lengths", "256"], "256 tokens are beyond the 128 positions of the model"),
        (["bench", "train", "MODEL", "--random-weights", "--max-positions", "512"], "the config says the positions"),
        (["bench", "decode", "MODEL", "--lengths", "x"], "--lengths 'x' is not allowed"),
        (["demo", "--length", "5"], "length must be at least 64, got 5"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(capsys, folder, text, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": folder, "TEXT": text}
    code, _, err = run(capsys, *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in err
    assert err.startswith("masformer: error: ")
    assert err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(("kind", "reason"), [("bert", "not causal"), ("bloom", "alibi"), ("t5", "not a causal")])
def test_the_cost_of_a_plan_that_a_model_cannot_take_is_not_shown(capsys, tmp_path, kind, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    code, out, err = run(capsys, "plan", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named_before_the_work(capsys, folder, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    code, _, err = run(capsys, "plan", folder, "--json", str(tmp_path / "plan.json"))
    tmp_path.chmod(stat.S_IRWXU)
    assert (code, "is not writable" in err) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["plan"],
        ["convert"],
        ["demo"],
        ["search"],
        ["train"],
        ["serve"],
        ["report"],
        ["eval", "perplexity"],
        ["eval", "summarization"],
        ["bench", "attention"],
    ],
)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    assert "masformer " in capsys.readouterr().out


def commands():
    found = [[]]
    for name, command in cli.COMMANDS.items():
        found += [[name]] if callable(command) else [[name], *([name, below] for below in command)]
    return found


def test_help_fits_into_80_columns_and_has_no_types(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in commands():
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if len(line) > 80] == []
        assert "null" not in out
        assert "type:" not in out


def test_without_a_word_the_help_is_shown_with_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    for words in commands():
        assert f"masformer {words[0] if words else ''}" in out
    with pytest.raises(SystemExit):
        cli.main(["-V"])
    assert capsys.readouterr().out.startswith("masformer ")


@pytest.mark.parametrize(("words", "several"), [(["plan"], 1), (["eval", "retrieval"], 1), (["bench", "decode"], 1)])
@pytest.mark.parametrize("single", [["generate"], ["serve"], ["convert"], ["export"]])
def test_a_plan_may_be_repeated_where_help_says_so(capsys, words, several, single):
    for command, repeated in ((words, True), (single, False)):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        assert ("May be repeated" in " ".join(capsys.readouterr().out.split())) is repeated
    code, _, err = run(capsys, *single, "M", "OUT", "--plan", "full", "--plan", "block:4")
    assert (code, "--plan is given twice" in err) == (2, True)


def test_a_plan_needs_no_quotes(capsys, folder):
    quoted = run(capsys, "plan", folder, "--seq", "64", "--plan", "full@0,2-3; window:8+2")
    assert quoted[0] == 0
    assert run(capsys, "plan", folder, "--seq", "64", "--plan", "full@0,2-3,window:8+2") == quoted


def test_every_setting_of_a_recipe_is_listed(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--settings"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    for name in ("output", "model.plan", "data.sources.NAME.files", "training.steps", "lora.rank", "checkpoints.keep"):
        assert f" {name} " in out
    assert "0.0001" in out


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_written_for_a_shell(capsys, shell):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--print_completion", shell])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in ("perplexity", "prefill-chunk", "bfloat16", "lm-eval"):
        assert word in out


def test_completion_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for option in ("--print_completion", "--print_shtab"):
        code, _, err = run(capsys, option, "bash")
        assert (code, "pip install 'masformer[completion]'" in err) == (2, True)


def test_progress_and_device_are_told_on_standard_error_unless_quiet(capsys, folder, text, tmp_path):
    record = tmp_path / "record.json"
    searched = ["--budget", "1", "--out", str(tmp_path / "p.yaml"), "--length", "32", "--windows", "1"]
    searched += ["--held-out-windows", "1", "--random-placements", "1"]
    retrieval = ["--tasks", "passkey", "--lengths", "260", "--depths", "2", "--examples", "1", "--max-new-tokens", "2"]
    retrieval += ["--max-positions", "260"]
    summaries = tmp_path / "rows.jsonl"
    summaries.write_text(json.dumps({"text": "a b c " * 20, "summary": "a b"}) + "\n")
    rows = ["--data", str(summaries), "--document-field", "text", "--target-field", "summary", "--lengths", "110"]
    rows += ["--max-new-tokens", "2", "--out", str(tmp_path / "o.jsonl")]
    cases = {
        "full at 64 tokens": ["eval", "perplexity", folder, "--data", text, "--lengths", "64", "--plan", "full"],
        "choosing": ["search", folder, "--criteria", "tail", "--data", text, "--local", "window:4", *searched],
        "full at 260 tokens": ["eval", "retrieval", folder, *retrieval, "--plan", "full"],
        "block:8 at 110 tokens": ["eval", "summarization", folder, *rows, "--plan", "block:8"],
        "reading 5 prompt tokens": ["generate", folder, "--prompt", "a b c", "--max-new-tokens", "1"],
    }
    for stage, words in cases.items():
        code, _, err = run(capsys, *words, "--device", "cpu", "--json", str(record))
        assert code == 0, err
        assert err.splitlines()[0].startswith(f"{folder} on CPU, ")
        assert stage in err.splitlines()[1]
        assert json.loads(record.read_text())["device"].startswith("CPU, ")
        quiet = run(capsys, *words, "--quiet")
        assert (quiet[0], stage in quiet[2]) == (0, False)


@pytest.mark.parametrize("words", ["attention", "prefill", "decode --new 1", "train", "eval --tokens 64"])
def test_a_bench_runs_on_the_device_of_choice_and_records_it(capsys, folder, tmp_path, monkeypatch, words):
    monkeypatch.setattr(benchmarks, "default_device", lambda: pytest.fail("another device was asked for"))
    monkeypatch.setattr(timing, "default_device", benchmarks.default_device)
    record = tmp_path / "record.json"
    what, *options = words.split()
    words = ["bench", what, *([] if what == "attention" else [folder]), *options, "--lengths", "16", "--repeats", "1"]
    code, _, err = run(capsys, *words, "--device", "cpu", "--json", str(record))
    assert code == 0, err
    assert json.loads(record.read_text())["device"].startswith("CPU, ")
    assert run(capsys, *words, "--device", "cuda:77")[2].startswith("masformer: error: --device cuda:77: torch sees")


def test_what_is_only_written_is_put_on_no_other_device(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "default_device", lambda: pytest.fail("no device is needed"))
    assert run(capsys, "convert", folder, str(tmp_path / "a"), "--plan", "window:8")[0] == 0
    assert run(capsys, "export", folder, str(tmp_path / "b"), "--plan", "window:8", "--target", "transformers")[0] == 0


def test_documents_shorter_than_a_window_are_counted(capsys, folder, text):
    words = ["eval", "perplexity", folder, "--data", text, "--plan", "full", "--max-tokens", "100"]
    assert "the document is shorter than 128 tokens" in run(capsys, *words, "--lengths", "64,128")[1]
    assert "shorter" not in run(capsys, *words, "--lengths", "64")[1]


def test_the_same_seed_gives_the_same_inputs(capsys):
    for _ in range(2):
        cli.main(["bench", "attention", "--lengths", "8", "--repeats", "1", "--forward-only", "--seed", "7"])
        assert torch.initial_seed() == 7
    capsys.readouterr()


@pytest.fixture(scope="module")
def chatty(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(folder, path)
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}a")
    return str(path)


def pipe(monkeypatch, data):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_chat_reads_a_turn_from_each_line(capsys, chatty, tmp_path, monkeypatch):
    document, record = tmp_path / "doc.txt", tmp_path / "chat.json"
    document.write_text("doc")
    words = ["generate", chatty, "--chat", "--max-new-tokens", "3", "--plan", "full", "--json", str(record)]
    pipe(monkeypatch, b"one\n\n  two\r\n/exit\nthree\n")
    code, out, err = run(capsys, *words)
    turns = json.loads(record.read_text())["turns"]
    assert code == 0
    assert [turn["message"] for turn in turns] == ["one", "two"]
    assert turns[0]["text"] in out
    assert turns[1]["text"] in out
    assert err.count("prompt tokens") == 2
    for begun, said, messages in [
        (["--file", str(document)], b"what?", ["doc\n\nwhat?"]),
        (["--file", str(document), "--prompt", "what?"], b"and?\n", ["doc\n\nwhat?", "and?"]),
        ([], b"", []),
    ]:
        pipe(monkeypatch, said)
        assert run(capsys, *words, *begun)[0] == 0
        assert [turn["message"] for turn in json.loads(record.read_text())["turns"]] == messages


def test_an_interrupt_ends_the_answer_and_not_the_chat(capsys, chatty, tmp_path, monkeypatch):
    answered, answer = [], Chat.answer

    def interrupted(self, text, *heard):
        answered.append(text)
        if len(answered) == 1:
            raise KeyboardInterrupt
        return answer(self, text, *heard)

    monkeypatch.setattr(Chat, "answer", interrupted)
    pipe(monkeypatch, b"one\ntwo\n")
    code, _, err = run(capsys, "generate", chatty, "--chat", "--max-new-tokens", "3")
    assert (code, answered, "stopped; /exit ends the chat" in err) == (0, ["one", "two"], True)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (["--raw"], b"", "--raw does not go with --chat"),
        (["--beams", "2"], b"", "--beams does not go with --chat"),
        (["--temperature", "0", "--top-k", "3"], b"one\n", "top_p and top_k do nothing without"),
        ([], b"x" * 300, "the prompt has 302 tokens, and the model 128 positions"),
        ([], b"ok\n\xff\n", "standard input, line 2: not UTF-8 text"),
    ],
)
def test_what_a_chat_cannot_do_is_one_line(capsys, chatty, monkeypatch, options, data, message):
    pipe(monkeypatch, data)
    code, _, err = run(capsys, "generate", chatty, "--chat", "--max-new-tokens", "2", *options)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"masformer: error: {message}")


def test_a_model_without_a_template_cannot_chat_and_is_not_loaded(capsys, folder, monkeypatch):
    monkeypatch.setattr("masformer.models.checkpoint.load_model", None)
    code, _, err = run(capsys, "generate", folder, "--chat")
    assert (code, "the tokenizer has no chat template" in err) == (2, True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--temperature", "warm"], "--temperature 'warm' is not allowed; allowed: a number"),
        (["--temperature", "1e400"], "--temperature must be finite, got inf"),
        (["--top-p", "NaN"], "--top-p 'NaN' is not allowed; allowed: a number"),
        (["--seed", "1.5"], "--seed '1.5' is not allowed; allowed: a whole number"),
        (["--seed", ""], "--seed '' is not allowed; allowed: a whole number"),
    ],
)
def test_what_an_option_takes_is_said_as_it_is(capsys, option, message):
    code, _, err = run(capsys, "generate", "nowhere", "--prompt", "a", *option)
    assert code == 2
    assert err.strip().endswith(message)
