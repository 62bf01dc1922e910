"""Exports: every plan that a tool takes gives the same logits in stock transformers, which never sees masformer, and in
mlx-lm and vLLM where they are installed; every other plan is refused, by a message made of the same table."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from masformer import AttentionPlan, MasformerError, apply_plan, cli, load_model, save_model
from masformer import export as package
from masformer.cli.options import console
from masformer.export import TARGETS, check_export, export_model
from masformer.export.choose import kind_of, nearest, objection
from masformer.export.forms import FORMS, architecture, period
from masformer.export.stock import check_stock
from masformer.export.targets import KINDS
from masformer.export.verify import check_installed, verify_export
from masformer.models.native import native_plan
from masformer.models.sealing import kv_heads
from tiny import ARCHITECTURES, GPTS, VOCABULARY, random_plan, random_unit_plan, tiny, tiny_config, with_sinks

RUNNERS = Path(package.__file__).parent / "runners"
LENGTH, NEW = 48, 8
TOKENS = torch.randint(3, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(5))
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"] * 2}


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **settings}}


SCALED = {"factor": 4.0, "original_max_position_embeddings": 32}
YARN = rope("yarn", **SCALED)
LLAMA3 = rope("llama3", **SCALED, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = rope("longrope", **SCALED, short_factor=[1.0] * 16, long_factor=[2.0] * 16)
BY_TYPE = {"sliding_attention": rope("default")["rope_parameters"], "full_attention": YARN["rope_parameters"]}
CASES = {kind: (kind, {}) for kind in [*ARCHITECTURES, "vaultgemma", "starcoder2", "mixtral"]} | {
    "cwm": ("cwm", rope("default")),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with attention biases": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 64, "num_key_value_heads": 2}),
    "llama, yarn": ("llama", YARN),
    "llama, llama3": ("llama", LLAMA3),
    "llama, linear": ("llama", rope("linear", factor=2.0)),
    "llama, dynamic": ("llama", rope("dynamic", factor=2.0)),
    "phi3, longrope": ("phi3", LONG),
    "qwen2, trained with windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "smollm3, all rotary": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    "gemma3, every second": ("gemma3_text", ALTERNATE),
    "cohere2, every second": ("cohere2", ALTERNATE),
    "exaone4, every second": ("exaone4", ALTERNATE),
    "olmo3, two ropes": ("olmo3", {**ALTERNATE, "rope_parameters": BY_TYPE}),
    "gpt_neox, half rotary": ("gpt_neox", rope("default", partial_rotary_factor=0.5)),
}
PLANS = [
    AttentionPlan.parse(text, 4)
    for text in (
        "full@1,3; window:9",
        "full@1,3; window:9+sink",
        "full@2; window:5",
        "full@2; window:9+sink",
        "window:9",
        "window:5+sink",
        "full",
    )
]
FOR_ALL = PLANS[:2]
"""Those that are written for every tool that takes them, not for one alone."""
IN_ALL = {"llama", "qwen2", "smollm3"}
"""Cases whose every plan is: one for each form with constant sinks."""
SAMPLES = {
    "full": AttentionPlan.parse("full", 4),
    "window": AttentionPlan.parse("window:9", 4),
    "mixed": AttentionPlan.parse("full@2; window:9", 4),
    "windows": AttentionPlan.parse("window:9,full,window:5,window:9", 4),
    "sinks": AttentionPlan.parse("full@1; window:9+2", 4),
    "constants": AttentionPlan.parse("full@1; window:9+sink", 4),
    "blocks": AttentionPlan.parse("full@1; block:6x2", 4),
}
BESIDE = {
    "windows, constants": AttentionPlan.parse("window:9+sink,full,window:5+sink,window:9", 4),
    "sinks, constants": AttentionPlan.parse("full@1; window:9+2+sink", 4),
    "blocks, constants": AttentionPlan.parse("full@1; block:6x2+sink", 4),
}
"""What no tool runs, and a constant sink beside it: named by that, and then by the constant."""


def shape(kind):
    """Heads of 32, the smallest that vLLM's CPU kernels take."""
    heads = {} if kind in GPTS else {"num_key_value_heads": 1}
    wide = {} if kind in (*GPTS, "phi3", "olmo2") else {"head_dim": 32}
    return {"hidden_size": 64, "num_attention_heads": 2, **heads, **wide}


