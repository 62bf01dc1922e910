"""Decoding by graphs of a token. On the CPU a stand-in does the captured pass again, as a graph would."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from masformer import MasformerError, SpanCache, apply_plan
from masformer.models import graphs
from tiny import ARCHITECTURES, VOCABULARY, random_plan, tiny

SETTINGS = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
PLANS = ["full@0; window:5+2", "block:4x3", "full@1:0; window:3"]


class Recording(TorchDispatchMode):
    """Like a CUDA graph, the operations of a pass: done again on the same storage, whatever Python holds by then."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        if name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.lift_fresh")):
            raise RuntimeError(f"{name} needs the host")
        out = operation(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        fresh = [x if x.untyped_storage().data_ptr() not in held else None for x in fresh]
        self.operations.append((operation, args, kwargs or {}, fresh))
        return out

    def again(self):
        for operation, args, kwargs, fresh in self.operations:
            out = [x for x in tree_leaves(operation(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new in zip(fresh, out, strict=True):
                if old is not None:
                    old.copy_(new)


@pytest.fixture
def without_gpu(monkeypatch):
    """A captured pass is recorded, and done again."""
    passes = []

    def captured(once, device):
        once()
        with monkeypatch.context() as capturing, Recording() as graph:
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            out = once()
        out.fill_(torch.nan)

        def again():
            passes.append(1)
            graph.again()
            return out.clone()

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


def same(model, given, new=30, **options):
    """The logits by graphs are those of the model as it is written; returns what is in the way of graphs at the end.

    Full layers make room for a prompt of 14 twice: the last tokens are long enough after that for a second graph.
    """
    plain = copy.deepcopy(model)
    expected = plain.generate(**given, **SETTINGS, max_new_tokens=new, **options)
    graphs.graph_tokens(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no CUDA graphs are made")  # what forbade one is shown with it
        actual = model.generate(**given, **SETTINGS, max_new_tokens=new, **options)
    for a, b in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert torch.equal(actual.sequences, expected.sequences)
    return in_the_way(model)  # before the cache is freed that was returned with the tokens, and its graph with it


def in_the_way(model):
    """Why the newest token of the one cache that a model knows came of no trusted graph; None where it did."""
    if not (states := list(model.forward.states.values())):
        return "no pass was taken as one over a token of each row, or the cache is freed"
    (state,) = states
    if state.graph is None:
        return f"no graph was captured: storage lay where it does for {state.tokens} tokens, and {graphs.AFTER} are due"
    return None if state.trusted else "the graph was not held against the model since it last took several tokens"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_generates_the_same(kind, plan, without_gpu):
    model = apply_plan(tiny(kind).double(), plan)
    assert same(model, prompts(3)) is None
    assert without_gpu


def test_what_is_in_the_way_of_graphs_is_told(without_gpu):
    model = apply_plan(tiny("llama").double(), "full@0; window:5")
    assert "lay where it does for 7 tokens" in same(model, prompts(2), new=8)
    assert "lay where it does for 8 tokens" in same(model, prompts(2), new=27)  # and elsewhere before
    assert same(model, prompts(2)) is None
    assert "the cache is freed" in in_the_way(model)
    cache = SpanCache("full@0; window:5", num_layers=4, reserve=40)
    one_by_one(model, cache, prompts(2, 20)["input_ids"])
    assert in_the_way(model) is None
    with torch.no_grad():
        model(prompts(2, 3)["input_ids"], past_key_values=cache)
    assert "not held against the model" in in_the_way(model)


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
    with pytest.warns(UserWarning, match="other logits, which are 1 of the spread of the model's apart"):
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


def one_by_one(model, cache, tokens, **options):
    """Logits of tokens [rows, n] that a model is given one after the other, without gradients."""
    with torch.no_grad():
        return torch.cat([model(token, past_key_values=cache, **options).logits for token in tokens.split(1, 1)], 1)


def ready(kind="llama", plan="full@0; window:5", rows=2, read=20, **options):
    """A model, and its cache of a text that it reads by graphs."""
    model = graphs.graph_tokens(apply_plan(tiny(kind).double(), plan))
    cache, tokens = SpanCache(plan, num_layers=4, reserve=90), prompts(rows, 90, 5)["input_ids"]
    one_by_one(model, cache, tokens[:, :read], **options)
    assert model.forward.states[cache].trusted
    return model, cache, tokens


def with_adapters(model):
    peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False), model
    )


def other_weight(model):
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def other_storage(model):
    weight = model.model.layers[2].self_attn.k_proj.weight
    weight.data = weight.data * 2


def other_layer(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[2])
    model.model.layers[1].self_attn.layer_idx = 1


def other_setting(model):
    model.model.layers[2].self_attn.scaling *= 3


CHANGES = [with_adapters, other_weight, other_storage, other_layer, other_setting]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_between_tokens(change, without_gpu):
    """Even where no turn is between them, so that nothing else holds the graph against the model."""
    model, cache, tokens = ready()
    other, other_cache = copy.deepcopy(model), copy.deepcopy(cache)
    other.forward = type(other).forward.__get__(other)
    torch.manual_seed(1)
    change(model)
    torch.manual_seed(1)
    change(other)
    before = len(without_gpu)
    actual, expected = (one_by_one(*each, tokens[:, 20:45]) for each in ((model, cache), (other, other_cache)))
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)
    assert model.forward.states[cache].trusted
    assert len(without_gpu) > before + 10


def test_adapters_that_are_switched_and_merged(without_gpu):
    model = graphs.graph_tokens(apply_plan(tiny("llama").double(), "full@0; window:5"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    plain = copy.deepcopy(model)
    plain.forward = type(plain).forward.__get__(plain)
    caches = [SpanCache("full@0; window:5", num_layers=4, reserve=80) for _ in range(2)]
    tokens = prompts(1, 60, 5)["input_ids"]
    for piece, do in zip(
        tokens.split(15, 1), ("enable_adapters", "disable_adapters", "enable_adapters", "merge"), strict=True
    ):
        for each in (model, plain):
            for part in each.modules():
                if isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer):
                    part.merge() if do == "merge" else part.enable_adapters(do == "enable_adapters")
        torch.testing.assert_close(
            one_by_one(model, caches[0], piece), one_by_one(plain, caches[1], piece), atol=1e-9, rtol=0
        )
        assert model.forward.states[caches[0]].trusted
    assert wrapped.base_model.model is model


def test_hooks_that_come_later_are_called(without_gpu):
    model, cache, tokens = ready()
    heard = []
    model.register_forward_hook(lambda *given: heard.append("whole"))  # called around a graph
    one_by_one(model, cache, tokens[:, 20:30])
    assert model.forward.states[cache].graph is not None
    model.model.layers[1].register_forward_hook(lambda *given: heard.append("part"))
    with pytest.warns(UserWarning, match="hooks"):
        one_by_one(model, cache, tokens[:, 30:50])
    assert heard.count("whole") == 30
    assert heard.count("part") == 20


def test_a_look_at_hidden_states_does_not_end_graphs(without_gpu):
    """It leaves hooks of transformers in the model, which do nothing later."""
    model, cache, tokens = ready()
    with torch.no_grad():
        assert model(tokens[:, 20:21], past_key_values=cache, output_hidden_states=True).hidden_states
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one_by_one(model, cache, tokens[:, 21:45])
    assert model.forward.states[cache].trusted


def test_a_backend_that_is_chosen_later(without_gpu):
    model, cache, tokens = ready()
    apply_plan(model, "full@0; window:5", "reference")
    with pytest.warns(UserWarning, match="the backend is reference") as warned:
        one_by_one(model, cache, tokens[:, 20:50])
    assert sum(each.category is UserWarning for each in warned) == 1
    assert not graphs.graph_tokens_if_possible(model)
    apply_plan(model, "full@0; window:5")
    graphs.graph_tokens(model)  # tries anew
    one_by_one(model, cache, tokens[:, 50:70])
    assert model.forward.states[cache].trusted


@pytest.mark.parametrize("other", [1, 3])
def test_rows_that_are_others(other, without_gpu):
    """Of the same cache an error, as without graphs; after a reset it begins anew, wherever its storage lies."""
    model, cache, tokens = ready()
    with pytest.raises(MasformerError, match="another batch size"):
        one_by_one(model, cache, tokens[:1, 20:21].expand(other, 1))
    for rows in (other, 2, other):
        cache.reset()
        fresh = prompts(rows, 40, rows)["input_ids"]
        actual = one_by_one(model, cache, fresh)
        with torch.no_grad():
            expected = model(fresh, use_cache=False).logits
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


def test_a_pass_that_failed_is_said(without_gpu):
    """In the first pass, and in a later one, whose layers would be taken as filled."""
    for read in (0, 20):
        model = graphs.graph_tokens(apply_plan(tiny("llama").double(), "full@0; window:5"))
        cache, tokens = SpanCache("full@0; window:5", num_layers=4), prompts(2, 40)["input_ids"]
        one_by_one(model, cache, tokens[:, :read]) if read else None
        layer = model.model.layers[2]
        layer.forward = lambda *given, **options: 1 / 0
        with pytest.raises(ZeroDivisionError):
            one_by_one(model, cache, tokens[:, read : read + 1], output_hidden_states=True)
        del layer.forward
        with pytest.raises(MasformerError, match="half filled"):
            one_by_one(model, cache, tokens[:, read : read + 1])


@pytest.mark.parametrize("error", [ImportError("no module triton"), NotImplementedError(), AttributeError("logits")])
def test_whatever_forbids_a_capture_decoding_goes_on(error, without_gpu, monkeypatch):
    def captured(once, device):
        raise error

    monkeypatch.setattr(graphs, "captured", captured)
    model, given = apply_plan(tiny("llama").double(), "full@0; window:5"), prompts(2)
    expected = copy.deepcopy(model).generate(**given, **SETTINGS, max_new_tokens=20)
    graphs.graph_tokens(model)
    with pytest.warns(UserWarning, match="cannot be captured") as warned:
        actual = [model.generate(**given, **SETTINGS, max_new_tokens=20) for _ in range(2)]
    assert len(warned) == 1
    for each in actual:
        assert torch.equal(torch.stack(each.logits), torch.stack(expected.logits))


def test_a_graph_that_cannot_be_run_leaves_a_padded_cache_whole(without_gpu, monkeypatch):
    model = apply_plan(tiny("llama").double(), "full@0; window:5")
    expected = copy.deepcopy(model).generate(**prompts(3), **SETTINGS, max_new_tokens=27)
    graphs.graph_tokens(model)
    run = graphs._Graph.run

    def fails(self, *given):
        if len(without_gpu) > 5:
            raise torch.OutOfMemoryError("no room")
        return run(self, *given)

    monkeypatch.setattr(graphs._Graph, "run", fails)
    with pytest.warns(UserWarning, match="one cannot be run .no room"):
        actual = model.generate(**prompts(3), **SETTINGS, max_new_tokens=27)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-9, rtol=0)


@pytest.mark.parametrize("wrong", [lambda x: x[:1].expand(len(x), -1, -1), lambda x: x.roll(1, -1)])
def test_a_graph_is_held_against_the_model_row_by_row_and_by_what_tells_tokens_apart(wrong, without_gpu, monkeypatch):
    """What all logits have in common, as in GPT-2, and many rows that are right, hide nothing."""
    monkeypatch.setattr(graphs, "captured", lambda once, device: lambda: wrong(once()))
    model = graphs.graph_tokens(apply_plan(tiny("llama").double(), "full@0; window:5"))
    model.lm_head.bias = torch.nn.Parameter(torch.full((VOCABULARY,), 1e3, dtype=torch.float64))
    tokens = prompts(1, 20)["input_ids"].repeat(600, 1)
    tokens[-1] = prompts(1, 20, 3)["input_ids"]
    with pytest.warns(UserWarning, match="other logits"):
        one_by_one(model, SpanCache("full@0; window:5", num_layers=4, reserve=30), tokens)


def test_a_model_that_is_elsewhere_by_now(without_gpu, monkeypatch):
    """A copy, or what was on a GPU and is not any more, decodes as it is written."""
    model, given = graphs.graph_tokens(apply_plan(tiny("llama").double(), "full@0; window:5")), prompts(2)
    expected = model.generate(**given, **SETTINGS, max_new_tokens=20)
    made = pickle.loads(pickle.dumps(model))
    assert made.forward.model is made
    monkeypatch.setattr(graphs, "DEVICE", "cuda")
    before = len(without_gpu)
    for each in (model, made):
        actual = each.generate(**given, **SETTINGS, max_new_tokens=20)
        torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-9, rtol=0)
    assert len(without_gpu) == before


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_documents_and_then_tokens(compiled, without_gpu):
    model = graphs.graph_tokens(apply_plan(tiny("llama").double(), "full@0; window:5"))
    call = torch.compile(model, backend="eager") if compiled else model
    tokens, cache = prompts(1, 40)["input_ids"], SpanCache("full@0; window:5", num_layers=4, reserve=50)
    positions = torch.cat([torch.arange(6), torch.arange(34)])[None]
    with torch.no_grad():
        found = [call(tokens[:, :10], past_key_values=cache, position_ids=positions[:, :10]).logits]
        for at in range(10, 40):
            here = slice(at, at + 1)
            found.append(call(tokens[:, here], past_key_values=cache, position_ids=positions[:, here]).logits)
        whole = model(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-9, rtol=0)
    assert bool(without_gpu) != compiled


def test_positions_that_a_model_makes_of_its_mask(without_gpu):
    """OPT does so where it is given none, llama does not: with padded rows both decode as they are written."""
    for kind in ("opt", "llama"):
        options = {"word_embed_proj_dim": 32, "ffn_dim": 48} if kind == "opt" else {}
        model = graphs.graph_tokens(apply_plan(tiny(kind, **options).double(), "full@0; window:5"))
        plain = copy.deepcopy(model)
        plain.forward = type(plain).forward.__get__(plain)
        given, found = prompts(3, 40), []
        for each in (model, plain):
            cache, logits = SpanCache("full@0; window:5", num_layers=4, reserve=50), []
            for begin, end in [(0, 12), *((at, at + 1) for at in range(12, 40))]:
                mask = given["attention_mask"][:, :end]
                places = mask.cumsum(-1)[:, begin:] - 1 if begin < 25 else None
                with torch.no_grad():
                    options = {"attention_mask": mask, "position_ids": places, "past_key_values": cache}
                    logits.append(each(given["input_ids"][:, begin:end], **options).logits[:, -1])
            found.append(torch.stack(logits))
        torch.testing.assert_close(*found, atol=1e-9, rtol=0)
    assert without_gpu


def test_beams_in_inference_mode_and_then_without(without_gpu):
    """Rows that were chosen in inference mode go on outside of it."""
    model, cache, tokens = ready(rows=3)
    with torch.inference_mode():
        cache.reorder_cache(torch.tensor([1, 1, 0]))
    mixed = tokens[torch.tensor([1, 1, 0])]
    actual = one_by_one(model, cache, mixed[:, 20:45])
    with torch.no_grad():
        expected = model(mixed[:, :45], use_cache=False).logits[:, 20:]
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


def test_what_cannot_be_graphs_is_said():
    model = apply_plan(tiny("llama"), "full@0; window:5")
    with pytest.raises(MasformerError, match="on one NVIDIA GPU, and this one is on cpu"):
        graphs.graph_tokens(model)
    with pytest.raises(MasformerError, match="has no plan"):
        graphs.graph_tokens(tiny("llama"))


def test_models_without_logits_are_refused(without_gpu):
    with pytest.raises(MasformerError, match="LlamaModel: it gives no logits of the next token"):
        graphs.graph_tokens(apply_plan(tiny("llama").model, "full@0; window:5"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_graphs_on_a_gpu_generate_the_same(kind):
    """Prompts are read by tiles, for which nothing is compiled. Two rows: all their numbers in a cache lie aligned, for
    which Triton compiles half as many kernels as for three."""
    model = apply_plan(tiny(kind).cuda(), PLANS[ARCHITECTURES.index(kind) % len(PLANS)], "tiled")
    reason = same(model, {name: x.cuda() for name, x in prompts(2).items()})
    assert reason is None, f"{kind}: {reason}"
