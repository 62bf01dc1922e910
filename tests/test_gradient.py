"""Gains of units by gradients: against differences of losses, complete, by heads and layers, in every setting."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from masformer import AttentionPlan, FullSpan, MasformerError, WindowSpan, apply_plan
from masformer.models.bridge import add_sinks, attending_by
from masformer.models.sinks import named_sinks
from masformer.placement import gradient, search, summary
from masformer.placement.gradient import GainMeter
from masformer.placement.measure import Measurer
from masformer.placement.result import GradientWork
from masformer.placement.texts import Window, pair_windows
from masformer.spans import Span
from tiny import ARCHITECTURES, VOCABULARY, letter_tokenizer, tiny

LAYERS, HEADS, LENGTH = 4, 2, 40
LOCAL, FULL = WindowSpan(5, sinks=1), FullSpan()
ALL = AttentionPlan.uniform(LAYERS, FULL)


def sharp(kind="llama", **changes):
    """A tiny model in float64 whose attention is far from even, so that spans matter."""
    model = tiny(kind, **changes).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(6)
    return model


def window(seed=0, length=LENGTH):
    torch.manual_seed(seed)
    return Window(tuple(torch.randint(3, VOCABULARY, (length + 1,)).tolist()), length - length // 2)


WINDOWS = (window(),)


def gains(model, criterion="tail", windows=WINDOWS, wider=(FULL,), points=4, target=ALL, journal=None, **options):
    meter = GainMeter(Measurer(model, journal=journal, kl=criterion == "kl", **options), LOCAL, wider)
    return meter.gains(criterion, list(windows), target, points)


def losses(model, plans, windows=WINDOWS, kl=False):
    rows = Measurer(model, kl=kl).scores(plans, list(windows))
    return [np.mean([score.kl if kl else score.nll for score in row]) for row in rows]


def blended(model, shares, one):
    """The loss where each unit's attention is its share of the way from local to full."""
    from masformer.attention import attend

    def attention(layer, query, key, value, span, **options):
        near, far = (attend(query, key, value, each, **options) for each in (LOCAL, FULL))
        share = torch.tensor(shares[layer], dtype=torch.float64).repeat_interleave(query.shape[1] // len(shares[layer]))
        return near + share[:, None, None] * (far - near)

    with attending_by(model, attention):
        return losses_of(model, one)


@torch.no_grad()
def losses_of(model, one):
    tokens = torch.tensor([one.tokens])
    logits = model(tokens[:, :-1], use_cache=False).logits[0, -one.scored :]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, -one.scored :]))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neo"])
def test_gains_are_the_slopes_of_the_loss(kind):
    """At one point, half-way: each unit moved alone by a little, up and down."""
    model, one = sharp(kind), window()
    step, near = (1e-5, 1e-5) if kind.startswith("gpt") else (2e-3, 5e-3)  # the others round norms to float32
    found = gains(apply_plan(model, ALL), points=1)[0]
    heads = found.shape[1]
    for unit in np.ndindex(found.shape):
        ends = []
        for sign in (1, -1):
            shares = np.full(found.shape, 0.5)
            shares[unit] += sign * step
            ends.append(blended(model, shares.tolist(), one))
        assert found[unit] == pytest.approx(-(ends[0] - ends[1]) / (2 * step), rel=near, abs=1e-3 * near)
    assert found.shape == (LAYERS, heads)
    assert not np.allclose(found, 0, atol=1e-4)


def test_at_the_end_of_a_path_gains_are_the_slopes_at_the_plan():
    model, one, step = sharp(), window(), 2e-3
    moved = {(1, 0): FULL, (3, 1): FULL, (2, 0): FULL, (2, 1): FULL}
    target = AttentionPlan.of_units(LAYERS, HEADS, moved, local=LOCAL)
    found = gains(model, target=target, points=None)[0]
    for unit in np.ndindex(found.shape):
        ends = []
        for sign in (1, -1):
            shares = np.zeros(found.shape)
            shares[tuple(np.transpose([*moved]))] = 1
            shares[unit] += sign * step
            ends.append(blended(model, shares.tolist(), one))
        assert found[unit] == pytest.approx(-(ends[0] - ends[1]) / (2 * step), rel=5e-3, abs=5e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "gpt_neo"])
