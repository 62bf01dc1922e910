import functools
import io
import json
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small import metrics, recipe, recipe_file
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from masformer import AttentionPlan, MasformerError, fit_sinks, load_model, save_model
from masformer.cli import main
from masformer.data.documents import Document
from masformer.evaluation.perplexity import perplexity, prefix_token, tokenize
from masformer.training.checkpoints import MARKER, newest, steps_saved
from masformer.training.model import byte_tokenizer
from masformer.training.recipe import load_recipe
from masformer.training.run import train
from tiny import tiny

PLAN = "full@1; window:16+2"


def weights(folder):
    return load_file(folder / "out" / "model" / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def quiet():
    return Console(file=io.StringIO(), width=200)


def finished(folder, **changes):
    return train(recipe(folder, **changes), console=quiet())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    finished(folder)
    return folder


def test_a_run_learns_and_leaves_a_checkpoint_with_its_card_and_recipe(whole):
    losses = metrics(whole)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.5
    model, tokenizer = load_model(whole / "out" / "model")
    assert AttentionPlan.from_dict(model.config.masformer) == AttentionPlan.parse(PLAN, 4)
    assert model.config.use_cache
    assert tokenizer.decode(tokenizer("Straße\n")["input_ids"]) == "Straße\n"
    assert load_recipe(whole / "out" / "model" / "recipe.yaml") == recipe(whole)
    card = (whole / "out" / "model" / "README.md").read_text()
    assert "`full@1; window:16+2`" in card
    assert "transformers refuses it" in card
    report = json.loads((whole / "out" / "data.json").read_text())
    assert report["sources"][0]["documents"] == 3
    assert [step for step, _ in steps_saved(whole / "out")] == [6, 4, 2]
    with torch.no_grad():
        again, _ = load_model(whole / "out" / "checkpoints" / "checkpoint-4" / "model")
    assert not same(again.state_dict(), model.state_dict())


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(whole, tmp_path):
    finished(tmp_path)
    assert same(weights(tmp_path), weights(whole))
    other = tmp_path / "other"
    other.mkdir()
    finished(other, training__seed=4)
    assert not same(weights(other), weights(whole))


def test_accumulation_changes_nothing_but_rounding(whole, tmp_path):
    finished(tmp_path, training__device_rows=2)
    for step, loss in metrics(tmp_path).items():
        assert loss == pytest.approx(metrics(whole)[step], abs=1e-5)


def test_checkpointing_changes_nothing_but_rounding(whole, tmp_path):
    finished(tmp_path, training__checkpointing=True)
    for step, loss in metrics(tmp_path).items():
        assert loss == pytest.approx(metrics(whole)[step], abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiling_changes_nothing_but_rounding(whole, tmp_path, monkeypatch, precision):
    """Traced whole, but run without kernels: those take minutes to make, and are not ours."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    for name, compiles in (("compiled", True), ("plain", False)):
        (tmp_path / name).mkdir()
        finished(tmp_path / name, training__compile=compiles, training__precision=precision, training__loss_chunk=50)
    assert 2 <= counters["stats"]["unique_graphs"] <= 6
    assert not counters["graph_break"]
    for step, loss in metrics(tmp_path / "compiled").items():
        assert loss == pytest.approx(metrics(tmp_path / "plain")[step], abs=1e-5 if precision == "float32" else 1e-2)
    torch._dynamo.reset()


def copied(whole, folder, upto=4):
    """The run as it was when it had its checkpoints and no model yet, below another folder."""
    import shutil

    shutil.copytree(whole / "out", folder / "out")
    shutil.rmtree(folder / "out" / "model")
    for step, path in steps_saved(folder / "out"):
        if step > upto:
            shutil.rmtree(path)
    return folder


def resumed(folder, **changes):
    console = quiet()
    outcome = train(recipe(folder, **changes), resume=True, console=console)
    return outcome, console.file.getvalue()


def test_a_resumed_run_ends_with_the_same_bits(whole, tmp_path):
    outcome, text = resumed(copied(whole, tmp_path))
    assert outcome.steps == 6
    assert "going on from" in text
    assert same(weights(tmp_path), weights(whole))
    assert metrics(tmp_path) == metrics(whole)
    outcome, text = resumed(tmp_path)
    assert "the run is finished" in text


CONSTANT = {"training__schedule": "constant", "training__warmup_steps": 0}


@pytest.mark.parametrize("dropout", [{}, {"lora__rank": 2, "lora__dropout": 0.2}])
def test_a_finished_run_is_trained_on_with_its_optimizer_data_and_random_numbers(tmp_path, stock, dropout):
    changes = CONSTANT | (of_stock(stock) | dropout if dropout else {})
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    finished(tmp_path / "once", **changes, training__steps=9)
    finished(tmp_path / "twice", **changes, training__steps=5)
    before = weights(tmp_path / "twice")
    outcome, text = resumed(tmp_path / "twice", **changes, training__steps=9)
    assert outcome.steps == 9
    assert "the recipe has changed: training.steps was 5 and is 9" in text
    assert "checkpoint-5" in text.split("going on from ")[1].splitlines()[0]
    assert same(weights(tmp_path / "twice"), weights(tmp_path / "once"))
    assert not same(weights(tmp_path / "twice"), before)
    assert metrics(tmp_path / "twice") == metrics(tmp_path / "once")
    assert load_recipe(tmp_path / "twice" / "out" / "model" / "recipe.yaml").training.steps == 9
    _, text = resumed(tmp_path / "twice", **changes, training__steps=9)
    assert "the run is finished" in text
    with pytest.raises(MasformerError, match="the run has done 9 steps already, more than the 7 asked for"):
        resumed(tmp_path / "twice", **changes, training__steps=7)
    assert load_recipe(tmp_path / "twice" / "out" / "recipe.yaml").training.steps == 9


def test_the_rate_of_a_run_that_goes_on_is_that_of_the_recipe_as_it_is_now(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    finished(one, training__steps=8)
    finished(two, training__steps=5)
    assert metrics(two, "learning_rate")[5] < 0.5 * metrics(one, "learning_rate")[5]
    resumed(two, training__steps=8)
    for step in (6, 7, 8):
        assert metrics(two, "learning_rate")[step] == metrics(one, "learning_rate")[step]
    resumed(two, training__steps=9, training__learning_rate=1e-3, training__schedule="constant")
    assert metrics(two, "learning_rate")[9] == 1e-3


def test_a_run_killed_before_its_longer_model_was_written_writes_it(tmp_path):
    finished(tmp_path, **CONSTANT)
    resumed(tmp_path, **CONSTANT, training__steps=8)
    expected = weights(tmp_path)
    model = tmp_path / "out" / "model"
    (model / "recipe.yaml").write_text(recipe(tmp_path, **CONSTANT).to_yaml())
    (model / "model.safetensors").unlink()
    resumed(tmp_path, **CONSTANT, training__steps=8)
    assert same(weights(tmp_path), expected)


def test_a_run_without_checkpoints_cannot_be_trained_on(tmp_path):
    finished(tmp_path, checkpoints={"every": None})
    assert not steps_saved(tmp_path / "out")
    with pytest.raises(MasformerError, match="has no checkpoint to go on from, so its optimizer is lost"):
        resumed(tmp_path, checkpoints={"every": None}, training__steps=8)


def damage(path, how):
    if how == "marker":
        (path / MARKER).unlink()
    elif how == "cut":
        file = path / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "flipped":
        file = path / "model" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif how == "gone":
        (path / "schedule.json").unlink()
    else:
        (path / MARKER).write_text("{")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("marker", "it is incomplete: no checkpoint.json"),
        ("cut", "optimizer.safetensors has"),
        ("flipped", "model/model.safetensors is damaged: its checksum differs"),
        ("gone", "schedule.json is missing"),
        ("unreadable", "its checkpoint.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, how, reason):
    folder = copied(whole, tmp_path)
    damage(folder / "out" / "checkpoints" / "checkpoint-4", how)
    _, text = resumed(folder)
    assert "checkpoint-4 is not used: " in text
    assert reason in text
    assert "checkpoint-2" in text.split("going on from ")[1].splitlines()[0]
    assert same(weights(folder), weights(whole))
    found, faulty = newest(folder / "out")
    assert (found.step, faulty) == (6, [])


def test_nothing_but_damaged_checkpoints_is_an_error(whole, tmp_path):
    folder = copied(whole, tmp_path)
    for _, path in steps_saved(folder / "out"):
        damage(path, "marker")
    with pytest.raises(MasformerError, match=r"no checkpoint in .* can be used \(checkpoint-4: it is incomplete"):
        resumed(folder)


def test_a_run_is_not_overwritten_and_not_resumed_as_another(whole, tmp_path):
    with pytest.raises(MasformerError, match="holds a run already; go on with --resume, or name another output"):
        finished(copied(whole, tmp_path))
    for changes, message in [
        ({"data__length": 32}, "cannot be resumed with another recipe: data.length was 64 and is 32"),
        ({"model__plan": "full"}, "model.plan was 'full@1; window:16.2' and is 'full'"),
        ({"training__rows": 2}, "training.rows was 4 and is 2"),
        ({"lora__rank": 2}, "lora.*was None and is"),
    ]:
        with pytest.raises(MasformerError, match=message):
            resumed(tmp_path, **changes)
    _, text = resumed(tmp_path, training__steps=7)
    assert "the recipe has changed: training.steps was 6 and is 7" in text
    assert list(metrics(tmp_path)) == [1, 2, 3, 4, 5, 6, 7]


def test_resuming_what_has_no_checkpoint_starts_at_the_beginning(whole, tmp_path):
    _, text = resumed(tmp_path)
    assert "holds no checkpoint yet: starting from the beginning" in text
    assert same(weights(tmp_path), weights(whole))


def test_the_newest_checkpoints_are_kept(tmp_path):
    finished(tmp_path, checkpoints__every=1, checkpoints__keep=3)
    assert [step for step, _ in steps_saved(tmp_path / "out")] == [6, 5, 4]


HELD = {"held": {"builtin": "python-topics", "skip": 3, "limit": 2}}


def test_evaluations_are_the_figures_of_masformer_eval(tmp_path):
    sources = {"evaluation__sources": HELD, "evaluation__lengths": [32, 64], "evaluation__max_tokens": 300}
    outcome = finished(tmp_path, **sources, evaluation__every=4)
    assert list(outcome.evaluations) == [0, 4, 6]
    model, tokenizer = load_model(tmp_path / "out" / "model")
    rows = recipe(tmp_path, **sources).evaluation.sources["held"].rows()
    tokens, _ = tokenize(tokenizer, [Document(row.name, row.texts["text"]) for row in rows], max_tokens=300)
    for length in (32, 64):
        expected = perplexity(model, tokens, length, prefix=prefix_token(tokenizer))
        last = outcome.evaluations[6]
        assert last[f"eval_held_{length}_loss"] == pytest.approx(expected.nll, abs=1e-6)
        assert last[f"eval_held_{length}_perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        half = expected.second_half.perplexity
        assert last[f"eval_held_{length}_second_half_perplexity"] == pytest.approx(half, rel=1e-5)
    assert metrics(tmp_path, "eval_held_64_loss")[6] == outcome.evaluations[6]["eval_held_64_loss"]
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "| held_32_loss |" in card
    assert outcome.evaluations[6]["eval_held_64_loss"] < outcome.evaluations[0]["eval_held_64_loss"]


def test_pairs_are_trained_and_evaluated_on_their_targets(tmp_path):
    rows = [{"long": f"the number {number} " * 9, "short": f"{number}"} for number in range(40)]
    for name, part in (("train", rows[:32]), ("held", rows[32:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    pairs = {"prompt": "long", "target": "short"}
    outcome = finished(
        tmp_path,
        data__sources={"train": {"files": [str(tmp_path / "train.jsonl")]} | pairs},
        data__template="{prompt}\nWhich?",
        data__cut="middle",
        evaluation__sources={"held": {"files": [str(tmp_path / "held.jsonl")]} | pairs},
        training__epochs=2,
        training__steps=None,
    )
    report = json.loads((tmp_path / "out" / "data.json").read_text())
    assert report["cut"]["prompts"] == 32
    assert report["separate"]
    assert outcome.steps == -(-report["rows"] * 2 // 4)
    assert outcome.evaluations[outcome.steps]["eval_held_64_loss"] < outcome.evaluations[0]["eval_held_64_loss"]


CHAT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def conversations(file, count):
    talks = [
        [{"role": role, "content": f"{number + turn}"} for turn in range(2) for role in ("user", "assistant")]
        for number in range(count)
    ]
    file.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return {"files": str(file), "messages": "messages"}


def test_conversations_are_trained_and_evaluated_on_the_assistants_turns(tmp_path, stock, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    changes = of_stock(stock, tokenizer=str(tmp_path / "tokenizer")) | {
        "data__sources": {"train": conversations(tmp_path / "train.jsonl", 40)},
        "evaluation__sources": {"held": conversations(tmp_path / "held.jsonl", 8)},
        "data__length": 100,
        "training__epochs": 4,
        "training__steps": None,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    assert main(["train", "--config", str(recipe_file(one, **changes)), "--dry-run"]) == 0
    assert "tokens are the assistant's and predicted" in " ".join(capsys.readouterr().out.split())
    outcome = finished(one, **changes)
    first, last = (outcome.evaluations[step]["eval_held_100_loss"] for step in (0, outcome.steps))
    assert last < first - 0.5
    report = json.loads((one / "out" / "data.json").read_text())
    assert report["separate"]
    assert report["predicted"] == sum(2 * (1 + len(f"{n}")) + (n == 9) for n in range(40))
    again, _ = resumed(copied(one, two), **changes)
    assert same(weights(one), weights(two))
    assert again.steps == outcome.steps
    assert load_model(one / "out" / "model")[1].chat_template == CHAT


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock model with a tokenizer, as people have it."""
    folder = tmp_path_factory.mktemp("stock") / "model"
    tiny("llama", vocab_size=300, sliding_window=None, tie_word_embeddings=True).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def of_stock(stock, **more):
    return {"model": {"source": stock, "plan": PLAN} | more}


@pytest.mark.parametrize("train_more", [[], ["norm", "embed_tokens"]])
def test_adapters_are_trained_resumed_and_merged(tmp_path, stock, train_more):
    changes = of_stock(stock) | {"lora__rank": 2, "lora__dropout": 0.1, "lora__train": train_more}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    finished(one, **changes)
    resumed(copied(one, two), **changes)
    assert same(weights(one), weights(two))
    before, after = load_file(f"{stock}/model.safetensors"), weights(one)
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.3.mlp.down_proj" in changed
    assert ("model.norm" in changed) == ("model.embed_tokens" in changed) == bool(train_more)
    assert "model.layers.0.input_layernorm" not in changed
    saved = load_file(one / "out" / "checkpoints" / "checkpoint-4" / "adapter.safetensors")
    assert all("lora" in name or "norm" in name or "embed" in name for name in saved)


def test_longer_positions_come_first(tmp_path, stock):
    longer = {"max_positions": 256, "position_method": "linear"}
    finished(tmp_path, **of_stock(stock, **longer), data__length=200, training__steps=2)
    model, _ = load_model(tmp_path / "out" / "model")
    assert model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["rope_type"] == "linear"


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "gemma2"])
def test_other_architectures_packed_with_document_masks(tmp_path, kind):
    folder = tmp_path / "model"
    tiny(kind, vocab_size=300).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    changes = {"data__packing": "separate", "training__precision": "bfloat16", "training__checkpointing": True}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    finished(one, **of_stock(str(folder)), **changes)
    losses = metrics(one)
    assert losses[6] < losses[1] - 0.3
    resumed(copied(one, two), **of_stock(str(folder)), **changes)
    assert same(weights(one), weights(two))