def config_of(case):
    kind, changes = CASES[case]
    return tiny_config(kind, **(shape(kind) | changes))


def lively(kind, **changes):
    """A tiny model none of whose weights is zero or one: a bias or a norm that a tool dropped would be seen."""
    model = tiny(kind, initializer_range=0.1, **(shape(kind) | changes))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def answers(model):
    """Logits [tokens, vocabulary] and the greedy continuation; masformer's own."""
    with torch.no_grad():
        logits = model(TOKENS[None]).logits[0]
        model.generation_config.eos_token_id = None
        whole = model.generate(TOKENS[None], attention_mask=torch.ones(1, LENGTH), max_new_tokens=NEW, do_sample=False)
    return logits, whole[0, LENGTH:]


def job(folder):
    return {
        "folder": str(folder),
        "tokens": TOKENS.tolist(),
        "positions": list(range(LENGTH - 1)),
        "new_tokens": NEW,
        "answer": f"{folder}.npz",
    }


def run_jobs(runner, python, jobs, folder):
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [python, "-I", RUNNERS / runner, folder / "jobs.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(case, target, plan) -> folder, our logits, our continuation, logits under full attention."""
    base, made = tmp_path_factory.mktemp("exports"), {}
    for case, (kind, changes) in CASES.items():
        model, ours = with_sinks(lively(kind, **changes)), {}
        full = answers(apply_plan(model, SAMPLES["full"]))[0]
        for plan in dict.fromkeys([*PLANS, native_plan(config_of(case))]):
            targets = [name for name, target in TARGETS.items() if objection(config_of(case), plan, target) is None]
            targets = [name for name in targets if name != "llama.cpp"]  # which is given a file: test_llama_cpp.py
            whole = case in IN_ALL or plan in (*FOR_ALL, native_plan(config_of(case)))
            for target in targets if whole else targets[:1]:
                if plan not in ours:
                    ours[plan] = answers(apply_plan(model, plan))
                folder = base / str(len(made))
                export_model(apply_plan(model, plan), folder, target)
                made[case, target, plan] = folder, *ours[plan], full
    return made


@pytest.fixture(scope="module")
def run_stock(exported, tmp_path_factory):
    """Every export, for whatever tool, in one process of stock transformers; what is alike to the byte, once."""
    alike = {}
    for folder, *_ in exported.values():
        content = tuple((file.name, file.read_bytes()) for file in sorted(folder.iterdir()) if file.suffix != ".md")
        alike.setdefault(content, []).append(folder)
    jobs = [job(first) for first, *_ in alike.values()]
    run_jobs("run_transformers.py", sys.executable, jobs, tmp_path_factory.mktemp("stock"))
    for first, *others in alike.values():
        for other in others:
            shutil.copy(f"{first}.npz", f"{other}.npz")


def compare(made, within):
    """The largest difference to the tool's answer is rounding, and no answer is that of full attention."""
    for (case, target, plan), (folder, logits, continuation, full) in made.items():
        with np.load(f"{folder}.npz") as answer:
            theirs = {name: torch.from_numpy(answer[name]) for name in answer.files}
        expected, others = logits[:-1], full[:-1]
        if "logprobs" in theirs:
            expected, others = (each.log_softmax(-1).gather(-1, TOKENS[1:, None])[:, 0] for each in (expected, others))
        found = theirs.get("logits", theirs.get("logprobs"))
        name = f"{case} for {target} under {plan}"
        assert (found - expected).abs().max() < within, name
        assert theirs["continuation"].tolist() == continuation.tolist(), name
        if not plan.is_full:
            assert (expected - others).abs().max() > 1000 * within, name


def test_stock_transformers_gives_the_same_logits_and_tokens(exported, run_stock):
    compare(exported, 1e-5)


def test_every_architecture_and_kind_of_plan_that_a_tool_takes_is_among_them(exported):
    made = {(architecture(config_of(case)), target, kind_of(plan)) for case, target, plan in exported}
    kinds_of = {"transformers": ("window", "mixed", "constants"), "vllm": ("mixed", "constants")}
    kinds_of |= {"sglang": ("mixed",), "mlx-lm": ("mixed",)}
    for target, kinds in kinds_of.items():
        for name, entry in TARGETS[target].entries.items():
            for kind in set(kinds) & set(entry.plans):
                seen = (name, target, kind) in made or name in ("gemma3_text", "cohere2", "exaone4")
                assert seen, f"{name} for {target}: {kind}"
    assert {case for case, target, _ in exported if target == "transformers"} == set(CASES)


def python_with(target):
    """The Python of an environment that has a tool: this one, or the one that MASFORMER_<TOOL>_PYTHON names."""
    python = os.environ.get(f"MASFORMER_{target.upper().replace('-', '_')}_PYTHON", sys.executable)
    try:
        check_installed(target, python)
    except MasformerError as error:
        pytest.skip(str(error))
    return python


@pytest.mark.parametrize(("target", "within"), [("mlx-lm", 1e-5), ("vllm", 2e-5)])
def test_the_tool_gives_the_same_logits_and_tokens(exported, tmp_path, target, within):
    python = python_with(target)
    made = {key: value for key, value in exported.items() if key[1] == target}
    run_jobs(f"run_{target.replace('-', '_')}.py", python, [job(folder) for folder, *_ in made.values()], tmp_path)
    compare(made, within)


TABLE = [
    (target, name, kind)
    for target in TARGETS
    for name in [*dict.fromkeys(name for each in TARGETS.values() for name in each.entries), "granite"]
    for kind in [*KINDS, *(BESIDE if name in ("llama", "qwen2", "smollm3", "qwen3", "olmo2", "gpt_neo") else ())]
]


@pytest.mark.parametrize(("target", "name", "kind"), TABLE)
def test_the_table_decides_and_its_reason_is_the_message(target, name, kind):
    tool, config = TARGETS[target], config_of(name) if name in CASES else tiny_config(name)
    heads = kv_heads(config)
    if kind == "heads" and heads == 1:
        pytest.skip("no plan by heads fits a model of one KV head")
    plan = random_unit_plan(3, heads) if kind == "heads" else (SAMPLES | BESIDE)[kind]
    kind = kind.split(",")[0]
    entry = tool.entries.get(name)
    assert kind_of(plan) == kind
    assert architecture(config) == name
    if entry is not None and kind in entry.plans and objection(config, plan, tool) is None:
        return check_export(config, plan, target)
    if entry is None and target == "transformers" and plan == native_plan(config):
        return check_export(config, plan, target)
    with pytest.raises(MasformerError) as raised:
        check_export(config, plan, target)
    message = str(raised.value)
    assert message.startswith(f"{target} cannot run {plan} on {name} models: ")
    if entry is None:
        assert tool.other in message
    elif kind not in entry.plans:
        assert (tool.why.get(kind, entry.why) if entry.plans else entry.why) in message
    else:
        assert "must be those it was trained with" in message or "period" in message
    near = nearest(config, plan, tool)
    if near is None:
        assert "nearest" not in message
    else:
        assert f"nearest plan that it can: {near[0]} ({near[1]})" in message
        check_export(config, near[0], target)


@pytest.mark.parametrize("kind", ["gpt_oss", "granite_swa"])
@pytest.mark.parametrize("target", TARGETS)
def test_models_with_sinks_of_their_own_go_to_transformers_with_the_plan_they_were_trained_with(kind, target):
    config = AutoConfig.for_model(kind, num_hidden_layers=4, sliding_window=9, layer_types=ALTERNATE["layer_types"])
    trained = native_plan(config)
    assert str(trained) == "full@1,3; window:9"
    for plan in (trained, SAMPLES["mixed"], SAMPLES["constants"]):
        if target == "transformers" and plan == trained:
            check_export(config, plan, target)
        else:
            with pytest.raises(MasformerError, match=f"on {kind} models: nobody has checked"):
                check_export(config, plan, target)


READ_BY_CONVERTERS = (
    "MistralForCausalLM",
    "SmolLM3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
)
"""Classes that llama.cpp's converter knows, and whose windows it does not read, or read by a rule of its own."""


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang", "mlx-lm"])
@pytest.mark.parametrize("kind", ["llama", "llama with biases", "mistral", "qwen2", "qwen3", "smollm3", "phi3"])
def test_a_folder_with_windows_stops_converters_or_warns_of_them(tmp_path, target, kind):
    plan = SAMPLES["window"] if kind == "phi3" else SAMPLES["mixed"]
    name, changes = CASES[kind]
    if objection(config_of(kind), plan, TARGETS[target]) is not None:
        pytest.skip(f"{target} takes no {kind} models with windows")
    export_model(apply_plan(lively(name, **changes), plan), tmp_path / "out", target)
    known = json.loads((tmp_path / "out/config.json").read_text())["architectures"][0]
    text = (tmp_path / "out/README.md").read_text()
    if target == "sglang":
        assert known == "GraniteSWAForCausalLM"
        assert "knows the architecture that config.json names, with its windows and sinks" in text
        assert "masformer has not run this" in text
    else:
        assert known not in READ_BY_CONVERTERS
        assert "it stops, for it does not know the architecture" in text
    export_model(apply_plan(lively(name, **changes), SAMPLES["full"]), tmp_path / "full", "transformers")
    assert "convert_hf_to_gguf" not in (tmp_path / "full/README.md").read_text()


def test_every_entry_has_a_form_a_source_and_a_reason():
    for target in TARGETS.values():
        for entry in target.entries.values():
            assert entry.form in FORMS
            assert entry.source
            assert entry.why or set(entry.plans) >= {"full", "window", "mixed"}


@pytest.mark.parametrize(
    ("target", "kind", "plan", "message"),
    [
        (
            "transformers",
            "llama",
            "full@1; window:9+2",
            "nearest plan that it can: full@1; window:9+sink (put constants in place of first tokens, which masformer",
        ),
        ("mlx-lm", "llama", "full@1; window:9+2", "nearest plan that it can: full@1; window:9 (drop the sinks)"),
        ("mlx-lm", "llama", "full@1; window:9+sink", "nearest plan that it can: full@1; window:9 (drop the sinks)"),
        ("vllm", "qwen3", "full@1; window:9+sink", "only granite_swa has sinks, and these weights do not fit it"),
        ("llama.cpp", "olmo2", "full@1; window:9+sink", "nearest plan that it can: full@1; window:9 (drop the sinks)"),
        (
            "transformers",
            "llama",
            "window:9+sink,full,window:5+sink,window:9",
            "window:9+sink,full,window:9+sink,window:9",
        ),
        ("vllm", "llama", "full@1; window:9+2+sink", "nearest plan that it can: full@1; window:9+sink (put constants"),
        ("llama.cpp", "llama", "full@1; block:6x2+sink", "full@1; window:12+sink (use windows in place of blocks)"),
        ("transformers", "llama", "full@1; window:1+sink", "full@1; window:2+sink (use windows of at least 2)"),
        ("transformers", "gpt2", "full@1; window:9+sink", "nearest plan that it can: full"),
        ("vllm", "llama", "window:9,full,window:5,window:9", "full@1; window:9 (use one window)"),
        ("transformers", "qwen3", "full@0; block:6x2", "full@0; window:12 (use windows in place of blocks)"),
        ("mlx-lm", "llama", "window:9", "full@1; window:9 (keep one layer full)"),
        (
            "mlx-lm",
            "qwen3",
            "full@1; window:9",
            "it would run full attention, silently; nearest plan that it can: full",
        ),
        ("transformers", "phi3", "full@1; window:9", "window:9 (use the window in every layer)"),
        ("transformers", "gpt2", "full@1,2,3; window:9", "its attention has no window; nearest plan that it can: full"),
        (
            "transformers",
            "gemma3_text",
            "full@1; window:9+4",
            "window:9 (drop the sinks, use the window in every layer)",
        ),
        (
            "vllm",
            "gpt_neo",
            "full@1; window:9",
            "no GPT-Neo class, and its transformers backend needs a hook; --target",
        ),
        ("llama.cpp", "phi3", "full@1; window:9", "run full attention, silently"),
        ("llama.cpp", "gemma2", "full@1; block:9", "reads a period for it in place of a list of layers"),
        ("llama.cpp", "qwen3", "full@1; window:9+4", "full@1; window:9 (drop the sinks)"),
        ("llama.cpp", "llama", "full@1; block:6x2", "full@1; window:12 (use windows in place of blocks)"),
        ("llama.cpp", "olmo2", "window:9,full,window:5,window:9", "full@1; window:9 (use one window)"),
        ("transformers", "llama", "full@1; window:1", "full@1; window:2 (use windows of at least 2)"),
        ("onnx", "llama", "full", "unknown target 'onnx'; allowed: transformers, vllm, sglang, mlx-lm, llama.cpp"),
        ("transformers", "llama", "full,full", "the plan has 2 layers, but the model has 4"),
    ],
)
def test_a_refusal_names_the_nearest_plan(target, kind, plan, message):
    with pytest.raises(MasformerError) as raised:
        check_export(
            tiny_config(kind), AttentionPlan.parse(plan, None if "," in plan and "@" not in plan else 4), target
        )
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "kind", "changes", "message"),
    [
        ("vllm", "llama", rope("dynamic", factor=2.0), "does not compute dynamic rotary positions"),
        ("mlx-lm", "llama", rope("dynamic", factor=2.0), "does not compute dynamic rotary positions"),
        ("vllm", "phi3", LONG, "does not compute longrope rotary positions"),
        ("mlx-lm", "llama", YARN["rope_parameters"] | {"attention_factor": 1.5}, "reads attention_factor of yarn"),
        ("mlx-lm", "olmo2", YARN, "its sliding layers have no yarn rotary positions"),
        ("mlx-lm", "llama", {"hidden_act": "gelu"}, "only with hidden_act silu, not gelu"),
        ("vllm", "mistral", {"hidden_act": "gelu"}, "only with hidden_act silu, not gelu"),
        ("vllm", "llama", {"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised"),
        ("vllm", "llama", rope("default", partial_rotary_factor=0.5), "does not agree with transformers on rotary"),
        (
            "llama.cpp",
            "llama",
            rope("default", partial_rotary_factor=0.5),
            "does not agree with transformers on rotary",
        ),
        ("llama.cpp", "llama", rope("dynamic", factor=2.0), "does not compute dynamic rotary positions"),
        ("llama.cpp", "llama", YARN["rope_parameters"] | {"beta_fast": 20.0}, "reads beta_fast of yarn"),
        ("llama.cpp", "qwen3", YARN, "does not compute yarn rotary positions"),
        ("llama.cpp", "olmo2", rope("linear", factor=2.0), "does not compute linear rotary positions"),
        ("llama.cpp", "qwen3", {"attention_bias": True}, "only with attention_bias False, not True"),
        ("sglang", "llama", YARN, "does not compute yarn rotary positions"),
        ("sglang", "smollm3", {"attention_bias": True}, "only with attention_bias False, not True"),
        ("llama.cpp", "smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "leaves out positions in every fourth layer"),
        ("llama.cpp full", "smollm3", LLAMA3, "its full attention has no llama3 rotary positions for these"),
        ("llama.cpp full", "qwen2", LLAMA3, "its full attention has no llama3 rotary positions for these"),
        ("llama.cpp full", "qwen2", {"head_dim": 64}, "only with heads that are as wide together as the model"),
    ],
)
def test_settings_that_a_tool_reads_in_another_way_are_refused(target, kind, changes, message):
    changes = {"rope_parameters": changes} if "rope_type" in changes else changes
    target, *plans = target.split()
    plan = SAMPLES[plans[0] if plans else "window" if kind == "phi3" else "mixed"]
    with pytest.raises(MasformerError, match=message):
        check_export(tiny_config(kind, **(shape(kind) | changes)), plan, target)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.sampled_from(sorted(TARGETS)), st.integers(0, 10**6))
