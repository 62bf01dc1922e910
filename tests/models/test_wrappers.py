"""What peft, torch and accelerate put around a model: seen through where it can be, else refused in one line."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from masformer import AttentionPlan, MasformerError, WindowSpan, apply_plan, load_model, save_model
from masformer.evaluation.perplexity import compare_plans, perplexity
from masformer.export import export_model
from masformer.export.twins import stock_twin
from masformer.generation import generate, generate_batch
from masformer.models.positions import extend_positions, position_limit
from masformer.models.wrappers import bare_model
from masformer.training.loss import use_chunked_loss
from tiny import PLAN, letter_tokenizer, tiny

TOKENS = torch.arange(3, 43)[None]
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture(scope="module", autouse=True)
def one_process():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def planned(**changes):
    return apply_plan(tiny("llama", **changes), PLAN)


def adapted(model):
    return get_peft_model(model, LORA).eval()


def layers_compiled(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def base_compiled(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


WHOLE = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "compiled layers": layers_compiled,
    "compiled base": base_compiled,
}


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("wrap", WHOLE.values(), ids=WHOLE)
def test_what_is_inside_is_saved_whole(tmp_path, wrap):
    expected = logits(planned())
    save_model(wrap(planned()), tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), expected)
    inner = tiny("llama")
    outer = wrap(inner)
    assert apply_plan(outer, PLAN) is outer
    assert bare_model(outer) is inner
    save_model(outer, tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")[0]), expected)


def with_a_head(model):
    model.value_head = nn.Linear(3, 3)
    return model


def fewer_layers(model):
    model.model.layers = model.model.layers[:3]
    return model


def untied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    return model


BROKEN = {
    "PeftModel": (adapted, "merge them first"),
    "PeftMixedModel": (lambda model: get_peft_model(model, LORA, mixed=True), "merge them first"),
    "PeftModel in DDP": (lambda model: DistributedDataParallel(adapted(model)), "merge them first"),
    "injected adapter": (lambda model: [inject_adapter_in_model(LORA, model), model][1], "merge them first"),
    "prompt tuning": (
        lambda model: get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        "puts trained tokens before",
    ),
    "Sequential": (nn.Sequential, "Sequential is no transformers model"),
    "a path": (lambda model: "folder", "str is no transformers model"),
    "a head more": (with_a_head, "left over in it are value_head"),
    "a layer less": (fewer_layers, "missing from it are model.layers.3"),
    "parametrized": (
        lambda model: [nn.utils.parametrizations.weight_norm(model.lm_head), model][1],
        "left over in it are lm_head.parametrizations",
    ),
    "DDP inside": (
        lambda model: [setattr(model, "model", DistributedDataParallel(model.model)), model][1],
        "left over in it are model.module",
    ),
    "another vocabulary": (
        lambda model: [setattr(model.config, "vocab_size", 60), model][1],
        r"has the shape \[61, 32\], and by the model's config \[60, 32\]",
    ),
    "meta": (lambda model: model.to("meta"), "no values in model.embed_tokens.weight"),
    "untied": (untied, "ties lm_head.weight to .* but they differ"),
    "sharded": (fully_shard, "sharded over processes"),
}


@pytest.mark.parametrize(("wrap", "message"), BROKEN.values(), ids=BROKEN)
def test_what_would_not_load_again_is_not_saved(tmp_path, wrap, message):
    with pytest.raises(MasformerError, match=message):
        save_model(wrap(planned()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


AROUND = {"PeftModel": adapted, **{name: WHOLE[name] for name in ("compiled", "DDP")}}


@pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND)
def test_functions_that_take_a_model_take_it_in_a_wrapper(wrap):
    inner = planned(vocab_size=256)
    outer = wrap(inner)
    tokenizer, prompt = letter_tokenizer(), TOKENS[0].tolist()
    options = {"prefix": None}
    assert perplexity(outer, [prompt], 16, **options) == perplexity(inner, [prompt], 16, **options)
    assert (
        generate(outer, tokenizer, prompt, max_new_tokens=5).text
        == generate(inner, tokenizer, prompt, max_new_tokens=5).text
    )
    assert (
        generate_batch(outer, [prompt], max_new_tokens=3).rows == generate_batch(inner, [prompt], max_new_tokens=3).rows
    )
    other = AttentionPlan.uniform(4, WindowSpan(3))
    compare_plans(outer, [prompt], {"other": other}, [16], **options)
    assert inner.config.masformer == other.to_dict()
    assert extend_positions(outer, 512) is outer
    assert position_limit(inner.config) == 512
    assert use_chunked_loss(outer) is outer
    assert set(inner(TOKENS, labels=TOKENS)) == {"loss"}


@pytest.mark.parametrize("take", [stock_twin, lambda model: export_model(model, "nowhere", "transformers")])
def test_adapters_are_merged_before_weights_are_shared_or_exported(take):
    model = apply_plan(tiny("llama"), AttentionPlan.uniform(4, WindowSpan(7)))
    with pytest.raises(MasformerError, match="merge them first"):
        take(bare_model(adapted(model)))


def test_a_model_with_a_chunked_loss_is_copied_with_it():
    model = use_chunked_loss(planned())
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        found = again(TOKENS, labels=TOKENS)
        assert found.loss == model(TOKENS, labels=TOKENS).loss
        assert set(found) == {"loss"}
        assert again.forward.args[0] is again