@pytest.mark.parametrize("mixed", [False, True])
def test_of_a_question_gains_are_the_slopes_after_a_text_that_was_read_under_the_plan(monkeypatch, kind, mixed):
    """Held against whole passes, in which the positions of the text have the plan's own attention."""
    from masformer.attention import attend

    monkeypatch.setattr(gradient, "QUESTION", 6)
    model, (one,) = sharp(kind), WINDOWS
    one = replace(one, scored=4)
    read = LENGTH - 4 - 6
    step, near = (1e-5, 1e-5) if kind.startswith("gpt") else (2e-3, 5e-3)
    units = gains(model, points=1)[0].shape
    moved = dict.fromkeys([(1, 0), (3, units[1] - 1), (2, 0)] if mixed else np.ndindex(units), FULL)
    target = AttentionPlan.of_units(LAYERS, units[1], moved, local=LOCAL) if mixed else ALL
    found = GainMeter(Measurer(model), LOCAL, (FULL,)).gains("retrieval", [one], target, None, asked=True)[0]

    def loss(shares):
        def attention(layer, query, key, value, span, **options):
            near, far = (attend(query, key, value, each, **options) for each in (LOCAL, FULL))
            every = query.shape[1] // units[1]
            at = [torch.tensor(each[layer]).double().repeat_interleave(every) for each in (ends, shares)]
            share = torch.cat([at[0][:, None].expand(-1, read), at[1][:, None].expand(-1, LENGTH - read)], 1)[..., None]
            return near + share * (far - near)

        with attending_by(model, attention):
            return losses_of(model, one)

    ends = np.zeros(units)
    for unit in moved:
        ends[unit] = 1
    for unit in np.ndindex(units):
        both = []
        for sign in (1, -1):
            shares = ends.copy()
            shares[unit] += sign * step
            both.append(loss(shares))
        assert found[unit] == pytest.approx(-(both[0] - both[1]) / (2 * step), rel=near, abs=1e-3 * near)
    assert not np.allclose(found, 0, atol=1e-5)
    whole = gains(model, windows=[one], target=target, points=None)[0]
    assert not np.allclose(found, whole, rtol=0.1), "what the text itself would gain is no part of it"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_question_after_a_text_that_was_read_loses_what_the_whole_text_does(monkeypatch, kind):
    monkeypatch.setattr(gradient, "QUESTION", 6)
    meter, one = GainMeter(Measurer(sharp(kind)), LOCAL, (FULL,)), replace(window(), scored=4)
    asked, whole = (next(meter._slopes("retrieval", one, ALL, None, each)) for each in (True, False))
    assert asked.loss == pytest.approx(whole.loss, rel=1e-6)
    assert meter.passes == 2, "each a pass of its own"


def test_a_question_in_a_text_whose_positions_depend_on_its_length_is_measured_whole():
    model = sharp(rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0})
    model.config.max_position_embeddings = LENGTH // 2
    meter, one = GainMeter(Measurer(model), LOCAL, (FULL,)), replace(window(), scored=4)
    assert meter._read(one) == 0
    meter.gains("retrieval", [one], ALL, None, asked=True)


@pytest.mark.parametrize("criterion", ["tail", "kl"])
def test_gains_add_up_to_the_whole_difference_as_points_grow(criterion):
    model = sharp()
    local, full = losses(model, [AttentionPlan.uniform(LAYERS, LOCAL), ALL], kl=criterion == "kl")
    errors = [abs(gains(model, criterion, points=points).sum() - (local - full)) for points in (2, 8, 64)]
    assert errors[2] < 1e-3 * abs(local - full)
    assert errors[2] < errors[0]