def test_a_checkpoint_with_a_plan_keeps_it(tmp_path, stock):
    model, tokenizer = load_model(stock, AttentionPlan.parse("full@2; block:8", 4))
    save_model(model, tmp_path / "mixed", tokenizer)
    finished(tmp_path, model={"source": str(tmp_path / "mixed")}, training__steps=1, training__warmup_steps=0)
    assert str(AttentionPlan.from_dict(load_model(tmp_path / "out" / "model")[0].config.masformer)) == "full@2; block:8"


SINKS = "full@1; window:16+sink"


@pytest.mark.parametrize("compiled", [False, True])
def test_constant_sinks_are_trained_from_zero_and_resumed_with_the_same_bits(tmp_path, monkeypatch, compiled):
    if compiled:
        compile_whole = torch.compile
        monkeypatch.setattr(torch, "compile", functools.partial(compile_whole, backend="aot_eager"))
    changes = {"model__plan": SINKS, "training__weight_decay": 0.1, "training__compile": compiled}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    finished(one, **changes)
    sinks = {name: weight for name, weight in weights(one).items() if "sink_" in name}
    assert len(sinks) == 6
    assert all(bool(weight.any()) for weight in sinks.values())
    resumed(copied(one, two), **changes)
    assert same(weights(one), weights(two))
    model, _ = load_model(one / "out" / "model")
    assert str(AttentionPlan.from_dict(model.config.masformer)) == SINKS
    torch._dynamo.reset()