def test_any_plan_is_refused_with_an_accepted_neighbour_or_taken(case, target, seed):
    config, plan, tool = config_of(case), random_plan(seed), TARGETS[target]
    if objection(config, plan, tool) is None:
        check_export(config, plan, target)
    elif (near := nearest(config, plan, tool)) is not None:
        assert objection(config, near[0], tool) is None
        assert kind_of(near[0]) in ("full", "window", "mixed", "constants")


@pytest.mark.parametrize("sink", ["", "+sink"])
def test_blocks_of_one_token_are_windows(tmp_path, sink):
    model = apply_plan(with_sinks(lively("llama")), AttentionPlan.parse(f"full@1; block:1x9{sink}", 4))
    export_model(model, tmp_path / "out", "transformers")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.sliding_window == 9
    assert torch.allclose(stock(TOKENS[None]).logits, model(TOKENS[None]).logits, atol=1e-5)


def test_a_window_wider_than_the_context_stays_a_window(tmp_path):
    export_model(apply_plan(tiny("llama"), AttentionPlan.parse("full@1; window:500", 4)), tmp_path / "out", "vllm")
    assert AutoConfig.from_pretrained(tmp_path / "out").sliding_window == 500
    assert "| 128 |" in (tmp_path / "out/README.md").read_text()


