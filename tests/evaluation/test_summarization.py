"""Summaries: batches, beams, resuming, scores by plan and length, and the command."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from rich.console import Console

from masformer import AttentionPlan, FullSpan, MasformerError, apply_plan, cli
from masformer.evaluation import predictions
from masformer.evaluation.intervals import bootstrap
from masformer.evaluation.predictions import METRICS, Prediction
from masformer.evaluation.prompts import Example, Prompter, Template
from masformer.evaluation.rouge import longbench_rouge_l, rouge_scores
from masformer.evaluation.summarization import summarization_tables, summarize
from masformer.generation import generate_batch
from masformer.models import checkpoint
from tiny import PLAN, letter_tokenizer, tiny

WORDS = "the quick brown fox jumps over lazy dogs and runs away from it all while nobody looks"
WORDS = WORDS.split()
FULL = AttentionPlan.uniform(4, FullSpan())
PLANS = {"full": FULL, "mixed": PLAN}


def documents(count):
    """Of different lengths, each different."""
    return [" ".join(WORDS[(number + step) % len(WORDS)] for step in range(8 + 3 * number)) for number in range(count)]


@pytest.fixture
def tokenizer():
    return letter_tokenizer(eos_token="<e>")


@pytest.fixture
def model(tokenizer):
    shape = {"vocab_size": len(tokenizer), "sliding_window": None, "max_position_embeddings": 512}
    return apply_plan(tiny("llama", **shape, eos_token_id=None), PLAN)


@pytest.fixture
def prompter(tokenizer):
    return Prompter(tokenizer, Template("{document}\nSummary:"))


@pytest.fixture
def examples():
    return [Example(f"x:{number}", text, f"a summary of {text[:20]}") for number, text in enumerate(documents(5))]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(path):
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines(path)]


# Batches


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_gives_what_generate_gives_for_each_prompt(kind, beams):
    model = apply_plan(tiny(kind, eos_token_id=7), PLAN)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(8, 61, (count,), generator=generator).tolist() for count in (40, 1, 23, 40, 2)]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=20, num_beams=beams, do_sample=False, pad_token_id=0)
        for prompt in prompts
    ]
    expected = [row[0, len(prompt) :].tolist() for row, prompt in zip(expected, prompts, strict=True)]
    for chunk in (7, 2048):
        found = generate_batch(model, prompts, max_new_tokens=20, beams=beams, chunk=chunk)
        assert [row.tokens + [7] * row.ended for row in found.rows] == expected
        assert found.prefill_seconds > 0 < found.decode_seconds


def test_a_text_ends_at_the_tokens_of_the_generation_config_and_at_those_given(model):
    prompt = list(range(30, 50))
    free = generate_batch(model, [prompt], max_new_tokens=12).rows[0]
    assert (len(free.tokens), free.ended) == (12, False)
    end = next(token for token in free.tokens[3:] if token not in free.tokens[:3])
    stop = free.tokens.index(end)
    given = generate_batch(model, [prompt], max_new_tokens=12, end_tokens=[end]).rows[0]
    assert (given.tokens, given.ended) == (free.tokens[:stop], True)
    model.generation_config.eos_token_id = [255, end]
    assert generate_batch(model, [prompt], max_new_tokens=12).rows[0] == given
    both = generate_batch(model, [prompt], max_new_tokens=12, end_tokens=[free.tokens[0]]).rows[0]
    assert (both.tokens, both.ended) == ([], True)
    assert model.generation_config.max_new_tokens is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"beams": 0}, "beams must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[5], []]}, "holds no token"),
        ({"prompts": [[5] * 510]}, "a prompt of 510 tokens and 3 new ones are beyond the 512 positions"),
    ],
)
def test_batches_that_cannot_be_are_named(model, options, message):
    with pytest.raises(MasformerError, match=message):
        generate_batch(model, **{"prompts": [[5]], "max_new_tokens": 3} | options)


# Results


@pytest.mark.parametrize("beams", [1, 2])
def test_results_do_not_depend_on_the_batch(model, prompter, examples, tmp_path, beams):
    found = []
    for batch in (1, 3, 8):
        out = tmp_path / f"{batch}.jsonl"
        summarize(model, prompter, examples, PLANS, [30, 60], out, max_new_tokens=9, batch=batch, beams=beams)
        rows = without_seconds(out)
        found.append(sorted(rows, key=lambda row: (row["plan"], row["length"], row["id"])))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5 * 2 * 2


def test_predictions_are_the_models_own_and_scores_are_theirs(model, prompter, examples, tmp_path):
    out = tmp_path / "out.jsonl"
    results, differences = summarize(model, prompter, examples, PLANS, [40], out, max_new_tokens=12)
    kept = {(line["plan"], line["id"]): Prediction(**line) for line in lines(out)}
    for plan in PLANS.values():
        apply_plan(model, plan)
        for example in examples:
            prompt = prompter.prompt(example, 40)
            tokens = torch.tensor([prompt.tokens])
            own = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(prompt.tokens) :]
            line = kept[str(plan), example.name]
            assert line.prediction == prompter.tokenizer.decode(own, skip_special_tokens=True).strip()
            assert (line.prompt_tokens, line.cut_tokens) == (len(prompt.tokens), prompt.cut)
            assert (line.new_tokens, line.at_limit, line.reference) == (12, True, example.target)
    by_plan = {name: [kept[str(plan), example.name].scores() for example in examples] for name, plan in PLANS.items()}
    assert [result.name for result in results] == list(PLANS)
    for result in results:
        for metric in METRICS:
            assert result.metrics[metric] == bootstrap([row[metric] for row in by_plan[result.name]])
        assert result.metrics["rouge1"].count == result.examples == 5
        assert result.truncated == sum(len(example.document) > 31 for example in examples) > 0
        assert result.prompt_tokens <= 40
    line = next(iter(kept.values()))
    scores = rouge_scores(line.prediction, line.reference)
    assert scores.items() <= line.scores().items()
    assert line.scores()["longbench_rougeL"] == longbench_rouge_l(line.prediction, line.reference)
    (difference,) = differences
    assert (difference.name, difference.baseline, difference.length) == ("mixed", "full", 40)
    pairs = zip(by_plan["mixed"], by_plan["full"], strict=True)
    assert difference.metrics["rougeL"] == bootstrap([one["rougeL"] - base["rougeL"] for one, base in pairs])
    shown = Console(width=110, record=True)
    for table in summarization_tables(results, differences):
        shown.print(table)
    text = shown.export_text()
    assert all(word in text for word in ("R-Lsum", "mixed", "Difference to full"))


def test_queries_about_one_document_are_one_unit_of_the_interval(model, tokenizer, tmp_path):
    texts = documents(3)
    examples = [Example(f"x:{number}", texts[number % 2], WORDS[number], WORDS[number]) for number in range(5)]
    examples.append(Example("y", texts[2], "a", "b"))
    prompter = Prompter(tokenizer, Template("{query} {document}"))
    (result,), differences = summarize(model, prompter, examples, {"p": PLAN}, [50], tmp_path / "o", max_new_tokens=4)
    rows = {line["id"]: Prediction(**line).scores()["words"] for line in lines(tmp_path / "o")}
    assert result.metrics["words"].count == 3
    assert result.metrics["words"].mean == pytest.approx(sum(rows.values()) / 6)
    assert differences == []


def test_flat_figures_with_intervals(model, prompter, examples, tmp_path):
    results, differences = summarize(model, prompter, examples[:2], PLANS, [30, 40], tmp_path / "o", max_new_tokens=3)
    row = json.loads(json.dumps(results[1].to_dict()))
    assert (row["name"], row["plan"], row["length"], row["examples"]) == ("full", str(FULL), 40, 2)
    assert all(set(row[metric]) == {"mean", "low", "high", "count"} for metric in METRICS)
    assert set(differences[0].to_dict()) == {"name", "baseline", "length", *METRICS}
    assert [(each.name, each.length) for each in differences] == [("mixed", 30), ("mixed", 40)]


# Resuming


def test_an_interrupted_run_goes_on_and_ends_with_the_same_file(model, prompter, examples, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = {"max_new_tokens": 6, "batch": 2}
    expected = summarize(model, prompter, examples, PLANS, [30, 60], whole, **options)
    calls, real = Counter(), generate_batch

    def interrupted(*args, **kwargs):
        calls["all"] += 1
        if calls["all"] == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(predictions, "generate_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        summarize(model, prompter, examples, PLANS, [30, 60], out, **options)
    assert len(lines(out)) == 7  # batches of 2, 2, 1, and 2 again
    with out.open("a") as file:
        file.write('{"id": "x:1", "pla')
    done = []
    found = summarize(
        model, prompter, examples, PLANS, [30, 60], out, **options, progress=lambda *state: done.append(state)
    )
    assert without_seconds(out) == without_seconds(whole)
    assert calls["all"] == 5 + 3 * 4 - 4
    assert done[0][2] > 0
    assert done[-1][2] == done[-1][3] == sum(line["prompt_tokens"] for line in lines(out))
    for one, other in zip(expected[0], found[0], strict=True):
        assert one.metrics == other.metrics
    again = out.read_bytes()
    summarize(model, prompter, examples, PLANS, [30, 60], out, **options)
    assert (out.read_bytes(), calls["all"]) == (again, 5 + 3 * 4 - 4)
    more = PLANS | {"last": AttentionPlan.parse("full@3; window:4", 4)}
    results, _ = summarize(model, prompter, examples, more, [30], out, **options)
    assert len(results) == 3
    assert len(lines(out)) == 20 + 5


def test_other_settings_texts_and_weights_are_refused(model, prompter, examples, tokenizer, tmp_path):
    out = tmp_path / "out.jsonl"
    options = {"max_new_tokens": 2}

    def again(examples=examples, prompter=prompter, **changes):
        summarize(model, prompter, examples, {"p": PLAN}, [60], out, **options | changes)

    again()
    for changes, message in [
        ({"max_new_tokens": 3}, r"out\.jsonl was made with other settings: max_new_tokens was 2, now it is 3"),
        ({"beams": 2}, "beams was 1, now it is 2"),
        ({"settings": {"model": "other"}}, 'model was null, now it is "other"'),
        ({"prompter": Prompter(tokenizer, Template("{document}"))}, "template was "),
        (
            {"examples": [Example("x:0", "another text", "t"), *examples[1:]]},
            r"the prediction for x:0 .* was made with another text or model",
        ),
    ]:
        with pytest.raises(MasformerError, match=message):
            again(**changes)
    model.lm_head.weight.data[:] += 1
    with pytest.raises(MasformerError, match="another text or model"):
        again()
    model.lm_head.weight.data[:] -= 1
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(MasformerError, match=r"which says how they were made, cannot be read"):
        again()
    out.write_text('{"window": 1}\n')
    with pytest.raises(MasformerError, match=r"out\.jsonl, line 1: not a prediction"):
        again()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [510]}, "prompts of 510 tokens and 8 new ones are beyond the 512 positions of the model"),
        ({"lengths": [30, 30]}, "a length is given twice: 30, 30"),
        ({"lengths": []}, "nothing to summarize"),
        ({"examples": []}, "nothing to summarize"),
        ({"plans": {}}, "nothing to summarize"),
        ({"lengths": [0]}, "length must be at least 1"),
        ({"lengths": [9]}, "x:0: a prompt of 9 tokens has no room for the document, since the template alone takes 9"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"plans": {"p": AttentionPlan.uniform(3, FullSpan())}}, "3"),
        ({"examples": [Example("x", "a", "b"), Example("x", "c", "d")]}, "two examples have the same name"),
    ],
)
def test_wrong_values_are_named_before_anything_is_generated(model, prompter, examples, tmp_path, changes, message):
    options = {"examples": examples, "plans": {"p": PLAN}, "lengths": [40], "max_new_tokens": 8} | changes
    with pytest.raises(MasformerError, match=message):
        summarize(model, prompter, out=tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_text()


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stock") / "model"
    tokenizer = letter_tokenizer(bos_token="<s>")
    tiny("llama", vocab_size=len(tokenizer), sliding_window=None, max_position_embeddings=512).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path):
    rows = [
        {"document": text, "split": split, "queries": [{"q": "What?", "a": text[:9], "kind": kind} for kind in "ab"]}
        for split in ("train", "test")
        for text in [f"{split} {text}" for text in documents(3)]
    ]
    for row in rows:
        row["queries"][1]["q"] = "Who?"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data.jsonl")


def words(folder, data, tmp_path, *more):
    found = ["eval", "summarization", folder, "--data", data, "--document-field", "document", "--query-field"]
    found += ["queries.q", "--target-field", "queries.a", "--where", "split=test", "--where", "queries.kind=b"]
    return [*found, "--out", str(tmp_path / "out.jsonl"), "--lengths", "320", "--max-new-tokens", "5", *more]


def test_the_command_end_to_end(folder, data, tmp_path, capsys, monkeypatch):
    loads = Counter()
    real = checkpoint.load_model

    def counted(*args, **kwargs):
        loads["n"] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "load_model", counted)
    (tmp_path / "template.txt").write_text("{document}\nQ: {query}\nA:\n")
    record = tmp_path / "record.json"
    more = ["--plan", "full", "--plan", str(PLAN), "--template", str(tmp_path / "template.txt"), "--shots", "2"]
    more += ["--shot-where", "split=train", "--shot-tokens", "12", "--cut", "tail", "--beams", "2"]
    assert cli.main(words(folder, data, tmp_path, *more, "--json", str(record))) == 0
    out = capsys.readouterr().out
    assert "R-Lsum" in out
    assert "Difference to full" in out
    figures = json.loads(record.read_text())
    assert [(row["name"], row["length"], row["examples"]) for row in figures["results"]] == [
        ("full", 320, 3),
        (str(PLAN), 320, 3),
    ]
    assert figures["results"][0]["rouge1"]["count"] == 3
    assert figures["differences"][0]["baseline"] == "full"
    assert figures["settings"]["cut"] == "tail"
    shots = figures["settings"]["shots"]
    assert len(shots) == 2
    assert all(int(name.split(":")[1].split("#")[0]) <= 3 for name in shots)
    assert {line["id"] for line in lines(tmp_path / "out.jsonl")} == {f"data.jsonl:{line}#2" for line in (4, 5, 6)}
    assert loads["n"] == 1
    before = (tmp_path / "out.jsonl").read_bytes()
    assert cli.main(words(folder, data, tmp_path, *more)) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--where", "split"], "--where 'split' is not allowed; allowed: FIELD=VALUE"),
        (["--where", "split=train"], "--where names the field 'split' twice"),
        (["--shots", "1"], "--shots needs --shot-where FIELD=VALUE"),
        (["--shots", "-1"], "shots must be at least 0"),
        (["--shot-where", "split=train"], "--shot-where does nothing without --shots"),
        (["--shot-tokens", "9"], "--shot-tokens does nothing without --shots"),
        (["--seed", "9"], "--seed does nothing without --shots"),
        (["--shots", "1", "--shot-where", "split=test"], "1 shots asked for, but 0 examples are left"),
        (["--lengths", "510"], "beyond the 512 positions of the model"),
        (["--lengths", "20"], "has no room for the document"),
        (["--cut", "end"], "--cut 'end' is not allowed; allowed: middle, tail, head"),
        (["--template", "missing.txt"], "cannot read the template missing.txt"),
        (["--template", "no-query.txt"], "--query-field does nothing: template no-query.txt holds no {query}"),
        (["--target-field", "queries.answer"], "line 4, entry 2 of queries: no field 'queries.answer'"),
        (["--out", "nowhere/out.jsonl"], "cannot write nowhere/out.jsonl"),
        (["--plan", "window:0"], "window size must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(folder, data, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no-query.txt").write_text("{document}")
    assert cli.main(words(folder, data, tmp_path, *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("masformer: error: ")


def test_a_template_with_a_query_needs_a_query_field(folder, data, tmp_path, capsys):
    (tmp_path / "query.txt").write_text("{document} {query}")
    options = words(folder, data, tmp_path, "--template", str(tmp_path / "query.txt"))
    at = options.index("--query-field")
    assert cli.main(options[:at] + options[at + 2 :]) == 2
    assert "query.txt holds {query}; give --query-field" in capsys.readouterr().err
