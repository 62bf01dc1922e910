"""Numbers that no machine holds, and texts that are none: one line at once, wherever they are read."""

import math
from typing import get_args

import numpy as np
import pytest
import yaml

from masformer import AttentionPlan, BlockSpan, MasformerError, WindowSpan, cli
from masformer.cli.parser import all_commands, is_positional, option_name, option_parameters
from masformer.errors import LARGEST, check_int, check_number, check_seed, check_text, read_int, shown
from masformer.evaluation.retrieval import TASKS, Prober, parse_depths
from masformer.generation import generate
from masformer.models.positions import parse_max_positions
from masformer.placement import Budget
from masformer.placement.criteria import parse_criteria
from masformer.plan import MOST_LAYERS, place_full_layers
from masformer.plots import pattern
from masformer.settings import parse_yaml
from masformer.spans import LARGEST_SIZE, Span
from masformer.study.scale import load_scale
from masformer.training.recipe import Recipe, load_recipe
from tiny import letter_tokenizer, tiny

HUGE = ["9" * 20, "9" * 5000, "-" + "9" * 30, str(2**63), str(2**53)]
NO_NUMBERS = ["nan", "inf", "-inf", "1e400", "true", "1.5", "x", "\udcff", "1\udc80"]


def commands(below=cli.COMMANDS, words=()):
    for name, command in below.items():
        if callable(command):
            yield [*words, name], command
        else:
            yield from commands(command, [*words, name])


def options_of(kind):
    for words, command in commands():
        for name, parameter in option_parameters(command).items():
            if kind is parameter.annotation or kind in get_args(parameter.annotation):
                yield [*words, *_needed(command)], option_name(name)


def _needed(command):
    for name, parameter in option_parameters(command).items():
        if is_positional(name, parameter):
            yield "nowhere"
        elif parameter.default is parameter.empty:
            yield from (option_name(name), "1")


def refused(capsys, words):
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("masformer: error: ")
    assert err.count("\n") == 1
    assert len(err) < 400
    return err


def test_every_command_is_asked():
    assert len(list(commands())) == len(list(all_commands(cli.COMMANDS))) > 12
    assert len(list(options_of(int))) > 40


@pytest.mark.parametrize("value", [*HUGE, *NO_NUMBERS], ids=range(14))
def test_every_whole_number_of_the_command_line(capsys, value):
    last = ""
    for words, option in options_of(int):
        if words[:2] == last:  # one option of each command a value; which one changes with the value
            continue
        last = words[:2]
        err = refused(capsys, [*words, f"{option}={value}"])
        assert "nowhere" not in err, "it must be found before anything is opened"


def test_every_option_refuses_a_number_beyond_a_machine(capsys):
    for words, option in options_of(int):
        refused(capsys, [*words, f"{option}={2**63}"])
    for words, option in options_of(float):
        refused(capsys, [*words, f"{option}=inf"])
        refused(capsys, [*words, f"{option}=nan"])


@pytest.mark.parametrize(
    "words", [["plan", "a\udce4"], ["generate", "M", "--prompt", "x\udcff"], ["\ud800"]], ids=range(3)
)
def test_an_argument_that_is_no_text(capsys, words):
    assert "is no UTF-8 text" in refused(capsys, words)


SPANS = ["window:{}", "window:4+{}", "block:{}", "block:4x{}", "block:2147483647x2"]


