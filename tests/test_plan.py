import json

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from masformer import AttentionPlan, BlockSpan, FullSpan, MasformerError, WindowSpan
from masformer.plan import PLACEMENTS, place_full_layers
from strategies import local_spans, plans, units

BY_HEADS = AttentionPlan([(FullSpan(), WindowSpan(4)), WindowSpan(4)])


@pytest.mark.parametrize(
    ("placement", "layers"),
    [
        ("bottom", (0, 1, 2, 3)),
        ("top", (6, 7, 8, 9)),
        ("middle", (3, 4, 5, 6)),
        ("spread", (1, 3, 6, 8)),
        ([9, 0], (0, 9)),
        ("0-2,7", (0, 1, 2, 7)),
    ],
)
def test_placements(placement, layers):
    full = len(layers) if isinstance(placement, str) and placement in PLACEMENTS else None
    plan = AttentionPlan.mixed(10, full, placement, local=WindowSpan(4))
    assert plan.full_layers == layers
    assert all(span == WindowSpan(4) for layer, span in enumerate(plan) if layer not in layers)


@given(st.sampled_from(list(PLACEMENTS)), st.integers(1, 64), st.data())
def test_every_placement_names_that_many_different_layers(placement, num_layers, data):
    full = data.draw(st.integers(0, num_layers))
    layers = place_full_layers(num_layers, full, placement)
    assert len(set(layers)) == full
    assert list(layers) == sorted(layers)
    assert all(0 <= layer < num_layers for layer in layers)


@given(plans)
def test_text_and_dict_round_trip(plan):
    assert AttentionPlan.parse(str(plan), len(plan)) == plan
    assert eval(repr(plan)) == plan
    assert AttentionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(units)
def test_plans_by_heads_round_trip_and_name_each_unit(plan):
    assert AttentionPlan.parse(str(plan), len(plan), plan.kv_heads) == plan
    assert AttentionPlan.parse(str(plan).replace("; ", ","), len(plan), plan.kv_heads) == plan
    assert AttentionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))).units(plan.kv_heads) == plan.units(
        plan.kv_heads
    )
    rows = plan.units(plan.kv_heads)
    cells = {(layer, head): span for layer, row in enumerate(rows) for head, span in enumerate(row)}
    assert AttentionPlan.of_units(len(plan), plan.kv_heads, cells, local="full") == plan
    if plan.by_heads:
        assert eval(repr(plan)) == plan
        for one_span_each in (lambda: plan.spans, lambda: list(plan)):
            with pytest.raises(MasformerError, match="only plans by layers are allowed here"):
                one_span_each()


def test_a_plan_by_heads_is_read_at_a_glance():
    plan = AttentionPlan.parse("full@4,7:0,18:0-1; window:256+4", num_layers=30, kv_heads=3)
    full, local = FullSpan(), WindowSpan(256, 4)
    assert plan.layers[4] == full
    assert plan.units(3)[7] == (full, local, local)
    assert plan.units(3)[18] == (full, full, local)
    assert (plan.full_layers, plan.kv_heads, plan.by_heads) == ((4,), 3, True)
    with pytest.raises(MasformerError, match="gives the KV heads of one layer different spans"):
        plan[7]
    assert plan[8] == local
    assert str(AttentionPlan.parse("full@7:0-2,8; window:4", 30, 3)) == "full@7-8; window:4"
    several = AttentionPlan.parse("full@4,7:0; window:64@3,9:1-2; window:8", 12, 3)
    assert str(several) == "full@4,7:0; window:64@3,9:1-2; window:8"
    assert AttentionPlan.parse("full@2-3 window:64", 6) == AttentionPlan.parse("full@2-3,window:64", 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full@7:3; window:4", "KV head 3 is out of range: the model has KV heads 0 to 2"),
        ("full@7:2-1; window:4", "KV head range '2-1' ends before it starts"),
        ("full@7:x; window:4", "cannot read '7:x' as a layer; allowed: a layer (17), a range (0-3), or KV heads"),
        ("full@7,7:0; window:4", "layer 7 is named more than once among the units"),
        ("full@7:0,7:0-1; window:4", "layer 7 is named more than once among the units"),
        ("full@7:0", "does not say what the other layers do"),
        ("full@7:0; window:4; window:5", "cannot read the plan"),
        ("full@0-9999999999:0; window:4", "layer 9999999999 is out of range"),
        ("full@7:99999999999999999999; window:4", "KV head"),
    ],
)
def test_wrong_units_are_named(text, message):
    with pytest.raises(MasformerError) as error:
        AttentionPlan.parse(text, 12, 3)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionPlan.parse("full@1:0; window:4", 3), "needs the number of KV heads of the model"),
        (lambda: BY_HEADS.for_layers(None, 4), "the plan has 2 KV heads in each layer, but the model has 4"),
        (lambda: BY_HEADS.units(3), "the plan has 2 KV heads in each layer, but the model has 3"),
        (lambda: AttentionPlan(BY_HEADS.layers, 5), "the plan has 2 KV heads in each layer, but the model has 5"),
        (lambda: AttentionPlan([("full", "full")]), "layer 0 of the plan is 'full'; allowed"),
        (lambda: AttentionPlan([("full", FullSpan())]), "layer 0 of the plan: KV head 0 has 'full'"),
        (lambda: AttentionPlan([()]), "layer 0 of the plan"),
        (lambda: AttentionPlan([BY_HEADS.layers[0], (FullSpan(), WindowSpan(2), WindowSpan(2))]), "have 2 and 3 KV"),
        (lambda: AttentionPlan.of_units(3, 2, {(3, 0): "full"}, local="window:2"), "layer 3 is out of range"),
        (lambda: AttentionPlan.of_units(3, 2, {(0, 2): "full"}, local="window:2"), "KV head 2 is out of range"),
        (lambda: AttentionPlan.from_dict({"plan": "full", "num_layers": 2, "kv_heads": "x"}), "kv_heads"),
    ],
)
def test_heads_that_do_not_fit_are_named(make, message):
    with pytest.raises(MasformerError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["plan.yaml", "plan.yml", "plan.json"])
