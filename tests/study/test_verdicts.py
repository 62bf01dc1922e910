"""Verdicts, and what a study says in short, follow from intervals alone."""

import pytest

from masformer.evaluation.intervals import Interval
from masformer.study.figures import by_cost
from masformer.study.stages import generation
from masformer.study.stages.language import _in_short
from masformer.study.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    Nearness,
    comes_close,
    difference,
    interval,
    is_better,
    is_different,
    is_faster,
    is_no_worse,
    nearness,
    writes_as_well,
)

FULL = [[3.0, 2.0, 4.0, 2.5]]
LOCAL = [[3.5, 2.4, 4.6, 3.0]]


def shifted(values, by):
    return [[value + by for value in row] for row in values]


def between(share):
    """A plan that loses that share of what local attention loses, in every document."""
    return [[full + share * (local - full) for full, local in zip(FULL[0], LOCAL[0], strict=True)]]


def test_an_interval_holds_the_mean_of_every_seed_and_is_never_narrower_than_that_of_documents():
    documents = interval([[1.0, 2.0, 3.0, 4.0]])
    both = interval([[1.0, 2.0, 3.0, 4.0], [6.0, 7.0, 8.0, 9.0]])
    assert (documents.mean, documents.count) == (2.5, 4)
    assert documents.low < 2.5 < documents.high
    assert both.mean == 5.0
    assert both.low <= 2.5
    assert both.high >= 7.5


def test_seeds_are_the_units_where_each_gave_one_number():
    found = interval([[10.0], [20.0], [60.0]])
    assert (found.mean, found.low, found.high, found.count) == (30.0, 10.0, 60.0, 3)


def test_documents_count_by_their_weights():
    assert interval([[1.0, 5.0]], [3.0, 1.0]).mean == 2.0


def test_differences_are_paired():
    found = difference(shifted(FULL, 0.1), FULL)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


@pytest.mark.parametrize(("share", "answer"), [(0.0, HOLDS), (0.2, HOLDS), (0.6, FAILS), (1.0, FAILS), (-0.5, HOLDS)])
def test_a_plan_comes_close_where_little_of_the_loss_is_left(share, answer):
    near = Nearness.of(FULL, LOCAL, between(share))
    assert near.answer == answer
    assert near.left.mean == pytest.approx(share * near.gap.mean)


def test_nothing_is_claimed_where_local_attention_loses_nothing_for_certain():
    local = [[3.2, 1.8, 4.1, 2.4]]
    near = Nearness.of(FULL, local, FULL)
    assert near.answer == OPEN
    assert "nothing to win back" in near.text("mixed", "nats")
    assert comes_close("c", {"mixed": near}, "nats").answer == OPEN


def test_a_plan_that_loses_where_local_attention_does_not_is_not_close_to_full():
    better = [[value - 0.4 for value in FULL[0]]]
    near = Nearness.of(FULL, better, shifted(FULL, 0.3))
    assert near.answer == FAILS
    assert near.text("mixed", "points").startswith("mixed loses 0.30")
    assert writes_as_well("c", {"mixed": Nearness.of(FULL, LOCAL, FULL)}, {"mixed": near}, "points").answer == FAILS
    assert Nearness.of(FULL, better, shifted(FULL, -0.2)).answer == OPEN, "a gain is no loss"
    assert comes_close("c", {"mixed": near, "other": Nearness.of(FULL, better, FULL)}, "points").answer == OPEN


def test_nothing_is_claimed_of_one_measurement():
    near = Nearness.of([[1.0]], [[2.0]], [[1.0]])
    assert near.answer == OPEN
    assert is_better("c", Interval(-1, -1, -1, 1), "a less b").answer == OPEN
    assert is_no_worse("c", {"a": Interval(-1, -1, -1, 1)}).answer == OPEN
    assert is_different("c", Interval(1, 1, 1, 1), "a less b").answer == OPEN
    assert is_faster("c", {"a": Interval(2, 2, 2, 1)}).answer == OPEN


def test_documents_that_disagree_leave_it_open():
    plan = [[3.0, 2.4, 4.0, 3.0]]
    assert Nearness.of(FULL, LOCAL, plan).answer == OPEN


def test_one_good_mix_is_enough_and_all_must_fail():
    good, bad = Nearness.of(FULL, LOCAL, between(0.1)), Nearness.of(FULL, LOCAL, between(0.9))
    assert comes_close("c", {"1 full": bad, "2 full": good}, "nats").answer == HOLDS
    assert "1 full" not in comes_close("c", {"1 full": bad, "2 full": good}, "nats").why
    assert comes_close("c", {"1 full": bad}, "nats").answer == FAILS
    assert comes_close("c", {}, "nats").answer == OPEN


@pytest.mark.parametrize(
    ("low", "high", "better", "no_worse", "faster"),
    [
        (-0.2, -0.1, HOLDS, HOLDS, FAILS),
        (-0.1, 0.005, OPEN, HOLDS, FAILS),
        (-0.1, 0.1, OPEN, OPEN, FAILS),
        (0.02, 0.1, FAILS, FAILS, FAILS),
        (0.9, 1.1, FAILS, FAILS, OPEN),
        (1.1, 1.3, FAILS, FAILS, HOLDS),
    ],
)
def test_an_interval_decides(low, high, better, no_worse, faster):
    found = Interval((low + high) / 2, low, high, 8)
    assert is_better("c", found, "a less b").answer == better
    assert is_no_worse("c", {"a less b": found}).answer == no_worse
    assert is_faster("c", {"a": found}).answer == faster


