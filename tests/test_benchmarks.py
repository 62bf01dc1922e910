"""What benches report: peers that compute what we do, limits, growth, and what steps and prompts are held against."""

from __future__ import annotations

import json

import pytest
import torch

from masformer import AttentionPlan, attend
from masformer.benchmarks import (
    bench_attention,
    bench_decode,
    bench_eval,
    bench_prefill,
    bench_tables,
    bench_train,
    compare_times,
    peers,
    summary_line,
    timing,
)
from masformer.benchmarks.limits import COPY, PRODUCT, Limits, Probe
from masformer.benchmarks.models import decode_work, filled_cache, forward_work, random_tokens, variants
from masformer.benchmarks.peers import DIRECT, PEERS, UnableError, direct
from masformer.benchmarks.rows import with_exponents
from masformer.benchmarks.timing import Timing, peak_memory
from masformer.cost import ModelShape, cost
from masformer.errors import MasformerError
from masformer.models import bridge
from masformer.plots import plot_times
from masformer.spans import FullSpan, Span, UnitSpans, WindowSpan, layer_span
from tiny import PLAN, tiny

PURE = [name for name in PEERS if name not in ("flex-attention", "flash-attn", DIRECT)]


def dense(query, key, value, left):
    """A window without sinks on [batch, length, heads, dim], and the log-sum-exp [batch, heads, length]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    behind = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    scores = scores.masked_fill((behind < 0) | ((behind > left) & (left >= 0)), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1)


@pytest.fixture
def without_gpu(monkeypatch):
    """The peer that calls torch's kernels, with a dense stand-in for them."""

    def backward(gradient, query, key, value, out, lse, seed, offset, left):
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            again, its_lse = dense(*inputs, left)
        torch.testing.assert_close([again, its_lse], [out, lse])
        return torch.autograd.grad(again, inputs, gradient)

    state = torch.zeros(())
    monkeypatch.setattr(peers, "direct_forward", lambda q, k, v, left: (*dense(q, k, v, left), state, state))
    monkeypatch.setattr(peers, "direct_backward", backward)
    monkeypatch.setitem(PEERS, DIRECT, lambda span, query, key, backward: direct(span, query.shape[2]))


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
    with pytest.raises(UnableError, match="needs CUDA"):
        PEERS[DIRECT](Span.parse("window:8"), query, key, False)
    for text, length in (("block:8", 30), ("block:8x2", 32), ("full", 32)):
        with pytest.raises(UnableError, match=f"has no {text}"):
            direct(Span.parse(text), length)
    with pytest.raises(UnableError, match="GiB"):
        PEERS["hf-eager"](Span.parse("window:8"), torch.empty(1, 64, 10**6, 1, device="meta"), key, False)


@pytest.mark.parametrize(
    ("text", "computed"), [("window:16+4", "window:16"), ("window:40", "window:40"), ("block:12", "block:12")]
)
def test_the_kernel_called_directly_computes_the_window_or_block_that_it_says(without_gpu, text, computed):
    def heads(count):
        return torch.randn(2, 36, count, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()

    inputs = heads(4), heads(2), heads(2)
    attention, runs = PEERS[DIRECT](Span.parse(text), *inputs[:2], True)
    assert str(runs) == computed
    out, expected = attention(*inputs), attend(*inputs, runs, backend="reference")
    gradient = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)
    )


def test_attention_is_held_against_the_kernel_called_directly(without_gpu):
    spans = [Span.parse(text) for text in ("window:16+4", "block:16x2")]
    found = bench_attention(spans, [64], heads=2, kv_heads=1, head_dim=8, peers=["hf-sdpa", DIRECT], repeats=1)
    medians = {(row["pass"], row["name"]): row["median"] for row in found["results"]}
    for row in found["results"]:
        if row["span"] == "window:16+4":
            assert row["of_direct"] == medians[row["pass"], f"window:16+4, {DIRECT}"] / row["median"]
        else:
            assert row["of_direct"] is None
    assert all(row["difference"] < 1e-5 for row in found["results"] if row["peer"])
    assert [len(what) for why, what in found["left_out"].items() if "has no block:16x2" in why] == [2]


def test_attention_with_constant_sinks_is_timed_and_has_no_peers():
    spans = [Span.parse("window:16+sink"), UnitSpans((FullSpan(), Span.parse("block:16+sink")))]
    found = bench_attention(spans, [64], heads=2, kv_heads=2, head_dim=8, peers=["hf-sdpa"], repeats=1)
    assert {row["span"] for row in found["results"]} == {"full", "window:16+sink", "full,block:16+sink"}
    assert list(found["left_out"]) == ["hf-sdpa: it has no constant sinks"]


