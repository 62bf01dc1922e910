"""Numbers, intervals and plans as text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masformer import AttentionPlan, MasformerError
from masformer.evaluation.intervals import Interval
from masformer.reports import Code
from masformer.reports.values import as_interval, is_plan, show
from strategies import plans, spans
from tiny import random_unit_plan


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (8192, "8,192"),
        (-16384, "-16,384"),
        (0.0, "0"),
        (1.0, "1.000"),
        (19.882080414787694, "19.88"),
        (119.96, "120.0"),
        (999.96, "1,000"),
        (7757.748, "7,758"),
        (0.4522434959999373, "0.4522"),
        (0.076150, "0.07615"),
        (9.99996, "10.00"),
        (0.000225067138671875, "0.0002251"),
        (0.0001, "0.0001"),
        (3.814697265625e-05, "3.815e-05"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        ([256, 1024], "256, 1,024"),
        ([], "-"),
        ([0.0, 50.0, 100.0], "0, 50, 100"),
        ([0.0, 33.3, 100], "0, 33.30, 100"),
        ("pubmed.jsonl.xz", "pubmed.jsonl.xz"),
    ],
)
def test_values_read_well(value, expected):
    assert show(value) == expected


@given(st.floats(min_value=-1e15, max_value=1e15, allow_subnormal=False))
def test_numbers_keep_four_digits(value):
    assert float(show(value).replace(",", "")) == pytest.approx(value, rel=5.01e-4, abs=1e-300)


@pytest.mark.parametrize(
    ("key", "value", "spec", "expected"),
    [
        ("cache_bytes", 44974080, None, "42.9 MiB"),
        ("plan.forward_flops", 614786817024, None, "615 GFLOP"),
        ("kilobytes", 12, None, "12"),
        ("full_bytes", 0.2667, None, "0.2667"),
        ("share_bytes", 1.0, None, "1.000"),
        ("cache_bytes", 44974080, ",", "44,974,080"),
        ("speedup", 5.826, ".1f", "5.8"),
        ("share", 0.356, ".0%", "36%"),
        ("memory", 3 * 2**29, "bytes", "1.50 GiB"),
        ("share", Interval(0.5, 0.25, 0.75, 8), ".0%", "50% [25%, 75%]"),
    ],
)
def test_units_and_formats(key, value, spec, expected):
    assert show(value, key, spec) == expected


def test_an_unknown_format_is_named():
    with pytest.raises(MasformerError, match=r"unknown format '\.2x' of a number; allowed: .*bytes, flops"):
        show(1.5, "speedup", ".2x")


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(12.34, 11.81, 12.89, 30), "12.3 [11.8, 12.9]"),
        (Interval(0.1004, 0.0707, 0.1263, 3), "0.100 [0.071, 0.126]"),
        (Interval(19.884, 19.871, 19.899, 400), "19.884 [19.871, 19.899]"),
        (Interval(1523.4, 1410.0, 1700.0, 9), "1,523 [1,410, 1,700]"),
        (Interval(-0.02, -0.05, 0.01, 9), "-0.0200 [-0.0500, 0.0100]"),
        (Interval(100.0, 100.0, 100.0, 20), "100 [100, 100]"),
        (Interval(0.0, 0.0, 0.0, 20), "0 [0, 0]"),
        (Interval(12.34, 12.34, 12.34, 1), "12.3"),
        (Interval(math.inf, 3.0, math.inf, 4), "inf [3.0, inf]"),
    ],
)
def test_intervals_have_one_number_of_decimals(interval, expected):
    assert show(interval) == expected


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e3), st.floats(0.1, 0.9))
def test_an_interval_that_has_a_width_shows_it(low, width, share):
    interval = Interval(low + share * width, low, low + width, 10)
    text = show(interval)
    mean, rest = text.replace(",", "", 0).split(" [")
    ends = rest.rstrip("]").split(", ")
    assert len(ends) == 2
    if width > 1e-6 and interval.high - interval.low > 1e-7:
        assert ends[0] != ends[1]
    decimals = {len(part.partition(".")[2]) for part in (mean, *ends)}
    assert len(decimals) == 1


def test_only_what_intervals_write_is_an_interval():
    interval = Interval(2.0, 1.0, 3.0, 7)
    assert as_interval(interval.to_dict()) == interval
    assert as_interval({"mean": 2, "low": 1, "high": 3}) is not None
    for other in (
        {"mean": 1.0},
        {"mean": None, "low": 1, "high": 2},
        interval.to_dict() | {"plan": "full"},
        [1, 2, 3],
        5,
    ):
        assert as_interval(other) is None


@given(plans)
def test_plans_and_spans_are_shown_as_code(plan):
    assert is_plan(str(plan))
    assert isinstance(show(str(plan)), Code)
    assert AttentionPlan.parse(show(str(plan)), len(plan)) == plan


@pytest.mark.parametrize("seed", range(20))
def test_plans_by_heads_are_shown_as_code(seed):
    plan = random_unit_plan(seed)
    assert isinstance(show(str(plan)), Code)
    assert AttentionPlan.parse(show(str(plan)), 4, 2) == plan


@given(spans)
def test_a_span_with_more_words_is_no_plan(span):
    assert is_plan(str(span))
    assert not is_plan(f"{span} as a mask")
    assert not is_plan(f"transformers, sliding layers of {span}")


@pytest.mark.parametrize(
    "text", ["", "full causal SDPA", "window", "all full", "full@", "full@4:; window:8", "window:512+", "block:8x"]
)
def test_other_texts_are_no_plans(text):
    assert not is_plan(text)
