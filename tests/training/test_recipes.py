"""Every recipe of the folder `recipes/` is read and dry-run, without a network."""

import json
import re
from pathlib import Path

import pytest
import torch
from small import recipe
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from masformer import AttentionPlan, apply_plan
from masformer.cli import main
from masformer.cost import ModelShape, bytes_text
from masformer.training.dry_run import estimate_memory
from masformer.training.model import recipe_config
from masformer.training.recipe import load_recipe

FOLDER = Path(__file__).parent.parent.parent / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SIZES = {
    "chat.yaml": (134_515_008, "full@7-9,17-18,20,23-24; window:512+4", 400),
    "gpt-neo-1.3b-8k.yaml": (1_328_158_720, "full@8-15; block:1024", 5000),
    "llama-3.2-1b-128k.yaml": (1_235_814_400, "full@6-9; window:1024+4", 500),
    "llama-3.2-1b-32k.yaml": (1_235_814_400, "full@6-9; window:1024+4", 1000),
    "smollm2-135m-4k-cpu.yaml": (134_515_008, "full@7-9,17-18,20,23-24; window:512+4", 30),
    "summarization.yaml": (1_235_814_400, "full@6-9; window:1024+4", None),
    "tiny-from-scratch.yaml": (820_480, "full@1; window:128+4", 300),
}


def test_these_are_the_recipes():
    assert sorted(SIZES) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_dry_run_without_a_network(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["train", "--config", str(FOLDER / name), "--dry-run", "--json", "record.json"]) == 0
    out = capsys.readouterr().out
    forecast = json.loads((tmp_path / "record.json").read_text())["forecast"]
    parameters, plan, steps = SIZES[name]
    if name == "summarization.yaml":  # adapters come on top
        assert parameters < forecast["parameters"] < 1.02 * parameters
        assert forecast["trained"] < 0.02 * parameters
    else:
        assert forecast["parameters"] == forecast["trained"] == parameters
    assert (forecast["plan"], forecast["steps"]) == (plan, steps)
    settings = load_recipe(FOLDER / name)
    assert f"{settings.data.length:,} tokens" in out
    assert "memory of one process, estimated" in out
    assert "time of one process, estimated: at least " in out
    assert forecast["step_seconds"] == forecast["step_flops"] / forecast["rate"]["flops_per_second"] > 0
    assert (forecast["seconds"] is None) == (steps is None)
    if steps is not None:
        assert forecast["seconds"] == pytest.approx(steps * forecast["step_seconds"])
    assert not re.search(r"\b1 (rows|steps)\b", out)
    assert 0 < forecast["cost"]["fractions"]["training_flops"] < 1
    hub = [source.hub for source in settings.data.sources.values() if source.hub]
    assert all(f"dataset {each} was not asked for" in out for each in hub)
    assert ("was not asked for: the shape is that of model.config" in out) == (settings.model.source is not None)
    assert not (tmp_path / settings.output).exists()


def test_rows_that_devices_share_take_less_memory_and_the_bytes_they_send_are_said(tmp_path, capsys):
    words = ["train", "--config", str(FOLDER / "llama-3.2-1b-128k.yaml"), "--dry-run", "--json"]
    found = []
    for number in (1, 8):
        assert main([*words, str(tmp_path / "json"), "--training.sequence_devices", str(number)]) == 0
        found.append(json.loads((tmp_path / "json").read_text())["forecast"])
    alone, shared = found
    assert alone["sent"] is None
    slices, full = shared["sent"]["plan"], shared["sent"]["full"]
    assert slices["total"] == sum(slices["layers"]) < 0.3 * full["total"]
    out = capsys.readouterr().out
    assert f"8 devices share each row; for attention they send {bytes_text(slices['total'])} in a step" in out
    assert f", full (by heads) {bytes_text(slices['spans']['full'])}" in out
    assert "of that window:1024+4 (edge) " in out
    assert "weights, gradients and optimizer are shared by the processes; here by 8" in out
    assert all(shared["memory"][name] * 8 == alone["memory"][name] for name in ("weights", "gradients", "optimizer"))
    assert 1 / 8 < shared["memory"]["activations"] / alone["memory"]["activations"] < 1.05 / 8


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_of_a_recipe_names_commands_that_exist(name):
    head = (FOLDER / name).read_text().split("output:")[0]
    assert head.startswith("# ")
    for other in re.findall(r"recipes/([\w.-]+\.yaml)", head):
        assert other == name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", ["full", "full@1; window:64+4", "window:64"])
def test_estimated_activations_are_near_what_autograd_saves(tmp_path, plan, checkpointing):
    size = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = {"model_type": "llama", "num_hidden_layers": 4, "max_position_embeddings": 2048} | size
    settings = recipe(
        tmp_path,
        model={"config": config, "tokenizer": "bytes", "plan": plan},
        data__length=1024,
        training__checkpointing=checkpointing,
    )
    made, _ = recipe_config(settings.model)
    made.vocab_size = 257
    spans = AttentionPlan.parse(plan, 4)
    model = apply_plan(AutoModelForCausalLM.from_config(made), spans).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(torch.randint(257, (1, 1024)), use_cache=False)
    measured = sum(each.untyped_storage().nbytes() for place, each in saved.items() if place not in weights)
    memory = estimate_memory(settings, made, ModelShape.of(made), spans, 1, 1)
    if checkpointing:
        assert memory.activations > measured
        assert memory.activations < 1024 * 4 * (4 * 96 + 20 * 96 + 3 * 256 + 6 * 16 * 2 * 3)
    else:
        assert memory.activations == pytest.approx(measured, rel=0.35)