@pytest.mark.parametrize("number", [*HUGE, "2147483648"], ids=range(6))
def test_spans_budgets_positions_and_depths(number):
    for form in SPANS:
        with pytest.raises(MasformerError, match=r"must be|unknown span"):
            Span.parse(form.format(number))
    for read in (
        lambda: parse_max_positions("9" * 30),
        lambda: parse_max_positions("9" * 5000 + ":yarn"),
        lambda: Budget.parse(f"64MiB@{'9' * 5000}"),
        lambda: Budget.parse("9" * 400 + "GiB"),
        lambda: Budget.parse("9" * 5000),
        lambda: parse_depths(number),
        lambda: parse_depths("0," + "9" * 5000 + "x"),
        lambda: parse_criteria(f"tail:{'9' * 400}"),
        lambda: parse_criteria("tail:nan"),
        lambda: AttentionPlan.parse(f"full@0-{number}; window:4", 4),
        lambda: AttentionPlan.parse(f"full@{number}; window:4", 4),
        lambda: place_full_layers(4, None, f"0-{number}"),
        lambda: place_full_layers(10**12, 10**11, "spread"),
        lambda: AttentionPlan.uniform(10**12, WindowSpan(3)),
        lambda: AttentionPlan.from_dict({"plan": "window:3", "num_layers": MOST_LAYERS + 1}),
    ):
        with pytest.raises(MasformerError) as error:
            read()
        assert len(str(error.value)) < 400


def test_what_is_within_is_exact_and_takes_no_memory():
    length = LARGEST
    widest = WindowSpan(LARGEST_SIZE, sinks=7)
    keys = LARGEST_SIZE + 7
    assert widest.visible_pairs(length) == keys * (keys + 1) // 2 + (length - keys) * keys
    assert widest.visible_pairs(length, length - 2) == 2 * keys
    size = 10**9 + 1
    blocks = BlockSpan(size, lookback=1)
    cycle = size * size + size * (size + 1) // 2
    assert blocks.visible_pairs(5 * size) == 2 * size * (2 * size + 1) // 2 + 3 * cycle
    assert blocks.visible_pairs(5 * size, 3 * size) == 2 * cycle
    for span in (widest, blocks, Span.parse("full"), WindowSpan(3)):
        assert np.array_equal(pattern(span, length, 50).diagonal(), [True] * 50)


def test_numbers_and_texts_themselves():
    for value in (True, 1.0, "1", None, math.nan, np.int64(3)):
        with pytest.raises(MasformerError, match="n must be a whole number"):
            check_int("n", value, 0)
    for value in (10**5000, -(10**5000), LARGEST + 1, -1):
        with pytest.raises(MasformerError, match="n must be at") as error:
            check_int("n", value, 0)
        assert len(str(error.value)) < 120
    for value in (math.nan, math.inf, -math.inf, True, "1", None, -1, 10**400):
        with pytest.raises(MasformerError, match="n must be"):
            check_number("n", value, 0)
    with pytest.raises(MasformerError, match="n must be above 0 and at most 1, got 0"):
        check_number("n", 0, 0, 1, above=True)
    for value in (-1, 2**32, 1.0, True):
        with pytest.raises(MasformerError, match="seed must be"):
            check_seed(value)
    assert read_int("n", "007", 1) == 7
    for text in ("9" * 5000, "-" + "9" * 5000, "9" * 20):
        with pytest.raises(MasformerError, match="n must be"):
            read_int("n", text, 1)
    for text in ("\ud800", "a\0b"):
        with pytest.raises(MasformerError, match=r"n (is no UTF-8 text|holds a zero byte)"):
            check_text("n", text)
    assert shown("x" * 99) == "'" + "x" * 56 + "..."


def test_the_functions_below_the_command_line():
    tokenizer, model = letter_tokenizer(), tiny("llama", vocab_size=256, sliding_window=None)
    for options in (
        {"max_new_tokens": 2**63},
        {"chunk": 10**400},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": True},
        {"temperature": 1.0, "top_p": math.nan},
        {"temperature": 1.0, "top_k": 2**64},
        {"seed": 2**64},
        {"seed": -1},
    ):
        with pytest.raises(MasformerError, match="must be"):
            generate(model, tokenizer, [5, 6], **options)
    with pytest.raises(MasformerError, match="digits must be at most"):
        Prober(tokenizer, digits=10**9)
    with pytest.raises(MasformerError, match="length must be at most"):
        Prober(tokenizer).probe(TASKS["passkey"], 2**31, 50, 0)


