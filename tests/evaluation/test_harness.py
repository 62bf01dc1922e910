"""`--model masformer` gives the numbers of lm-eval's `hf` model if all layers are full, and masformer's own if not."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from masformer import AttentionPlan, MasformerError, SpanCache, cli, load_model, save_model
from tiny import PLAN, letter_tokenizer, tiny

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
import lm_eval
from lm_eval._cli import HarnessCLI
from lm_eval.api import registry
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from masformer.evaluation.harness.model import MasformerLM

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = "examples/lm-eval"  # from ROOT, as its data are
TASKS = ["notes_recall", "notes_perplexity"]
POSITIONS = 256
HALF = {"mixed_precision_dtype": "bfloat16"}
TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 5,
    "a",
    "forty-nine letters, no more and not a single less",
]
PAIRS = [
    ("", "and so"),
    ("one two three", " four"),
    ("one two three", " five"),
    (TEXTS[0], "!"),
    (TEXTS[2], " " + TEXTS[2]),
]
PROMPTS = [(TEXTS[0], {"until": ["e"], "max_gen_toks": 30}), (TEXTS[2], {"until": ["\n\n"], "max_gen_toks": 30})]


def write_model(folder, kind="llama"):
    tokenizer = letter_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    changes |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "llama":  # whose stock generate drops keys where a config names a window that Llama does not have
        changes["sliding_window"] = None
    tiny(kind, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def at_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_a_context_ends_with_no_token_that_ends_texts(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "model"))
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    template = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path / "model")
    for options in ({}, {"add_bos_token": True}, {"tokenizer": str(tmp_path / "model")}):
        lm = MasformerLM(str(tmp_path / "model"), **options)
        tokens = [tokenizer.bos_token_id, *tokenizer("one", add_special_tokens=False)["input_ids"]]
        assert lm.tok_encode("one") == tokens
        assert lm.tok_batch_encode(["one"])[0].tolist() == [tokens]


def asked(lm, kind, arguments):
    requests = [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def rolling(lm):
    return asked(lm, "loglikelihood_rolling", [(text,) for text in TEXTS])


def evaluated(model, **model_args):
    manager = TaskManager(include_path=EXAMPLES, include_defaults=False)
    out = lm_eval.simple_evaluate(
        model, model_args=model_args, tasks=TASKS, task_manager=manager, device="cpu", batch_size=8, bootstrap_iters=0
    )
    numbers = {
        (task, name): value
        for task, found in out["results"].items()
        for name, value in found.items()
        if isinstance(value, float)
    }
    return numbers, out


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_full_attention_it_is_hf(kind, batch_size, tmp_path):
    folder = write_model(tmp_path, kind)
    ours = MasformerLM(folder, plan="full", batch_size=batch_size)
    theirs = HFLM(folder, device="cpu", batch_size=batch_size)
    assert ours.max_length == theirs.max_length == POSITIONS
    assert rolling(ours) == pytest.approx(rolling(theirs), rel=1e-5)
    pairs = list(zip(asked(ours, "loglikelihood", PAIRS), asked(theirs, "loglikelihood", PAIRS), strict=True))
    assert [our[0] for our, _ in pairs] == pytest.approx([their[0] for _, their in pairs], rel=1e-5)
    assert [our[1] for our, _ in pairs] == [their[1] for _, their in pairs]
    texts = asked(ours, "generate_until", PROMPTS)
    assert texts == asked(theirs, "generate_until", PROMPTS)
    assert any(texts)


@pytest.mark.parametrize("options", [{"max_length": 32}, {"add_bos_token": True}, {"prefix_token_id": 40}], ids=str)
def test_options_of_hf_mean_the_same(folder, options):
    ours = rolling(MasformerLM(folder, plan="full", **options))
    assert ours == pytest.approx(rolling(HFLM(folder, device="cpu", **options)), rel=1e-5)
    assert ours != pytest.approx(rolling(MasformerLM(folder, plan="full")), rel=1e-5)


def test_the_example_tasks_give_the_numbers_of_hf(folder, at_root):
    theirs, _ = evaluated("hf", pretrained=folder)
    ours, out = evaluated("masformer", pretrained=folder, plan="full")
    assert {task for task, _ in ours} == set(TASKS)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert out["config"]["masformer_plan"] == "full"


def test_under_a_plan_the_example_gives_the_numbers_of_masformer(folder, at_root, tmp_path):
    numbers, out = evaluated("masformer", pretrained=folder, plan=str(PLAN))
    assert out["config"]["masformer_plan"] == str(PLAN)
    words = ["eval", "perplexity", folder, "--data", f"{EXAMPLES}/notes.jsonl", "--lengths", str(POSITIONS)]
    found = []
    for plan in (str(PLAN), "full"):
        assert cli.main([*words, "--plan", plan, "--json", str(tmp_path / "figures.json")]) == 0
        (result,) = json.loads((tmp_path / "figures.json").read_text())["results"]
        found.append(result["bits_per_byte"])
    bits = numbers["notes_perplexity", "bits_per_byte,none"]
    assert bits == pytest.approx(found[0], rel=1e-5)
    assert bits != pytest.approx(found[1], rel=1e-4)


def test_generation_takes_the_span_cache_and_scoring_none(folder):
    lm = MasformerLM(folder, plan=PLAN)
    caches = []
    lm.model.base_model.register_forward_pre_hook(
        lambda base, args, kwargs: caches.append(kwargs.get("past_key_values", kwargs.get("cache"))), with_kwargs=True
    )
    (text,) = asked(lm, "generate_until", [(TEXTS[0][:150], {"until": [], "max_gen_toks": 40})])
    assert {type(cache) for cache in caches} == {SpanCache}
    assert caches[0].text == str(PLAN)
    caches.clear()
    rolling(lm)
    assert set(caches) == {None}

    model, tokenizer = load_model(folder, PLAN)  # token by token, from the whole text each time, without any cache
    tokens = tokenizer(TEXTS[0][:150], return_tensors="pt")["input_ids"]
    for _ in range(40):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == tokenizer.eos_token_id:
            break
    assert text == tokenizer.decode(tokens[0, 150:], skip_special_tokens=True)


def test_a_checkpoint_brings_its_plan_and_positions(folder, tmp_path):
    model, tokenizer = load_model(folder, PLAN, max_positions=512, dtype=torch.bfloat16)
    save_model(model, tmp_path / "sealed", tokenizer)
    lm = MasformerLM(str(tmp_path / "sealed"))
    assert lm.get_model_info()["masformer_plan"] == str(PLAN)
    assert (lm.max_length, lm.model.dtype) == (512, torch.bfloat16)
    lm = MasformerLM(folder, plan=PLAN, max_positions="512:dynamic", dtype="bfloat16", backend="reference")
    assert (lm.max_length, lm.model.dtype) == (512, torch.bfloat16)
    assert lm.model.model.layers[0].self_attn.masformer_backend == "reference"


MIX = "full@0,2-3; window:5+2"


@pytest.mark.parametrize(
    ("model_args", "plan"),
    [
        (["pretrained=FOLDER,plan='full@0,2-3; window:5+2'"], MIX),
        (["pretrained=FOLDER", "plan='full@0,2-3; window:5+2'"], MIX),
        (["pretrained=FOLDER,plan=full@2-3; window:5+2"], "full@2-3; window:5+2"),
        (['{"pretrained": "FOLDER", "plan": "full@0,2-3; window:5+2"}'], MIX),
        (['{"pretrained": "FOLDER", "placement": [0, 2, 3], "local": "window:5+2"}'], MIX),
        (["pretrained=FOLDER,plan=FOLDER/plan.yaml"], MIX),
        (["pretrained=FOLDER,full=2,placement=top,local=window:5+2"], "full@2-3; window:5+2"),
        (["pretrained=FOLDER,full=2,local=window:5+2"], "full@1-2; window:5+2"),
        (["pretrained=FOLDER,placement=3,local=block:6x2"], "full@3; block:6x2"),
        (["--config", "FOLDER/run.yaml"], MIX),
    ],
    ids=str,
)
def test_a_plan_comes_through_the_command_line(folder, model_args, plan, monkeypatch):
    AttentionPlan.parse(MIX, 4).save(f"{folder}/plan.yaml")
    Path(folder, "run.yaml").write_text(yaml.safe_dump({"model_args": {"pretrained": folder, "plan": MIX}}))
    words = [word.replace("FOLDER", folder) for word in model_args]
    words = words if words[0] == "--config" else ["--model_args", *words]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "masformer", "--tasks", "notes_recall", *words])
    config = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    lm = registry.get_model(config.model).create_from_arg_obj(config.model_args, {"device": "cpu", "batch_size": 1})
    assert lm.model.config.masformer["plan"] == plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": "adapter"}, "peft='adapter' of hf cannot be honoured; allowed: pretrained, plan"),
        ({"parallelize": True}, "parallelize=True of hf cannot be honoured"),
        ({"trust_remote_code": True}, "trust_remote_code=True of hf cannot be honoured"),
        ({"revision": "old"}, "revision='old' of hf cannot be honoured"),
        ({"load_in_4bit": True}, "load_in_4bit is not known; allowed: pretrained, plan"),
        ({"plan": "full@0", "2-3; window:5": ""}, "cut at the commas, and '2-3; window:5' is no option"),
        ({"plan": "full", "full": 2}, "give either plan or full/placement/local"),
        ({"full": 2}, "full and placement need local SPAN"),
        ({"plan": 8}, "8 is no plan; allowed: an AttentionPlan"),
        ({"plan": "full@9; window:5"}, "layer 9 is out of range"),
        ({"plan": "missing.yaml"}, "plan file missing.yaml does not exist"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; allowed: auto, float32"),
        ({"backend": "causal"}, "unknown backend 'causal'; allowed: auto"),
        ({"batch_size": 0}, "batch_size 0 is not allowed"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"max_length": 300}, "max_length 300 is beyond the 256 positions"),
        ({"max_positions": "many"}, "cannot read 'many' as a number of positions"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(folder, options, message):
    with pytest.raises(MasformerError) as error:
        MasformerLM(folder, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mixed_precision_rounds_and_no_more(folder):
    exact, rounded = (rolling(MasformerLM(folder, plan=PLAN, **options)) for options in ({}, HALF))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=1e-2)


def test_what_is_hf_s_default_is_no_error(folder):
    MasformerLM(folder, parallelize=False, trust_remote_code=False, revision="main", peft=None)


def test_a_model_without_a_tokenizer_takes_another(folder, tmp_path):
    tiny("llama", vocab_size=258).save_pretrained(tmp_path)
    with pytest.raises(MasformerError, match="has no tokenizer"):
        MasformerLM(str(tmp_path))
    assert rolling(MasformerLM(str(tmp_path), tokenizer=folder, max_length=64))
    with pytest.raises(MasformerError, match="does not exist"):
        MasformerLM(str(tmp_path / "missing.gguf"))
    with pytest.raises(MasformerError, match="a loaded model is for lm-eval's HFLM"):
        MasformerLM(tiny("llama"))


def project():
    """What pyproject.toml declares."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared():
    """The entry point of pyproject.toml."""
    ((name, value),) = project()["entry-points"]["lm_eval.models"].items()
    return EntryPoint(name, value, "lm_eval.models")


