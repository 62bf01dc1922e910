"""The server is asked by the official client; what it answers is held against `model.generate` on the same tokens."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from masformer import AttentionPlan, FullSpan, SpanCache, apply_plan, cli, load_model, save_model, serving
from masformer.serving.stops import Stops
from served import (
    BODIES,
    CHAT,
    LENGTH,
    LETTERS,
    PATHS,
    PROMPT,
    TEMPLATE,
    chat,
    client_of,
    events_of,
    generated,
    make_app,
    make_model,
    make_tokenizer,
    plain_client,
    refused,
)
from tiny import PLAN, letter_tokenizer, tiny

FULL = AttentionPlan.uniform(4, FullSpan())


def complete(client, prompt=PROMPT, name="m", **options):
    options = {"temperature": 0, "max_tokens": LENGTH} | options
    return client.completions.create(model=name, prompt=prompt, **options).choices[0].text


@pytest.fixture(scope="module")
def expected(folder):
    """The answers under the plan to the chat and to the prompt."""
    loaded = load_model(folder, PLAN)
    return generated(*loaded, CHAT), generated(*loaded, PROMPT)


def test_answers_are_those_of_generate_under_the_plan(client, folder, expected):
    model, tokenizer = load_model(folder, FULL)
    assert generated(model, tokenizer, CHAT) != expected[0]
    assert generated(model, tokenizer, PROMPT) != expected[1]
    answer = client.chat.completions.create(model="m", messages=CHAT, temperature=0, max_tokens=LENGTH)
    assert answer.choices[0].message.content == expected[0]
    assert len(set(expected[0])) > 5  # of so many different letters
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == LENGTH
    assert complete(client, n=1, echo=False, presence_penalty=0) == expected[1]


def whole_and_streamed(client, path, **options):
    """The text of an answer, whole and as pieces, each with its reason to end and its usage."""
    body = BODIES[path] | {"max_tokens": LENGTH} | options
    whole = client.post(path, json=body).json()
    events = events_of(client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text)
    *chunks, last = events
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(event["id"], event["created"]) for event in events}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    pieces = [choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices]
    first = whole["choices"][0]
    text = first["message"]["content"] if "message" in first else first["text"]
    streamed = "".join(pieces), choices[-1]["finish_reason"], last["usage"]
    assert (text, first["finish_reason"], whole["usage"]) == streamed
    return streamed


@pytest.mark.parametrize("path", PATHS)
def test_text_ends_before_a_stop_sequence(plain, path):
    text, reason, usage = whole_and_streamed(plain, path)
    assert (len(text), reason, usage["completion_tokens"]) == (LENGTH, "length", LENGTH)
    for stops in (text[7], text[6:8], [text[5:9]], ["never", text[10:14], text[11:13] + "!", text[20:22]]):
        places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
        ends = min(place for place in places if place >= 0)
        cut, reason, usage = whole_and_streamed(plain, path, stop=stops)
        assert (cut, reason) == (text[:ends], "stop")
        assert ends < usage["completion_tokens"] <= ends + 4  # a token a letter; those of the stop sequence were made
    for stops in ([], [text[:3] + "!"], [text[-2:] + "!"]):  # what only began like a stop sequence is not lost
        assert whole_and_streamed(plain, path, stop=stops)[:2] == (text, "length")


def test_stop_sequences_are_found_in_any_pieces():
    text = "one two three two one"
    for stops in (["two"], ["two", "one"], ["e t", "three"], ["no", "three two on!", " one"], ["two one!"]):
        ends = min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))
        for size in range(1, len(text)):
            found, kept = Stops(stops), ""
            for start in range(0, len(text), size):
                kept += found.feed(text[start : start + size])
                if found.found:
                    break
            assert kept + found.rest() == text[:ends]
            assert found.found == (ends < len(text))


def test_an_answer_ends_where_it_is_told_to(client, expected):
    assert chat(client, max_tokens=None, max_completion_tokens=7) == expected[0][:7]
    stop = expected[1][10:12]
    assert complete(client, stop=stop) == expected[1][: expected[1].index(stop)]


@pytest.mark.parametrize("path", PATHS)
def test_the_end_of_text_is_counted_and_is_no_reason_of_length(expected, path):
    text = expected[PATHS.index(path)]
    end = LETTERS.index(text[9])
    client, at = plain_client(make_app(make_model(eos_token_id=end))), text.index(text[9])
    for length in (LENGTH, at + 1):  # also where it is the last token that was allowed
        cut, reason, usage = whole_and_streamed(client, path, max_tokens=length)
        assert (cut.rstrip(text[9]), reason) == (text[:at], "stop")
        assert usage["completion_tokens"] == at + 1
    assert whole_and_streamed(client, path, max_tokens=at)[1] == "length"


@pytest.mark.parametrize("path", PATHS)
def test_usage_in_a_stream_comes_where_it_is_asked_for(plain, path):
    events = events_of(plain.post(path, json=BODIES[path] | {"stream": True}).text)
    assert not any("usage" in event for event in events)
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-1])


def test_usage_counts_the_tokens_of_the_template(client):
    answer = client.chat.completions.create(model="m", messages=CHAT, temperature=0, max_tokens=5)
    prompt = len(make_tokenizer()(f"<user>{PROMPT}<assistant>")["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        *(prompt, 5),
        prompt + 5,
    )
    *_, last = client.completions.create(
        model="m", prompt=PROMPT, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(PROMPT), 5)


def test_a_letter_of_several_bytes_is_handed_on_whole():
    model = make_model(vocab_size=256)
    app = serving.build_app(apply_plan(model, PLAN), make_tokenizer(letters=None), "m")
    for path in PATHS:
        text = whole_and_streamed(plain_client(app), path)[0]
        if path == PATHS[1]:
            assert text == generated(model, make_tokenizer(letters=None), PROMPT)
            assert any(ord(letter) > 127 for letter in text)


def test_a_seed_holds_while_others_ask(client):
    alone = [chat(client, temperature=1.5, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        seeds = [0, None, 1, None, 2, None, 3, None]
        asked = list(pool.map(lambda seed: chat(client, temperature=1.5, seed=seed), seeds))
    assert asked[::2] == alone
    assert len(set(asked)) == 8  # those without a seed differ from each other, whatever came before


def test_logit_bias_is_at_work(plain):
    wanted = str(LETTERS.index("z"))
    for path in PATHS:
        assert whole_and_streamed(plain, path, logit_bias={wanted: 100}, max_tokens=4)[0] == "zzzz"
        assert "z" not in whole_and_streamed(plain, path, logit_bias={wanted: -100})[0]


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALLING = "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}" + TEMPLATE
CALLING += "{% if mood %}<{{ mood }}>{% endif %}{# tool_calls #}"
PARSED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


@pytest.fixture
def calling(monkeypatch):
    """A client of a model that calls a tool, whatever it is asked, and says something before."""
    model, tokenizer = (
        apply_plan(make_model(vocab_size=256, max_position_embeddings=512), PLAN),
        make_tokenizer(CALLING, None),
    )
    tokenizer.response_template = PARSED
    said = 'I look.<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call>'
    prompts = []

    def generate(tokens, streamer, **options):
        prompts.append(tokenizer.decode(tokens[0]))
        streamer.put(tokens)
        for token in tokenizer(said)["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(model, "generate", generate)
    found = client_of(serving.build_app(model, tokenizer, "m"))
    found.prompts = prompts
    return found


def test_tools_are_called_where_the_model_has_a_form_for_it(calling):
    ask = {"model": "m", "messages": CHAT, "tools": [TOOL]}
    choice = calling.chat.completions.create(**ask).choices[0]
    assert calling.prompts[-1].startswith("<look><user>")
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    call = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "it"})
    chunks = list(calling.chat.completions.create(**ask, stream=True, tool_choice="auto"))
    calls = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert [(part.index, part.function.name, json.loads(part.function.arguments)) for part in calls] == [
        (0, "look", {"at": "it"})
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    calling.chat.completions.create(**ask, tool_choice="none")
    assert calling.prompts[-1].startswith("<user>")
    cut = calling.chat.completions.create(**ask, stop=["look"]).choices[0]
    assert (cut.finish_reason, cut.message.content, cut.message.tool_calls) == ("stop", "I ", None)
    result = {"role": "tool", "tool_call_id": call.id, "content": "a fox"}
    calling.chat.completions.create(**ask | {"messages": [*CHAT, choice.message, result]})
    assert calling.prompts[-1].endswith("<assistant>I look.<tool>a fox<assistant>")


def test_tools_are_refused_where_nothing_would_come_of_them(plain, calling):
    ask = BODIES[PATHS[0]] | {"tools": [TOOL]}
    assert refused(plain.post(PATHS[0], json=ask), 400)["param"] == "tools"
    assert plain.post(PATHS[0], json=ask | {"tool_choice": "none"}).status_code == 200
    with pytest.raises(openai.BadRequestError, match=r"tool_choice .* is not supported"):
        calling.chat.completions.create(model="m", messages=CHAT, tools=[TOOL], tool_choice="required")


def test_a_template_gets_those_variables_that_it_reads(calling):
    ask = {"model": "m", "messages": CHAT}
    calling.chat.completions.create(**ask, extra_body={"chat_template_kwargs": {"mood": "glad"}})
    assert calling.prompts[-1].endswith("<assistant><glad>")
    for name in ("chat_template", "tokenize", "tools", "messages", "add_generation_prompt", "temper", "m", "for x"):
        with pytest.raises(openai.BadRequestError, match="chat_template_kwargs: "):
            calling.chat.completions.create(**ask, extra_body={"chat_template_kwargs": {name: "{{ 1 }}"}})


def test_what_fails_in_a_stream_is_said_in_the_stream(monkeypatch):
    model = make_model()
    app = make_app(model)
    monkeypatch.setattr(model, "generate", lambda *given, **options: 1 / 0)
    for path in PATHS:
        answer = plain_client(app).post(path, json=BODIES[path] | {"stream": True})
        assert events_of(answer.text)[-1]["error"]["message"] == "division by zero"
        answer = plain_client(app).post(path, json=BODIES[path])
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    with pytest.raises(openai.APIError, match="division by zero"):
        list(client_of(app).completions.create(model="m", prompt="a", stream=True))


def test_streams_give_the_same_in_pieces(client, expected):
    chunks = client.chat.completions.create(model="m", messages=CHAT, temperature=0, max_tokens=LENGTH, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert ("".join(pieces), len(pieces)) == (expected[0], LENGTH)
    chunks = client.completions.create(model="m", prompt=PROMPT, temperature=0, max_tokens=LENGTH, stream=True)
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices[0].text]
    assert ("".join(pieces), len(pieces)) == (expected[1], LENGTH)


def test_a_conversation_goes_on_as_in_a_fresh_model(client, folder):
    loaded = load_model(folder, PLAN)
    messages = list(CHAT)
    for text in ("and then the cat sat on the mat", "why"):
        reply = chat(client, messages, max_tokens=20)
        assert reply == generated(*loaded, messages, max_new_tokens=20)
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": text}]


def test_requests_at_the_same_time_do_not_mix(client, expected):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda index: (chat, complete)[index % 2](client), range(8)))
    assert answers == list(expected) * 4


def test_a_request_samples_unless_its_temperature_is_0(client, expected):
    assert client.models.list().data[0].id == "m"
    hot = [chat(client, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert chat(client) == expected[0]


def test_what_cannot_be_served_is_answered_with_the_reason(client):
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; this server has 'm'"):
        chat(client, name="other")
    with pytest.raises(openai.BadRequestError, match="the prompt has 300 tokens, and the model 256 positions"):
        complete(client, "a" * 300)
    with pytest.raises(openai.BadRequestError, match="the prompt has 300 tokens"):
        complete(client, "a" * 300, stream=True)
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        complete(client, "")
    with pytest.raises(openai.BadRequestError, match=r"generation_config .* is not supported"):
        complete(client, extra_body={"generation_config": '{"cache_implementation": "static", "max_new_tokens": 4}'})
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="m", input="hello")


def test_an_answer_ends_with_the_positions_of_the_model():
    model, tokenizer = apply_plan(make_model("gpt2"), PLAN), make_tokenizer()
    answer = client_of(serving.build_app(model, tokenizer, "m")).completions.create(
        model="m", prompt="a" * 100, temperature=0
    )
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (128, "length")


def test_every_request_has_a_span_cache_of_its_own():
    model, caches = apply_plan(make_model(), PLAN), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, options: caches.append(options.get("past_key_values", options.get("cache"))),
        with_kwargs=True,
    )
    client = client_of(serving.build_app(model, make_tokenizer(), "m"))
    complete(client, max_tokens=5)
    chat(client, max_tokens=5)
    assert {type(cache) for cache in caches} == {SpanCache}
    assert (len(caches), len(set(map(id, caches)))) == (10, 2)


def test_a_checkpoint_is_served_with_the_plan_it_carries(folder, tmp_path, expected, monkeypatch, capsys):
    model, tokenizer = load_model(folder, PLAN)
    save_model(model, tmp_path / "sealed", tokenizer)
    served = []
    monkeypatch.setattr(serving, "run", lambda app, listener: served.append(app))
    assert cli.main(["serve", str(tmp_path / "sealed"), "--port", "0", "--name", "m"]) == 0
    assert str(PLAN) in capsys.readouterr().out
    assert chat(client_of(served[0])) == expected[0]


def test_a_tokenizer_without_chat_template_serves_completions(expected, folder):
    model, _ = load_model(folder, PLAN)
    client = client_of(serving.build_app(model, make_tokenizer(template=None), "m"))
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        chat(client)
    assert complete(client) == expected[1]


@pytest.mark.parametrize("stream", [False, True])
def test_scores_that_are_no_numbers_are_the_servers_fault(stream):
    model = apply_plan(tiny("llama", vocab_size=257), PLAN)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    client = client_of(serving.build_app(model, letter_tokenizer(eos_token="<e>"), "m"))
    with pytest.raises(openai.APIError, match="scores of the next token are not numbers") as found:
        list(client.completions.create(model="m", prompt="ab", max_tokens=3, stream=stream))
    assert found.value.type == "server_error"