def test_stock_transformers_itself_is_asked():
    """The classes that would run something else in silence are found out, whatever a table said."""
    plan = SAMPLES["mixed"]
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    wrong = {"layer_types": types, "sliding_window": 9}
    check_stock(tiny_config("ministral", **wrong), plan)
    for kind, changes in [("llama", wrong), ("phi3", wrong), ("qwen2", wrong), ("smollm3", wrong), ("gpt_neox", {})]:
        with pytest.raises(MasformerError, match=r"would not run|cannot run this"):
            check_stock(tiny_config(kind, **changes), plan)
    with pytest.raises(MasformerError, match="would not run window:9 in layer 0 of a ministral model"):
        check_stock(tiny_config("ministral", **(wrong | {"sliding_window": 10})), plan)
    with pytest.raises(MasformerError, match="would not run window:1 in layer 0 of a ministral model"):
        check_stock(
            tiny_config("ministral", **(wrong | {"sliding_window": 1})), AttentionPlan.parse("full@2; window:1", 4)
        )
    with pytest.raises(MasformerError, match="would not run window:9 in layer 0 of a gpt_neo model"):
        check_stock(tiny_config("gpt_neo"), plan)


def test_nothing_is_left_behind_where_the_stock_model_would_not_follow(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "ministral", FORMS["without window"])
    with pytest.raises(MasformerError, match="would not run window:9 in layer 0 of a llama model"):
        export_model(apply_plan(tiny("llama"), SAMPLES["mixed"]), tmp_path / "out", "transformers")
    assert list(tmp_path.iterdir()) == []


