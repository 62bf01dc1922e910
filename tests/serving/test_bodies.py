"""Whatever a client sends: an answer, or status 4xx and the reason where OpenAI's clients look for it."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from served import BODIES, CHAT, PATHS, make_app, make_model, plain_client, refused

SAY = CHAT[0]
LOOP = "{% for i in range(100000) %}"
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
WRONG = {
    "model": [5, ["m"], {}, "m2", "", "../m", "m:other.gguf", "m@main"],
    "max_tokens": [0, -1, 1.5, "5", True, [], 10**30, 1e30],
    "temperature": [-0.1, 2.1, 1e-50, "0", True, [], 10**400],
    "top_p": [-0.1, 1.1, "1", {}],
    "seed": [1.5, "1", 10**30, -(10**30), []],
    "stop": [5, "", ["a", ""], ["a"] * 5, [5], {"a": "b"}, "a" * 2000],
    "stream": ["yes", 1, []],
    "stream_options": [5, [], {"include_usage": True}, {"include_usage": "yes"}, {"other": 1}],
    "logit_bias": [5, [1], {"a": 1}, {"5": "1"}, {"5": 101}, {"-1": 1}, {"67": 1}, {"9" * 5000: 1}, {"5": True}],
    "n": [0, 2, "1", True],
    "presence_penalty": [0.5, -0.5, "0"],
    "frequency_penalty": [0.5, -0.5, "0"],
    "user": [5, {}],
    "generation_config": ["{}", "[]", {}, '{"max_new_tokens": 2}'],
    "chat_template": ["{{ 1 }}", ""],
    "processor": ["gpt2"],
    "unheard_of": [0, "", False],
}
OF_CHATS = {
    "messages": [
        *(None, [], {}, "hello", 5, [None], ["hello"], [[]], [{}], [SAY, 5]),
        *(
            [{"content": "hello"}],
            [{"role": "user"}],
            [{"role": "wizard", "content": "a"}],
            [{"role": 5, "content": "a"}],
        ),
        *([SAY | {"content": content}] for content in (None, 5, {}, [], [5], ["a"], [{"text": "a"}])),
        *([SAY | {"content": [{"type": "text", "text": text}]}] for text in (None, 5, ["a"])),
        [SAY | {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [SAY | {"content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
        [SAY | {"content": [{"type": "file", "file": {"file_id": "1"}}]}],
        [SAY | {"content": [{"type": "video_url", "video_url": {"url": "file:///a"}}]}],
        [SAY | {"name": "me"}],
        [{"role": "assistant"}],
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],  # the template says nothing of calls
        [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "look", "arguments": "["}}]}],
        [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "look", "arguments": "[1]"}}]}],
        [{"role": "assistant", "content": "", "reasoning_content": "hm"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "function", "name": "look", "content": "a"}],
    ],
    "max_completion_tokens": [0, "5", 4],  # 4 is not the 3 of max_tokens
    "tools": [5, {}, [5], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}]],
    "tool_choice": ["required", "any", 5, {"type": "function", "function": {"name": "look"}}],
    "functions": [[{"name": "look"}]],
    "chat_template_kwargs": [
        5,
        [],
        {"chat_template": LOOP * 3},
        {"tokenize": False},
        {"eos_token": "a"},
        {"a": "b"},
        {"message": []},
    ],
    "reasoning_effort": ["high", 5],
    "logprobs": [True, 1],
    "top_logprobs": [3],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "text", {}],
    "modalities": [["audio"], ["text", "audio"]],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "store": [True],
    "parallel_tool_calls": [False],
    "metadata": [5, {"a": 1}],
}
OF_COMPLETIONS = {
    "prompt": [None, "", 5, {}, [], ["a", "b"], [1, 2], [[1]], True],
    "echo": [True],
    "logprobs": [0, 3],
    "best_of": [2],
    "suffix": ["the end"],
    "messages": [CHAT],
}


@pytest.mark.parametrize("path", PATHS)
def test_what_would_be_ignored_or_cannot_be_read_is_refused_by_name(plain, path):
    for field, values in (WRONG | (OF_CHATS if "chat" in path else OF_COMPLETIONS)).items():
        for value in values:
            content = json.dumps(BODIES[path] | {field: value}).encode()
            answer = plain.post(path, content=content, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500, (field, value, answer.text)
            error = refused(answer)
            assert field in f"{error['message']} {error['param']}" or value == "", error
            assert len(error["message"]) < 400


@pytest.mark.parametrize("path", PATHS)
def test_what_asks_for_nothing_is_as_good_as_nothing(plain, path):
    def content(**options):
        choice = plain.post(path, json=BODIES[path] | options).json()["choices"][0]
        return choice.get("text") or choice["message"]["content"]

    nothing = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "stop": [], "logit_bias": {}, "user": "me"}
    nothing |= dict.fromkeys((*WRONG, "tools", "suffix", "unheard_of_too"))
    if "chat" in path:
        nothing |= {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "store": False}
        nothing |= {"logprobs": False, "modalities": ["text"], "metadata": {"a": "b"}, "service_tier": "auto"}
    else:
        nothing |= {"echo": False, "best_of": 1, "suffix": ""}
    kept = {key: value for key, value in nothing.items() if key not in ("max_tokens", "temperature")}
    assert content(**kept) == content()


def test_texts_of_a_message_may_come_in_parts(plain):
    def answer(*messages):
        answer = plain.post(PATHS[0], json=BODIES[PATHS[0]] | {"messages": messages, "max_tokens": 20})
        return answer.json()["choices"][0]["message"]["content"]

    parts = [{"type": "text", "text": part} for part in ("the quick", "brown fox")]
    assert answer({"role": "user", "content": parts}) == answer({"role": "user", "content": "the quick brown fox"})
    assert answer({"role": "developer", "content": "be"}, SAY) == answer({"role": "system", "content": "be"}, SAY)
    assert answer({"role": "user", "content": "be"}, SAY) != answer({"role": "system", "content": "be"}, SAY)


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_no_json_object_is_refused(plain, path):
    good = json.dumps(BODIES[path]).encode()
    deep = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bodies = [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"a"',
        good[:-1],
        good + b"x",
        b"\xff" + good,
        good.replace(b"quick", b"\xff\xfe"),
    ]
    bodies += [good.decode().encode("utf-16"), deep, b"[" * 100_000, b'{"a":' * 100_000]
    bodies += [
        good.replace(b'"max_tokens": 3', b'"max_tokens": ' + number) for number in (b"NaN", b"9" * 10_000, b"1e999")
    ]
    bodies += [
        good.replace(b'"temperature": 0', b'"temperature": ' + number) for number in (b"NaN", b"-Infinity", b"1e999")
    ]
    bodies += [
        good.replace(b"quick", half) for half in (rb"\ud800", rb"\udc00 ", rb"\ud800\ud800")
    ]  # of surrogate pairs
    for body in bodies:
        refused(plain.post(path, content=body, headers={"content-type": "application/json"}), 400)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
        refused(plain.post(path, content=good, headers={"content-type": kind}), 415)
    refused(plain.post(path, content=good), 415)
    assert (
        plain.post(path, content=good, headers={"content-type": "Application/JSON; charset=utf-8"}).status_code == 200
    )


def test_paths_and_methods_are_refused_in_the_same_form(plain):
    refused(plain.get(PATHS[0]), 405)
    for path in ("/v1/responses", "/v1/embeddings", "/load_model", "/reset", "/v1/models/other", "/"):
        refused(plain.get(path), 404)
    refused(plain.post("/load_model", json={"model": "gpt2"}), 404)
    assert plain.get("/v1/models/m").json() == plain.get("/v1/models").json()["data"][0]
    assert plain.get("/health").json() == {"status": "ok", "requests": 0}


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 2**31, 2**63, 10**40, 0.5, 1e-300, 1e308]),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(["user", "assistant", "tool", "text", "image_url", "m", "auto", "{{ 1 }}", "\ud800", "\0"]),
)
NAMES = st.sampled_from(sorted({*WRONG, *OF_CHATS, *OF_COMPLETIONS, "role", "content", "type", "text", "a"}))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=3)
)


def places(value, place=()):
    """All places in a body that hold something."""
    yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*place, key))


@st.composite
def damaged(draw):
    """A path, and a body for it of which some places are damaged."""
    path = draw(st.sampled_from(PATHS))
    body = json.loads(json.dumps(BODIES[path] | {"stream": draw(st.booleans()), "stop": ["zz"], "seed": 1}))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([place for place in places(body) if place]))
        holder = body
        for step in way:
            holder = holder[step]
        match draw(st.sampled_from(["replace", "drop", "add", "known"])):
            case "replace":
                holder[last] = draw(VALUES)
            case "drop":
                del holder[last]
            case "add" if isinstance(holder, dict):
                holder[draw(NAMES)] = draw(VALUES)
            case _:
                body[draw(NAMES)] = draw(VALUES)
        if not body:
            break
    raw = json.dumps(body).encode()
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(raw) - 1))
        raw = raw[:place] + draw(st.binary(max_size=3)) + raw[place + draw(st.integers(0, 3)) :]
    return path, raw


@pytest.fixture(scope="module")
def small():
    """A client of a model with so few positions that no answer is long."""
    return plain_client(make_app(make_model(max_position_embeddings=80)))


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_any_damage_to_a_body_is_an_answer_or_a_reason(small, damage):
    path, body = damage
    answer = small.post(path, content=body, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        refused(answer)
    elif re.match("text/event-stream", answer.headers["content-type"]):
        assert '"error"' not in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")
