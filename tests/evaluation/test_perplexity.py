import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from masformer import AttentionPlan, FullSpan, MasformerError, apply_plan
from masformer.data import Document
from masformer.evaluation.perplexity import (
    compare_plans,
    perplexity,
    perplexity_table,
    prefix_token,
    rolling_windows,
    tokenize,
)
from tiny import PLAN, VOCABULARY, tiny

HEADS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.05},
    "gemma3_text": {"final_logit_softcapping": 0.05},
    "cohere": {"logit_scale": 7.0},
    "granite": {"logits_scaling": 0.1},
    "mixtral": {"num_local_experts": 2, "output_router_logits": True},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_neo": {},
    "olmo2": {},
    "phi3": {},
}
PREFIX = 1


def tokens(count, seed=0):
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_hand(model, documents, length, prefix=PREFIX):
    """The loss of every predicted token and its position in its window, from the model's own full logits."""
    losses, positions = [], []
    for document in documents:
        for inputs, targets in rolling_windows(document, prefix, length):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([inputs])).logits[0].double()
            loss = -logits.log_softmax(-1)[-len(targets) :].gather(-1, torch.tensor(targets)[:, None])[:, 0]
            losses.append(loss)
            positions.append(torch.arange(len(inputs))[-len(targets) :])
    return torch.cat(losses), torch.cat(positions)


@given(st.integers(0, 60), st.integers(1, 20), st.data(), st.booleans())
def test_every_token_is_predicted_once_from_what_precedes_it(count, length, data, has_prefix):
    context = data.draw(st.integers(1, length))
    stream = list(range(-1, count)) if has_prefix else list(range(count))
    windows = list(rolling_windows(range(count), -1 if has_prefix else None, length, context))
    assert [target for _, targets in windows for target in targets] == stream[1:]
    for index, (inputs, targets) in enumerate(windows):
        assert 1 <= len(targets) <= len(inputs) <= length
        assert inputs == list(range(targets[-1] - len(inputs), targets[-1]))
        if index:
            assert len(inputs) == length
            assert len(inputs) - len(targets) + 1 >= context


def span(first, end):
    return list(range(first, end))


@pytest.mark.parametrize(
    ("count", "length", "context", "expected"),
    [
        (
            34,
            10,
            1,
            [
                ([-100, *span(0, 9)], span(0, 10)),
                (span(9, 19), span(10, 20)),
                (span(19, 29), span(20, 30)),
                (span(23, 33), span(30, 34)),
            ],
        ),
        (
            34,
            10,
            8,
            [([-100, *span(0, 9)], span(0, 10)), *[(span(i - 8, i + 2), span(i, i + 3)) for i in span(10, 34)[::3]]],
        ),
        (34, 10, 10, [([-100, *span(0, 9)], span(0, 10)), *[(span(i - 10, i), [i]) for i in span(10, 34)]]),
        (30, 10, 1, [([-100, *span(0, 9)], span(0, 10)), (span(9, 19), span(10, 20)), (span(19, 29), span(20, 30))]),
        (9, 2, 1, [([-100, 0], [0, 1]), ([1, 2], [2, 3]), ([3, 4], [4, 5]), ([5, 6], [6, 7]), ([6, 7], [8])]),
        (0, 2, 1, []),
    ],
)
def test_windows_equal_the_examples_of_lm_eval(count, length, context, expected):
    """The expected values are those of lm-eval's tests/test_utils.py for get_rolling_token_windows."""
    assert list(rolling_windows(range(count), -100, length, context)) == expected


@pytest.mark.parametrize("plan", [None, PLAN], ids=["stock", "plan"])
@pytest.mark.parametrize("kind", HEADS)
def test_losses_equal_those_of_the_models_own_logits(kind, plan):
    model = tiny(kind, **HEADS[kind])
    if plan is not None:
        model = apply_plan(model, plan)
    documents = [tokens(75), tokens(1, 1), [], tokens(11, 2)]
    expected, positions = by_hand(model, documents, 32)
    base = model.base_model
    result = perplexity(model, documents, 32, prefix=PREFIX, chunk=7)
    assert model.base_model is base
    assert (result.documents, result.tokens) == (3, 87)
    assert result.nll == pytest.approx(expected.mean().item(), abs=1e-5)
    assert result.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    half = expected[positions >= 16]
    assert (result.second_half.tokens, result.second_half.nll) == (
        len(half),
        pytest.approx(half.mean().item(), abs=1e-5),
    )


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "cohere", "granite"])
def test_what_the_head_does_to_its_logits_matters(kind):
    """Guards the test above: without the soft cap or the scale the result would be another."""
    plain = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
    nll = [
        perplexity(tiny(kind, **changes), [tokens(20)], 32, prefix=PREFIX).nll
        for changes in (HEADS[kind], {name: plain[name] for name in HEADS[kind]})
    ]
    assert abs(nll[0] - nll[1]) > 1e-3


