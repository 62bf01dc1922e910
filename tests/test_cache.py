"""The span cache against the same model without a cache."""

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import strategies
from masformer import AttentionPlan, BlockSpan, FullSpan, MasformerError, SpanCache, WindowSpan, apply_plan
from masformer.cache import PAST
from masformer.cost import ModelShape, cost
from tiny import ARCHITECTURES, PLAN, VOCABULARY, random_plan, tiny

SPANS = (BlockSpan(4, 2), WindowSpan(3, 7), BlockSpan(5), WindowSpan(5))
PLANS = [AttentionPlan(SPANS), AttentionPlan.uniform(4, WindowSpan(5, 2)), PLAN]
four_layers = st.lists(strategies.spans | st.tuples(strategies.spans, strategies.spans), min_size=4, max_size=4).map(
    AttentionPlan
)
EPS = {"atol": 1e-5, "rtol": 0}
EXACT = {"atol": 1e-9, "rtol": 0}


def some_tokens(batch, length, seed=1):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch, length):
    """Rows of different lengths; the first has no padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return mask


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def without_cache(model, tokens, mask):
    return model(tokens, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits


@torch.no_grad()
def in_chunks(model, cache, tokens, mask, chunks, start=0):
    """Logits of the tokens from `start` on, in chunks of the given lengths, the last of them again and again."""
    logits, at = [], start
    lengths = itertools.chain(chunks, itertools.repeat(chunks[-1]))
    positions = positions_of(mask)
    while at < tokens.shape[1]:
        end = min(at + next(lengths), tokens.shape[1])
        part = slice(at, end)
        out = model(
            tokens[:, part], attention_mask=mask[:, :end], position_ids=positions[:, part], past_key_values=cache
        )
        logits.append(out.logits)
        at = end
    return torch.cat(logits, 1)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_generation_far_past_the_window_equals_the_forward_without_cache(kind, plan):
    model = apply_plan(tiny(kind), plan)
    tokens, mask = some_tokens(3, 14), left_padded(3, 14)
    out = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=27,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = torch.cat([mask, torch.ones(3, 27, dtype=torch.long)], 1)
    expected = without_cache(model, out.sequences, whole)[:, 13:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **EPS)
    assert torch.equal(expected.argmax(-1), out.sequences[:, 14:])
    caches = [value for value in (out.get("cache"), out.get("past_key_values")) if value is not None]
    assert isinstance(caches[0], SpanCache)


@pytest.mark.parametrize("chunk", [1, 3, 5, 7, 30])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_prefill_in_chunks_of_any_size_equals_one_pass(kind, chunk):
    """One token, less than a window of 5, just that, more, and all at once."""
    model, tokens, mask = tiny(kind), some_tokens(3, 30), left_padded(3, 30)
    for plan in PLANS:
        apply_plan(model, plan)
        expected = without_cache(model, tokens, mask)
        actual = in_chunks(model, SpanCache(plan), tokens, mask, [chunk])
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **EPS)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_tokens_after_a_crop_past_the_window_equal_one_pass(kind):
    model, tokens, mask = tiny(kind), some_tokens(3, 30), left_padded(3, 30)
    other = torch.cat([tokens[:, :19], some_tokens(3, 11, seed=2)], 1)
    for plan in PLANS:
        apply_plan(model, plan)
        cache = SpanCache(plan)
        cache.activate_past_recording()
        in_chunks(model, cache, tokens, mask, [9, 1])
        cache.crop(-11)
        actual = in_chunks(model, cache, other, mask, [1, 1, 4], start=19)
        torch.testing.assert_close(actual, without_cache(model, other, mask)[:, 19:], **EPS)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_generate_with_a_prefill_chunk_size(chunk):
    model = apply_plan(tiny("llama"), PLAN)
    tokens, mask = some_tokens(2, 30), left_padded(2, 30)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    whole = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=chunk, **options), whole)


@pytest.mark.parametrize(("kind", "plan"), list(zip(ARCHITECTURES, itertools.cycle(PLANS), strict=False)), ids=str)
def test_beam_search_equals_the_one_without_cache(kind, plan):
    """Rows change places, whatever the architecture is."""
    model = apply_plan(tiny(kind).double(), plan)
    options = {"attention_mask": left_padded(2, 11), "num_beams": 3, "num_return_sequences": 2}
    options |= {"do_sample": False, "max_new_tokens": 19, "min_new_tokens": 19}
    tokens = some_tokens(2, 11)
    cached, plain = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@st.composite
def stories(draw):
    """A plan, rows with padding, and what happens to the cache: chunks, tokens taken back, other tokens instead."""
    plan = draw(four_layers)
    length = draw(st.integers(2, 48))
    batch = draw(st.integers(1, 3))
    padding = draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch))
    chunks = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    back = draw(st.integers(0, length - 1))
    return plan, length, padding, chunks, back, draw(st.booleans())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stories())
def test_any_story_of_chunks_padding_and_crops_ends_as_without_cache(story):
    plan, length, padding, chunks, back, record = story
    model = apply_plan(tiny("llama"), plan, backend="tiled" if record else "reference").double()
    tokens = some_tokens(len(padding), length)
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    cache = SpanCache(plan)
    if record:
        cache.activate_past_recording()
    first = in_chunks(model, cache, tokens, mask, chunks)
    torch.testing.assert_close(first[mask.bool()], without_cache(model, tokens, mask)[mask.bool()], **EXACT)
    other = torch.cat([tokens[:, : length - back], some_tokens(len(padding), 30, seed=2)], 1)
    mask = torch.cat([mask[:, : length - back], torch.ones(len(padding), 30, dtype=torch.long)], 1)
    longest = length - min(padding)
    overwritten = any(span.max_visible is not None and longest > span.max_visible for span in plan.kinds)
    try:
        cache.crop(-back)
    except MasformerError:
        assert overwritten
        assert not record
        assert cache.get_seq_length() == length
        return
    assert cache.get_seq_length() == length - back
    again = in_chunks(model, cache, other, mask, chunks[::-1], start=length - back)
    keep = mask[:, length - back :].bool()
    torch.testing.assert_close(again[keep], without_cache(model, other, mask)[:, length - back :][keep], **EXACT)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=four_layers, chunk=st.integers(1, 9), data=st.data())
def test_padding_inside_a_document_stays_hidden(plan, chunk, data):
    """Right padding before a continuation, as after a batched prefill of prompts of different lengths."""
    model = apply_plan(tiny("llama"), plan).double()
    tokens = some_tokens(2, 36)
    mask = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=72, max_size=72))).view(2, 36)
    positions = torch.arange(36).expand(2, -1)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, logits = SpanCache(plan), []
        for at in range(0, 36, chunk):
            end = min(36, at + chunk)
            part = {"attention_mask": mask[:, :end], "position_ids": positions[:, at:end], "past_key_values": cache}
            logits.append(model(tokens[:, at:end], **part).logits)
    torch.testing.assert_close(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()], **EXACT)


def test_after_packed_documents_the_cache_goes_on_with_the_last_one():
    model = apply_plan(tiny("llama"), PLAN).double()
    tokens = some_tokens(2, 40)
    positions = torch.cat([torch.arange(9), torch.arange(31)]).expand(2, -1)
    with torch.no_grad():
        expected = model(tokens, position_ids=positions, use_cache=False).logits
        cache = SpanCache(PLAN)
        logits = [model(tokens[:, :20], position_ids=positions[:, :20], past_key_values=cache).logits]
        for at in (slice(20, 29), slice(29, 30), slice(30, 31), slice(31, 40)):
            logits.append(model(tokens[:, at], position_ids=positions[:, at], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, **EXACT)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding_past_the_window_equals_greedy_decoding(how):
    model = apply_plan(tiny("llama"), PLAN).double()
    tokens = some_tokens(1, 12).repeat(1, 3)
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
    expected = model.generate(tokens, **options)
    if how == "assistant":
        helper = copy.deepcopy(model)
        with torch.no_grad():
            helper.model.layers[1].mlp.down_proj.weight.mul_(1.05)
        options["assistant_model"] = apply_plan(helper, random_plan(3))
    else:
        options["prompt_lookup_num_tokens"] = 4
    assert torch.equal(model.generate(tokens, **options), expected)


def test_what_a_window_has_overwritten_is_not_taken_back():
    plan = AttentionPlan.uniform(4, WindowSpan(5, 2))
    model = apply_plan(tiny("llama"), plan)
    tokens, mask = some_tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    cache = SpanCache(plan)
    in_chunks(model, cache, tokens, mask, [20])
    with pytest.raises(MasformerError, match=r"cannot take back 6 of 20 tokens: window:5\+2 has overwritten"):
        cache.crop(-6)
    cache.crop(-1)
    assert cache.get_seq_length() == 19
    recording = SpanCache(plan)
    recording.activate_past_recording()
    long, ones = some_tokens(1, PAST + 20), torch.ones(1, PAST + 20, dtype=torch.long)
    with torch.no_grad():
        for at in (slice(0, 100), slice(100, 200), slice(200, PAST + 20)):
            model(long[:, at], attention_mask=ones[:, : at.stop], past_key_values=recording)
    with pytest.raises(MasformerError, match="not so far"):
        recording.crop(-PAST - 6)
    recording.crop(-PAST)
    with pytest.raises(MasformerError, match="records its past from the first token on"):
        cache.activate_past_recording()


def test_crop_below_the_window_reset_and_reuse():
    model = apply_plan(tiny("llama"), PLAN).double()
    tokens, mask = some_tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    expected = without_cache(model, tokens, mask)
    cache = SpanCache(PLAN)
    for how in (lambda: cache.crop(-30), cache.reset, lambda: cache.crop(-(10**6))):
        torch.testing.assert_close(in_chunks(model, cache, tokens, mask, [11, 1]), expected, **EXACT)
        how()
        assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    one = in_chunks(model, cache, tokens[:1], mask[:1], [4])
    torch.testing.assert_close(one, expected[:1], **EXACT)
    assert cache.layers[0].keys.shape[0] == 1


def test_rows_are_repeated_selected_and_reordered():
    model = apply_plan(tiny("llama"), PLAN).double()
    tokens, mask = some_tokens(3, 26), left_padded(3, 26)
    cache = SpanCache(PLAN)
    in_chunks(model, cache, tokens[:, :20], mask[:, :20], [9])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 2, 0]))
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    rows = torch.tensor([1, 2, 2])
    tokens, mask = tokens[rows], mask[rows]
    expected = without_cache(model, tokens, mask)[:, 20:]
    torch.testing.assert_close(in_chunks(model, cache, tokens, mask, [2, 1], start=20), expected, **EXACT)
    before = [layer.keys for layer in cache.layers]
    cache.reorder_cache(torch.arange(3))
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neo"])
@pytest.mark.parametrize("reserve", [0, 36])
def test_the_cost_model_predicts_the_bytes(kind, reserve):
    for plan in PLANS:
        model = apply_plan(tiny(kind), plan)
        shape = ModelShape.of(model.config)
        tokens = some_tokens(2, 70)
        cache = SpanCache(plan, reserve=reserve)
        ones = torch.ones_like(tokens)
        for end in (1, 2, 7, 19, 20, 36, 37, 70):
            in_chunks(model, cache, tokens[:, :end], ones[:, :end], [7, 1], start=cache.get_seq_length())
            predicted = cost(shape, plan, end, cache_bytes_per_value=4, cache_reserve=reserve)
            assert cache.nbytes == 2 * predicted.kv_cache_bytes
            assert cache.storage_nbytes == 2 * predicted.kv_storage_bytes


@pytest.mark.parametrize(("new", "slots"), [(20, 53), (60, 128)])
def test_generate_reserves_all_there_can_be_unless_that_is_far_more_than_the_prompt(new, slots):
    model = apply_plan(tiny("llama"), PLAN)
    out = model.generate(some_tokens(1, 33), max_new_tokens=new, eos_token_id=None, return_dict_in_generate=True)
    cache = out.get("cache") or out.get("past_key_values")
    assert [layer.keys.shape[2] for layer in cache.layers] == [7, slots, 12, 9]


def test_decoding_copies_no_cache_and_allocates_nothing_that_grows():
    """The largest allocation of a decoding step stays far below one layer's keys, at 2000 tokens as at 1000."""
    plan = AttentionPlan((WindowSpan(64, 4), FullSpan(), BlockSpan(64, 1), WindowSpan(64)))
    model = apply_plan(tiny("llama", max_position_embeddings=4096), plan)
    tokens, largest = some_tokens(1, 2010), []
    cache = SpanCache(plan)
    ones = torch.ones_like(tokens)
    for length in (1000, 2000):
        in_chunks(model, cache, tokens[:, :length], ones[:, :length], [100], start=cache.get_seq_length())
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            in_chunks(model, cache, tokens[:, : length + 4], ones[:, : length + 4], [1], start=length)
        assert places == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        sizes = [event.cpu_memory_usage for event in prof.events() if event.name == "[memory]"]
        largest.append(max(sizes))
        assert len(sizes) > 100
    full_layer = 2 * 8 * 4 * 1000  # kv heads x head_dim x bytes x tokens
    assert largest[0] == largest[1] < full_layer / 8