def test_config_json_is_written_last(tmp_path, monkeypatch):
    written = []
    write = package.write_whole
    monkeypatch.setattr(package, "write_whole", lambda path, text: (written.append(path), write(path, text)))
    export_model(apply_plan(tiny("llama"), SAMPLES["mixed"]), tmp_path / "out", "vllm")
    assert written[-1].name == "config.json"
    assert written[-1].parent.name == "model"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_an_export_for_vllm_never_meets_a_class_of_its_own_that_ignores_layer_types(tmp_path):
    for number, (case, (kind, changes)) in enumerate(CASES.items()):
        if objection(config_of(case), SAMPLES["mixed"], TARGETS["vllm"]) is None:
            export_model(apply_plan(tiny(kind, **changes), SAMPLES["mixed"]), tmp_path / str(number), "vllm")
            data = json.loads((tmp_path / str(number) / "config.json").read_text())
            names = ["MixedSpansForCausalLM", "MistralForCausalLM"]  # it takes the first that it knows
            assert data["architectures"] == (names if data["model_type"] == "mistral" else ["TransformersForCausalLM"])


def test_mlx_lm_reads_flat_rope_settings(tmp_path):
    export_model(apply_plan(tiny("llama", **LLAMA3), SAMPLES["mixed"]), tmp_path / "out", "mlx-lm")
    data = json.loads((tmp_path / "out/config.json").read_text())
    assert data["rope_theta"] == 500.0
    assert data["rope_scaling"]["rope_type"] == "llama3"
    assert data["tie_word_embeddings"] is False
    assert data["head_dim"] == 8


