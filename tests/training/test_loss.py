import copy
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from masformer import apply_plan
from masformer.training import loss as loss_module
from masformer.training.loss import IGNORED, use_chunked_loss
from tiny import ARCHITECTURES, PLAN, VOCABULARY, tiny

CAPPED = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 2.5},
}
KINDS = sorted({*ARCHITECTURES, *CAPPED})


def batch():
    tokens = torch.randint(3, VOCABULARY, (2, 41), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 5:9] = labels[1, :20] = IGNORED
    return tokens, labels


def noisy(kind, **changes):
    """Heads with biases have biases that matter, and norms weights that do."""
    model = tiny(kind, **(CAPPED.get(kind, {}) | changes)).double()
    torch.manual_seed(5)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    return apply_plan(model, PLAN) if kind in ARCHITECTURES else model


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def check_equal(model, way=None, **options):
    """Loss and gradients against the plain formula on the model's own logits."""
    tokens, labels = batch()
    plain, chunked = copy.deepcopy(model), use_chunked_loss(copy.deepcopy(model), chunk=7)
    logits = plain(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    actual = chunked(tokens, labels=labels).loss
    actual.backward()
    assert way in (None, chunked.masformer_loss.way)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    wanted, found = gradients(plain), gradients(chunked)
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("torch_has_it", [True, False])
def test_loss_and_gradients_equal_the_plain_ones(kind, torch_has_it, monkeypatch):
    if not torch_has_it:
        monkeypatch.setattr(loss_module, "LINEAR_CROSS_ENTROPY", None)
    check_equal(noisy(kind), "chunked" if kind in CAPPED else "linear")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_tied_embeddings_and_biased_heads(kind):
    check_equal(noisy(kind, tie_word_embeddings=True))
    model = noisy(kind, tie_word_embeddings=False)
    head = torch.nn.Linear(32, VOCABULARY, bias=True).double()
    model.set_output_embeddings(head)
    check_equal(model)


def test_a_frozen_head_still_trains_what_is_below():
    model = noisy("llama", tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    check_equal(model)


def test_sums_are_divided_by_the_count_that_is_given():
    model = use_chunked_loss(noisy("llama"), 7)
    tokens, labels = batch()
    count = (labels[:, 1:] != IGNORED).sum()
    mean, shared = model(tokens, labels=labels).loss, model(tokens, labels=labels, num_items_in_batch=count * 2).loss
    torch.testing.assert_close(mean, 2 * shared)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    torch.testing.assert_close(model(tokens, shift_labels=shifted).loss, mean)
    each = model(tokens, shift_labels=shifted, per_token=True).loss
    assert each.shape == tokens.shape
    assert bool((each[shifted == IGNORED] == 0).all())
    torch.testing.assert_close(each.sum() / count, mean)
    nothing = model(tokens, labels=torch.full_like(labels, IGNORED)).loss
    assert nothing == 0
    nothing.backward()
    assert model(tokens).logits.shape == (2, 41, VOCABULARY)


def test_a_loss_with_further_terms_keeps_them_and_says_so():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", vocab_size=61, num_key_value_heads=2, num_local_experts=4, **shape)
    config.output_router_logits = True
    model = AutoModelForCausalLM.from_config(config).train()
    tokens, labels = batch()
    expected = model(tokens, labels=labels).loss
    with pytest.warns(UserWarning, match="needs the logits of all positions at once: it adds a term that balances"):
        use_chunked_loss(model)
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)


class OddHead(LlamaForCausalLM):
    """Looks into its base, so that nothing else can stand there."""

    def forward(self, input_ids=None, **kwargs):
        assert len(self.model.layers) == 4
        return super().forward(input_ids, **kwargs)


def test_a_head_that_cannot_be_run_apart_falls_back_and_says_so():
    model = noisy("llama").float()
    model.__class__ = OddHead
    tokens, labels = batch()
    expected = model(tokens, labels=labels).loss
    with pytest.warns(UserWarning, match="the head of OddHead cannot be run apart from its base"):
        use_chunked_loss(model)
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)


def test_a_head_that_calls_the_decoder_past_the_base():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 61}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", word_embed_proj_dim=32, **shape)).eval()
    tokens, labels = batch()
    expected = model(tokens, labels=labels).loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_chunked_loss(model)
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)


def test_bfloat16_under_autocast_is_as_exact_as_the_plain_loss():
    model = noisy("llama").float()
    tokens, labels = batch()
    chunked = use_chunked_loss(copy.deepcopy(model), 7)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens, labels=labels).loss
        actual = chunked(tokens, labels=labels).loss
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neo"])
def test_tiles_checkpointing_and_packed_rows_give_the_gradients_of_the_reference(kind):
    """The issue's line: float64, all at once."""
    tokens, labels = batch()
    index = torch.arange(41).expand(2, -1)
    documents = (index >= 11).long() + (index >= 30).long()
    positions = index - torch.tensor([0, 11, 30])[documents]
    labels[:, [11, 30]] = IGNORED
    found = []
    for backend in ("reference", "tiled"):
        model = apply_plan(tiny(kind, **CAPPED.get(kind, {})).double(), PLAN, backend).train()
        if backend == "tiled":
            use_chunked_loss(model, 7)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            loss = model(tokens, labels=labels, position_ids=positions).loss
        else:
            logits = model(tokens, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (expected, wanted), (actual, grads) = found
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], atol=1e-11, rtol=1e-9)


MEMORY = """
import sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from masformer import AttentionPlan, apply_plan
from masformer.training import loss
if sys.argv[1] == "chunked":
    loss.LINEAR_CROSS_ENTROPY = None

LENGTH, VOCABULARY, HIDDEN = int(sys.argv[2]), 49152, 16
largest = 0

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        global largest
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                largest = max(largest, tensor.untyped_storage().nbytes() if not tensor.is_meta else 0)
        return out

config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=2,
                     num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=LENGTH,
                     tie_word_embeddings=True)
model = apply_plan(LlamaForCausalLM(config), AttentionPlan.parse("window:64+2", 2)).train()
loss.use_chunked_loss(model, LENGTH // 16)
tokens = torch.randint(VOCABULARY, (1, LENGTH))
optimizer = torch.optim.AdamW(model.parameters())
import resource

def step(tokens):
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()

step(tokens[:, :16])  # what is imported then is no part of it
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with Watch():
    step(tokens)
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(largest, extra)
"""


@pytest.mark.parametrize(("way", "length"), [("linear", 8192), ("chunked", 4096)])
def test_a_step_of_49152_words_makes_no_tensor_of_the_size_of_its_logits(way, length):
    words = [sys.executable, "-c", MEMORY, way, str(length)]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    largest, extra = map(int, result.stdout.split())
    chunk, logits = length // 16 * 49152 * 4, length * 49152 * 4
    assert largest <= chunk
    assert extra < logits / 2
