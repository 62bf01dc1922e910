"""Rolling perplexity is lm-eval's: its windows, its prefix token, its sums."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masformer import AttentionPlan, FullSpan, apply_plan
from masformer.data import Document
from masformer.evaluation.perplexity import perplexity, prefix_token, rolling_windows, tokenize
from tiny import PLAN, letter_tokenizer, tiny

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 2,
    "a",
    "exactly thirty-two letters long!",
    "thirty-three, with one letter more",
]
LENGTH = 32


@given(st.integers(0, 80), st.integers(1, 20), st.data())
def test_the_windows_are_those_of_lm_eval(count, length, data):
    context = data.draw(st.integers(1, length))
    document = list(range(count))
    theirs = list(get_rolling_token_windows(document, -1, length, context))
    ours = list(rolling_windows(document, -1, length, context))
    assert ours == theirs
    # What lm-eval hands to the model are disjoint windows; joined again they give our inputs.
    for (inputs, targets), (before, after) in zip(ours, map(make_disjoint_window, theirs), strict=True):
        assert after == targets
        assert (before + after)[:-1] == inputs


def instances(texts):
    return [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("plan", [None, PLAN], ids=["stock", "mixed"])
def test_the_sums_are_those_of_lm_eval(kind, plan, batch_size):
    tokenizer = letter_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny(kind, vocab_size=len(tokenizer))
    if plan is not None:
        model = apply_plan(model, plan)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=batch_size, backend="causal")
    assert theirs.prefix_token_id == prefix_token(tokenizer) == tokenizer.bos_token_id
    expected = [-each for each in theirs.loglikelihood_rolling(instances(TEXTS), disable_tqdm=True)]
    documents, text_bytes = tokenize(tokenizer, [Document(text[:9], text) for text in TEXTS])
    assert [len(document) for document in documents] == [len(text) for text in TEXTS]
    result = perplexity(model, documents, LENGTH, prefix=prefix_token(tokenizer), text_bytes=text_bytes)
    assert result.by_document.nll == pytest.approx(expected, rel=1e-5)
    # lm-eval's byte_perplexity and bits_per_byte are over all bytes of the texts.
    bits = sum(expected) / sum(len(text.encode()) for text in TEXTS) / torch.log(torch.tensor(2.0)).item()
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_the_comparison_sees_a_plan():
    """Guards the test above: a plan changes the sums."""
    tokenizer = letter_tokenizer(bos_token="<s>")
    documents, _ = tokenize(tokenizer, [Document("text", TEXTS[0])])
    sums = []
    for plan in (AttentionPlan.uniform(4, FullSpan()), PLAN):
        model = apply_plan(tiny("llama", vocab_size=len(tokenizer)), plan)
        sums.append(perplexity(model, documents, LENGTH, prefix=prefix_token(tokenizer)).by_document.nll[0])
    assert abs(sums[0] - sums[1]) > 1e-4 * sums[0]


def test_without_bos_both_start_from_eos():
    tokenizer = letter_tokenizer(eos_token="</s>", pad_token="</s>")
    model = tiny("llama", vocab_size=len(tokenizer))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, backend="causal")
    assert theirs.prefix_token_id == prefix_token(tokenizer) == tokenizer.eos_token_id
    (expected,) = theirs.loglikelihood_rolling(instances(TEXTS[:1]), disable_tqdm=True)
    documents, _ = tokenize(tokenizer, [Document("text", TEXTS[0])])
    found = perplexity(model, documents, LENGTH, prefix=prefix_token(tokenizer))
    assert found.by_document.nll == pytest.approx([-expected], rel=1e-5)
