"""Decoding by graphs of a token. On the CPU a stand-in does the captured pass again, as a graph would."""

import copy
import warnings

import pytest
import torch

from masformer import MasformerError, SpanCache, apply_plan
from masformer.models import graphs
from tiny import ARCHITECTURES, VOCABULARY, random_plan, tiny

SETTINGS = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
PLANS = ["full@0; window:5+2", "block:4x3", "full@1:0; window:3"]


@pytest.fixture
def without_gpu(monkeypatch):
    """A captured pass is done as it is written."""
    passes = []

    def captured(once, device):
        def again():
            passes.append(1)
            return once().clone()

        return again

    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(graphs, "captured", captured)
    return passes


def prompts(rows, length=14, seed=0):
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row in range(rows):
        mask[row, : 3 * row] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def same(model, given, new=27, **options):
    """The logits by graphs are those of the model as it is written."""
    plain = copy.deepcopy(model)
    expected = plain.generate(**given, **SETTINGS, max_new_tokens=new, **options)
    graphs.graph_tokens(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = model.generate(**given, **SETTINGS, max_new_tokens=new, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_generates_the_same(kind, plan, without_gpu):
    model = apply_plan(tiny(kind).double(), plan)
    same(model, prompts(3))
    assert without_gpu


def test_compiled_parts(without_gpu, monkeypatch):
    """Norms and feed-forward parts are traced in the graph of a token, and run as they are everywhere else."""
    compile_whole, traced = torch.compile, []

    def compile_part(call, **options):
        traced.append(call)
        return compile_whole(call, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_part)
    monkeypatch.setattr(graphs, "captured", lambda once, device: [once(), once][1])
    model = graphs.compile_tokens(apply_plan(tiny("llama").double(), "full@0; window:5"))
    before = len(traced)
    cache, tokens = SpanCache("full@0; window:5", num_layers=4, reserve=30), prompts(1, 30)["input_ids"]
    with torch.no_grad():
        whole = apply_plan(tiny("llama").double(), "full@0; window:5")(tokens, use_cache=False).logits
        for at in range(graphs.AFTER + 2):
            out = model(tokens[:, at : at + 1], past_key_values=cache).logits
            torch.testing.assert_close(out, whole[:, at : at + 1], atol=1e-9, rtol=0)
    assert len(traced) - before == 4 * 3  # two norms and a feed-forward part in each layer
    assert model.forward.states[cache].trusted
    assert all(part._compiled_call_impl is None for layer in model.model.layers for part in layer.children())


def test_random_plans_and_storage_that_moves(without_gpu):
    """The cache of a full layer that is given no room grows at 16, 32 and 64 tokens: new graphs each time."""
    for seed in range(3):
        model = graphs.graph_tokens(apply_plan(tiny("llama").double(), random_plan(seed)))
        plain, given = copy.deepcopy(model), prompts(2, 5, seed)
        plain.forward = type(plain).forward.__get__(plain)
        for each in (model, plain):
            cache = SpanCache(each.config.masformer["plan"], num_layers=each.config.num_hidden_layers)
            out = each.generate(**given, **SETTINGS, max_new_tokens=70, past_key_values=cache)
            each.found = torch.stack(out.logits)
        torch.testing.assert_close(model.found, plain.found, atol=1e-5, rtol=0)
    assert without_gpu


def test_beams_sampling_and_a_cache_that_is_cropped(without_gpu):
    model = apply_plan(tiny("llama").double(), "full@0; window:6+1")
    same(model, prompts(2), num_beams=3)
    cache = SpanCache("full@0; window:6+1", num_layers=4)
    cache.activate_past_recording()
    tokens = prompts(1, 40)["input_ids"]
    logits = []
    with torch.no_grad():
        for at in range(30):
            logits.append(model(tokens[:, at : at + 1], past_key_values=cache).logits)
        cache.crop(-9)
        for at in range(21, 40):
            logits.append(model(tokens[:, at : at + 1], past_key_values=cache).logits)
        whole = model(tokens, use_cache=False).logits
    found = torch.cat([*logits[:21], *logits[30:]], 1)
    torch.testing.assert_close(found, whole, atol=1e-9, rtol=0)


def test_passes_that_are_no_token_run_as_they_are_written(without_gpu):
    model = graphs.graph_tokens(apply_plan(tiny("llama"), "full@0; window:5"))
    cache = SpanCache("full@0; window:5", num_layers=4)
    with torch.no_grad():
        for tokens in prompts(1, 60)["input_ids"].split(3, 1):
            model(tokens, past_key_values=cache)
    for token in prompts(1, 20)["input_ids"].split(1, 1):
        model(token, past_key_values=cache)  # gradients may be asked for
    with torch.no_grad():
        for token in prompts(1, 20)["input_ids"].split(1, 1):
            assert model(token, past_key_values=cache, output_hidden_states=True).hidden_states
    assert not without_gpu


def test_another_plan_and_other_weights_are_seen(without_gpu):
    model = graphs.graph_tokens(apply_plan(tiny("llama").double(), "full@0; window:5"))
    same(model, prompts(2))
    apply_plan(model, "full@2; window:3+1")
    same(model, prompts(2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    same(model, prompts(2))


def test_a_model_that_changes_between_turns(without_gpu, monkeypatch):
    """A graph keeps what the model was; after a turn of several tokens it is held against the model again."""

    model = graphs.graph_tokens(apply_plan(tiny("llama").double(), "full@0; window:5"))
    cache, tokens = SpanCache("full@0; window:5", num_layers=4, reserve=80), prompts(1, 80)["input_ids"]
    scale = [1.0]
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight) * scale[0]

    def captured(once, device):
        kept = scale[0]

        def again():
            now, scale[0] = scale[0], kept
            try:
                return once().clone()
            finally:
                scale[0] = now

        return again

    monkeypatch.setattr(graphs, "captured", captured)
    found = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for piece in tokens[:, :30].split(1, 1):
            found.append(model(piece, past_key_values=cache).logits)
        assert model.forward.states[cache].trusted
        scale[0] = 3.0
        found.append(model(tokens[:, 30:40], past_key_values=cache).logits)
        for piece in tokens[:, 40:].split(1, 1):
            found.append(model(piece, past_key_values=cache).logits)
        assert model.forward.states[cache].trusted
        whole = model(tokens, use_cache=False).logits
    actual = torch.cat(found, 1)
    torch.testing.assert_close(actual[:, 30:], whole[:, 30:], atol=1e-9, rtol=0)
    torch.testing.assert_close(3 * actual[:, :30], whole[:, :30], atol=1e-9, rtol=0)


def test_a_wrong_graph_is_not_trusted(without_gpu, monkeypatch):
    monkeypatch.setattr(graphs, "captured", lambda once, device: lambda: once() * 2)
    model = apply_plan(tiny("llama").double(), "full@0; window:5")
    expected = copy.deepcopy(model).generate(**prompts(2), **SETTINGS, max_new_tokens=20)
    graphs.graph_tokens(model)
    with pytest.warns(UserWarning, match="other logits"):
        actual = model.generate(**prompts(2), **SETTINGS, max_new_tokens=20)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))


def test_hooks_of_others_are_called(without_gpu):
    model = graphs.graph_tokens(apply_plan(tiny("llama"), "full@0; window:5"))
    heard = []
    model.lm_head.register_forward_hook(lambda *given: heard.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        model.generate(**prompts(1), **SETTINGS, max_new_tokens=20)
    assert len(heard) == 20


def test_caches_are_freed_with_their_graphs(without_gpu):
    model = graphs.graph_tokens(apply_plan(tiny("llama"), "full@0; window:5"))
    model.generate(
        **prompts(1), **(SETTINGS | {"return_dict_in_generate": False, "output_logits": False}), max_new_tokens=20
    )
    assert not len(model.forward.states)


def test_what_cannot_be_graphs_is_said():
    model = apply_plan(tiny("llama"), "full@0; window:5")
    with pytest.raises(MasformerError, match="on one NVIDIA GPU, and this one is on cpu"):
        graphs.graph_tokens(model)
    with pytest.raises(MasformerError, match="has no plan"):
        graphs.graph_tokens(tiny("llama"))


@pytest.mark.gpu
def test_graphs_on_a_gpu_generate_the_same():
    for number, kind in enumerate(ARCHITECTURES):
        model = apply_plan(tiny(kind).cuda(), PLANS[number % len(PLANS)])
        same(model, {name: x.cuda() for name, x in prompts(3).items()})
        (state,) = model.forward.states.values()
        assert state.trusted, kind
