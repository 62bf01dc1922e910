"""A tiny model that chats, and clients of a server that has it."""

import json
import string
import threading
import time
from contextlib import contextmanager

import openai
import torch
import uvicorn
from fastapi.testclient import TestClient

from masformer import apply_plan, serving
from tiny import PLAN, letter_tokenizer, tiny

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
LETTERS = string.ascii_letters + string.digits + "<>.,Ġ"
PROMPT = "the quick brown fox jumps over the lazy dog"
CHAT = [{"role": "user", "content": PROMPT}]
LENGTH = 40  # of an answer: several times every window
PATHS = ("/v1/chat/completions", "/v1/completions")
BODIES = {
    PATHS[0]: {"model": "m", "messages": CHAT, "max_tokens": 3, "temperature": 0},
    PATHS[1]: {"model": "m", "prompt": PROMPT, "max_tokens": 3, "temperature": 0},
}


def make_model(kind="llama", **changes):
    """A tiny model whose greedy answers depend on far tokens, and never end by themselves."""
    model = tiny(kind, **{"vocab_size": len(LETTERS), "eos_token_id": None, "sliding_window": None} | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def make_tokenizer(template=TEMPLATE, letters=LETTERS):
    return letter_tokenizer(letters, chat_template=template)


def make_app(model=None, template=TEMPLATE, **options):
    """The application of such a model under a plan."""
    model = make_model(max_position_embeddings=256) if model is None else model
    return serving.build_app(apply_plan(model, PLAN), make_tokenizer(template), "m", **options)


def plain_client(app):
    """An HTTP client of an application in this process, which sees status 500 rather than an exception."""
    return TestClient(app, raise_server_exceptions=False)


def client_of(app, key="none"):
    """OpenAI's client of an application in this process."""
    http = TestClient(app, follow_redirects=True)
    return openai.OpenAI(base_url="http://testserver/v1", api_key=key, max_retries=0, http_client=http)


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


@contextmanager
def listening(app):
    """The address of a real server in a thread."""
    listener = serving.listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()


def wait_until(true):
    """Returns once that is so; no test waits so long for what is right."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def events_of(stream):
    """The events of a stream that has ended as it should."""
    lines = [line for line in stream.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert "[DONE]" not in "".join(lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refused(answer, status=None):
    """The error of an answer that is refused in OpenAI's form."""
    assert 400 <= answer.status_code < 500, answer.text
    assert status in (None, answer.status_code)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]
    return error