def test_the_entry_point_is_the_model():
    models = registry.Registry("model", base_cls=LM)
    models.register(declared().name, target=declared())
    assert models.get("masformer") is MasformerLM


def test_no_script_of_another_package_is_declared():
    own = {**project()["scripts"], **project().get("gui-scripts", {})}
    others = [each for each in distributions() if each.name.lower() != "masformer"]
    taken = {
        point.name: each.name
        for each in others
        for point in each.entry_points
        if point.group in ("console_scripts", "gui_scripts")
    }
    assert {"lm_eval", "lm-eval"} & taken.keys(), "lm-eval has a script, or nothing is seen here"
    assert own == {"masformer": "masformer.cli:main"}
    assert not own.keys() & taken.keys()


def test_every_word_goes_to_lm_eval_as_it_is(monkeypatch, capsys):
    words = ["run", "--model_args", "a='b c',d=", "--training.steps", "60", "--json", "--", "-x", "--plan", "full; x"]
    heard, before = [], list(sys.argv)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: heard.append(sys.argv[1:]))
    assert cli.main(["lm-eval", *words]) == 0
    assert cli.main(["lm-eval", "--help"]) == 0
    assert cli.main(["lm-eval"]) == 0
    assert heard == [words, ["--help"], []]
    assert sys.argv == before
    assert registry.get_model("masformer") is MasformerLM
    monkeypatch.undo()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["lm-eval", "run", "--help"])
    assert exit_.value.code == 0
    assert "--model_args" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "lm-evaluation-harness with masformer among its models" in " ".join(capsys.readouterr().out.split())


def test_the_command_line(folder, tmp_path):
    command = [sys.executable, "-m", "masformer", "lm-eval", "--model", "masformer"]
    command += ["--include_path", EXAMPLES, "--tasks", ",".join(TASKS)]
    command += ["--device", "cpu", "--limit", "2", "--output_path", str(tmp_path / "out"), "--model_args"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}

    done = subprocess.run(
        [*command, f"pretrained={folder},plan='{PLAN}'"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "|notes_perplexity|" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["masformer_plan"] == str(PLAN)


def test_the_command_line_says_what_is_wrong_in_a_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: registry.get_model("masformer")(folder, plan="wide"))
    assert cli.main(["lm-eval", "--tasks", "x"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("masformer: error: unknown span 'wide'; allowed: full")
    monkeypatch.setattr("masformer.extras.find_spec", lambda name: None)
    for words in (["--help"], ["ls", "tasks"], []):
        assert cli.main(["lm-eval", *words]) == 2
        assert capsys.readouterr().err == "masformer: error: this needs lm-eval: pip install 'masformer[lm-eval]'\n"