@pytest.mark.parametrize("spans", [("window:5+sink", "full"), ("window:5", "window:5+sink")])
def test_constant_sinks_are_at_either_end_of_a_path(spans):
    model, (local, wider) = sharp(), map(Span.parse, spans)
    plans = [AttentionPlan.uniform(LAYERS, span) for span in (local, wider)]
    sinks = plans[spans.index("window:5+sink")]
    add_sinks(model, sinks)
    for _, weight in named_sinks(model):
        weight.data.normal_(generator=torch.Generator().manual_seed(1))
    before, after = losses(model, plans)
    found = GainMeter(Measurer(model), local, (wider,)).gains("tail", list(WINDOWS), plans[1], 16)
    assert abs(before - after) > 1e-3
    assert found.sum() == pytest.approx(before - after, rel=0.05)
    assert all(weight.grad is None and weight.requires_grad for _, weight in named_sinks(apply_plan(model, sinks)))


def test_the_path_to_a_plan_moves_its_units_alone():
    model = sharp()
    target = AttentionPlan.of_units(
        LAYERS, HEADS, {(1, 0): FULL, (3, 1): FULL, (2, 0): FULL, (2, 1): FULL}, local=LOCAL
    )
    found, moved = gains(model, points=64, target=target)[0], [(1, 0), (2, 0), (2, 1), (3, 1)]
    shares = np.zeros((LAYERS, HEADS))
    start = blended(model, shares.tolist(), window())
    for unit in moved:
        shares[unit] = 1
    fall = start - blended(model, shares.tolist(), window())
    assert sum(found[unit] for unit in moved) == pytest.approx(fall, rel=1e-3)
    assert found.sum() != pytest.approx(fall, rel=1e-3)


