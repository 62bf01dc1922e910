import string

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from masformer import MasformerError, SpanCache, apply_plan
from masformer.data.tokens import part_tokens
from masformer.generation import Chat, chat_text, generate, generate_batch, prompt_tokens
from tiny import PLAN, letter_tokenizer, tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
PROMPT = "a rather long prompt that goes far past every window of the plan: " * 2


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer(eos_token="<e>")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = tiny("llama", vocab_size=257, sliding_window=None, max_position_embeddings=512, eos_token_id=256)
    return apply_plan(model, PLAN)


def test_text_is_streamed_and_equals_the_models_own_generation(model, tokenizer):
    prompt, pieces = prompt_tokens(tokenizer, PROMPT), []
    result = generate(model, tokenizer, prompt, max_new_tokens=30, chunk=16, on_text=pieces.append)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :]
    assert "".join(pieces) == result.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(pieces) > 3
    assert (result.prompt_tokens, result.tokens) == (len(prompt), len(expected))
    assert 0 < result.first_seconds < result.seconds
    assert result.tokens_per_second > 0
    keys = [7, len(prompt) + 29, 12, 9]
    assert result.cache_bytes == sum(keys) * 2 * 2 * 8 * 4
    assert result.full_cache_bytes == 4 * keys[1] * 2 * 2 * 8 * 4
    assert f"{len(prompt):,} prompt tokens, 30 new, first after" in result.summary()
    assert result.to_dict()["tokens_per_second"] == result.tokens_per_second


def test_sampling_follows_the_seed_and_beams_give_one_text(model, tokenizer):
    prompt = prompt_tokens(tokenizer, PROMPT)
    options = {"max_new_tokens": 12, "temperature": 1.0}
    first, again, other = (generate(model, tokenizer, prompt, seed=seed, **options).text for seed in (1, 1, 2))
    assert first == again != other
    pieces = []
    beams = generate(model, tokenizer, prompt, max_new_tokens=12, beams=3, on_text=pieces.append)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, num_beams=3, do_sample=False)
    assert pieces == [beams.text] == [tokenizer.decode(expected[0, len(prompt) :], skip_special_tokens=True)]
    assert beams.first_seconds is beams.tokens_per_second is None
    assert beams.cache_bytes < beams.full_cache_bytes
    assert "12 new" in beams.summary()


def test_chat_templates(tokenizer):
    plain = prompt_tokens(tokenizer, "hello")
    assert tokenizer.decode(plain) == "hello"
    with pytest.raises(MasformerError, match="the tokenizer has no chat template"):
        prompt_tokens(tokenizer, "hello", chat=True)
    with pytest.raises(MasformerError, match="a system message needs a chat template"):
        prompt_tokens(tokenizer, "hello", system="be brief")
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=TEMPLATE)
    assert chatty.decode(prompt_tokens(chatty, "hello", system="be brief")) == "<system>be brief<user>hello<a>"
    assert prompt_tokens(chatty, "hello", chat=False) == plain
    chatty.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(MasformerError, match="the chat template refuses the messages: no"):
        prompt_tokens(chatty, "hello")


def test_generation_ends_where_the_positions_end(model, tokenizer):
    prompt = [5] * 505
    assert generate(model, tokenizer, prompt, max_new_tokens=30).tokens <= 7
    with pytest.raises(MasformerError, match="the prompt has 512 tokens, and the model 512 positions"):
        generate(model, tokenizer, [5] * 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.9}, "top_p and top_k do nothing without a temperature"),
        ({"prompt": []}, "the prompt holds no token"),
    ],
)
def test_wrong_values_are_named(model, tokenizer, options, message):
    with pytest.raises(MasformerError, match=message):
        generate(model, tokenizer, **({"prompt": [5, 6, 7]} | options))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"beams": 2}])
def test_scores_that_are_no_numbers_choose_no_token(model, tokenizer, options):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(MasformerError, match="scores of the next token are not numbers"):
        generate(model, tokenizer, [5, 6, 7], max_new_tokens=3, **options)
    with pytest.raises(MasformerError, match="scores of the next token are not numbers"):
        generate_batch(model, [[5, 6], [7]], max_new_tokens=3, beams=options.get("beams", 1))


CHAT = TEMPLATE.replace("<a>", "<assistant>")
LETTERS = sorted({*string.printable.strip(), "Ġ"})


