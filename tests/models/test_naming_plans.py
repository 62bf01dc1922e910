"""Python takes a plan as the command line does: as text, as file, by rule, or as it is."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from masformer import AttentionPlan, MasformerError, SpanCache, WindowSpan, apply_plan, attend, load_model
from masformer.cost import ModelShape, compare, cost
from masformer.evaluation.perplexity import compare_plans
from masformer.export import check_export
from masformer.placement import search_layers
from masformer.plan import read_plans
from tiny import tiny

TEXT = "full@2-3; window:6+2"
PLAN = AttentionPlan.parse(TEXT, 4)
TOKENS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    PLAN.save(path / "plan.yaml")
    PLAN.save(path / "plan.json")
    return path


WAYS = {
    "plan": {"plan": PLAN},
    "text": {"plan": TEXT},
    "by layer": {"plan": "window:6+2,window:6+2,full,full"},
    "file": {"plan": "FOLDER/plan.yaml"},
    "path": {"plan": Path("FOLDER/plan.json")},
    "rule": {"full": 2, "placement": "top", "local": "window:6+2"},
    "layers": {"placement": "2-3", "local": WindowSpan(6, 2)},
    "list": {"placement": [2, 3], "local": "window:6+2"},
}


def ways(folder, name):
    def placed(value):
        text = str(value).replace("FOLDER", str(folder))
        return type(value)(text) if isinstance(value, str | Path) else value

    return {key: placed(value) for key, value in WAYS[name].items()}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_a_plan_gives_the_same_model(folder, way):
    options = ways(folder, way)
    expected = apply_plan(tiny("llama"), PLAN)(TOKENS).logits
    for model in (load_model(folder, **options)[0], apply_plan(tiny("llama"), **options)):
        assert model.config.masformer["plan"] == TEXT
        assert torch.equal(model(TOKENS).logits, expected)


def test_a_rule_that_leaves_the_placement_out_means_the_middle(folder):
    assert load_model(folder, full=2, local="block:4")[0].config.masformer["plan"] == "full@1-2; block:4"
    assert apply_plan(tiny("llama"), placement=3, local="block:4").config.masformer["plan"] == "full@3; block:4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "full@9; window:4"}, "layer 9 is out of range: the model has layers 0 to 3"),
        ({"plan": "wide"}, "unknown span 'wide'; allowed: full, window:SIZE"),
        ({"plan": ""}, "the plan is empty"),
        ({"plan": "missing.yaml"}, "plan file missing.yaml does not exist"),
        ({"plan": AttentionPlan.uniform(6, "full")}, "the plan has 6 layers, but the model has 4"),
        ({"plan": 8}, "8 is no plan; allowed: an AttentionPlan, or as text one span for all layers"),
        ({"plan": [WindowSpan(4)] * 4}, "is no plan; allowed: an AttentionPlan"),
        ({"plan": TEXT, "full": 2}, "give either plan or full/placement/local"),
        ({"full": 2}, "full and placement need local SPAN"),
        ({"local": "window:4"}, "local needs full N or placement LAYERS"),
        ({"full": 2, "local": 64}, "64 is no span; allowed: full, window:SIZE"),
        ({"full": 2, "placement": "sides", "local": "full"}, "unknown placement 'sides'"),
        ({"placement": 0.5, "local": "full"}, "placement 0.5 is not allowed; allowed: bottom, top"),
    ],
    ids=str,
)
def test_a_wrong_plan_is_one_line_before_any_weight_is_read(folder, options, message, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for take in (lambda: load_model(folder, **options), lambda: apply_plan(tiny("llama"), **options)):
        with pytest.raises(MasformerError) as error:
            take()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_model_is_not_given_a_plan_by_nobody():
    with pytest.raises(MasformerError, match="no plan is named; give plan, or full and local"):
        apply_plan(tiny("llama"))


@torch.no_grad()
def test_a_cache_takes_the_text():
    model = apply_plan(tiny("llama"), TEXT)
    for cache in (SpanCache(TEXT, num_layers=4), SpanCache("window:6+2,window:6+2,full,full"), SpanCache(PLAN)):
        assert model(TOKENS, past_key_values=cache).past_key_values is cache
    with pytest.raises(MasformerError, match="needs the number of layers"):
        SpanCache(TEXT)
    with pytest.raises(MasformerError, match="the cache is of 1 layers, the model of 4"):
        apply_plan(model, "window:6")(TOKENS, past_key_values=SpanCache("window:6"))


def test_so_do_spans_and_whatever_takes_plans(folder):
    assert AttentionPlan.mixed(4, 2, local="window:6+2") == AttentionPlan.mixed(4, 2, local=WindowSpan(6, 2))
    assert AttentionPlan.uniform(4, "block:4x2") == AttentionPlan.parse("block:4x2", 4)
    query = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attend(query, query, query, "window:3+1"), attend(query, query, query, WindowSpan(3, 1)))

    model, config = load_model(folder, TEXT)[0], AutoConfig.from_pretrained(folder)
    shape = ModelShape.of(config)
    assert cost(shape, TEXT, 64) == cost(shape, PLAN, 64)
    assert compare(shape, folder / "plan.yaml", [64]) == compare(shape, PLAN, [64])
    check_export(config, "full", "transformers")
    found = compare_plans(model, [list(range(3, 43))], [TEXT, "full", folder / "plan.yaml"], [16], prefix=None)
    assert [(each.name, each.plan) for each in found] == [
        (TEXT, TEXT),
        ("full", "full"),
        (str(folder / "plan.yaml"), TEXT),
    ]
    assert found[0].perplexity == found[2].perplexity
    texts = [[3 + 7 * i % 40 for i in range(n)] for n in (150, 160)]
    options = {"length": 16, "prefix": None, "windows": 1, "held_out_windows": 1, "random_placements": 1}
    for local in ("window:6+2", WindowSpan(6, 2)):
        assert search_layers(model, texts, 1, local, method="sensitivity", **options).plan.full_layers
    chosen = search_layers(model, texts, "60%", "window:4", method="joint", spans=("full", "window:4"), **options)
    assert set(map(str, chosen.plan)) <= {"full", "window:4"}


def test_several_plans_by_name():
    assert read_plans({"mine": TEXT}, 4) == {"mine": PLAN}
    assert read_plans([PLAN, "full"], 4) == {TEXT: PLAN, "full": AttentionPlan.parse("full", 4)}
    assert read_plans(TEXT, 4) == {TEXT: PLAN}
    with pytest.raises(MasformerError, match="plan 'full' is given twice"):
        read_plans(["full", "full"], 4)


def recorded(monkeypatch, owner):
    """What reaches `owner.from_pretrained`, which goes on without what only other machines can do."""
    asked, real = [], owner.from_pretrained

    def stand_in(source, *args, **options):
        asked.append((source, options))
        own = ("quantization_config", "revision", "token")
        return real(source, *args, **{name: value for name, value in options.items() if name not in own})

    monkeypatch.setattr(owner, "from_pretrained", stand_in)
    return asked


def test_what_is_for_transformers_reaches_it(folder, monkeypatch):
    asked = recorded(monkeypatch, AutoModelForCausalLM)
    packed = BitsAndBytesConfig(load_in_4bit=True)
    model, _ = load_model(folder, TEXT, quantization_config=packed, device_map={"": "cpu"}, token="secret")
    ((source, options),) = asked
    assert source == str(folder)
    assert options["quantization_config"] is packed
    assert (options["device_map"], options["token"]) == ({"": "cpu"}, "secret")
    assert model.config.masformer["plan"] == TEXT
    asked.clear()
    load_model(folder)
    assert not {"quantization_config", "device_map", "token", "revision"} & asked[0][1].keys()


def test_a_revision_and_a_token_reach_config_weights_and_tokenizer(folder, monkeypatch):
    asked = []

    def stand_in(name, answer):
        def read(source, *args, **options):
            asked.append((name, source, options.get("revision"), options.get("token")))
            return answer()

        return read

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)

    def no_tokenizer():
        raise OSError("none there")

    patch = monkeypatch.setattr
    patch("masformer.models.checkpoint.PretrainedConfig.get_config_dict", stand_in("raw", lambda: ({}, {})))
    patch("masformer.models.checkpoint.AutoConfig.from_pretrained", stand_in("config", lambda: config))
    patch("masformer.models.checkpoint.AutoModelForCausalLM.from_pretrained", stand_in("weights", lambda: model))
    patch("masformer.models.checkpoint.AutoTokenizer.from_pretrained", stand_in("tokenizer", no_tokenizer))
    patch("masformer.models.checkpoint.hub.is_cached_alone", lambda *asked: False)
    with pytest.raises(MasformerError, match="cannot read the tokenizer of some/model"):
        load_model("some/model", TEXT, revision="v2", token="secret")
    assert {name for name, *_ in asked} == {"raw", "config", "weights", "tokenizer"}
    assert {tuple(rest) for _, *rest in asked} == {("some/model", "v2", "secret")}


def test_a_revision_of_what_is_here_is_refused(folder):
    with pytest.raises(MasformerError, match=r"revision 'v2' is for models on the hub; .* is here"):
        load_model(folder, revision="v2")


def test_packing_without_its_package_is_one_line(folder):
    if find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is here")
    with pytest.raises(MasformerError, match=r"cannot load .*bitsandbytes") as error:
        load_model(folder, TEXT, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "parts"])
def test_a_device_map(folder, device_map):
    if device_map == "parts":  # as a model that one device does not hold: hooks of accelerate fetch the others
        names = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "model.rotary_emb")
        device_map = dict.fromkeys((*names, "lm_head"), "cpu") | {"model.layers.1": "disk"}
    model, _ = load_model(folder, TEXT, device_map=device_map)
    expected = apply_plan(tiny("llama"), PLAN)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert torch.equal(*(each.generate(TOKENS, max_new_tokens=4, do_sample=False) for each in (model, expected)))
    if isinstance(device_map, dict) and len(device_map) > 1:
        assert isinstance(model.model.layers[1].self_attn.q_proj._hf_hook, AlignDevicesHook)