def test_buckets_have_power_of_two_edges_and_add_up():
    model = tiny("llama", max_position_embeddings=2048, num_hidden_layers=1)
    documents = [tokens(2500), tokens(700, 1)]
    expected, positions = by_hand(model, documents, 2048)
    result = perplexity(model, documents, 2048, prefix=PREFIX)
    assert [(part.start, part.end) for part in result.buckets] == [(0, 256), (256, 512), (512, 1024), (1024, 2048)]
    for part in result.buckets:
        mine = expected[(positions >= part.start) & (positions < part.end)]
        assert part.tokens == len(mine)
        assert part.nll == pytest.approx(mine.mean().item(), abs=1e-5)
    assert sum(part.tokens for part in result.buckets) == result.tokens == 3200
    assert result.second_half == result.buckets[-1]
    short = perplexity(model, documents, 300, prefix=PREFIX)
    assert [(part.start, part.end) for part in short.buckets] == [(0, 256), (256, 300)]
    assert (short.second_half.start, short.second_half.end) == (150, 300)


def test_a_part_without_tokens_has_no_loss():
    result = perplexity(tiny("llama"), [tokens(5)], 100, prefix=PREFIX)
    assert (result.second_half.tokens, result.second_half.nll, result.second_half.perplexity) == (0, None, None)
    json.dumps(result.to_dict(), allow_nan=False)


def test_without_a_prefix_the_first_token_is_not_predicted():
    model = tiny("llama")
    document = tokens(20)
    result = perplexity(model, [document, [5], []], 32, prefix=None)
    assert (result.documents, result.tokens) == (1, 19)
    assert result.nll == pytest.approx(perplexity(model, [document[1:]], 32, prefix=document[0]).nll)


def test_a_longer_context_is_what_each_later_token_sees():
    model, document = tiny("llama"), tokens(40)
    result = perplexity(model, [document], 16, prefix=PREFIX, context=16)
    stream = torch.tensor([PREFIX, *document])
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(input_ids=stream[None, max(0, i - 16) : i]).logits[0, -1], stream[i]
            )
            for i in range(1, 41)
        ]
    assert result.tokens == 40
    assert result.nll == pytest.approx(torch.stack(losses).double().mean().item(), abs=1e-5)