@pytest.fixture
def chatty():
    """Its every token is a letter, so that texts become the tokens that they were made of."""
    return letter_tokenizer(LETTERS, chat_template=CHAT)


@pytest.fixture
def talker():
    torch.manual_seed(0)
    shape = {"vocab_size": len(LETTERS), "max_position_embeddings": 512, "eos_token_id": None}
    return apply_plan(tiny("llama", sliding_window=None, **shape), PLAN)


ALONE = CHAT.replace("{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last else '-' }}")
TURNS = ["hello there, this is rather long", "and how are you?", "fine"]


@pytest.mark.parametrize(
    ("template", "plan", "reads_all"), [(CHAT, PLAN, False), (ALONE, PLAN, True), (ALONE, "full", False)]
)
def test_a_chat_gives_what_its_whole_text_gives_and_reads_new_tokens_alone(talker, chatty, template, plan, reads_all):
    model = apply_plan(talker, plan)
    chatty.chat_template = template
    chat, messages, before = Chat(model, chatty, system="be brief", max_new_tokens=20, chunk=8), [], 0
    messages.append({"role": "system", "content": "be brief"})
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        prompt, pieces = part_tokens(chatty, chat_text(chatty, messages)), []
        found = chat.answer(turn, pieces.append)
        alone = generate(model, chatty, prompt, max_new_tokens=20)
        assert (found.text, found.token_ids, found.prompt_tokens) == (alone.text, alone.token_ids, len(prompt))
        assert "".join(pieces) == found.text
        if before and template is CHAT:
            assert found.held_tokens == before
        elif before:
            assert (found.held_tokens == 0) == reads_all
        before = found.prompt_tokens + found.tokens - 1
        messages.append({"role": "assistant", "content": found.text})
    assert chat.messages == messages


def test_an_interrupted_answer_leaves_what_was_said(talker, chatty):
    model, pieces = talker, []
    chat = Chat(model, chatty, max_new_tokens=20)

    def stop(piece):
        pieces.append(piece)
        if piece:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.answer("hello", stop)
    assert [m["content"] for m in chat.messages] == ["hello", "".join(pieces)]
    again = chat.answer("go on")
    prompt = part_tokens(chatty, chat_text(chatty, chat.messages[:-1]))
    assert (again.held_tokens, again.text) == (0, generate(model, chatty, prompt, max_new_tokens=20).text)
    said = list(chat.messages)
    with pytest.raises(MasformerError, match="the prompt has"):
        chat.answer("x" * 600)
    assert chat.messages == said
    with pytest.raises(MasformerError, match="the message is empty"):
        chat.answer(" ")


def test_a_chat_needs_a_template(model, tokenizer):
    with pytest.raises(MasformerError, match="the tokenizer has no chat template"):
        Chat(model, tokenizer)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_chat_whose_rotary_table_changes_is_read_anew(chatty, rope):
    torch.manual_seed(0)
    settings = {"rope_type": rope, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    settings |= {"factor": 8.0} if rope == "dynamic" else {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    changes = {
        "vocab_size": len(LETTERS),
        "max_position_embeddings": 64 if rope == "dynamic" else 512,
        "rope_parameters": settings,
        "eos_token_id": None,
        **({"original_max_position_embeddings": 64} if rope == "longrope" else {}),
    }
    model = apply_plan(tiny("llama" if rope == "dynamic" else "phi3", sliding_window=None, **changes), PLAN)
    chat, held = Chat(model, chatty, max_new_tokens=6), []
    for turn in TURNS:
        found = chat.answer(turn)
        prompt = part_tokens(chatty, chat_text(chatty, chat.messages[:-1]))
        assert found.text == generate(model, chatty, prompt, max_new_tokens=6).text
        held.append(found.held_tokens)
    assert 0 in held[1:]


def test_a_cache_that_does_not_fit_a_prompt_is_refused(model, tokenizer):
    cache = SpanCache(PLAN)
    generate(model, tokenizer, [5, 6, 7], max_new_tokens=4, cache=cache)
    for options in ({"prompt": [5, 6, 7]}, {"prompt": [5] * 20, "beams": 2}):
        with pytest.raises(MasformerError, match="a cache serves"):
            generate(model, tokenizer, cache=cache, **options)