def test_weight_decay_is_for_matrices_and_adapters_leave_constant_sinks_as_they_are(tmp_path, stock):
    model, tokenizer = load_model(stock)
    fit_sinks(model, tokenizer, ["the quick brown fox jumps over the lazy dog " * 3], SINKS, length=64)
    save_model(model, tmp_path / "fitted", tokenizer)
    before = load_file(tmp_path / "fitted" / "model.safetensors")
    source = {"source": str(tmp_path / "fitted")}
    still = {"training__learning_rate": 1e-30, "training__weight_decay": 1e30, "training__steps": 1}
    finished(tmp_path, model=source, **still, training__warmup_steps=0)
    after = weights(tmp_path)
    changed = {name for name in before if not torch.allclose(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert not any("sink_" in name or "norm" in name for name in changed)
    (tmp_path / "lora").mkdir()
    finished(tmp_path / "lora", model=source, lora__rank=2, training__steps=2)
    after = weights(tmp_path / "lora")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "sink_" in name)


def test_constant_sinks_of_a_stock_model_are_fitted_first(tmp_path, stock):
    with pytest.raises(MasformerError, match="has no weights for them; fit them: masformer convert --sinks fit"):
        finished(tmp_path, model={"source": stock, "plan": SINKS})


@pytest.mark.parametrize("setting", [{"logging__tensorboard": True}, {"training__report_to": ["tensorboard"]}])
def test_tensorboard_gets_the_same_figures(tmp_path, setting):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finished(tmp_path, **setting, training__steps=2)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx(metrics(tmp_path), rel=1e-6)


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_gets_what_is_in_the_file(tmp_path, monkeypatch, tracker):
    """Through the Trainer's own registry of trackers, which a stand-in is put into."""
    logged = {}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.setdefault(state.global_step, {}).update(logs)

    (tmp_path / f"{tracker}.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, tracker, Tracker)
    finished(tmp_path, training__report_to=[tracker], training__steps=3, evaluation__sources=HELD)
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row.items() - {("step", row["step"])} <= logged[row["step"]].items()
    names = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "eval_held_64_perplexity"}
    assert names <= logged[3].keys()
    assert recipe(tmp_path).trackers == []


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch, capsys, tracker, dry):
    monkeypatch.setitem(sys.modules, tracker, None)
    words = ["train", "--config", str(recipe_file(tmp_path)), "--training.report_to", tracker, *dry]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert f"training.report_to {tracker} needs {tracker}: pip install " in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_lines_for_people_hold_one_figure_a_length(tmp_path):
    console = quiet()
    lengths = {"evaluation__sources": HELD, "evaluation__lengths": [32, 64], "training__steps": 2}
    outcome = train(recipe(tmp_path, **lengths), console=console)
    (line,) = [line for line in console.file.getvalue().splitlines() if line.startswith("step 2/2  perplexity")]
    figures = outcome.evaluations[2]
    values = [figures[f"eval_held_{length}_perplexity"] for length in (32, 64)]
    assert line == "step 2/2  perplexity  held_32 {:.2f}  held_64 {:.2f}".format(*values)
    assert set(figures) > {"eval_held_32_loss", "eval_held_32_second_half_perplexity"}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    with pytest.raises(MasformerError, match="the loss is not finite at step"):
        finished(tmp_path, training__learning_rate=1e30, training__clip=0.0)
    assert not (tmp_path / "out" / "model").exists()