def test_full_sequence_logits_never_exist():
    """Watches every tensor that any operation makes."""

    class Largest(TorchDispatchMode):
        positions = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == vocabulary:
                    self.positions = max(self.positions, tensor.numel() // vocabulary)
            return out

    vocabulary = 1009
    model = apply_plan(tiny("gemma2", vocab_size=vocabulary), PLAN)
    document = tokens(128)
    with Largest() as largest:
        model(input_ids=torch.tensor([document]))
    assert largest.positions == 128
    with Largest() as largest:
        perplexity(model, [document], 128, prefix=PREFIX, chunk=48)
    assert largest.positions == 48


def test_low_precision_weights_are_scored_in_float32():
    model = apply_plan(tiny("llama").to(torch.bfloat16), PLAN)
    documents = [tokens(60)]
    expected, _ = by_hand(model, documents, 32)
    assert perplexity(model, documents, 32, prefix=PREFIX).nll == pytest.approx(expected.mean().item(), abs=2e-3)


def test_a_model_can_be_trained_after_it_was_measured():
    model = apply_plan(tiny("gemma2"), PLAN)
    perplexity(model, [tokens(60)], 32, prefix=PREFIX)
    batch = torch.tensor([tokens(32)])
    model.train()(input_ids=batch, labels=batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_base_returns_after_an_error():
    model = tiny("llama")
    base = model.base_model
    model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        perplexity(model, [tokens(5)], 8, prefix=PREFIX)
    assert model.base_model is base


def test_plans_are_compared_on_one_model():
    model = tiny("llama")
    documents = [tokens(75), tokens(30, 1)]
    plans = {"full": AttentionPlan.uniform(4, FullSpan()), "mixed": PLAN}
    calls = []
    results = compare_plans(
        model,
        documents,
        plans,
        [16, 64],
        prefix=PREFIX,
        text_bytes=500,
        progress=lambda *call: calls.append(call),
    )
    assert [(result.name, result.plan, result.length) for result in results] == [
        ("full", "full", 16),
        ("full", "full", 64),
        ("mixed", str(PLAN), 16),
        ("mixed", str(PLAN), 64),
    ]
    for result in results:
        expected, _ = by_hand(apply_plan(tiny("llama"), plans[result.name]), documents, result.length)
        assert result.nll == pytest.approx(expected.mean().item(), abs=1e-5)
        assert result.bits_per_byte == pytest.approx(expected.sum().item() / math.log(2) / 500, abs=1e-5)
    assert calls[0] == ("full", 16, 0, 420)
    assert calls[-1] == ("mixed", 64, 420, 420)
    assert [call[2] for call in calls] == sorted(call[2] for call in calls)

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(perplexity_table(results[:3]))
    text = console.export_text()
    first = f"{results[0].perplexity:.2f} / {results[0].second_half.perplexity:.2f}"
    assert all(part in text for part in ("16 tokens", "64 tokens", "full", "mixed", first))


def test_documents_are_tokenized_without_special_tokens():
    def tokenizer(text, add_special_tokens, verbose):
        return {"input_ids": [*([1] if add_special_tokens else []), *map(ord, text)]}

    encode = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    fake = type("Fake", (), {"__call__": staticmethod(tokenizer), "decode": staticmethod(encode.decode)})()
    documents = [Document("a", "äb"), Document("b", "cdefg")]
    assert tokenize(fake, documents) == ([[228, 98], [99, 100, 101, 102, 103]], 8)
    assert tokenize(fake, documents, max_tokens=3) == ([[228, 98], [99, 100, 101]], 6)


@pytest.mark.parametrize(("bos", "eos", "expected"), [(1, 2, 1), (0, 2, 0), (None, 2, 2), (None, None, None)])
def test_the_prefix_is_bos_else_eos(bos, eos, expected):
    assert prefix_token(SimpleNamespace(bos_token_id=bos, eos_token_id=eos)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 129}, "length 129 is beyond the 128 positions of the model; allowed: 1 to 128, or extend"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"context": 9}, "context must be at most the length, 8, got 9"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"text_bytes": 0}, "text_bytes must be at least 1, got 0"),
        ({"documents": [[], []]}, "the documents hold no token to predict"),
        ({"documents": [[5]], "prefix": None}, "the documents hold no token to predict"),
        ({"model": tiny("llama").train()}, "the model is in training mode"),
        ({"model": tiny("llama").model}, "LlamaModel has no head"),
    ],
)
def test_wrong_values_are_named(changes, message):
    given = {"model": tiny("llama"), "documents": [tokens(9)], "length": 8, "prefix": PREFIX} | changes
    with pytest.raises(MasformerError) as error:
        perplexity(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_is_refused():
    model = tiny("llama")
    model.lm_head.weight.data[7] = math.inf
    with pytest.raises(MasformerError, match="the loss is not finite in document 2 of 2"):
        perplexity(model, [[], tokens(9)], 8, prefix=PREFIX)


def test_wrong_plans_and_lengths_are_named_before_anything_runs():
    model, plans = tiny("llama"), {"good": PLAN, "short": AttentionPlan((FullSpan(),))}
    ran = []
    for chosen, lengths, message in [
        (plans, [8], "the plan has 1 layers, but the model has 4"),
        ({"good": PLAN}, [8, 1000], "length 1000 is beyond the 128 positions"),
        ({}, [8], "at least one plan and one length"),
        ({"good": PLAN}, [], "at least one plan and one length"),
    ]:
        with pytest.raises(MasformerError, match=message):
            compare_plans(model, [tokens(9)], chosen, lengths, prefix=PREFIX, progress=lambda *call: ran.append(call))
    assert ran == []


def test_a_head_that_calls_the_decoder_past_the_base():
    model = apply_plan(tiny("opt", ffn_dim=48, word_embed_proj_dim=32), PLAN)
    tokens = list(range(3, 50))
    with torch.no_grad():
        logits = model(torch.tensor([[1, *tokens[:-1]]]), use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens))
    assert perplexity(model, [tokens], 64, prefix=1).nll == pytest.approx(float(expected), abs=1e-6)
