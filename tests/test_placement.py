import itertools
import json
import math
import random
import re

import pytest
import torch
import yaml
from matplotlib.image import imread
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from masformer import AttentionPlan, BlockSpan, FullSpan, MasformerError, WindowSpan, apply_plan
from masformer.cost import ModelShape, cost
from masformer.evaluation.perplexity import perplexity
from masformer.placement import (
    Budget,
    Evidence,
    SearchResult,
    parse_criteria,
    placement_table,
    plot_search,
    search_layers,
    summary,
)
from masformer.placement.budget import Purse
from masformer.placement.choice import joint, shuffled
from masformer.placement.measure import Journal, Measurer, PrefixPasses, model_fingerprint
from masformer.placement.texts import Window, retrieval_probes, split_windows, text_windows
from masformer.plan import SCHEMA
from masformer.records import read_record, write_record
from masformer.reports import build_report
from tiny import ARCHITECTURES, PLAN, VOCABULARY, letter_tokenizer, random_plan, tiny

KEYS, NAMED, VALUES, FILLER = [*range(6), *range(12, 18)], [*range(6, 12), *range(18, 24)], range(24, 32), range(32, 40)
TOKENS = 40
LENGTH, LAYERS = 96, 6
LOCAL = WindowSpan(8, sinks=2)