TALKS = {"hub": "nobody/nothing", "messages": "messages"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__length": 200}, "data.length 200 is beyond the 128 positions of the model; set model.max_positions"),
        ({"model__plan": "full@9; window:4"}, "layer 9 is out of range"),
        ({"model__config": {"model_type": "lama"}}, "model.config: unknown model_type 'lama'"),
        ({"model__config__hiden_size": 3}, "llama models have no setting hiden_size; did you mean hidden_size?"),
        ({"model__config__head": 3}, "llama models have no setting head; it would do nothing"),  # nothing near enough
        ({"model__config__num_attention_heads": 5}, "model.config:"),
        ({"model__config__vocab_size": 100}, "the tokenizer has 257 tokens, but model.config.vocab_size is 100"),
        ({"model__tokenizer": "nowhere"}, "no folder nowhere here"),
        ({"model": {"source": "nowhere.gguf"}}, "model file nowhere.gguf does not exist"),
        ({"data__sources": {"a": {"files": ["nowhere.txt"]}}}, "data file nowhere.txt does not exist"),
        ({"data__sources": {"a": TALKS}}, "conversations need a chat template, which the tokenizer lacks"),
        ({"lora__targets": ["q_projection"]}, "lora: llama models have no module named q_projection"),
        ({"evaluation__sources": HELD, "evaluation__lengths": [999]}, "evaluation.lengths 999 is beyond the 128"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, capsys, changes, message, dry):
    if dry and "model__tokenizer" in changes and "257" not in message:
        pytest.skip("a dry run of a fixed number of steps needs no tokenizer")
    words = ["train", "--config", str(recipe_file(tmp_path, **changes)), *(["--dry-run"] if dry else [])]
    code = main(words)
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
    assert err.startswith("masformer: error: ")
    assert err.count("\n") == 1


def test_what_a_recipe_expects_of_a_model_is_checked(tmp_path, stock):
    expected = {"model_type": "llama", "hidden_size": 64}
    with pytest.raises(MasformerError, match=r"model.config says hidden_size 64, but .* has 32"):
        finished(tmp_path, **of_stock(stock, config=expected))


def test_the_command_trains_and_records(tmp_path, capsys):
    record = tmp_path / "record.json"
    words = ["train", "--config", str(recipe_file(tmp_path)), "--training.steps", "3", "--json", str(record)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "step 3/3" in out
    assert "tokens/s" in out
    figures = json.loads(record.read_text())
    assert figures["steps"] == 3
    assert figures["recipe"]["training"]["steps"] == 3
    assert main(words) == 2
    for option in ("--resume", "--quiet"):
        assert main([*words, option, "--dry-run"]) == 2
        assert f"{option} does nothing in a dry run" in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [False, True])
def test_in_a_pipe_a_run_says_each_stage_once_and_nothing_in_between_where_it_is_quiet(tmp_path, capsys, quiet):
    words = ["train", "--config", str(recipe_file(tmp_path)), "--training.steps", "3", *["--quiet"] * quiet]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("training: ") for line in lines) == (not quiet)
    assert any(line.startswith("reading ") for line in lines) is not quiet
    assert any(line.startswith("step 3/3") for line in lines) is not quiet
    assert lines[-1].startswith(f"{tmp_path / 'out' / 'model'}: ")
    assert any("weights are trained" in line for line in lines)