RECIPE = {
    "output": "out",
    "model": {"config": {"model_type": "llama"}, "tokenizer": "bytes"},
    "data": {"sources": {"a": {"builtin": "python-topics"}}, "length": 16},
    "training": {"steps": 2},
    "lora": {},
}
BAD = [
    ("training", "steps", 2**63),
    ("training", "steps", 2**52),
    ("training", "seed", 2**32),
    ("training", "learning_rate", math.nan),
    ("training", "learning_rate", math.inf),
    ("training", "clip", math.nan),
    ("training", "betas", [0.9, math.nan]),
    ("training", "weight_decay", 10**400),
    ("lora", "alpha", math.inf),
    ("lora", "dropout", math.nan),
    ("lora", "rank", 10**5000),
    ("data", "length", 10**20),
    ("data", "cache", "a\0b"),
    ("model", "plan", "window:\ud800"),
    ("model", "max_positions", 2**63),
]


@pytest.mark.parametrize(("section", "name", "value"), BAD, ids=range(len(BAD)))
def test_recipes(section, name, value):
    Recipe.from_dict(RECIPE)
    with pytest.raises(MasformerError, match=name) as error:
        Recipe.from_dict(RECIPE | {section: {**RECIPE[section], name: value}})
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


def test_settings_of_any_kind():
    for config in ({"hidden_size": 10**30}, {"rope_theta": math.nan}, {"a": {"b": [1, 2**70]}}, {"a": "\ud800"}):
        with pytest.raises(MasformerError, match=r"model\.config"):
            Recipe.from_dict(RECIPE | {"model": RECIPE["model"] | {"config": {"model_type": "llama"} | config}})


NO_YAML = [
    b"a: 2020-13-45",
    b"a: !!timestamp x",
    b"a: !!bool x",
    b"a: !!int ''",
    b"a: " + b"9" * 5000,
    b"a: &a [*a]",
    b"[" * 5_000,
    b"a: !!python/object:os.system x",
    b"plan: full\nplan: window:3",
    b"\xff\xfe",
    b"\0",
    b"- *a",
    b"{",
    b"&a [" + b"1," * 99 + b"]\n",
]


@pytest.mark.parametrize("content", NO_YAML, ids=range(len(NO_YAML)))
def test_whatever_a_file_of_settings_holds(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    for read in (lambda: AttentionPlan.load(path, 4), lambda: load_recipe(path), lambda: load_scale(str(path))):
        with pytest.raises(MasformerError, match=r"a\.yaml") as error:
            read()
        assert "\n" not in str(error.value)


def test_names_for_parts_that_stand_for_too_much():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    with pytest.raises(MasformerError, match="more than 1000000 values"):
        parse_yaml("\n".join(lines))
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": {"counted": [0]}}, "cost.counted must be at least 1, got 0"),
        ({"recall": {"seeds": [-1]}}, "recall.seeds must be at least 0, got -1"),
        ({"recall": {"room": 2**63}}, "recall.room must be at most"),
        ({"recall": {"depths": [math.nan]}}, "recall.depths must be"),
        ({"recall": {"recipe": {"model": 7}}}, "recall.recipe.model must hold names and values, got 7"),
        ({"language": {"lengths": [64, -5]}}, "language.lengths must be at least 1, got -5"),
        ({"rates": {"train": math.inf}}, "rates.train must be finite, got inf"),
        ({"data": 7}, "data must hold names and what they are, got 7"),
    ],
)
def test_scales(tmp_path, changes, message):
    from importlib import resources

    settings = yaml.safe_load((resources.files("masformer.study") / "scales" / "tiny.yaml").read_text())
    for name, change in changes.items():
        settings[name] = settings[name] | change if isinstance(change, dict) and name in settings else change
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(MasformerError) as error:
        load_scale(str(tmp_path / "s.yaml"))
    assert message in str(error.value)
