"""What benches report: peers that compute what we do, limits, growth, and what steps and prompts are held against."""

from __future__ import annotations

import json

import pytest
import torch

from masformer import AttentionPlan
from masformer.benchmarks import bench_attention, bench_decode, bench_prefill, bench_tables, bench_train, summary_line
from masformer.benchmarks.limits import COPY, PRODUCT, Limits, Probe
from masformer.benchmarks.models import decode_work, forward_work
from masformer.benchmarks.peers import PEERS, UnableError
from masformer.benchmarks.rows import with_exponents
from masformer.benchmarks.timing import Timing
from masformer.cost import ModelShape, cost
from masformer.errors import MasformerError
from masformer.models import bridge
from masformer.plots import plot_times
from masformer.spans import Span
from tiny import PLAN, tiny

PURE = [name for name in PEERS if name not in ("flex-attention", "flash-attn")]


@pytest.mark.parametrize("peer", PURE)
@pytest.mark.parametrize("text", ["window:16", "block:16x2", "block:16"])
def test_a_peer_computes_the_span_that_it_says(peer, text):
    if peer == "local-attention":
        pytest.importorskip("local_attention")
    inputs = torch.randn(1, 4, 90, 8), torch.randn(1, 2, 90, 8), torch.randn(1, 2, 90, 8)
    attention, computed = PEERS[peer](Span.parse(text), *inputs[:2], False)
    index = torch.arange(90)
    mask = computed.visible(index[:, None], index)
    query, key, value = (x.double() for x in inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(attention(*inputs).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_peer_says_why_it_does_not_run():
    query, key = torch.randn(1, 4, 32, 8), torch.randn(1, 2, 32, 8)
    with pytest.raises(UnableError, match="no backward pass on the CPU"):
        PEERS["flex-attention"](Span.parse("window:8"), query, key, True)
    pytest.importorskip("local_attention")
    with pytest.raises(UnableError, match="sinks"):
        PEERS["local-attention"](Span.parse("window:8+2"), query, key, False)
    with pytest.raises(UnableError, match="GiB"):
        PEERS["hf-eager"](Span.parse("window:8"), torch.empty(1, 64, 10**6, 1, device="meta"), key, False)


def test_attention_rows_hold_peers_limits_and_growth():
    spans = [Span.parse("window:16")]
    found = bench_attention(spans, [64, 128], heads=2, kv_heads=1, head_dim=8, peers=["hf-sdpa", "hf-eager"], repeats=2)
    rows = found["results"]
    assert [row["name"] for row in rows[:4]] == [
        "full causal SDPA",
        "window:16",
        "window:16, hf-sdpa",
        "window:16, hf-eager",
    ]
    assert len(rows) == 2 * 2 * 4
    assert all(row["difference"] < 1e-5 for row in rows if row["peer"])
    assert all((row["exponent"] is None) == (row["length"] == 64) for row in rows)
    full, local = rows[4], rows[5]
    assert full["flops"] == 4 * 2 * 8 * 128 * 129 / 2
    assert local["flops"] == 4 * 2 * 8 * (16 * 17 / 2 + 112 * 16)
    assert local["share"] == pytest.approx(local["speedup"] / (full["flops"] / local["flops"]))
    assert all(row["of_limit"] == pytest.approx(row["limit_seconds"] / row["median"]) for row in rows)
    assert [(each["length"], each["pass"]) for each in found["limits"]] == [
        (length, pass_) for pass_ in ("forward", "forward + backward") for length in (64, 128)
    ]


def test_the_limit_is_the_slower_of_operations_and_bytes():
    limits = Limits(flops_per_second=100.0, bytes_per_second=10.0)
    assert limits.of(4.0, flops=200, bytes_moved=10) == {
        "flops": 200, "bytes": 10, "limit_seconds": 2.0, "bound": "flops", "of_limit": 0.5,
    }  # fmt: skip
    assert limits.of(4.0, flops=200, bytes_moved=30)["bound"] == "bytes"


def test_rates_come_from_the_times_of_the_probe():
    probe = Probe(torch.float32, torch.device("cpu"))
    for call in probe.calls().values():
        call()
    limits = probe.limits({PRODUCT: Timing(PRODUCT, (2.0, 1.0, 9.0)), COPY: Timing(COPY, (0.5,))})
    assert limits == Limits(2 * 1536**3 / 2.0, 2 * 2**25 / 0.5)


def test_growth_is_the_slope_between_neighbouring_lengths():
    rows = [{"name": "a", "length": n, "median": 3.0 * n**1.5} for n in (16, 4, 64)]
    growth = [row["exponent"] for row in with_exponents(rows, ["name"])]
    assert growth[1] is None
    assert growth[0] == pytest.approx(1.5)
    assert growth[2] == pytest.approx(1.5)


def test_work_is_that_of_the_cost_model_without_the_logits_that_are_not_made():
    model = tiny("llama")
    plan = PLAN.for_layers(model.config.num_hidden_layers)
    shape = ModelShape.of(model.config)
    whole = cost(shape, plan, 40, cache_bytes_per_value=4)
    head = model.config.vocab_size * model.config.hidden_size
    assert forward_work(model, plan, 40, 40).flops == whole.forward_flops
    assert forward_work(model, plan, 40, 1).flops == whole.forward_flops - 2 * head * 39
    steps = [cost(shape, plan, n, cache_bytes_per_value=4).forward_flops for n in (40, 43)]
    assert decode_work(model, plan, 40, 3).flops == steps[1] - steps[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps_leave_the_weights_and_are_held_against_transformers(checkpointing):
    model = tiny("llama", sliding_window=None)
    before = [parameter.clone() for parameter in model.parameters()]
    plans = {"mixed": PLAN, "full": AttentionPlan.parse("full", len(PLAN))}
    rows = bench_train(model, plans, [24], checkpointing=checkpointing, repeats=2)["results"]
    names = [row["name"] for row in rows]
    assert names == ["mixed", "all full, masformer", "transformers"]
    assert all(row["speedup"] == 1 for row in rows if row["name"] == "transformers")
    assert rows[0]["ideal"] > 1 == rows[1]["ideal"]
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("bench", [bench_prefill, bench_decode, bench_train])
def test_without_peers_full_attention_is_the_baseline(bench):
    rows = bench(tiny("llama"), {"mixed": PLAN}, [24], repeats=1, peers=False)["results"]
    assert [row["name"] for row in rows] == ["mixed", "all full, masformer"]
    assert (rows[1]["speedup"], rows[1]["ideal"]) == (1, 1)
    assert rows[0]["ideal"] > 1


def test_prefill_and_decode_use_the_backend_that_is_named(monkeypatch):
    seen = []
    original = bridge.apply_plan
    monkeypatch.setattr("masformer.benchmarks.models.apply_plan", lambda m, p, b: seen.append(b) or original(m, p, b))
    for bench in (bench_prefill, bench_decode):
        bench(tiny("llama"), {"mixed": PLAN}, [16], repeats=1, backend="reference")
    assert set(seen) == {"reference"}


def test_tables_pictures_and_the_line_say_the_same(tmp_path):
    rows = [
        {
            "length": n,
            "name": name,
            "median": n / 1000,
            "speedup": 2.0,
            "share": 0.5,
            "seconds": [1.0],
            "exponent": None,
        }
        for n in (16, 32)
        for name in ("a", "b")
    ]
    (table,) = bench_tables("Title", rows)
    assert table.row_count == 4
    assert [str(column.header) for column in table.columns] == ["tokens", "variant", "time", "speed-up", "of ideal"]
    plot_times(rows, tmp_path / "x.svg")
    assert "seconds" in (tmp_path / "x.svg").read_text()
    assert json.loads(summary_line("prefill", rows)) == {
        "bench": "prefill",
        "results": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "at least one span and one length"),
        ({"lengths": [0]}, "length must be at least 1, got 0"),
        ({"peers": ["x"]}, "unknown peer 'x'; allowed: hf-sdpa"),
        ({"backend": "x"}, "unknown backend 'x'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(MasformerError, match=message):
        bench_attention(**{"spans": [Span.parse("window:8")], "lengths": [16]} | options)
