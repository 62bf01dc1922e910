"""Retrieval: prompts of an exact length and depth, RULER's score and effective length, resuming, and the commands."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from lm_eval.tasks.ruler.common_utils import string_match_all as lm_eval_match
from rich.console import Console

from masformer import AttentionPlan, FullSpan, MasformerError, apply_plan, cli
from masformer.data.sources import Source
from masformer.data.store import token_store
from masformer.evaluation import predictions
from masformer.evaluation.intervals import bootstrap
from masformer.evaluation.retrieval import (
    TASKS,
    Haystack,
    Prober,
    effective_length,
    graded_lengths,
    parse_depths,
    read_haystack,
    retrieval_tables,
    retrieve,
    string_match_all,
    tasks_of,
    training_pairs,
    word_tokenizer,
)
from masformer.evaluation.retrieval.haystack import NOISE, insert
from masformer.generation import generate_batch
from masformer.records import read_record
from masformer.reports.build import build_report
from tiny import PLAN, letter_tokenizer, tiny

CHAT = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
FULL = AttentionPlan.uniform(4, FullSpan())
PLANS = {"full": FULL, "mixed": PLAN}
PASSKEY, SINGLE = TASKS["passkey"], TASKS["niah_single"]
WORDS = [task for name, task in TASKS.items() if name != "variable_tracking"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS, 2)


@pytest.fixture
def model(tokenizer):
    return apply_plan(tiny("llama", vocab_size=len(tokenizer), sliding_window=None, eos_token_id=None), PLAN)


def prober(tokenizer, **options):
    return Prober(tokenizer, **{"digits": 2, "max_new_tokens": 4} | options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(path):
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines(path)]


# Prompts


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("chat", [None, CHAT])
def test_a_prompt_and_its_answer_fill_the_length(name, chat):
    tokenizer = letter_tokenizer(bos_token="<s>", eos_token="</s>", chat_template=chat)
    task = TASKS[name]
    for length in (1900, 2500):
        for depth in (0, 37, 100):
            made = Prober(tokenizer).probe(task, length, depth, 3)
            room = length - task.room - len(made.tokens)
            assert 0 <= room <= len(" yellow."), "the next word would fit"
            assert tokenizer.decode(made.tokens).replace("<s>", "") == made.text
            assert made.text.startswith("<u>") == (chat is not None)
            assert re.search(r"</u><a>(The|Answer:)" if chat else r"(\?|above\.) (The|Answer:)", made.text)


def test_the_same_arguments_give_the_same_prompt_and_others_another(tokenizer):
    def made(task=PASSKEY, length=160, depth=50, index=0, stream="test", **options):
        return prober(tokenizer, **options).probe(task, length, depth, index, stream)

    assert made() == made()
    text = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n{}\nWhat is the pass key? The pass key is"
    )
    before, after = text.split("{}")
    assert made().text.startswith(before)
    assert made().text.endswith(after)
    keys = {made(index=index).answers for index in range(30)}
    assert len(keys) > 20
    several = [made(seed=seed, stream=stream, digits=3).text for seed in range(5) for stream in ("test", "train")]
    assert len(set(several)) == 10


def context(made, task):
    """The haystack with what is hidden in it, without the words around."""
    head, tail = (re.escape(part) for part in task.question.split("{context}"))
    tail = tail.replace(re.escape("{query}"), r"[\w, -]+")
    found = re.findall(f"{head}(.*?){tail}", made.text, re.DOTALL)
    return found[-1]


@pytest.mark.parametrize("depth", [0, 10, 25, 50, 80, 100])
def test_the_needle_stands_at_its_depth_between_sentences(tokenizer, depth):
    for index in range(4):
        made = prober(tokenizer).probe(PASSKEY, 400, depth, index)
        (key,) = made.answers
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert made.text.count(needle) == 1
        before, after = context(made, PASSKEY).split(needle)
        words = len(before.split()), len(after.split())
        assert abs(100 * words[0] / sum(words) - depth) <= 100 * 2.5 / sum(words)
        assert before == "" or before.rstrip().endswith(NOISE) or depth == 100
        whole = " ".join(f"{before} {after}".split())
        assert 3 * (" ".join(NOISE) + " ") in whole


@pytest.mark.parametrize("name", [name for name in TASKS if name != "passkey"])
def test_what_rulers_tasks_hide(name):
    tokenizer = letter_tokenizer(eos_token="</s>")
    task = TASKS[name]
    for index in range(10):
        made = Prober(tokenizer).probe(task, 4000, 30, index)
        text = context(made, task)
        if name == "variable_tracking":
            pairs = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
            names = [left for left, _ in pairs]
            assert tuple(names) == made.answers
            assert len(set(names)) == 5
            assert [right for _, right in pairs[1:]] == names[:-1]
            assert re.fullmatch(r"\d{5}", pairs[0][1])
            assert f"assigned the value {pairs[0][1]} in the text above" in made.text
            places = [text.index(f"VAR {left} = ") / len(text) for left, _ in pairs]
            assert made.text.count("Answer: According to") == 2, "a worked example comes first"
        else:
            pairs = re.findall(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", text)
            asked = re.findall(r"[a-z]+-[a-z]+", re.search(r"magic numbers? for ([\w, -]+) mentioned", made.text)[1])
            found = [value for key, value in pairs if key in asked]
            assert sorted(found) == sorted(made.answers)
            assert len({value for _, value in pairs}) == len(pairs)
            counts = {
                "niah_single": (1, 1),
                "niah_multikey": (4, 4),
                "niah_multivalue": (1, 4),
                "niah_multiquery": (4, 4),
            }
            assert len(asked) == (4 if name == "niah_multiquery" else 1)
            assert (len({key for key, _ in pairs}), len(pairs)) == counts[name]
            places = [text.index(f"is: {value}") / len(text) for value in made.answers]
        assert places[0] == pytest.approx(0.3, abs=0.09)
        assert min(places) == places[0]


def test_distractors_lie_anywhere_and_the_text_may_be_ones_own(tmp_path):
    tokenizer = letter_tokenizer()
    task, order = TASKS["niah_multikey"], Counter()
    for index in range(20):
        made = Prober(tokenizer, max_new_tokens=20).probe(task, 2000, 50, index)
        order[re.findall(r"is: (\d+)\.", context(made, task)).index(made.answers[0])] += 1
    assert len(order) >= 3
    sentences = [f"Sentence {word} of a text has its own words." for word in ("one", "two", "three", "four", "five")]
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": " ".join(sentences)}) + "\n")
    own = read_haystack([tmp_path / "text.jsonl"], "body")
    assert own.sentences == tuple(sentences)
    texts = [context(Prober(tokenizer, haystack=own).probe(PASSKEY, 1200, 50, index), PASSKEY) for index in range(9)]
    assert len({text[:20] for text in texts}) > 2, "examples begin at different sentences"
    assert all(sentence in text for text in texts for sentence in sentences)
    assert own.fingerprint() != Haystack().fingerprint()


def test_needles_go_between_sentences():
    sentences = ["one two.", "three four.", "five six."]
    needles = [(0.6, "B"), (0, "A"), (0.6, "C"), (1, "D")]
    assert insert(sentences, needles) == "A one two. three four. B C five six. D"
    assert insert([], needles) == "A B C D"
    assert Haystack(("a b c.", "d.")).words(6, 1) == ["d.", "a b c.", "d.", "a"]


def test_the_word_tokenizer_knows_every_word(tokenizer):
    for task in WORDS:
        for index in range(20):
            made = prober(tokenizer, max_new_tokens=30).probe(task, 500, 40, index)
            assert tokenizer.unk_token_id not in made.tokens
            target = tokenizer(made.target)["input_ids"]
            assert tokenizer.unk_token_id not in target
            assert len(target) == 2 * len(made.answers)
            assert string_match_all(tokenizer.decode(target), made.answers) == 100
    assert len(word_tokenizer([PASSKEY], 2)) < 150


# Scores


def test_scores_are_rulers():
    cases = [
        ("It is 123 and 456.", ["123"], 100),
        ("It is 123 and 456.", ["123", "456", "789", "12"], 75),
        ("the BRAVE one", ["brave", "Fox"], 50),
        ("", ["1"], 0),
    ]
    for text, references, score in cases:
        assert string_match_all(text, references) == score == 100 * lm_eval_match([text], [references])


@pytest.mark.parametrize(
    ("scores", "length"),
    [
        ({4096: 86.0, 1024: 100.0, 2048: 85.7}, 4096),
        ({1024: 100.0, 2048: 85.6, 4096: 99.0}, 1024),
        ({1024: 85.6}, None),
    ],
)
def test_the_effective_length_is_the_longest_that_stays_above(scores, length):
    assert effective_length(scores) == length


def test_results_are_those_of_the_predictions(model, tokenizer, tmp_path):
    depths, out = [0.0, 100.0], tmp_path / "out.jsonl"
    asks = prober(tokenizer)
    results, reach = retrieve(model, asks, [PASSKEY, SINGLE], PLANS, [110, 120], depths, 3, out, batch=4)
    kept = lines(out)
    assert len(kept) == 2 * 2 * 2 * 2 * 3
    for line in kept[:5] + kept[-5:]:
        task, length, depth, index = re.fullmatch(r"(\w+) at (\d+), depth (\w+), number (\d+)", line["id"]).groups()
        made = asks.probe(TASKS[task], int(length), float(depth), int(index))
        apply_plan(model, AttentionPlan.parse(line["plan"], 4))
        tokens = torch.tensor([made.tokens])
        own = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=0)[
            0, tokens.shape[1] :
        ]
        assert line["prediction"] == tokenizer.decode(own, skip_special_tokens=True).strip()
        assert line["references"] == list(made.answers)
    for result in results:
        here = [line for line in kept if (line["plan"], line["task"]) == (result.plan, result.task)]
        here = [line for line in here if line["length"] == result.length and result.depth in (None, line["depth"])]
        assert len(here) == result.score.count == (6 if result.depth is None else 3)
        assert result.score == bootstrap([string_match_all(line["prediction"], line["references"]) for line in here])
    assert len(results) == 2 * 2 * 2 * 3
    assert [(each.name, each.task) for each in reach] == [
        (name, task) for name in PLANS for task in ("passkey", "niah_single", "all")
    ]
    shown = Console(width=120, record=True)
    for table in retrieval_tables(results, reach):
        shown.print(table)
    text = shown.export_text()
    assert all(word in text for word in ("niah_single", "100%", "none", "mixed"))


def test_an_interrupted_run_goes_on_and_ends_with_the_same_file(model, tokenizer, tmp_path, monkeypatch):
    def run(out, plans=PLANS, **options):
        return retrieve(model, prober(tokenizer, **options), [PASSKEY], plans, [90, 100], [0.0, 50.0], 2, out, batch=2)

    expected = run(tmp_path / "whole")
    calls, real = Counter(), generate_batch

    def interrupted(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(predictions, "generate_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    assert len(lines(tmp_path / "out")) == 6
    found = run(tmp_path / "out")
    assert calls["n"] == 4 + 5
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "whole")
    assert [each.score for each in found[0]] == [each.score for each in expected[0]]
    for options, message in [
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"max_new_tokens": 5}, "max_new_tokens was 4, now it is 5"),
        ({"haystack": Haystack(("A word.",))}, "haystack was "),
    ]:
        with pytest.raises(MasformerError, match=message):
            run(tmp_path / "out", **options)
    model.lm_head.weight.data[:] += 1
    with pytest.raises(MasformerError, match="was made with another text or model"):
        run(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [129]}, "a length of 129 tokens is beyond the 128 positions of the model; allowed: up to 128"),
        ({"lengths": [50]}, "passkey: a length of 50 tokens has no room for a haystack.* take 5[0-9]"),
        ({"lengths": [90, 90]}, "a length is given twice"),
        ({"lengths": []}, "nothing to retrieve"),
        ({"depths": [101.0]}, "depth 101 is not allowed; allowed: 0 to 100 percent"),
        ({"depths": [5.0, 5.0]}, "a depth is given twice: 5, 5"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"plans": {"p": AttentionPlan.uniform(3, FullSpan())}}, "3"),
    ],
)
def test_wrong_values_are_named_before_anything_is_generated(model, tokenizer, tmp_path, changes, message):
    options = {"tasks": [PASSKEY], "plans": PLANS, "lengths": [100], "depths": [0.0], "examples": 1} | changes
    with pytest.raises(MasformerError, match=message):
        retrieve(model, prober(tokenizer), out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() or not (tmp_path / "out").read_text()


def test_names_and_numbers_that_are_not_allowed(tokenizer):
    for call, message in [
        (lambda: tasks_of("passkey,needle"), "unknown task 'needle'; allowed: passkey, niah_single"),
        (lambda: tasks_of("passkey, passkey"), "task passkey is given twice"),
        (lambda: Prober(tokenizer, digits=1), "digits must be at least 2"),
        (lambda: Prober(tokenizer, max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda: Prober(tokenizer, chat=True), "no chat template"),
        (lambda: Haystack((" ",)), "every sentence is blank"),
        (lambda: word_tokenizer([PASSKEY], 4), "numbers of 4 digits are too many"),
        (lambda: word_tokenizer([TASKS["variable_tracking"]], 2), "allowed: passkey, niah_single"),
        (lambda: graded_lengths(9, 8), "longest length must be at least 9"),
        (lambda: list(training_pairs(tokenizer, [], [90], 1)), "at least one task and one length"),
        (lambda: list(training_pairs(tokenizer, [PASSKEY], [90], 0)), "pairs must be at least 1"),
        *((lambda text=text: parse_depths(text), "are not allowed; allowed: a whole number from 2") for text in
          ("1", "x", "0,,5", "2.5", "")),
    ]:  # fmt: skip
        with pytest.raises(MasformerError, match=message):
            call()
    assert parse_depths("5") == [0, 25, 50, 75, 100]
    assert parse_depths("0, 33.3,100") == [0, 33.3, 100]


# What is trained on


def test_pairs_have_the_form_of_tested_prompts_and_random_numbers_of_their_own(tokenizer, tmp_path):
    lengths = graded_lengths(110, 130)
    assert (min(lengths), max(lengths), len(lengths), sorted(lengths)) == (110, 130, 100, lengths)
    assert sum(length < 115 for length in lengths) > 50
    options = {"digits": 2, "max_new_tokens": 4}
    pairs = list(training_pairs(tokenizer, [PASSKEY, SINGLE], [110, 130], 40, **options))
    assert pairs == list(training_pairs(tokenizer, [PASSKEY, SINGLE], [110, 130], 40, **options))
    drawn = {(pair["task"], pair["length"]) for pair in pairs}
    assert drawn == {(task, length) for task in ("passkey", "niah_single") for length in (110, 130)}
    asks = Prober(tokenizer, **options)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = Source([str(tmp_path / "pairs.jsonl")], prompt="prompt", target="target")
    store = token_store("pairs", source, tokenizer, tmp_path / "cache")
    for index, pair in enumerate(pairs):
        task = TASKS[pair["task"]]
        tested = asks.probe(task, pair["length"], pair["depth"], index)
        trained = asks.probe(task, pair["length"], pair["depth"], index, "train")
        assert (pair["prompt"], pair["target"]) == (trained.text, trained.target)
        assert pair["prompt"] != tested.text
        tokens = store.document(index).tolist()
        target = tokenizer(pair["target"])["input_ids"]
        assert tokens == [*trained.tokens, *target, tokenizer.eos_token_id]


# The commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("stock") / "model"
    tiny("llama", vocab_size=len(tokenizer), sliding_window=None, max_position_embeddings=256).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def words(folder, *more):
    found = ["eval", "retrieval", folder, "--tasks", "passkey,niah_single", "--lengths", "110,140", "--depths", "3"]
    return [*found, "--examples", "2", "--digits", "2", "--max-new-tokens", "4", *more]


def test_the_command_end_to_end(folder, tmp_path, capsys):
    record, out, plot = tmp_path / "record.json", tmp_path / "out.jsonl", tmp_path / "heat.png"
    more = ["--plan", "full", "--plan", str(PLAN), "--out", str(out), "--json", str(record), "--plot", str(plot)]
    assert cli.main(words(folder, *more)) == 0
    assert "Effective length" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(record.read_text())
    assert figures["settings"]["depths"] == [0, 50, 100]
    assert len(figures["results"]) == 2 * 2 * 2 * 4
    assert figures["effective_lengths"][-1] == {"name": str(PLAN), "task": "all", "effective_length": 0}
    assert len(lines(out)) == 2 * 2 * 2 * 3 * 2
    report = build_report([read_record(record)], "x")
    captions = [figure.caption for figure in report.figures()]
    assert "score, by length and depth" in captions
    assert any(table.columns[:3] == ("plan", "task", "length") and len(table.rows) == 8 for table in report.tables())
    before = out.read_bytes()
    assert cli.main(words(folder, *more)) == 0
    assert out.read_bytes() == before


def test_pairs_are_written(folder, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    options = ["--count", "7", "--tasks", "niah_single", "--lengths", "120", "--digits", "2", "--max-new-tokens", "4"]
    assert cli.main(["pairs", folder, str(out), *options]) == 0
    assert len(lines(out)) == 7
    assert set(lines(out)[0]) == {"prompt", "target", "task", "length", "depth"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "needle"], "unknown task 'needle'; allowed: passkey"),
        (["--lengths", "300"], "beyond the 256 positions"),
        (["--depths", "1"], "depths '1' are not allowed"),
        (["--field", "text"], "--field does nothing without --data"),
        (["--data", "blank.txt"], "holds no document"),
        (["--plot", "heat.txt"], "cannot tell the format of figure heat.txt"),
        (["--out", "nowhere/out.jsonl"], "cannot write nowhere/out.jsonl"),
        (["--examples", "0"], "examples must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(folder, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n")
    assert cli.main(words(folder, *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