def induction_model(first=2, second=4, heads=1, at=(0, 0)):
    """A Llama of six layers in which exactly two carry information over long ranges, built by hand.

    Layer 0 tells each token which one came before it: its query and key are the same for all tokens, and rotary
    positions turn the product largest at distance 1, well within a window. Layer `first` lets the second occurrence of
    a key 0..11 find the token after the first occurrence, layer `second` does so for the keys 12..23: both match token
    identities in dimensions that hardly rotate, so that distance does not matter. The other layers only add
    noise, and so do of several heads those that are not `at` these two places.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=3 * TOKENS + 4,
        intermediate_size=4,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=128,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    own, before, out, one = 0, TOKENS, 2 * TOKENS, 3 * TOKENS
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.zero_()
        model.model.embed_tokens.weight[:, own : own + TOKENS] = torch.eye(TOKENS)
        model.model.embed_tokens.weight[:, one] = 1
        model.lm_head.weight[:, out : out + TOKENS] = 3 * torch.eye(TOKENS)
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for head in range(heads):
                attention.v_proj.weight[128 * head :][:TOKENS, own : own + TOKENS] = torch.eye(TOKENS)
            attention.o_proj.weight.copy_(1e-3 * torch.randn_like(attention.o_proj.weight))
            here = 128 * (at[index == second] if index in (first, second) else 0)
            query, key, out_of = attention.q_proj.weight[here:], attention.k_proj.weight[here:], attention.o_proj.weight
            if index == 0:
                angles = 1e8 ** (-torch.arange(24) / 64)
                query[:24, one] = 8
                key[:24, one] = angles.cos()
                key[64:88, one] = angles.sin()
                out_of[before : before + TOKENS, :TOKENS] = torch.eye(TOKENS)
            elif index in (first, second):
                for slot, token in enumerate(range(0, 12) if index == first else range(12, 24)):
                    query[50 + slot, own + token] = 100
                    key[50 + slot, before + token] = 1
                out_of[out : out + TOKENS, here : here + TOKENS] = torch.eye(TOKENS)
    return model


def pairs_document(seed, windows=1):
    """In each window, 12 pairs of a key and a value far at the front, filler, and the same pairs again at the end."""
    choose = random.Random(seed)
    tokens = []
    for _ in range(windows):
        pairs = [(key, choose.choice(VALUES)) for key in choose.sample(KEYS, len(KEYS))]
        again = choose.sample(pairs, len(pairs))
        filler = [choose.choice(FILLER) for _ in range(LENGTH - 4 * len(KEYS))]
        tokens += [*itertools.chain(*pairs), *filler, *itertools.chain(*again)]
    return [*tokens, FILLER[0]]


class Words:
    """A tokenizer that keeps keys asked for (those that no document has), numbers (as values), full stops, filler."""

    chat_template = None
    eos_token_id = None

    def __init__(self):
        self.names = {}

    def __call__(self, text, add_special_tokens=True, return_special_tokens_mask=False, verbose=True):
        asked = r"\w+-\w+(?= (?:is:|mentioned in the provided text is))"
        tokens = [self.token(word) for word in re.findall(rf"{asked}|\d+|\.|filler", text)]
        return {"input_ids": tokens, "special_tokens_mask": [0] * len(tokens)}

    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(["filler filler."] * len(tokens))

    def token(self, word):
        if "-" in word:
            return NAMED[self.names.setdefault(word, len(self.names) % len(NAMED))]
        return VALUES[int(word) % len(VALUES)] if word.isdigit() else FILLER[-1]


DOCUMENTS = [pairs_document(seed) for seed in range(6)]
SETTING = {"length": LENGTH, "prefix": None, "windows": 2, "held_out_windows": 3, "random_placements": 8}


def search(model, budget=2, local=LOCAL, documents=DOCUMENTS, **changes):
    options = SETTING | {"criteria": "tail"} | changes
    if "retrieval" not in options["criteria"]:
        options.pop("probes", None)
    return search_layers(model, documents, budget, local, **options)


@pytest.mark.parametrize("known", [(2, 4), (1, 5)])
@pytest.mark.parametrize("method", ["gradient", "sensitivity", "greedy", "joint"])
@pytest.mark.parametrize("criteria", ["tail", "kl", "retrieval", "tail:1,kl:0.5,retrieval:2"])
def test_every_method_finds_the_layers_that_carry_long_range_information(method, known, criteria):
    model = induction_model(*known)
    result = search(model, method=method, criteria=criteria, tokenizer=Words(), probes=8, random_placements=3)
    assert result.plan == AttentionPlan.mixed(LAYERS, placement=known, local=LOCAL)
    assert model.config.masformer == result.plan.to_dict()
    assert result.rank() == 1
    found, full, local = (result.score(name) for name in ("found", "all full", "all local"))
    assert found.tail_nll == pytest.approx(full.tail_nll, abs=0.02)
    assert local.tail_nll > full.tail_nll + 0.5
    assert all(score.criterion > found.criterion + 0.1 for score in result.random())
    if "retrieval" in criteria:
        assert (found.retrieval_accuracy, full.retrieval_accuracy) == (1, 1)
        assert local.retrieval_accuracy < 0.6
    if "kl" in criteria:
        assert full.kl == 0
        assert found.kl < 0.01 < 0.1 < local.kl


@pytest.mark.parametrize("at", [(0, 1), (3, 3), (2, 0)])
@pytest.mark.parametrize("criteria", ["tail", "kl", "retrieval", "tail,retrieval"])
def test_exactly_the_heads_that_carry_long_range_information_are_found(at, criteria):
    model = induction_model(2, 4, heads=4, at=at)
    result = search(
        model, by="heads", method="gradient", criteria=criteria, tokenizer=Words(), probes=6, random_placements=3
    )
    known = {(2, at[0]): FullSpan(), (4, at[1]): FullSpan()}
    assert result.plan == AttentionPlan.of_units(LAYERS, 4, known, local=LOCAL)
    assert (result.by, result.rank(), result.budget) == ("heads", 1, "2 full KV heads")
    assert result.score("found").tail_nll == pytest.approx(result.score("all full").tail_nll, abs=0.05)
    assert {name.split()[0] for name in (score.name for score in result.placements["held-out"])} == {
        "found", "all", "random"
    }, "no rule costs as little as two heads"  # fmt: skip
    for check in result.gradient.completeness:
        assert check.measured > 0.5
    assert [row.name for row in result.evidence] == [f"full, head {head}" for head in range(4)]
    if criteria == "tail":
        once = {"method": "gradient", "rounds": 1, "random_placements": 0}
        layers, heads = (search(induction_model(2, 4, 4, at), by=by, **once) for by in ("layers", "heads"))
        sums = [sum(row.values[layer] for row in heads.evidence) for layer in range(LAYERS)]
        assert layers.evidence[0].values == pytest.approx(sums, abs=1e-5)
        assert layers.plan.full_layers == (2, 4)


def test_a_search_by_heads_goes_on_and_is_drawn(tmp_path):
    options = {"by": "heads", "method": "gradient", "journal": tmp_path / "journal", "criteria": "tail"}
    first = search(induction_model(heads=2), 5, **options)
    again = search(induction_model(heads=2), 5, **options)
    assert (again, measured(again)) == (first, 0)
    assert "middle" in [score.name for score in first.placements["held-out"]]
    plot_search(first, tmp_path / "map.png")
    assert imread(tmp_path / "map.png").shape[0] > 200
    first.save(tmp_path / "plan.yaml")
    assert AttentionPlan.load(tmp_path / "plan.yaml") == first.plan
    write_record(tmp_path / "s.json", ["masformer", "search"], "0", **first.to_dict())
    text = build_report([read_record(tmp_path / "s.json")], "by heads").to_markdown()
    (complete,) = first.gradient.completeness
    assert f"| tail | {complete.gains:.4f} | {complete.measured:.4f} |" in text
    assert f"plan: {first.plan}" in text
    assert SearchResult.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    spans = search(induction_model(heads=2), "45%", **options, spans=["full", "window:30"])
    costs = [
        sum(each.visible_pairs(LENGTH) for layer in plan.units(2) for each in layer)
        for plan in (spans.plan, AttentionPlan.uniform(LAYERS, FullSpan()))
    ]
    assert costs[0] <= 0.45 * costs[1]


def test_a_plan_is_found_and_held_against_nothing_where_no_window_is_held_out(tmp_path):
    options = {"by": "heads", "criteria": "tail", "method": "gradient", "random_placements": None}
    found = search(induction_model(heads=2), 5, **options, held_out_windows=0)
    assert found.plan == search(induction_model(heads=2), 5, **options).plan
    assert found.placements == {}
    plot_search(found, tmp_path / "map.png")
    assert f"found: {found.plan}" in summary(found)
    assert "rank" not in summary(found)


def test_greedy_adds_one_layer_after_the_other():
    result = search(induction_model(), method="greedy")
    first, second = result.evidence
    order = [max(range(LAYERS), key=lambda layer: row.values[layer] or 0) for row in result.evidence]
    assert sorted(order) == [2, 4]
    assert first.name == "step 1"
    assert None not in first.values
    assert [layer for layer, value in enumerate(second.values) if value is None] == [order[0]]
    assert all(abs(value) < 0.02 for layer, value in enumerate(first.values) if layer not in order)


def test_joint_takes_the_smallest_span_that_is_enough():
    """What layer 2 looks up is far back, what layer 4 looks up is at most 44 tokens away."""
    choose = random.Random(0)
    documents = []
    for _ in range(6):
        far, near = ([(key, choose.choice(VALUES)) for key in half] for half in (KEYS[:6], KEYS[6:]))
        filler = [choose.choice(FILLER) for _ in range(LENGTH - 47)]
        again = choose.sample(far + near, 12)
        documents.append([*sum(far, ()), *filler[8:], *sum(near, ()), *filler[:8], *sum(again, ())])
    middle = WindowSpan(50)
    result = search(induction_model(), "43%", documents=documents, method="joint", spans=[FullSpan(), middle, LOCAL])
    assert [row.name for row in result.evidence] == [str(middle), str(LOCAL)]
    assert result.plan == AttentionPlan((LOCAL, LOCAL, FullSpan(), LOCAL, middle, LOCAL))
    assert result.rank() == 1
    assert result.score("found").tail_nll < result.score("all full").tail_nll + 0.02


@pytest.mark.parametrize("seed", range(20))
def test_joint_is_the_best_of_all_choices(seed):
    choose = random.Random(seed)
    choices = [FullSpan(), WindowSpan(20), LOCAL, BlockSpan(5)][: choose.choice([2, 3, 4])]
    purse = Purse(Budget(flops_share=choose.uniform(0.4, 0.9)), induction_model(), LOCAL, LENGTH)
    evidence = [
        Evidence(str(span), tuple(round(choose.uniform(-0.1, 1), 6) for _ in range(LAYERS))) for span in choices[1:]
    ]

    def loss(spans):
        rows = {row.name: row.values for row in evidence}
        return sum(rows[str(span)][layer] for layer, span in enumerate(spans) if span != FullSpan())

    allowed = [
        spans for spans in itertools.product(choices, repeat=LAYERS) if sum(map(purse.price, spans)) <= purse.limit
    ]
    losses = [[0.0] * LAYERS, *(row.values for row in evidence)]
    plan = joint(losses, choices, purse)
    assert plan.spans in allowed
    assert loss(plan) == pytest.approx(min(map(loss, allowed)), abs=1e-9)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_shared_prefixes_change_nothing(kind):
    model = tiny(kind)
    full = AttentionPlan.uniform(4, FullSpan())
    local = PLAN[0]
    plans = [full, PLAN, *(random_plan(seed) for seed in range(3)), AttentionPlan.uniform(4, local)]
    plans += [AttentionPlan.mixed(4, placement=layers, local=local) for layers in ([0], [0, 2], [1, 2], [0, 1, 3])]
    torch.manual_seed(1)
    documents = torch.randint(3, VOCABULARY, (3, 24)).tolist()
    windows = [Window((1, *document), 12) for document in documents]
    measurer = Measurer(model, kl=True)
    scores = measurer.scores(plans, windows)
    assert measurer.passes.layers_run < 0.8 * measurer.unshared
    assert measurer.unshared == len(plans) * len(windows) * 4
    for plan, row in zip(plans, scores, strict=True):
        apply_plan(model, plan)
        whole = perplexity(model, documents, 24, prefix=1)
        assert sum(score.nll for score in row) / 3 == pytest.approx(whole.second_half.nll, rel=1e-6)
        assert row[0].kl == pytest.approx(divergence(model, full, plan, windows[0]), abs=1e-6)
    assert all(score.kl == 0 for score in scores[0])


@torch.no_grad()
def divergence(model, full, plan, window):
    inputs = torch.tensor([window.tokens[:-1]])
    wanted, given = (
        apply_plan(model, each)(inputs).logits[0, -window.scored :].double().log_softmax(-1) for each in (full, plan)
    )
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_states_are_those_of_a_whole_pass_bit_for_bit(kind):
    model = tiny(kind)
    tokens = torch.randint(3, VOCABULARY, (2, 20))
    passes = PrefixPasses(model)
    passes.start(tokens)
    with torch.inference_mode():
        for seed in range(6):
            shared = passes.run(random_plan(seed)).last_hidden_state
            whole = apply_plan(model, random_plan(seed)).base_model(tokens, use_cache=False).last_hidden_state
            assert torch.equal(shared, whole)
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in passes.layers)


def test_layers_are_run_once_for_each_distinct_prefix():
    model = tiny("llama")
    full = AttentionPlan.uniform(4, FullSpan())
    plans = [full] + [AttentionPlan((*full[:layer], LOCAL, *full[layer + 1 :])) for layer in range(4)]
    measurer = Measurer(model)
    measurer.scores(plans, [Window(tuple(range(3, 30)), 5)])
    check = 1
    assert measurer.passes.layers_run == 4 + (4 + 3 + 2 + 1) + check
    assert measurer.unshared == 5 * 4


def test_layers_that_need_each_other_are_refused():
    model = tiny("llama")
    handed_over = []

    class First(type(model.model.layers[0])):
        def forward(self, *args, **kwargs):
            handed_over.append(0.1)
            return super().forward(*args, **kwargs)

    class Last(type(model.model.layers[0])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + handed_over.pop()

    model.model.layers[0].__class__, model.model.layers[3].__class__ = First, Last
    with pytest.raises(MasformerError, match=r"llama models cannot be run one by one: pop from empty list"):
        Measurer(model).scores([PLAN], [Window(tuple(range(3, 30)), 5)])
    handed_over.append(9)
    with pytest.raises(MasformerError, match=r"llama models cannot be run one by one: the last layer needs others"):
        Measurer(model).scores([PLAN], [Window(tuple(range(3, 30)), 5)])


@pytest.mark.parametrize("method", ["sensitivity", "greedy"])
def test_the_batch_size_changes_nothing(method):
    one, many = (search(induction_model(), method=method, batch_size=size, criteria="tail,kl") for size in (1, 3))
    assert one.plan == many.plan
    for row, other in zip(one.evidence, many.evidence, strict=True):
        for value, same in zip(row.values, other.values, strict=True):
            assert value == (None if same is None else pytest.approx(same, abs=3e-6))
    for score, same in zip(one.placements["held-out"], many.placements["held-out"], strict=True):
        assert (score.name, score.plan) == (same.name, same.plan)
        assert score.criterion == pytest.approx(same.criterion, abs=1e-5)


class Interrupted(Exception):
    pass


def measured(result):
    """Lines of the journal that a search wrote."""
    return result.work.measurements + (result.gradient.passes if result.gradient else 0)


@pytest.mark.parametrize("method", ["gradient", "sensitivity", "greedy", "joint"])
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_search_goes_on(method, torn, tmp_path):
    journal = tmp_path / "journal.jsonl"
    whole = search(induction_model(), method=method, criteria="tail,retrieval", tokenizer=Words(), probes=3)
    seen = []

    def stop_at(limit):
        def progress(stage, done, total):
            seen.append((stage, done, total))
            if done >= limit:
                raise Interrupted

        return progress

    def run(limit):
        return search(
            induction_model(),
            method=method,
            criteria="tail,retrieval",
            tokenizer=Words(),
            probes=3,
            journal=journal,
            progress=stop_at(limit),
        )

    for limit in (11, 40):
        with pytest.raises(Interrupted):
            run(limit)
    kept = len(journal.read_text().splitlines())
    assert kept == len(set(journal.read_text().splitlines()))
    if torn:
        with journal.open("a") as file:
            file.write('{"window": "half a li')
    seen.clear()
    result = run(math.inf)
    assert result == whole
    assert measured(result) == measured(whole) - kept
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({(line["window"], line.get("plan", line.get("path"))) for line in lines}) == len(lines)
    assert len(lines) == measured(whole)
    done = [each[1] for each in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2] == seen[0][2]
    assert list(dict.fromkeys(each[0] for each in seen)) == ["choosing", "held-out"]
    assert measured(run(math.inf)) == 0


def test_a_journal_serves_other_texts_models_and_criteria(tmp_path):
    journal = tmp_path / "journal.jsonl"
    first = search(induction_model(), journal=journal)
    wider = search(induction_model(), criteria="tail,kl", journal=journal)
    assert wider.work.measurements == first.work.measurements
    assert search(induction_model(), criteria="kl", journal=journal).work.measurements == 0
    assert search(induction_model(), journal=journal) == first
    other, fresh = (search(induction_model(1, 5), journal=path) for path in (journal, None))
    assert other == fresh
    assert other.work.measurements == fresh.work.measurements
    assert other.plan.full_layers == (1, 5)


def test_fingerprints_tell_models_apart_but_not_plans():
    one, same, changed = induction_model(), induction_model(), induction_model()
    changed.lm_head.weight.data[3, 0] += 1
    apply_plan(same, AttentionPlan.uniform(LAYERS, FullSpan()))
    before = model_fingerprint(same)
    apply_plan(same, AttentionPlan.uniform(LAYERS, LOCAL))
    assert model_fingerprint(same) == before == model_fingerprint(one)
    scaled = induction_model()
    scaled.model.layers[3].self_attn.v_proj.weight.data.mul_(2)
    assert model_fingerprint(scaled) != before
    assert model_fingerprint(induction_model(1, 5)) != before


@pytest.mark.parametrize("content", ["no journal", "{}\n", '{"window": 1}\n', "[1]\n", '{"plan": "full", "nll": 1}\n'])
def test_other_files_are_no_journals_and_stay_as_they_are(content, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(content)
    with pytest.raises(MasformerError, match=r"file\.jsonl"):
        Journal(path)
    assert path.read_text() == content
    with pytest.raises(MasformerError, match="cannot use the journal"):
        Journal(tmp_path / "missing" / "file.jsonl")


def test_windows_predict_each_token_of_the_second_halves_once():
    windows = text_windows(range(100, 131), 1, 10)
    assert [window.tokens[0] for window in windows] == [1, 109, 119]
    assert all(len(window.tokens) == 11 and window.scored == 5 for window in windows)
    assert windows[-1].tokens[-1] == 129
    assert text_windows(range(10), None, 10) == []
    assert len(text_windows(range(11), None, 10)) == 1


def test_held_out_windows_are_of_other_documents_where_there_are_any():
    documents = [text_windows(range(start, start + 100), None, 10) for start in range(0, 600, 100)]
    chosen, held_out, other = split_windows(documents, 2, 4)
    assert other
    assert [window.tokens[0] for window in chosen] == [0, 100]
    assert [window.tokens[0] for window in held_out] == [200, 300, 400, 500]
    chosen, held_out, other = split_windows(documents[:1], 3, 5)
    assert not other
    assert [window.tokens[0] for window in (*chosen, *held_out)] == [0, 10, 20, 40, 50, 60, 70, 80]
    with pytest.raises(MasformerError, match=r"hold 9 windows .* 5 \+ 5 held-out"):
        split_windows(documents[:1], 5, 5)


def test_one_document_is_enough():
    result = search(induction_model(), documents=[pairs_document(0, windows=5)])
    assert not result.other_documents
    assert result.plan.full_layers == (2, 4)


def test_probes_hold_what_they_ask_for_far_back():
    fillers = [Window(tuple(document[: LENGTH + 1]), 1) for document in DOCUMENTS[:2]]
    probes = retrieval_probes(Words(), fillers, LENGTH, 10, seed=0)
    assert probes == retrieval_probes(Words(), fillers, LENGTH, 10, seed=0)
    assert probes != retrieval_probes(Words(), fillers, LENGTH, 10, seed=1)
    for probe in probes:
        assert (probe.scored, probe.probe) == (1, True)
        assert LENGTH / 2 < len(probe.tokens) <= LENGTH
        needle = (*probe.tokens[-2:], FILLER[-1])
        places = [start for start in range(LENGTH) if probe.tokens[start : start + 3] == needle]
        assert len(places) == 1
        assert places[0] + 3 <= 0.8 * len(probe.tokens)
    with pytest.raises(MasformerError, match="a length of 12 tokens has no room"):
        retrieval_probes(Words(), fillers, 12, 1, 0)


def test_probes_are_asked_in_the_chat_template_or_as_they_are():
    words = "It was a long day. Nothing else happened there at all. "
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer = letter_tokenizer(chat_template=template)
    filler = Window(tuple(tokenizer(words * 8)["input_ids"]), 1)

    def text(tokenizer, **options):
        (probe,) = retrieval_probes(tokenizer, [filler], 900, 1, 0, **options)
        return tokenizer.decode(list(probe.tokens[: -probe.scored]))

    assert text(tokenizer).startswith("<")
    assert text(tokenizer, chat=True) == text(tokenizer)
    plain = text(tokenizer, chat=False)
    assert "<" not in plain
    assert plain == text(letter_tokenizer())
    with pytest.raises(MasformerError, match="chat template"):
        text(letter_tokenizer(), chat=True)


def test_other_texts_are_reported_too():
    other = [pairs_document(seed) for seed in (20, 21, 22)]
    result = search(induction_model(), other_texts={"more": other})
    assert list(result.placements) == ["held-out", "more"]
    assert result.rank("more") == 1
    alone = search(induction_model(), documents=[*DOCUMENTS[:2], *other])
    assert alone.score("middle").tail_nll == result.score("middle", "more").tail_nll


def test_random_placements_are_distinct_and_cost_the_same():
    plan = AttentionPlan((FullSpan(), LOCAL, LOCAL, WindowSpan(20), LOCAL, FullSpan()))
    drawn = shuffled(plan, 20, seed=3)
    assert len({*drawn, plan}) == 21
    assert all(sorted(map(str, each)) == sorted(map(str, plan)) for each in drawn)
    assert drawn == shuffled(plan, 20, seed=3) != shuffled(plan, 20, seed=4)
    few = AttentionPlan.mixed(4, placement=[1], local=LOCAL)
    assert {each.full_layers for each in shuffled(few, 20, seed=0)} == {(0,), (2,), (3,)}


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("8", Budget(full_layers=8)),
        (" 30% ", Budget(flops_share=0.3)),
        ("12.5%@8192", Budget(flops_share=0.125, length=8192)),
        ("64MiB@8192", Budget(cache_bytes=64 * 2**20, length=8192)),
        ("1.5 GiB @ 10", Budget(cache_bytes=3 * 2**29, length=10)),
        ("100000B", Budget(cache_bytes=100_000)),
    ],
)
def test_budgets_have_a_text_form(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text", ["", "eight", "8@100", "1.5", "-3", "0%", "100%", "120%", "64MB", "30%@", "30%@0", "0B"]
)
def test_wrong_budgets(text):
    with pytest.raises(MasformerError):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["50%", "45%@300", "150KiB", "300KiB@300"])
def test_a_budget_is_used_up_and_kept(text):
    model = induction_model()
    purse = Purse(Budget.parse(text), model, LOCAL, LENGTH)
    full_layers = purse.most(FullSpan(), LOCAL)
    shape = ModelShape.of(LlamaForCausalLM.config_class.from_dict(model.config.to_dict()))
    at = int(text.partition("@")[2] or LENGTH)

    def used(full):
        figures = cost(shape, AttentionPlan.mixed(LAYERS, full, "top", local=LOCAL), at)
        whole = cost(shape, AttentionPlan.uniform(LAYERS, FullSpan()), at)
        kib = figures.kv_cache_bytes / 1024
        return kib if "KiB" in text else 100 * figures.attention_flops / whole.attention_flops

    limit = float(re.match(r"\d+", text)[0])
    assert 0 < full_layers < LAYERS
    assert used(full_layers) <= limit < used(full_layers + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 6}, "lets every layer be full"),
        ({"budget": 7}, "more than the model's 6 layers"),
        ({"budget": 0}, "allows no full layer"),
        ({"budget": "1%"}, "less than window:8\\+2 in every layer needs"),
        ({"budget": "24%"}, "allows no full layer"),
        ({"budget": "99.9%", "local": WindowSpan(200)}, "costs as much as full"),
        ({"method": "guess"}, "unknown method 'guess'; allowed: gradient, sensitivity, greedy, joint"),
        ({"spans": [LOCAL], "method": "greedy"}, "for the methods gradient and joint"),
        ({"criteria": "speed"}, "unknown criterion: speed; allowed: tail, kl, retrieval"),
        ({"criteria": {}}, "unknown criterion: none at all"),
        ({"criteria": "tail:x"}, "must be a number, got 'x'"),
        ({"criteria": "tail:-1"}, "must be a positive number"),
        ({"criteria": "tail,tail"}, "named twice"),
        ({"criteria": "retrieval"}, "needs the model's tokenizer"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"windows": 4}, "hold 6 windows"),
        ({"length": 1}, "length must be at least 2"),
        ({"length": 257}, "beyond the 256 positions"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"random_placements": -1}, "random placements must be at least 0"),
        ({"held_out_windows": 0}, "so random placements would do nothing"),
        ({"held_out_windows": 0, "random_placements": None, "other_texts": {"t": DOCUMENTS}}, "so other texts would"),
        ({"other_texts": {"held-out": DOCUMENTS}}, "cannot be named 'held-out'"),
        ({"other_texts": {"short": DOCUMENTS[:1]}}, "text 'short' holds 1 windows"),
    ],
)
def test_wrong_values_are_named_before_anything_runs(changes, message):
    model = induction_model()
    model.model.forward = None
    with pytest.raises(MasformerError, match=message):
        search(model, **changes)


def test_models_that_cannot_be_measured():
    with pytest.raises(MasformerError, match="training mode"):
        search(induction_model().train())
    damaged = induction_model()
    damaged.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(MasformerError, match="not finite"):
        search(damaged)


def test_criteria_have_a_text_form():
    assert parse_criteria("tail") == {"tail": 1}
    assert parse_criteria("tail:1, retrieval:0.5,kl") == {"tail": 1, "retrieval": 0.5, "kl": 1}


def test_the_plan_file_says_how_the_plan_was_found(tmp_path):
    result = search(induction_model(), criteria="tail,kl", method="greedy")
    assert isinstance(result, SearchResult)
    for name in ("plan.yaml", "plan.json"):
        result.save(tmp_path / name, model="tiny")
        assert AttentionPlan.load(tmp_path / name) == result.plan
    notes = json.loads((tmp_path / "plan.json").read_text())
    assert notes.pop("$schema") == SCHEMA.as_uri()
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text()) == notes
    found_by = notes["found_by"]
    assert notes["model"] == "tiny"
    assert found_by["method"] == "greedy"
    assert found_by["ranks"] == {"held-out": {"rank": 1, "of": 9}}
    assert found_by["placements"]["held-out"][0]["tail_perplexity"] == result.score("found").tail_perplexity
    assert found_by["work"]["layer_evaluations"] < found_by["work"]["unshared_layer_evaluations"]
    assert len(found_by["evidence"]) == 2


def test_the_table_and_the_heat_map(tmp_path):
    result = search(induction_model(), criteria="tail,kl,retrieval", tokenizer=Words(), probes=4, method="sensitivity")
    console = Console(width=80, record=True)
    console.print(placement_table(result))
    text = console.export_text()
    found = next(line for line in text.splitlines() if line.startswith(("│ found", "┃ found")))
    assert f"{result.score('found').tail_perplexity:.2f}" in found
    for name in ("all full", "all local", "bottom", "top", "middle", "spread", "random: median", "1 of 9 on held-out"):
        assert name in text
    assert "shared prefixes saved" in text
    assert "passes for gains" not in text
    plot_search(result, tmp_path / "map.png")
    assert imread(tmp_path / "map.png").shape[0] > 200
    with pytest.raises(MasformerError, match="cannot tell the format"):
        plot_search(result, tmp_path / "map.txt")