def test_periods():
    full, sliding = "full_attention", "sliding_attention"
    assert period([sliding, full] * 2) == 2
    assert period([sliding, sliding, full]) == 3
    assert period([full, full]) == 1
    assert period([sliding, full, full, full]) is None
    assert period([sliding, sliding]) is None


@pytest.fixture
def folder(tmp_path):
    """A model as people have it: tokenizer, chat template, generation config, several files of weights."""
    path = tmp_path / "stock"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model = lively("llama", vocab_size=len(alphabet) + 1)
    model.generation_config.update(temperature=0.7, top_p=0.9, do_sample=True)
    model.save_pretrained(path, max_shard_size="40KB")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="a")
    fast.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    fast.save_pretrained(path)
    return path


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang", "mlx-lm"])
def test_the_command_carries_over_all_that_belongs_to_the_model(capsys, folder, tmp_path, target):
    assert len(list(folder.glob("*.safetensors"))) > 1
    out = tmp_path / "out"
    code, printed, _ = run(capsys, "export", folder, out, "--target", target, "--plan", "full@1; window:9")
    assert (code, "README.md" in printed) == (0, True)
    theirs, ours = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "naïve? 東京"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "[user] naïve? 東京\n"
    assert theirs.encode("don't  go\n") == ours.encode("don't  go\n")
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"], generation["do_sample"]) == (0.7, 0.9, True)
    text = (out / "README.md").read_text()
    command = {
        "transformers": 'from_pretrained("out")',
        "vllm": "vllm serve out",
        "sglang": "sglang.launch_server --model-path out",
        "mlx-lm": "mlx_lm.generate --model out",
    }
    assert command[target] in text
    assert "Plan: `full@1; window:9`" in text
    assert "| 128 | " in text
    assert not hasattr(AutoConfig.from_pretrained(out), "masformer")


