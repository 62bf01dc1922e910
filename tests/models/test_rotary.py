"""Rotary positions that depend on the length of the whole text: read in pieces, they are those of one pass."""

import copy

import pytest
import torch
from transformers import DynamicCache

from masformer import AttentionPlan, FullSpan, MasformerError, SpanCache, apply_plan
from masformer.evaluation.perplexity.losses import target_losses
from masformer.generation import generate, generate_batch
from tiny import VOCABULARY, letter_tokenizer, tiny

TRAINED = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 4.0, 16.0, 64.0],
    "original_max_position_embeddings": TRAINED,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 8.0}
KINDS = {
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": TRAINED},
    "phimoe": {
        "rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.5},
        "original_max_position_embeddings": TRAINED,
        "num_local_experts": 2,
    },
    "qwen2": {"rope_parameters": LONGROPE},
    "llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED},
    "olmo2": {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "max_position_embeddings": TRAINED,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 200,
    },
}
TOKENS = torch.randint(3, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(1))
FULL = AttentionPlan.uniform(4, FullSpan())


def stock_and_ours(kind):
    """A stock model whose far tokens and whose positions matter, and the same with full attention as its plan."""
    stock = tiny(kind, **({"sliding_window": None, "eos_token_id": None} | KINDS[kind]))
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return stock, apply_plan(copy.deepcopy(stock), FULL)


def continued(stock, prompt, new=12):
    """What a model that has read nothing before continues a prompt with."""
    out = copy.deepcopy(stock).generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_chunks_has_one_table(kind):
    """Past the switch, up to it, and across it while tokens are generated: as in transformers, after one pass."""
    stock, ours = stock_and_ours(kind)
    for length in (50, TRAINED + 1, TRAINED, 10):
        prompt = TOKENS[0, :length].tolist()
        expected = continued(stock, prompt)
        for chunk in (4096, 20, 7, 1):
            assert generate_batch(ours, [prompt], max_new_tokens=12, chunk=chunk).rows[0].tokens == expected
            text = generate(ours, letter_tokenizer(), prompt, max_new_tokens=12, chunk=chunk).text
            assert text == letter_tokenizer().decode(expected)


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_the_rows_of_a_batch_do_not_share_a_table(kind):
    stock, ours = stock_and_ours(kind)
    prompts = [TOKENS[row, :length].tolist() for row, length in ((0, 3), (1, 40), (0, 12), (1, 4), (0, 40), (0, 25))]
    rows = generate_batch(ours, prompts, max_new_tokens=8, chunk=30).rows
    assert [row.tokens for row in rows] == [continued(stock, prompt, 8) for prompt in prompts]
    for prompt in (TOKENS[0, :40], TOKENS[0, :12]):
        expected = copy.deepcopy(stock).generate(prompt[None], max_new_tokens=8, do_sample=False, num_beams=3)
        beams = generate_batch(ours, [prompt.tolist()], max_new_tokens=8, beams=3, chunk=9).rows[0].tokens
        assert beams == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_longer_texts_before_leave_nothing_behind(kind):
    stock, ours = stock_and_ours(kind)
    expected = [copy.deepcopy(stock)(TOKENS[:, :length], use_cache=False).logits for length in (60, 30, 10)]
    for length, logits in zip((60, 30, 10), expected, strict=True):
        torch.testing.assert_close(ours(TOKENS[:, :length], use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)
    windows = [(TOKENS[0, :length].tolist(), TOKENS[1, : length // 2].tolist()) for length in (60, 30)]
    with torch.no_grad():
        once = [target_losses(ours, [window], 8) for window in windows]
        again = [target_losses(ours, [window], 8) for window in reversed(windows)]
    for (losses, there), (others, _) in zip(once, reversed(again), strict=True):
        assert there.any()
        assert torch.equal(losses, others)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_by_hand_are_right_or_refused(kind):
    stock, ours = stock_and_ours(kind)
    with torch.no_grad():
        expected = stock(TOKENS, use_cache=False).logits
        cache = SpanCache(FULL, prompt=60)
        pieces = [ours(TOKENS[:, at : at + 9], past_key_values=cache).logits for at in range(0, 60, 9)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)
        for cache in (SpanCache(FULL), DynamicCache()):
            ours(TOKENS[:, :10], past_key_values=cache)
            with pytest.raises(MasformerError, match="depend on the length of the whole text: a cache filled for 10 "):
                ours(TOKENS[:, 10:30], past_key_values=cache)
    with pytest.raises(MasformerError, match="prompt must be at least 0, got -1"):
        SpanCache(FULL, prompt=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_across_the_switch_are_those_of_transformers(kind):
    stock, ours = stock_and_ours(kind)
    with torch.no_grad():
        for model_cache, our_cache in ((DynamicCache(), SpanCache(FULL)), (DynamicCache(), DynamicCache())):
            fresh = copy.deepcopy(stock)
            for at in (slice(0, 10), *(slice(index, index + 1) for index in range(10, 24))):
                expected = fresh(TOKENS[:, at], past_key_values=model_cache).logits
                actual = ours(TOKENS[:, at], past_key_values=our_cache).logits
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["phi3", "qwen2", "llama"])
def test_a_chat_that_goes_on_is_as_in_transformers_or_refused(kind):
    """Phi-3 reads the whole text anew past its switch; where transformers would not, a piece is refused."""
    stock, ours = stock_and_ours(kind)
    options = {"do_sample": False, "max_new_tokens": 4}
    for first, more in ((5, 2), (5, 20), (11, 20), (20, 10)):
        stock_cache, cache, fresh = DynamicCache(), SpanCache(FULL), copy.deepcopy(stock)
        text = fresh.generate(TOKENS[:1, :first], past_key_values=stock_cache, **options)
        assert torch.equal(ours.generate(TOKENS[:1, :first], past_key_values=cache, **options), text)
        text = torch.cat([text, TOKENS[1:, :more]], 1)
        expected = fresh.generate(text, past_key_values=stock_cache, **options)
        if kind == "phi3" or text.shape[1] <= TRAINED or (kind == "qwen2" and first > TRAINED):
            assert torch.equal(ours.generate(text, past_key_values=cache, **options), expected)
        else:
            with pytest.raises(MasformerError, match="depend on the length of the whole text"):
                ours.generate(text, past_key_values=cache, **options)
