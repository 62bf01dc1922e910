"""Losses by document, their intervals, and plans compared document by document."""

import json
import math

import pytest
import torch

from masformer import AttentionPlan, FullSpan, MasformerError, WindowSpan, apply_plan
from masformer.evaluation.intervals import bootstrap
from masformer.evaluation.perplexity import (
    DocumentLosses,
    compare_plans,
    difference_table,
    paired_differences,
    perplexity,
    perplexity_table,
    rolling_windows,
)
from shown import shown
from tiny import PLAN, VOCABULARY, tiny

PREFIX = 1
PLANS = {
    "full": AttentionPlan.uniform(4, FullSpan()),
    "mixed": PLAN,
    "local": AttentionPlan.uniform(4, WindowSpan(3)),
}


def tokens(count, seed=0):
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENTS = [tokens(75), tokens(1, 1), [], tokens(40, 2), tokens(9, 3), tokens(60, 4)]


@pytest.fixture(scope="module")
def results():
    return compare_plans(tiny("llama"), DOCUMENTS, PLANS, [16, 32], prefix=PREFIX)


def by_hand(plan, length):
    """Number of the document -> the losses of its tokens, and of those in the second half of their windows."""
    model, found = apply_plan(tiny("llama"), plan), {}
    for number, document in enumerate(DOCUMENTS):
        whole, half = [], []
        for inputs, targets in rolling_windows(document, PREFIX, length):
            with torch.no_grad():
                logits = model(torch.tensor([inputs])).logits[0, -len(targets) :].double()
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()
            whole += losses
            first = len(inputs) - len(targets)
            half += [loss for position, loss in enumerate(losses, first) if position >= length // 2]
        found[number] = whole, half
    return found


def test_losses_by_document_are_those_of_the_models_own_logits(results):
    for result in results:
        expected = by_hand(PLANS[result.name], result.length)
        for found, part in ((result.by_document, 0), (result.second_half_by_document, 1)):
            have = {number: losses[part] for number, losses in expected.items() if losses[part]}
            assert found.numbers == tuple(have)
            assert found.tokens == tuple(map(len, have.values()))
            assert found.nll == pytest.approx([sum(losses) for losses in have.values()], abs=1e-4)
        assert result.documents == 5
        assert sum(result.by_document.tokens) == result.tokens == 185
        assert sum(result.by_document.nll) / result.tokens == pytest.approx(result.nll)
        assert sum(result.second_half_by_document.tokens) == result.second_half.tokens


def test_windows_that_run_together_score_the_same(results):
    together = compare_plans(tiny("llama"), DOCUMENTS, PLANS, [16, 32], prefix=PREFIX, batch_size=3, chunk=10)
    for one, other in zip(results, together, strict=True):
        assert one.by_document.nll == pytest.approx(other.by_document.nll, abs=1e-4)
        assert (one.by_document.tokens, one.tokens) == (other.by_document.tokens, other.tokens)
        assert one.second_half.nll == pytest.approx(other.second_half.nll, abs=1e-5)


def test_a_batch_is_one_pass_of_the_model():
    model, shapes = tiny("llama"), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    done = []
    perplexity(model, [tokens(48), tokens(32, 1)], 16, prefix=PREFIX, batch_size=4, progress=done.append)
    assert shapes == [(4, 16), (1, 16)]
    assert done == [64, 16]


def test_intervals_are_of_token_weighted_means(results):
    for result in results:
        losses = result.by_document
        means = [nll / count for nll, count in zip(losses.nll, losses.tokens, strict=True)]
        expected = bootstrap(means, losses.tokens)
        assert result.interval.mean == pytest.approx(result.perplexity)
        assert (result.interval.low, result.interval.high) == (math.exp(expected.low), math.exp(expected.high))
        assert result.interval.low < result.perplexity < result.interval.high
        assert result.interval.count == 5
        assert result.second_half_interval.mean == pytest.approx(result.second_half.perplexity)


def test_plans_are_paired_document_by_document(results):
    differences = paired_differences(results)
    assert [(each.name, each.length, each.against) for each in differences] == [
        (name, length, "full") for name in ("mixed", "local") for length in (16, 32)
    ]
    named = {(result.name, result.length): result for result in results}
    for each in differences:
        mine, base = named[each.name, each.length], named["full", each.length]
        assert each.difference.mean == pytest.approx(mine.nll - base.nll)
        assert each.ratio.mean == pytest.approx(mine.perplexity / base.perplexity)
        assert (each.ratio.low, each.ratio.high) == (math.exp(each.difference.low), math.exp(each.difference.high))
        assert each.second_half.mean == pytest.approx(mine.second_half.nll - base.second_half.nll)
        gaps = [a - b for a, b in zip(mine.by_document.nll, base.by_document.nll, strict=True)]
        weights = mine.by_document.tokens
        expected = bootstrap([gap / weight for gap, weight in zip(gaps, weights, strict=True)], weights)
        assert each.difference == expected


def test_pairing_is_narrower_than_the_intervals_themselves():
    """Documents differ much more from each other than plans do, and pairing takes that out."""
    base = DocumentLosses(tuple(range(20)), (100,) * 20, tuple(100.0 + 20 * number for number in range(20)))
    other = DocumentLosses(
        base.numbers, base.tokens, tuple(nll + 1 + number % 3 for number, nll in enumerate(base.nll))
    )
    paired = other.minus(base)
    assert 0.01 < paired.low < paired.mean < paired.high < 0.03
    assert base.interval.high - base.interval.low > 0.5


def test_another_plan_can_be_the_one_compared_with(results):
    first, second = paired_differences(results), paired_differences(results, "mixed")
    assert {each.name for each in second} == {"full", "local"}
    forth = {each.length: each.difference.mean for each in first if each.name == "mixed"}
    back = {each.length: each.difference.mean for each in second if each.name == "full"}
    assert forth == {length: pytest.approx(-value) for length, value in back.items()}
    with pytest.raises(MasformerError, match="no plan 'none' to compare against; allowed: 'full', 'mixed', 'local'"):
        paired_differences(results, "none")
    assert paired_differences(results[:2]) == paired_differences([]) == []


def test_only_the_same_tokens_can_be_paired():
    losses = DocumentLosses((0, 1), (3, 4), (1.0, 2.0))
    for other in (DocumentLosses((0, 2), (3, 4), (1.0, 2.0)), DocumentLosses((0, 1), (3, 5), (1.0, 2.0))):
        with pytest.raises(MasformerError, match="only losses of the same tokens"):
            losses.minus(other)


def test_one_document_gives_no_interval():
    results = compare_plans(tiny("llama"), [tokens(40)], PLANS, [16], prefix=PREFIX)
    assert results[0].interval.low == results[0].interval.high == results[0].interval.mean
    text = shown(perplexity_table(results))
    assert "one document gives no interval" in text
    assert "[" not in text
    assert "[" not in shown(difference_table(paired_differences(results)))


def test_tables_and_records_hold_the_intervals(results):
    text, differences = shown(perplexity_table(results)), paired_differences(results)
    compared = shown(difference_table(differences))
    for result in results:
        assert f"[{result.interval.low:.2f}, {result.interval.high:.2f}]" in text
        row = json.loads(json.dumps(result.to_dict()))
        assert row["interval"] == {
            "mean": pytest.approx(row["perplexity"]),
            "low": result.interval.low,
            "high": result.interval.high,
            "count": 5,
        }
        assert row["by_document"]["tokens"] == list(result.by_document.tokens)
        assert row["second_half"]["interval"] == result.second_half_interval.to_dict()
    assert "95% interval over 5 documents" in text
    for each in differences:
        part = each.difference
        assert f"{part.mean:+.4f} ({each.ratio.mean:.3f}x)" in compared
        assert f"[{part.low:+.4f}, {part.high:+.4f}]" in compared
        row = each.to_dict()
        assert set(row) == {"name", "plan", "against", "length", "difference", "ratio", "second_half_difference"}
        assert row["difference"] == part.to_dict()