def test_files_round_trip_and_keep_notes(tmp_path, name):
    plan = AttentionPlan((FullSpan(), WindowSpan(8, 2), BlockSpan(4, 1)))
    plan.save(tmp_path / name, found_by="hand")
    assert AttentionPlan.load(tmp_path / name, num_layers=3) == plan
    assert yaml.safe_load((tmp_path / name).read_text())["found_by"] == "hand"
    assert [file.name for file in tmp_path.iterdir()] == [name]


@given(local_spans, st.integers(2, 40), st.data())
def test_the_text_names_full_layers_in_ranges(local, num_layers, data):
    layers = data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers - 1))
    plan = AttentionPlan.mixed(num_layers, placement=sorted(layers), local=local)
    assert str(plan).startswith("full@")
    assert AttentionPlan.load(str(plan), num_layers) == plan


def test_a_plan_shows_itself_as_its_text():
    plan = AttentionPlan.mixed(6, 2, local="window:64")
    assert repr(plan) == "AttentionPlan.parse('full@2-3; window:64', num_layers=6)"
    assert repr([AttentionPlan.uniform(30, "full")]) == "[AttentionPlan.parse('full', num_layers=30)]"


def test_a_span_alone_means_every_layer():
    assert AttentionPlan.parse("window:8", 3) == AttentionPlan.uniform(3, WindowSpan(8))
    assert AttentionPlan.parse("full", 3).is_full


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: place_full_layers(4, 5, "top"), "5 full layers asked for, but the model has only 4 layers"),
        (lambda: place_full_layers(4, -1, "top"), "number of full layers must be at least 0, got -1"),
        (lambda: place_full_layers(4, None, "top"), "placement 'top' needs the number of full layers"),
        (lambda: place_full_layers(4, 2, "sides"), "unknown placement 'sides'; allowed: bottom, top, middle, spread"),
        (lambda: place_full_layers(4, 1, [4]), "layer 4 is out of range: the model has layers 0 to 3"),
        (lambda: place_full_layers(4, 1, [-1]), "layer must be at least 0, got -1"),
        (lambda: place_full_layers(4, 3, [0, 1]), "3 full layers asked for, but the placement lists 2"),
        (lambda: place_full_layers(4, None, [1, 1]), "layer 1 is named more than once"),
        (lambda: place_full_layers(4, None, "3-1"), "layer range '3-1' ends before it starts"),
        (lambda: AttentionPlan(()), "a plan needs at least one layer"),
        (lambda: AttentionPlan(("full",)), "layer 0 of the plan is 'full'; allowed: FullSpan"),
        (lambda: AttentionPlan.parse("", 3), "the plan is empty"),
        (lambda: AttentionPlan.parse("full@0-1", 3), "does not say what the other layers do"),
        (lambda: AttentionPlan.parse("full@0; window:4"), "needs the number of layers"),
        (lambda: AttentionPlan.parse("full@9; window:4", 3), "layer 9 is out of range: the model has layers 0 to 2"),
        (lambda: AttentionPlan.parse("full,full", 3), "the plan has 2 layers, but the model has 3"),
        (lambda: AttentionPlan.parse("window:4; full", 3), "cannot read the plan 'window:4; full'"),
        (lambda: AttentionPlan.load("missing.yaml", 3), "plan file missing.yaml does not exist"),
        (lambda: AttentionPlan((FullSpan(),)).save("plan.txt"), "cannot tell the format of plan file plan.txt"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(MasformerError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_plan_file_is_named(tmp_path):
    for content in ("plan: [", "- 1", "plan: 3", "plan: full\nnum_layers: x"):
        (tmp_path / "plan.yaml").write_text(content)
        with pytest.raises(MasformerError, match=r"plan\.yaml") as error:
            AttentionPlan.load(tmp_path / "plan.yaml", 3)
        assert "\n" not in str(error.value)


def test_spans_are_shared_not_copied_by_position():
    assert torch.equal(
        AttentionPlan.parse("full,block:2", 2)[1].visible(torch.tensor([3]), torch.arange(4)),
        torch.tensor([False, False, True, True]),
    )


def test_a_plan_file_without_a_depth_takes_the_models(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("plan: full@1; window:4\n")
    assert AttentionPlan.load(file, 3) == AttentionPlan.parse("full@1; window:4", 3)
    with pytest.raises(MasformerError, match="layer 1 is out of range"):
        AttentionPlan.load(file, 1)