def test_a_sealed_checkpoint_is_exported_with_its_plan(capsys, folder, tmp_path):
    plan = AttentionPlan.parse("full@0,3; window:6", 4)
    model, tokenizer = load_model(folder, plan)
    save_model(model, tmp_path / "sealed", tokenizer)
    assert run(capsys, "export", tmp_path / "sealed", tmp_path / "out", "--target", "transformers")[0] == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(stock(TOKENS[None]).logits, model(TOKENS[None]).logits, atol=1e-5)
    again, _ = load_model(tmp_path / "out")
    assert AttentionPlan.from_dict(again.config.masformer) == plan


def test_longer_positions_and_another_dtype_are_exported(capsys, folder, tmp_path):
    options = ["--plan", "full@1; window:9", "--max-positions", "512", "--dtype", "bfloat16"]
    assert run(capsys, "export", folder, tmp_path / "out", "--target", "mlx-lm", *options)[0] == 0
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.max_position_embeddings, config.dtype) == (512, torch.bfloat16)
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("yarn", 4.0)
    assert "KV cache of one sequence in bfloat16" in (tmp_path / "out/README.md").read_text()


def test_verify_compares_in_the_tool_and_records_it(capsys, folder, tmp_path):
    record = tmp_path / "record.json"
    words = ["export", folder, tmp_path / "out", "--target", "transformers", "--plan", "full@1; window:9"]
    code, out, _ = run(capsys, *words, "--verify", "--json", record)
    assert code == 0
    assert "verified in transformers" in out
    found = json.loads(record.read_text())["verification"]
    assert found["window"] == 9 < found["tokens"]
    assert found["difference"] < 1e-5 < 0.01 < found["full_difference"]
    assert len(found["continuation"]) == 16


