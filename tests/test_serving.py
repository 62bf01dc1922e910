"""The server is asked by the official client; what it answers is held against `model.generate` on the same tokens."""

import signal
import socket
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from fastapi.testclient import TestClient

from masformer import AttentionPlan, FullSpan, SpanCache, apply_plan, cli, load_model, save_model, serving
from tiny import PLAN, letter_tokenizer, tiny

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
LETTERS = string.ascii_letters + string.digits + "<>.,Ġ"
FULL = AttentionPlan.uniform(4, FullSpan())
PROMPT = "the quick brown fox jumps over the lazy dog"
CHAT = [{"role": "user", "content": PROMPT}]
LENGTH = 40  # of an answer: several times every window


def make_model(kind, **changes):
    """A tiny model whose greedy answers depend on far tokens, and never end by themselves."""
    model = tiny(kind, vocab_size=len(LETTERS), eos_token_id=None, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def make_tokenizer(template=TEMPLATE):
    return letter_tokenizer(LETTERS, chat_template=template)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock model with a byte-level tokenizer, as people have it."""
    path = tmp_path_factory.mktemp("served") / "model"
    make_model("llama", sliding_window=None, max_position_embeddings=256).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def server(folder):
    """The command itself; gives its address."""
    command = [sys.executable, "-m", "masformer", "serve", folder, "--plan", str(PLAN), "--port", "0", "--name", "m"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        try:
            assert line.startswith(f"m with {PLAN}: http://127.0.0.1:"), line + process.stderr.read()
            yield line.split()[-1]
        finally:
            process.send_signal(signal.SIGINT)
            errors = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server, api_key="none", max_retries=0) as found:
        yield found


def client_of(app):
    """A client of an application in this process."""
    return openai.OpenAI(
        base_url="http://testserver/v1",
        api_key="none",
        max_retries=0,
        http_client=TestClient(app, follow_redirects=True),
    )


def generated(model, tokenizer, prompt, max_new_tokens=LENGTH):
    """The greedy answer of the model itself."""
    tokens = (
        tokenizer(prompt, return_tensors="pt")
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    )
    out = model.generate(**tokens, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(client, messages=CHAT, name="m", **options):
    options = {"temperature": 0, "max_tokens": LENGTH} | options
    return client.chat.completions.create(model=name, messages=messages, **options).choices[0].message.content


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


def test_an_answer_ends_where_it_is_told_to(client, expected):
    assert chat(client, max_tokens=None, max_completion_tokens=7) == expected[0][:7]
    stop = expected[1][10:12]
    assert complete(client, stop=stop) == expected[1][: expected[1].index(stop) + 2]


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
    with pytest.raises(openai.BadRequestError, match="pinned to 'm'; requested 'other'"):
        chat(client, name="other")
    with pytest.raises(openai.BadRequestError, match="the prompt has 300 tokens, and the model 256 positions"):
        complete(client, "a" * 300)
    with pytest.raises(openai.BadRequestError, match="the prompt has 300 tokens"):
        complete(client, "a" * 300, stream=True)
    with pytest.raises(openai.BadRequestError, match="the prompt holds no token"):
        complete(client, "")
    with pytest.raises(openai.BadRequestError, match="StaticCache"):
        complete(client, extra_body={"generation_config": '{"cache_implementation": "static", "max_new_tokens": 4}'})
    for field, value in {"n": 2, "echo": True, "logprobs": 1, "presence_penalty": 0.5, "logit_bias": {"3": 1}}.items():
        with pytest.raises(openai.BadRequestError, match=f"{field} .* is not supported"):
            complete(client, **{field: value})
    with pytest.raises(openai.BadRequestError, match=r"response_format .* is not supported"):
        chat(client, response_format={"type": "json_object"})
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="m", input="hello")


def test_an_answer_ends_with_the_positions_of_the_model():
    model, tokenizer = apply_plan(make_model("gpt2"), PLAN), make_tokenizer()
    answer = client_of(serving.build_app(model, tokenizer, "m")).completions.create(
        model="m", prompt="a" * 100, temperature=0
    )
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (128, "length")


def test_every_request_has_a_span_cache_of_its_own():
    model, caches = apply_plan(make_model("llama", sliding_window=None), PLAN), []
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
    with pytest.raises(openai.BadRequestError, match="chat_template"):
        chat(client)
    assert complete(client) == expected[1]


@pytest.mark.pretrained
def test_a_real_model_answers(smollm2):
    model, tokenizer = apply_plan(smollm2[0], AttentionPlan.parse("full@11-18; window:16+4", 30)), smollm2[1]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = chat(client_of(serving.build_app(model, tokenizer, "m")), messages)
    assert answer == generated(model, tokenizer, messages)
    assert "Paris" in answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf"], "model file missing.gguf does not exist"),
        (["MODEL", "--plan", "full", "--plan", "window:4"], "a server has one plan; give one --plan"),
        (["MODEL", "--plan", "window:0"], "window size must be at least 1, got 0"),
        (["MODEL", "--port", "PORT"], "cannot listen on 127.0.0.1, port PORT: Address already in use"),
        (["MODEL", "--port", "70000"], "cannot listen on 127.0.0.1, port 70000: "),
        (["MODEL", "--host", "no host"], "cannot listen on no host, port 8000: "),
        (["MODEL", "--port", "x"], "--port 'x' is not allowed; allowed: a whole number"),
        (["BARE", "--port", "0"], "has no tokenizer"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(capsys, folder, tmp_path, arguments, message):
    tiny("llama").save_pretrained(tmp_path / "bare")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        places = {"MODEL": folder, "BARE": str(tmp_path / "bare"), "PORT": port}
        assert cli.main(["serve", *(places.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message.replace("PORT", port) in error
    assert error.startswith("masformer: error: ")
    assert error.count("\n") == 1


def test_a_missing_package_is_named_with_how_to_install_it(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve", folder]) == 2
    expected = "masformer: error: masformer serve needs fastapi: pip install 'masformer[serve]'\n"
    assert capsys.readouterr().err == expected