def test_wrong_use_is_refused():
    model, tokens = apply_plan(tiny("llama"), PLAN), some_tokens(2, 20)
    ones = torch.ones_like(tokens)
    with pytest.raises(MasformerError, match="the cache is of the plan window:5, the model of"):
        model(tokens, past_key_values=SpanCache(AttentionPlan.uniform(4, WindowSpan(5))))
    with pytest.raises(MasformerError, match="reserve must be at least 0, got -1"):
        SpanCache(PLAN, reserve=-1)
    with pytest.raises(MasformerError, match="a SpanCache serves models with a plan alone"):
        tiny("llama")(tokens, past_key_values=SpanCache(PLAN))
    with pytest.raises(MasformerError, match="an offloaded DynamicCache is not supported with a plan"):
        model(tokens, past_key_values=DynamicCache(offloading=True))
    cache = SpanCache(PLAN)
    in_chunks(model, cache, tokens, ones, [20])
    with pytest.raises(MasformerError, match="another batch size"):
        model(tokens[:1, :1], past_key_values=cache)
    cache.reset()
    in_chunks(model, cache, tokens, ones, [20])
    with pytest.raises(MasformerError, match="packed position_ids together with a filled cache"):
        model(tokens[:, :4], position_ids=torch.tensor([[0, 1, 0, 1]]), past_key_values=cache)
    hidden = torch.ones(2, 21, dtype=torch.long)
    hidden[0, 3] = 0
    with pytest.raises(MasformerError, match="attention_mask hides tokens"):
        model(tokens[:, :1], attention_mask=hidden, past_key_values=cache)
    with pytest.raises(MasformerError, match=r"attention_mask must be \[batch, 21\] with this cache, got \[2, 1\]"):
        model(tokens[:, :1], attention_mask=hidden[:, :1], past_key_values=cache)


def test_a_pass_that_failed_half_way_is_noticed(monkeypatch):
    model, tokens = apply_plan(tiny("llama"), PLAN), some_tokens(1, 20)
    cache = SpanCache(PLAN)
    model(tokens, past_key_values=cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens[:, :1], past_key_values=cache)
    with pytest.raises(MasformerError, match="left the cache half filled; call its reset"):
        model(tokens[:, :1], past_key_values=cache)
    cache.reset()
    model(tokens, past_key_values=cache)


def test_a_dynamic_cache_of_the_user_is_kept():
    model, tokens = apply_plan(tiny("llama"), PLAN), some_tokens(1, 20)
    mine = DynamicCache()
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    out = model.generate(tokens, past_key_values=mine, **options)
    assert mine.get_seq_length() == 29
    assert torch.equal(out, model.generate(tokens, **options))