class Clock:
    """Calls that take so many seconds of a clock of their own."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds

        return run


def test_a_call_is_timed_until_its_rounds_reach_the_cap_and_what_prepares_it_is_not_timed(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {"slow": clock.call("slow", 5.0), "quick": clock.call("quick", 1.0)}
    found = compare_times(calls, 4, prepare={"slow": clock.call("prepare", 100.0)}, cap=6.0)
    assert found["slow"].seconds == (5.0, 5.0)
    assert found["quick"].seconds == (1.0,) * 4
    assert clock.log == ["prepare", "slow", "quick"] * 3 + ["quick"] * 2
    for cap in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MasformerError, match="cap must be above 0 seconds"):
            compare_times(calls, 1, cap=cap)


def test_calls_on_the_cpu_are_timed_there_though_there_is_a_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(str(device)))
    calls = {"call": lambda: sum(range(1000))}
    for short in (False, True):
        assert len(compare_times(calls, 2, short=short, device=torch.device("cpu"))["call"].seconds) == 2
    peak_memory(calls["call"], torch.device("cpu"))
    assert waited == []
    compare_times(calls, 1, device=torch.device("cuda:3"))
    assert set(waited) == {"cuda:3"}


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


@pytest.mark.parametrize("work", [forward_work, decode_work])
def test_rows_multiply_operations_and_cache_but_share_the_weights(work):
    model = tiny("llama")
    one, four = (work(model, PLAN, 40, 3, rows) for rows in (1, 4))
    weights = ModelShape.of(model.config).matmul_weights * 4 * (3 if work is decode_work else 1)
    assert four.flops == 4 * one.flops
    assert four.bytes - weights == 4 * (one.bytes - weights)


def test_decoding_runs_no_prompt_and_is_held_against_what_the_bytes_predict(monkeypatch):
    model = tiny("llama", sliding_window=None)
    lengths = []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape))
    rows = bench_decode(model, {"mixed": PLAN}, [64], new=2, batch=3, repeats=2)["results"]
    assert set(lengths) == {(3, 1)}
    by_name = {row["name"]: row for row in rows}
    mixed, full = by_name["mixed"], by_name["all full, masformer"]
    assert mixed["over_full"] == full["median"] / mixed["median"]
    assert mixed["ideal_bytes"] == full["bytes"] / mixed["bytes"] > 1 == full["ideal_bytes"]
    assert mixed["share_bytes"] == mixed["over_full"] / mixed["ideal_bytes"]
    assert mixed["tokens_per_second"] == 3 * 2 / mixed["median"]


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_a_cache_filled_at_random_is_like_one_after_a_prompt(kind):
    model = tiny(kind, **({} if kind == "gpt_neo" else {"sliding_window": None}))
    for variant in variants(model, {"mixed": PLAN}):
        variant.apply("auto")
        filled, after = filled_cache(variant, 50, 60, 2), variant.make_cache(60)
        variant.run(random_tokens(model, 50, 2), after)
        assert int(filled.get_seq_length()) == int(after.get_seq_length()) == 50
        for mine, other in zip(filled.layers, after.layers, strict=True):
            assert (mine.keys.shape, mine.values.dtype) == (other.keys.shape, other.values.dtype)
        token = random_tokens(model, 1, 2)
        assert variant.run(token, filled).shape == variant.run(token, after).shape


@pytest.mark.parametrize("bench", [bench_train, bench_eval])
def test_layers_are_compiled_where_that_is_asked_for(monkeypatch, bench):
    compiled = []
    for name in ("compile_layers", "compile_loss") if bench is bench_train else ("compile_layers",):
        monkeypatch.setattr(f"{bench.__module__}.{name}", compiled.append)
    model, options = tiny("llama"), {} if bench is bench_train else {"tokens": 32}
    for asked in (False, True):
        bench(model, {"mixed": PLAN}, [16], repeats=1, compiled=asked, **options)
        assert compiled == [model] * asked * (2 if bench is bench_train else 1)


def test_evaluation_is_timed_on_as_many_tokens_as_are_asked_for():
    rows = bench_eval(tiny("llama"), {"mixed": PLAN}, [16, 48], tokens=100, repeats=1)["results"]
    assert [(row["length"], row["name"], row["documents"]) for row in rows] == [
        (16, "mixed", 6), (16, "all full, masformer", 6), (48, "mixed", 2), (48, "all full, masformer", 2),
    ]  # fmt: skip
    assert all(row["tokens_per_second"] == row["length"] * row["documents"] / row["median"] for row in rows)
    assert rows[2]["ideal"] > 1 == rows[3]["ideal"]


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


def test_training_steps_run_in_the_precision_and_the_chunks_of_a_recipe(monkeypatch):
    chunks, dtypes = [], []
    monkeypatch.setattr("masformer.benchmarks.training.use_chunked_loss", lambda model, chunk: chunks.append(chunk))
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    for precision in ("float32", "bfloat16"):
        rows = bench_train(
            model, {"mixed": PLAN}, [24], batch=2, precision=precision, loss_chunk=7, repeats=1, peers=False
        )
        assert set(dtypes) == {getattr(torch, precision)}
        assert all(row["tokens_per_second"] == 48 / row["median"] for row in rows["results"])
        dtypes.clear()
    assert chunks == [7, 7]
    with pytest.raises(MasformerError, match="unknown precision 'float16'; allowed: float32, bfloat16"):
        bench_train(model, {"mixed": PLAN}, [24], precision="float16")


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


def test_spans_by_unit_are_timed_beside_their_parts():
    spans = [layer_span([FullSpan(), WindowSpan(8)])]
    found = bench_attention(spans, [64], heads=4, kv_heads=2, head_dim=8, peers=["hf-sdpa"], repeats=1)
    names = [(row["pass"], row["name"], row["ideal"]) for row in found["results"]]
    ideal = 64 * 65 / (64 * 65 / 2 + WindowSpan(8).visible_pairs(64))
    for pass_ in ("forward", "forward + backward"):
        assert (pass_, "full,window:8", pytest.approx(ideal)) in names
        assert (pass_, "full,window:8, its parts alone", pytest.approx(ideal)) in names
    with pytest.raises(MasformerError, match="2 spans are named for 3 KV heads; give one span, or one for each"):
        bench_attention(spans, [64], heads=3, kv_heads=3)
