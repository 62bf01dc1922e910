"""The same tokens predicted from contexts of several lengths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masformer import AttentionPlan, FullSpan, MasformerError, WindowSpan, apply_plan
from masformer.evaluation.perplexity import (
    FixedTargets,
    compare_plans,
    perplexity,
    perplexity_table,
    rolling_windows,
    target_window,
)
from shown import shown
from tiny import PLAN, VOCABULARY, tiny

PREFIX = 1
FULL = AttentionPlan.uniform(4, FullSpan())


def tokens(count, seed=0):
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@given(st.data(), st.integers(2, 40), st.booleans())
def test_targets_are_the_same_at_every_length_and_follow_what_is_seen(data, end, has_prefix):
    count = data.draw(st.integers(1, end - 1))
    length = data.draw(st.integers(count + (not has_prefix), end))
    extra = data.draw(st.integers(0, 10))
    document, prefix = list(range(100, 100 + end + extra)), 7 if has_prefix else None
    inputs, targets = target_window(document, prefix, length, FixedTargets(count, end))
    assert targets == document[end - count : end]
    context = document[end - length : end - 1]
    assert inputs == ([7, *context] if has_prefix else context)
    assert len(context) - (count - 1) == length - count


def test_the_longest_window_is_the_first_rolling_one():
    document = list(range(50))
    inputs, targets = target_window(document, -1, 32, FixedTargets(8, 32))
    first, predicted = next(rolling_windows(document, -1, 32))
    assert (inputs, targets) == (first, predicted[-8:])


@pytest.mark.parametrize("plan", [FULL, PLAN], ids=["full", "mixed"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_are_those_of_the_models_own_logits(plan, batch_size):
    documents = [tokens(90, 1), tokens(64, 2), tokens(63, 3), tokens(70, 4), tokens(64, 5)]
    results = compare_plans(
        tiny("llama"), documents, {"plan": plan}, [16, 24, 64],
        prefix=PREFIX, target_tokens=12, batch_size=batch_size, chunk=5,
    )  # fmt: skip
    model = apply_plan(tiny("llama"), plan)
    used = [document[:64] for document in documents if len(document) >= 64]
    for result, length in zip(results, [16, 24, 64], strict=True):
        sums = []
        for document in used:
            seen = torch.tensor([[PREFIX, *document[-length:]]])
            with torch.no_grad():
                logits = model(seen).logits[0, -13:-1].double()
            sums.append(float(torch.nn.functional.cross_entropy(logits, seen[0, -12:], reduction="sum")))
        assert (result.length, result.documents, result.left_out, result.tokens) == (length, 4, 1, 48)
        assert result.target_tokens == 12
        assert result.by_document.numbers == (0, 1, 3, 4)
        assert result.by_document.nll == pytest.approx(sums, abs=1e-4)
        assert result.nll == pytest.approx(sum(sums) / 48, abs=1e-5)


def test_what_a_window_cannot_see_makes_no_difference():
    """Context beyond the reach of all windows together changes nothing; under full attention it does."""
    documents = [tokens(100, 1), tokens(100, 2)]
    plans = {"local": AttentionPlan.uniform(4, WindowSpan(4)), "full": FULL}
    results = compare_plans(tiny("llama"), documents, plans, [40, 60, 100], prefix=PREFIX, target_tokens=10)
    nll = {(result.name, result.length): result.nll for result in results}
    assert nll["local", 40] == pytest.approx(nll["local", 100], abs=1e-5)
    assert nll["local", 60] == pytest.approx(nll["local", 100], abs=1e-5)
    assert abs(nll["full", 40] - nll["full", 100]) > 1e-4


def test_without_a_prefix_the_context_comes_first():
    document = tokens(40)
    result = perplexity(tiny("llama"), [document], 20, prefix=None, targets=FixedTargets(6, 30))
    with torch.no_grad():
        logits = tiny("llama")(torch.tensor([document[10:29]])).logits[0, -6:]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(document[24:30]))
    assert result.nll == pytest.approx(float(expected), abs=1e-5)
    assert result.tokens == 6


def test_the_table_counts_what_was_left_out():
    documents = [tokens(64, 1), tokens(64, 2), tokens(20, 3)]
    results = compare_plans(tiny("llama"), documents, {"full": FULL}, [16, 64], prefix=PREFIX, target_tokens=8)
    text = shown(perplexity_table(results))
    assert "Perplexity of the same 8 tokens of each document" in text
    assert "95% interval over 2 documents; 1 shorter document left out" in text
    assert "second half" not in text
    assert f"{results[0].perplexity:.2f}" in text


def test_progress_counts_the_inputs_of_every_pass():
    calls = []
    compare_plans(
        tiny("llama"), [tokens(64, 1), tokens(64, 2), tokens(9)], {"a": FULL, "b": PLAN}, [16, 64],
        prefix=PREFIX, target_tokens=8, progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls[0] == ("a", 16, 0, 320)
    assert calls[-1] == ("b", 64, 320, 320)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_tokens": 0}, "target_tokens must be at least 1, got 0"),
        ({"target_tokens": 17}, "length 16 is too short for 17 target tokens; least: 17"),
        ({"target_tokens": 16, "prefix": None}, "and one that the first is predicted from; least: 17"),
        (
            {"lengths": [16, 65]},
            "no document has the 65 tokens of the longest context: the longest has 64; give longer",
        ),
        ({"context": 2}, "context and text_bytes are of rolling windows; they do nothing with fixed targets"),
        ({"text_bytes": 9}, "context and text_bytes are of rolling windows; they do nothing with fixed targets"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_named_before_anything_runs(changes, message):
    ran = []
    given = {"lengths": [16, 64], "target_tokens": 8, "prefix": PREFIX} | changes
    with pytest.raises(MasformerError) as error:
        compare_plans(tiny("llama"), [tokens(64)], {"full": FULL}, progress=lambda *call: ran.append(call), **given)
    assert message in str(error.value)
    assert ran == []


def test_a_window_beyond_its_targets_or_its_document_is_refused():
    with pytest.raises(MasformerError, match="length 31 is beyond the 30 tokens at which the targets end"):
        target_window(range(40), 1, 31, FixedTargets(4, 30))
    with pytest.raises(MasformerError, match="the document has 29 tokens, 30 are needed"):
        target_window(range(29), 1, 30, FixedTargets(4, 30))