def test_verify_finds_an_export_that_runs_something_else(tmp_path):
    model = apply_plan(lively("llama"), SAMPLES["mixed"])
    export_model(model, tmp_path / "out", "transformers")
    config = tmp_path / "out/config.json"
    good = json.loads(config.read_text())
    config.write_text(json.dumps(good | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(MasformerError, match=r"computes something else from .*: the logits differ by \d"):
        verify_export(model, tmp_path / "out", "transformers")
    config.write_text(json.dumps(good | {"hidden_size": 24}))
    with pytest.raises(MasformerError, match="transformers cannot run"):
        verify_export(model, tmp_path / "out", "transformers")


@pytest.mark.parametrize(("kind", "dtype"), [("mixed", torch.float16), ("constants", torch.bfloat16)])
def test_verify_in_half_precision_leaves_the_model_as_it_was(tmp_path, kind, dtype):
    save_model(apply_plan(with_sinks(lively("qwen2")), SAMPLES[kind]), tmp_path / "stock")
    model, _ = load_model(tmp_path / "stock", dtype=dtype)
    export_model(model, tmp_path / "out", "transformers")
    assert verify_export(model, tmp_path / "out", "transformers").difference < 1e-5
    assert model.dtype == dtype
    assert AttentionPlan.from_dict(model.config.masformer) == SAMPLES[kind]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (stock.dtype, bool(stock(TOKENS[None]).logits.isfinite().all())) == (dtype, True)


OUT = ["export", "MODEL", "OUT", "--target"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*OUT, "onnx"], "--target 'onnx' is not allowed; allowed: transformers, vllm, sglang, mlx-lm, llama.cpp"),
        (["export", "MODEL", "OUT"], "masformer export needs --target; see masformer export --help"),
        ([*OUT, "mlx-lm", "--plan", "full@1; window:9+4"], "(drop the sinks)"),
        ([*OUT, "llama.cpp", "--plan", "full@1; window:9"], "reads one file, so OUT must end in .gguf: out"),
        ([*OUT, "vllm", "--plan", "full@1; window:9", "--quantised", "q8_0"], "for llama.cpp alone, not for vllm"),
        ([*OUT, "transformers", "--plan", "full", "--plan", "window:4"], "--plan is given twice; export takes one"),
        ([*OUT, "transformers", "--plan", "full@1; window:9", "--python", "python3"], "does nothing without --verify"),
        ([*OUT, "vllm", "--plan", "full@1; window:9", "--verify", "--python", "no/python"], "no/python: No such file"),
        ([*OUT, "sglang", "--plan", "full@1; window:9", "--verify"], "nothing to verify an export for sglang with"),
        (
            [*OUT, "vllm", "--plan", "full@1; window:9", "--sinks", "MODEL"],
            "--sinks is for .gguf files that go to llama",
        ),
        (["export", "MODEL", "MODEL", "--target", "vllm", "--plan", "window:9"], "exists already"),
        (["export", "MODEL", "TEXT", "--target", "vllm", "--plan", "window:9", "--overwrite"], "is no model folder"),
        (["export", "MODEL", "TEXT/out", "--target", "vllm", "--plan", "window:9"], "is no folder"),
        (["export", "missing.gguf", "OUT", "--target", "vllm"], "model file missing.gguf does not exist"),
        (["export", "BARE", "OUT", "--target", "mlx-lm", "--plan", "full@1; window:9"], "has no tokenizer, and mlx-lm"),
    ],
)
def test_a_wrong_value_is_one_line_and_leaves_nothing(capsys, folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    tiny("llama").save_pretrained(tmp_path / "bare")
    (tmp_path / "text.txt").write_text("text")
    places = {"MODEL": str(folder), "BARE": "bare", "OUT": "out"}
    code, _, err = run(capsys, *(places.get(word, word).replace("TEXT", "text.txt") for word in words))
    assert code == 2
    assert message in err
    assert err.startswith("masformer: error: ")
    assert err.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bare", "stock", "text.txt"]


@pytest.mark.parametrize("target", ["mlx-lm", "vllm"])
def test_verify_says_where_the_tool_is_missing_before_the_work(capsys, folder, tmp_path, target):
    try:
        check_installed(target)
    except MasformerError:
        words = ["export", folder, tmp_path / "out", "--target", target, "--plan", "full@1; window:9", "--verify"]
        code, _, err = run(capsys, *words)
        assert (code, f"{target} is not installed in {sys.executable}" in err) == (2, True)
        assert not (tmp_path / "out").exists()
    else:
        pytest.skip(f"{target} is installed here")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named_before_the_work(capsys, folder, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    words = ["export", folder, closed / "out", "--target", "transformers", "--plan", "window:9"]
    code, _, err = run(capsys, *words)
    assert (code, "is not writable" in err) == (2, True)


def test_overwriting_replaces_an_export_and_nothing_else(tmp_path):
    model = apply_plan(tiny("llama"), SAMPLES["mixed"])
    export_model(model, tmp_path / "out", "transformers")
    with pytest.raises(MasformerError, match="exists already"):
        export_model(model, tmp_path / "out", "vllm")
    export_model(model, tmp_path / "out", "vllm", overwrite=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "mistral"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    with pytest.raises(MasformerError, match="the model has no plan"):
        export_model(tiny("llama"), tmp_path / "other", "vllm")


def test_a_tokenizer_that_would_split_text_in_another_way_is_refused(tmp_path, monkeypatch):
    class Other:
        def encode(self, text):
            return [0]

        def save_pretrained(self, path):
            Path(path, "tokenizer.json").write_text("{}")

    monkeypatch.setattr(package.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Other())
    good = type("Good", (Other,), {"encode": lambda self, text: [1, 2]})()
    with pytest.raises(MasformerError, match="would split text in another way under model type ministral"):
        export_model(apply_plan(tiny("llama"), SAMPLES["mixed"]), tmp_path / "out", "transformers", good)
    assert list(tmp_path.iterdir()) == []


def test_the_list_shows_every_entry_with_its_source(capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 300)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["export", "--list"])
    assert exit_.value.code == 0
    out = "".join(capsys.readouterr().out.split())
    for target in TARGETS.values():
        for name, entry in target.entries.items():
            assert "".join(name.split()) in out
            assert entry.plans == () or ",".join(entry.plans) in out
