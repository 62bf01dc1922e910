"""Plans by KV head at work, against each head by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from masformer import (
    AttentionPlan,
    FullSpan,
    MasformerError,
    SpanCache,
    WindowSpan,
    apply_plan,
    attend,
    load_model,
    save_model,
)
from masformer.cost import ModelShape, compare, cost
from masformer.models.sealing import kv_heads
from masformer.plots import picture, plot_plan
from masformer.spans import UnitSpans
from tiny import ARCHITECTURES, VOCABULARY, kv_heads_of, letter_tokenizer, random_unit_plan, tiny

TEXT = "full@0:0,2; window:5+2@1:1; block:4"


def some_tokens(batch, length):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["auto", "reference", "flex"])
@settings(deadline=None, max_examples=40)
@given(st.lists(strategies.spans, min_size=2, max_size=4), st.integers(1, 3), st.integers(1, 40), st.data())
def test_each_head_attends_as_it_does_alone(backend, spans, group, key_len, data):
    if len(set(spans)) == 1:
        spans = [*spans, WindowSpan(13, 1)]
    query_len, heads = data.draw(st.integers(1, key_len)), len(spans)
    make = torch.Generator().manual_seed(key_len)
    shapes = [(2, heads * group, query_len, 4), (2, heads, key_len, 4), (2, heads, key_len, 3)]
    inputs = [torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_() for shape in shapes]
    row = st.lists(st.integers(0, 2), min_size=key_len, max_size=key_len)
    options = {"softcap": data.draw(st.none() | st.floats(0.5, 5))}
    if data.draw(st.booleans()):
        options["padding_mask"] = (torch.tensor([data.draw(row), data.draw(row)]) > 0).long()
    if data.draw(st.booleans()):
        options["document_ids"] = torch.tensor([data.draw(row), data.draw(row)]).sort(-1)[0]
    query, key, value = inputs
    alone = [
        attend(query[:, h * group : (h + 1) * group], key[:, h : h + 1], value[:, h : h + 1], span, **options)
        for h, span in enumerate(spans)
    ]
    expected = torch.cat(alone, 1)
    actual = attend(*inputs, UnitSpans(tuple(spans)), backend=backend, **options)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    weight = torch.randn(expected.shape, generator=make, dtype=torch.float64)
    if actual.requires_grad:
        left, right = (torch.autograd.grad((x * weight).sum(), inputs) for x in (expected, actual))
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(b, a, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_generation_past_three_windows_in_a_padded_batch_equals_the_forward_without_cache(kind):
    model, plan = tiny(kind), random_unit_plan(f"{kind} cached", kv_heads_of(kind))
    apply_plan(model, plan)
    tokens, mask = some_tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[1, :3] = mask[2, :6] = 0
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None}
    out = model.generate(
        tokens, attention_mask=mask, output_logits=True, return_dict_in_generate=True, prefill_chunk_size=5, **options
    )
    whole = torch.cat([mask, torch.ones(3, 30, dtype=torch.long)], 1)
    places = (whole.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(out.sequences, attention_mask=whole, position_ids=places, use_cache=False).logits[:, 13:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=1e-5, rtol=0)
    assert torch.equal(logits.argmax(-1), out.sequences[:, 14:])


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_beams_and_a_crop_past_the_window(kind):
    model = tiny(kind).double()
    apply_plan(model, TEXT)
    tokens = some_tokens(2, 11)
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 19, "min_new_tokens": 19}
    cached, plain = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    cache = SpanCache(model.config.masformer["plan"], num_layers=4, kv_heads=kv_heads_of(kind))
    cache.activate_past_recording()
    tokens = some_tokens(1, 40)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        for at in (slice(0, 25), slice(25, 31)):
            model(tokens[:, at], past_key_values=cache)
        cache.crop(-12)
        actual = model(tokens[:, 19:], past_key_values=cache).logits
    torch.testing.assert_close(actual, expected[:, 19:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neo"])
@pytest.mark.parametrize("reserve", [0, 36])
def test_bytes_are_freed_by_head_as_predicted(kind, reserve):
    model, plan = tiny(kind), random_unit_plan(f"{kind} bytes", kv_heads_of(kind))
    apply_plan(model, plan)
    shape, cache, tokens = ModelShape.of(model.config), SpanCache(plan, reserve=reserve), some_tokens(2, 70)
    for start, end in ((0, 1), (1, 7), (7, 19), (19, 20), (20, 37), (37, 70)):
        with torch.no_grad():
            model(tokens[:, start:end], past_key_values=cache)
        predicted = cost(shape, plan, end, cache_bytes_per_value=4, cache_reserve=reserve)
        assert (cache.nbytes, cache.storage_nbytes) == (2 * predicted.kv_cache_bytes, 2 * predicted.kv_storage_bytes)
        held = sum(
            part.keys.nbytes + part.values.nbytes for layer in cache.layers for part in getattr(layer, "parts", [layer])
        )
        assert held == cache.storage_nbytes


def test_a_unit_costs_its_share_of_a_layer():
    shape = ModelShape(6, query_heads=6, kv_heads=3, head_dim=8, value_dim=8, matmul_weights=9, parameters=9, widest=9)
    for length in (5, 100):
        full, local, mixed = (
            cost(shape, plan, length) for plan in ("full@2; window:7", "window:7", "full@2:1; window:7")
        )
        for figure in ("attention_flops", "kv_cache_bytes"):
            whole, none, third = (getattr(each, figure) for each in (full, local, mixed))
            assert 3 * (third - none) == whole - none
    assert compare(shape, "full@2:1; window:7", [100])[0].fractions["kv_cache_bytes"] < 0.2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_class_says_how_many_kv_heads_there_are(kind):
    model = tiny(kind)
    assert kv_heads(model.config) == kv_heads_of(kind)
    apply_plan(model, "full@1:0; window:3")
    assert kv_heads(model.config) == kv_heads_of(kind)


def test_of_one_kv_head_a_unit_is_the_layer():
    model = apply_plan(tiny("llama", num_key_value_heads=1), "full@1:0; window:3")
    assert model.config.masformer["plan"] == "full@1; window:3"


def test_a_folder_carries_the_plan_and_another_can_be_named(tmp_path):
    model = apply_plan(tiny("llama"), TEXT)
    save_model(model, tmp_path / "m", letter_tokenizer())
    again, _ = load_model(tmp_path / "m")
    tokens = some_tokens(1, 30)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.masformer["plan"] == TEXT
    assert load_model(tmp_path / "m", "full@3:1,window:4")[0].config.masformer["plan"] == "full@3:1; window:4"
    with pytest.raises(MasformerError, match="KV head 2 is out of range: the model has KV heads 0 to 1"):
        load_model(tmp_path / "m", "full@3:2,window:4")


def test_wrong_numbers_and_changed_keys_are_refused():
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8)
    with pytest.raises(MasformerError, match="spans for 2 KV heads, but the keys have 4"):
        attend(query, key, key, UnitSpans((FullSpan(), WindowSpan(3))))
    with pytest.raises(MasformerError, match="the plan has 3 KV heads in each layer, but the model has 2"):
        apply_plan(tiny("llama"), random_unit_plan(0, 3))
    plan = random_unit_plan(1)
    cache = SpanCache(plan)
    cache.begin(1, 5)
    keys = torch.randn(1, 2, 5, 8)
    layer = next(number for number, spans in enumerate(plan.layers) if isinstance(spans, UnitSpans))
    for number in range(4):
        out = cache.update(keys, keys, number)
    with pytest.raises(MasformerError, match="changes its keys after the cache took them"):
        cache.seen(layer, out[0] * 2, out[1])


def test_pictures_show_layers_by_heads(tmp_path):
    plan = AttentionPlan.parse("full@4,7:0; window:64@3,9:1-2; window:8", 12, 3)
    text = picture(plan, 100)
    rows = [line.split()[2:] for line in text.splitlines() if line.startswith("head")]
    assert [len(row) for row in rows] == [12, 12, 12]
    assert [row[7] for row in rows].count("█") == 1
    assert [row[4] for row in rows].count("█") == 3
    assert rows[1][9] == rows[2][9] != rows[0][9]
    assert "units" in text
    assert max(map(len, text.splitlines())) <= 80
    plot_plan(plan, tmp_path / "plan.png", 256)
    assert (tmp_path / "plan.png").stat().st_size > 2000