def test_layers_that_run_again_and_compiled_ones_change_nothing(monkeypatch):
    model = sharp()
    expected = gains(model)
    frozen = [weight.requires_grad for weight in model.parameters()]
    monkeypatch.setattr("masformer.placement.gradient.KEPT", 0)
    runs = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *given: runs.append(1))
    assert np.allclose(gains(model), expected, rtol=1e-12)
    assert len(runs) == 2 * 4
    for layer in model.model.layers:
        layer._compiled_call_impl = None if layer is model.model.layers[0] else (lambda *given: 1 / 0)
    assert np.allclose(gains(model), expected, rtol=1e-12)
    assert [weight.requires_grad for weight in model.parameters()] == frozen
    assert all(weight.grad is None for weight in model.parameters())
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_memory_that_is_not_enough_is_tried_again_and_then_named(monkeypatch):
    model = sharp()
    expected, slope, tries = gains(model), GainMeter._slope, []

    def short(self, *given, again):
        tries.append(again)
        if not again:
            raise torch.OutOfMemoryError
        return slope(self, *given, again=again)

    monkeypatch.setattr(GainMeter, "_slope", short)
    assert np.allclose(gains(model), expected)
    assert tries == [False, True, True, True, True]
    monkeypatch.setattr(GainMeter, "_slope", lambda *given, again: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(MasformerError, match=r"window of 40 tokens does not fit"):
        gains(model)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_and_bfloat16(kind):
    exact = gains(tiny(kind))
    assert np.isfinite(exact).all()
    assert exact.shape == (1, LAYERS, 2 if kind not in ("gpt_neox", "gpt2", "gpt_neo") else 4)
    for coarse in (gains(tiny(kind).bfloat16()), gains(tiny(kind), precision="bfloat16")):
        assert np.isfinite(coarse).all()
        assert np.corrcoef(coarse.ravel(), exact.ravel())[0, 1] > 0.8


def test_further_spans_come_from_the_same_passes():
    model, window_20 = sharp(), WindowSpan(20, sinks=1)
    both = gains(model, wider=(window_20, FULL))
    assert np.allclose(both[1], gains(model)[0])
    assert not np.allclose(both[0], both[1])
    nothing = gains(model, wider=(WindowSpan(LENGTH), FULL))
    assert np.allclose(nothing[0], nothing[1]), "a window over all there is"


def test_windows_are_means_and_what_is_known_is_not_run_again(tmp_path):
    model, windows = sharp(), [window(0), window(1), window(2, 30)]
    apart = [gains(model, windows=[each]) for each in windows]
    journal = tmp_path / "journal.jsonl"
    meter = GainMeter(Measurer(model, journal=journal), LOCAL, (FULL,))
    together = meter.gains("tail", windows, ALL, 4)
    assert np.allclose(together, np.mean(apart, axis=0))
    assert (meter.passes, meter.recalled) == (12, 0)
    again = GainMeter(Measurer(model, journal=journal), LOCAL, (FULL,))
    assert np.array_equal(again.gains("tail", windows, ALL, 4), together)
    assert (again.passes, again.recalled) == (0, 12)
    other = GainMeter(Measurer(model, journal=journal), WindowSpan(6), (FULL,))
    other.gains("tail", windows[:1], ALL, 4)
    assert other.passes == 4


def test_damaged_weights_are_named():
    model = sharp()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(MasformerError, match="not finite"):
        gains(model)


TEXTS = [
    "".join(chr(97 + (7 * i * i + seed * i) % 26) + (" " if i % 5 == 4 else "") for i in range(400))
    for seed in range(4)
]
TOKENIZER = letter_tokenizer(eos_token="!")
SETTING = {"length": 64, "windows": 2, "held_out_windows": 2, "random_placements": 3, "rounds": 1, "points": 2}


def letters():
    return sharp(vocab_size=256).float()


def test_layers_are_chosen_by_the_sums_of_their_heads():
    found = search(letters(), TOKENIZER, TEXTS, 2, LOCAL, criteria="tail", **SETTING)
    assert (found.by, found.method, found.gradient.passes) == ("layers", "gradient", 4)
    assert len(found.evidence) == 1
    assert len(found.plan.full_layers) == 2
    best = sorted(range(LAYERS), key=lambda layer: -found.evidence[0].values[layer])[:2]
    assert found.plan.full_layers == tuple(sorted(best))
    (check,) = found.gradient.completeness
    assert check.criterion == "tail"
    assert check.gains == pytest.approx(sum(found.evidence[0].values), abs=1e-5)
    assert " recalled; 4 passes for gains; " in summary(found)


def test_the_work_of_two_ends_shares_no_prefixes():
    found = search(letters(), TOKENIZER, TEXTS, 2, LOCAL, criteria="tail", length=64, windows=2, held_out_windows=0)
    assert "4 measurements, 0 recalled; 4 passes for gains; " in summary(found)
    assert "shared prefixes" not in summary(found)


@pytest.mark.parametrize(
    ("budget", "spans"), [("55%", ()), ("60%", ("full", "window:20+1")), ("8KiB", ("full",)), (3, ())]
)
def test_budgets_are_kept(budget, spans):
    from masformer.placement.budget import Budget, Purse

    model = letters()
    found = search(model, TOKENIZER, TEXTS, budget, LOCAL, spans=spans, criteria="tail", **SETTING)
    purse = Purse(Budget.parse(str(budget)), model, LOCAL, SETTING["length"])
    spent = sum(map(purse.price, found.plan.spans))
    assert spent <= purse.limit
    assert all(score.plan != str(found.plan) for score in found.random())


def test_each_criterion_has_points_of_its_own():
    pairs = [(f"say {word}: {word} {word}", f" {word}") for word in ("abc", "bcd", "cde", "def")]
    options = SETTING | {"criteria": "tail,retrieval", "pairs": pairs}
    by_default = search(letters(), TOKENIZER, TEXTS, 2, LOCAL, **(options | {"points": None})).gradient
    asked = search(letters(), TOKENIZER, TEXTS, 2, LOCAL, **(options | {"points": 3})).gradient
    assert (by_default.points, by_default.passes) == ({"tail": 2, "retrieval": 4}, 2 * 2 + 2 * 4)
    assert (asked.points, asked.passes) == ({"tail": 3, "retrieval": 3}, 2 * 3 + 2 * 3)
    older = asdict(asked) | {"points": 3}
    del older["ends"]
    assert GradientWork.from_dict(older) == asked
    with_ends = search(letters(), TOKENIZER, TEXTS, 2, LOCAL, **(options | {"points": 3, "ends": True})).gradient
    assert (with_ends.ends, with_ends.passes) == (True, asked.passes + 2), "one more for each prompt"
    assert with_ends.completeness == asked.completeness


@pytest.mark.parametrize(("ends", "chosen"), [(True, "full@0:1,2:0"), (False, "full@0:1,1:0")])
def test_with_ends_a_unit_counts_as_the_larger_of_its_shares_along_the_path_and_at_its_end(monkeypatch, ends, chosen):
    """One head fetches: it shows along the path. Another tells keys apart: it shows at the end alone."""
    along, end = np.zeros((2, 1, LAYERS, 2))
    along[0, 0, 1], along[0, 1, 0], along[0, 2, 0] = 6.0, 3.0, 1.0
    end[0, 2, 0], end[0, 1, 0] = 0.02, 0.005
    calls = []

    def gains(self, name, windows, target, points, *, asked=False):
        calls.append((name, target, points, asked))
        return end if points is None else along

    monkeypatch.setattr(GainMeter, "gains", gains)
    options = SETTING | {"pairs": [("say abc: abc", " abc"), ("say bcd: bcd", " bcd")], "ends": ends}
    found = search(letters(), TOKENIZER, TEXTS, 2, LOCAL, criteria="retrieval", by="heads", **options)
    assert str(found.plan).split(";")[0] == chosen
    assert calls == [("retrieval", ALL, 2, False), ("retrieval", ALL, None, True)][: 1 + ends]
    (check,) = found.gradient.completeness
    assert check.gains == 10, "the sum is of the path, which is complete"


def test_pairs_of_your_own_take_the_place_of_probes():
    pairs = [(f"say {word}: {word} {word}", f" {word}") for word in ("abc", "bcd", "cde", "def", "efg")]
    options = SETTING | {"criteria": "retrieval", "pairs": pairs}
    found = search(letters(), TOKENIZER, TEXTS, 2, LOCAL, **options)
    assert found.probes == 2
    windows = pair_windows(TOKENIZER, pairs, 64)
    assert [each.scored for each in windows] == [4] * 5
    assert found.score("all full").retrieval_nll > 0
    for changes, message in (
        ({"pairs": pairs[:1]}, "pairs must be at least 2"),
        ({"probes": 3}, "3 pairs to choose by and as many to report on are asked for, of 5"),
        ({"pairs": [*pairs[:3], ("x", " ")]}, "pair 2 has a blank"),
        ({"pairs": [("x" * 70, "y"), *pairs]}, "pair 1 takes 70 tokens; allowed: the length, 64"),
        ({"criteria": "tail"}, "pairs do nothing without the criterion retrieval"),
        ({"criteria": "tail", "pairs": None, "ends": True}, "ends do nothing without the criterion retrieval"),
        ({"chat": False}, "the form of probes .* does nothing with pairs"),
        ({"criteria": "tail", "pairs": None, "chat": False}, "the form of probes .* does nothing without"),
    ):
        with pytest.raises(MasformerError, match=message):
            search(letters(), TOKENIZER, TEXTS, 2, LOCAL, **(options | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "greedy", "by": "heads", "rounds": None, "points": None},
            "greedy measures layers; a search by heads",
        ),
        ({"method": "greedy", "points": None}, "rounds are of the method gradient; greedy has none"),
        ({"method": "joint", "rounds": None, "points": None, "ends": True}, "ends are of the method gradient; joint"),
        ({"by": "neurons"}, "a search is by layers or heads"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"points": 101}, "points must be"),
        ({"spans": ["window:4"]}, "window:4 is not wider than window:5\\+1"),
        ({"spans": [LOCAL]}, "there is no span wider than window:5\\+1"),
        ({"by": "heads", "budget": 9}, "9 full KV heads are more than the model's 8 KV heads"),
        ({"by": "heads", "budget": 8}, "lets every KV head be full"),
        ({"by": "heads", "budget": 0}, "allows no full KV head"),
    ],
)
def test_wrong_values_are_one_line(changes, message):
    options = {"budget": 2, "local": LOCAL, "criteria": "tail"} | SETTING | changes
    with pytest.raises(MasformerError, match=message):
        search(letters(), TOKENIZER, TEXTS, **options)