@pytest.mark.parametrize(
    ("low", "high", "answer"), [(0.02, 0.3, HOLDS), (-0.1, 0.3, OPEN), (0.0, 0.01, FAILS), (0.002, 0.005, FAILS)]
)
def test_a_difference_that_is_too_small_is_none(low, high, answer):
    assert is_different("c", Interval((low + high) / 2, low, high, 8), "worst less best").answer == answer


def test_all_must_be_no_worse_and_all_faster():
    good, bad, open_ = Interval(-1, -2, 0, 5), Interval(1, 0.5, 2, 5), Interval(0, -1, 1, 5)
    assert is_no_worse("c", {"a": good, "b": bad}).answer == FAILS
    assert is_no_worse("c", {"a": good, "b": open_}).answer == OPEN
    assert is_no_worse("c", {}).answer == OPEN
    assert is_faster("c", {"a": Interval(2, 1.5, 3, 5), "b": Interval(1, 0.8, 1.2, 5)}).answer == OPEN


def test_what_comes_close_by_the_loss_of_text_must_do_so_by_what_it_writes():
    good, bad = Nearness.of(FULL, LOCAL, between(0.1)), Nearness.of(FULL, LOCAL, between(0.9))
    open_ = Nearness.of(FULL, LOCAL, [[3.0, 2.4, 4.0, 3.0]])
    likely = {"8 full": good, "4 full": good, "bottom": bad}
    for written, answer in (
        ({"8 full": good, "4 full": good, "bottom": bad}, HOLDS),
        ({"8 full": good, "4 full": bad, "bottom": good}, FAILS),
        ({"8 full": good, "4 full": open_, "bottom": bad}, OPEN),
        ({"bottom": good}, OPEN),
    ):
        assert writes_as_well("c", likely, written, "points").answer == answer
    assert "bottom" not in writes_as_well("c", likely, {"8 full": good, "bottom": bad}, "points").why
    assert writes_as_well("c", {"bottom": bad}, {"bottom": good}, "points").why.startswith("no plan comes close")
    assert writes_as_well("c", {}, {}, "points").why == "nothing was measured"


def test_the_first_page_says_of_what_is_written_only_what_was_measured():
    good, bad = Nearness.of(FULL, LOCAL, between(0.1)), Nearness.of(FULL, LOCAL, between(0.9))
    better = [[value - 0.4 for value in FULL[0]]]
    nothing, worse = Nearness.of(FULL, better, FULL), Nearness.of(FULL, better, shifted(FULL, 0.3))
    likely = {"24 heads": good, "8 layers": good, "bottom": bad}
    written = {
        "keys": {"24 heads": bad, "8 layers": good},
        "values": {},
        "answers": {"24 heads": worse, "8 layers": nothing},
        "spans": {"24 heads": worse, "8 layers": nothing},
        "summaries": {"24 heads": nothing},
    }
    assert generation._in_short(likely, written) == (
        "Of 2 plans that come close by the loss of text, so many write as well: keys 1; at answers and spans local "
        "attention loses nothing for certain, and 24 heads lose; at summaries local attention loses nothing for "
        "certain."
    )
    assert generation._in_short(likely, {"values": {}, "keys": {"bottom": bad}}) == ""
    assert generation._in_short({"bottom": bad}, written) == ""


def test_what_has_one_seed_is_held_against_that_seed_alone():
    two = {"all full": [FULL[0], [value + 9 for value in FULL[0]]], "all local": [LOCAL[0], LOCAL[0]]}
    one = {"all full": FULL[:1], "all local": LOCAL[:1]}
    mix = {"8 full": between(0.1)[:1]}
    assert nearness(two | mix) == nearness(one | mix)


def test_nearness_is_asked_of_all_plans_between_the_ends():
    values = {"all full": FULL, "all local": LOCAL, "8 full": between(0.1)}
    assert set(nearness(values)) == {"8 full"}
    assert nearness({"all full": FULL, "8 full": between(0.1)}) == {}


def test_the_cheapest_plan_that_comes_close_is_named_before_training_and_after_it():
    good, bad = Nearness.of(FULL, LOCAL, between(0.1)), Nearness.of(FULL, LOCAL, between(0.9))
    lost = {"all local": Interval(0.8, 0.7, 0.9, 4), "heads": Interval(0.14, 0.1, 0.2, 4)}
    lost["layers"] = Interval(0.19, 0.1, 0.3, 4)
    shares, near = {"heads": 0.25, "layers": 0.5}, {"before": {"heads": bad, "layers": bad}, "after": {}}
    first = "The cheapest plan that leaves at most a quarter of what local attention everywhere loses: before training "
    assert _in_short(near, {"before": lost, "after": {}}, shares) == f"{first}none."
    near = {"before": {"heads": bad, "layers": good}, "after": {"heads": good, "layers": good}}
    assert _in_short(near, {"before": lost, "after": lost}, shares) == (
        f"{first}layers (50% of the attention operations, 0.190 of 0.80 nats lost); after training heads (25% of the "
        "attention operations, 0.140 of 0.80 nats lost)."
    )
    del lost["all local"]
    assert _in_short(near, {"before": lost, "after": {}}, shares) == "", (
        "of a quarter of what is unknown nothing is said"
    )


def test_a_line_without_points_is_not_drawn():
    (axes,) = by_cost(
        {"before": {"heads": [(0.25, Interval(0.2, 0.1, 0.3, 4))], "middle": []}, "after": {"heads": []}}
    ).axes
    assert [each.get_text() for each in axes.get_legend().get_texts()] == ["heads"]
