"""Every path by which transformers' Trainer and peft save and read a model with a plan."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from masformer import AttentionPlan, MasformerError, apply_plan, load_model, save_model
from masformer.models.checkpoint import load_config
from tiny import PLAN, tiny

TOKENS = torch.arange(3, 43)[None]
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(3, 43).view(4, 10).tolist() * 2]


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def adapted(model, **changes):
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**lora | changes))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A stock folder, and the same model with a plan as a folder of masformer."""
    path = tmp_path_factory.mktemp("bases")
    tiny("llama").save_pretrained(path / "stock")
    save_model(apply_plan(tiny("llama"), PLAN), path / "planned")
    return path


def trainer(model, path, steps, **options):
    arguments = {"output_dir": str(path), "per_device_train_batch_size": 2, "max_steps": steps, "save_steps": 2}
    arguments |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    arguments = TrainingArguments(**arguments | options)
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:2])


@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["whole", "peft"])
def test_a_trainer_resumes_takes_the_best_and_saves(bases, tmp_path, wrap):
    def fresh():
        torch.manual_seed(0)
        return wrap(load_model(bases / "planned")[0])

    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-2}
    straight = trainer(fresh(), tmp_path / "straight", 4, **best)
    straight.train()
    trainer(fresh(), tmp_path / "run", 2, lr_scheduler_type="constant", learning_rate=1e-2).train()
    resumed = trainer(fresh(), tmp_path / "run", 4, lr_scheduler_type="constant", learning_rate=1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert resumed.state.global_step == 4
    again = fresh()
    whole = trainer(again, tmp_path / "whole", 4, lr_scheduler_type="constant", learning_rate=1e-2)
    whole.train()
    assert torch.equal(logits(resumed.model), logits(whole.model))
    assert not torch.equal(logits(resumed.model), logits(fresh()))
    resumed.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "run/checkpoint-4"):
        if wrap is adapted:
            read = [PeftModel.from_pretrained(load_model(bases / "planned")[0], folder)]
            read.append(AutoPeftModelForCausalLM.from_pretrained(folder))
        else:
            assert load_config(folder)[1] == PLAN
            read = [load_model(folder)[0], AutoModelForCausalLM.from_pretrained(folder)]
        for model in read:
            assert torch.equal(logits(model), logits(resumed.model))


@pytest.mark.parametrize("base", ["stock", "planned"])
@pytest.mark.parametrize("embeddings", ["auto", True, False])
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "lora and head"])
def test_peft_saves_an_adapter_of_a_model_with_a_plan(bases, tmp_path, base, embeddings, extra):
    model = adapted(load_model(bases / base, PLAN)[0], **extra)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
    again = PeftModel.from_pretrained(load_model(bases / base, PLAN)[0], tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    if base == "planned":
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))
    merged = model.merge_and_unload()
    save_model(merged, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "saved")
    for folder in ("merged", "saved"):
        assert torch.equal(logits(load_model(tmp_path / folder)[0]), logits(merged))
        assert load_config(tmp_path / folder)[1] == PLAN


@pytest.mark.parametrize("base", ["stock", "planned"])
def test_peft_sees_that_embeddings_were_resized(bases, tmp_path, base):
    model = load_model(bases / base, PLAN)[0]
    model.resize_token_embeddings(70)
    adapted(model).save_pretrained(tmp_path)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_plan_is_changed_under_an_adapter_and_stays_when_it_is_merged(bases):
    model = adapted(load_model(bases / "stock")[0])
    assert apply_plan(model, PLAN) is model
    expected = logits(model)
    inside = model.generate(input_ids=TOKENS, max_new_tokens=4, return_dict_in_generate=True)
    assert inside.past_key_values.text == str(PLAN)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    other = AttentionPlan.uniform(4, PLAN[0])
    apply_plan(merged, other)
    assert merged.generate(TOKENS, max_new_tokens=4, return_dict_in_generate=True).past_key_values.text == str(other)


def test_save_model_says_that_adapters_are_to_be_merged(bases, tmp_path):
    for model in (
        adapted(load_model(bases / "planned")[0]),
        adapted(load_model(bases / "stock", PLAN)[0]).base_model.model,
    ):
        with pytest.raises(MasformerError, match="merge them first"):
            save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
