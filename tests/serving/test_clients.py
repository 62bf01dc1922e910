"""Many clients, those that leave, those that send too much, and those without a key."""

import http.client
import json
import threading

import openai
import pytest

from masformer import MasformerError
from served import (
    BODIES,
    PATHS,
    client_of,
    events_of,
    listening,
    make_app,
    make_model,
    plain_client,
    refused,
    wait_until,
)


class Gate:
    """A model that waits before each pass until it is let through, and counts its passes."""

    def __init__(self, **changes):
        self.model, self.passes, self.open = make_model(**changes), 0, threading.Event()
        self.model.register_forward_pre_hook(self._pass)

    def _pass(self, *given):
        self.passes += 1
        assert self.open.wait(120)


def send(address, path, **options):
    """Sends a request, and leaves its answer on the way."""
    link = http.client.HTTPConnection(*address, timeout=120)
    link.request("POST", path, json.dumps(BODIES[path] | options), {"content-type": "application/json"})
    return link


def answer_of(link):
    response = link.getresponse()
    return response.status, response.read().decode(), response.headers


def under_way(address):
    link = http.client.HTTPConnection(*address, timeout=120)
    link.request("GET", "/health")
    return json.loads(answer_of(link)[1])["requests"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_frees_the_machine(path, stream):
    gate, many = Gate(max_position_embeddings=100_000), 50_000
    gate.open.set()
    with listening(make_app(gate.model)) as address:
        link = send(address, path, max_tokens=many, stream=stream)
        wait_until(lambda: gate.passes > 2)
        if stream:
            link.getresponse().read(100)
        link.close()
        wait_until(lambda: under_way(address) == 0)
        assert gate.passes < many
        assert answer_of(send(address, path))[0] == 200


def test_a_client_that_leaves_while_a_long_prompt_is_read_frees_the_machine(monkeypatch):
    monkeypatch.setattr("masformer.serving.worker.CHUNK", 8)
    gate = Gate(max_position_embeddings=1000)
    with listening(make_app(gate.model)) as address:
        link = send(address, PATHS[1], prompt="a" * 800)
        wait_until(lambda: gate.passes == 1)
        link.close()
        others = send(address, PATHS[1])
        wait_until(lambda: under_way(address) == 2)
        gate.open.set()
        assert answer_of(others)[0] == 200
    assert gate.passes < 100


def test_clients_are_answered_in_turn_and_the_queue_has_an_end():
    gate = Gate()
    with listening(make_app(gate.model, waiting=2)) as address:
        links = []
        for number in range(3):
            links.append(send(address, PATHS[number % 2], max_tokens=number + 1))
            wait_until(lambda: under_way(address) == len(links))
        for stream in (False, True):
            status, body, headers = answer_of(send(address, PATHS[0], stream=stream))
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(body)["error"]["code"] == "overloaded"
        links[1].close()  # gives its place away, though the machine is busy
        wait_until(lambda: under_way(address) == 2)
        links[1] = send(address, PATHS[0], max_tokens=2)
        wait_until(lambda: under_way(address) == 3)
        assert gate.passes == 1
        gate.open.set()
        answers = [answer_of(link) for link in links]
        assert [status for status, *_ in answers] == [200] * 3
        assert [json.loads(body)["usage"]["completion_tokens"] for _, body, _ in answers] == [1, 2, 3]
        wait_until(lambda: under_way(address) == 0)
    assert gate.passes == 1 + 3 + 2  # none for the client that left


def test_openai_clients_read_that_the_queue_is_full():
    gate = Gate()
    with listening(make_app(gate.model, waiting=0)) as (host, port):
        link = send((host, port), PATHS[1])
        wait_until(lambda: gate.passes == 1)
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.InternalServerError, match="try again later"):
            client.completions.create(**BODIES[PATHS[1]])
        gate.open.set()
        assert answer_of(link)[0] == 200


def test_the_server_ends_though_an_answer_is_under_way():
    gate, many = Gate(max_position_embeddings=100_000), 50_000
    gate.open.set()
    with listening(make_app(gate.model)) as address:
        links = [send(address, PATHS[0], max_tokens=many, stream=True), send(address, PATHS[1], max_tokens=many)]
        wait_until(lambda: gate.passes > 2 and under_way(address) == 2)
    assert gate.passes < many
    for link in links:
        link.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_body_has_a_longest_size(path):
    body = json.dumps(BODIES[path]).encode()
    client = plain_client(make_app(max_bytes=len(body)))
    kind = {"content-type": "application/json"}
    assert client.post(path, content=body, headers=kind).status_code == 200
    assert "longer than" in refused(client.post(path, content=body + b" ", headers=kind), 413)["message"]
    parts = iter([body, b" " * 10])  # no length is announced
    refused(client.post(path, content=parts, headers=kind), 413)
    with listening(make_app(max_bytes=1000)) as address:
        assert answer_of(send(address, path, user="a" * 5000))[0] == 413


def test_a_key_is_asked_for_everywhere_but_at_the_health():
    app, key = make_app(api_key="secret"), {"authorization": "Bearer secret"}
    client = plain_client(app)
    asks = [("post", path, {"json": body}) for path, body in BODIES.items()]
    asks += [("post", path, {"content": b"{"}) for path in PATHS]  # nothing is read without the key
    asks += [("get", "/v1/models", {}), ("get", "/v1/models/m", {}), ("get", "/v1/models/other", {})]
    wrong = ["", "secret", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Bearer SECRET", "Basic secret"]
    wrong += ["Bearer  secret", "Bearer sécret".encode("latin-1"), "Bearer sécret".encode()]
    for method, path, options in asks:
        for value in (None, *wrong):
            headers = {} if value is None else {"authorization": value}
            answer = getattr(client, method)(path, headers=headers, **options)
            assert refused(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for method, path, options in asks[:2] + asks[4:6]:
        assert getattr(client, method)(path, headers=key, **options).status_code == 200
    assert client.get("/v1/models", headers={"authorization": "bearer secret"}).status_code == 200
    assert client.get("/health").status_code == 200
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client_of(app, "other").completions.create(**BODIES[PATHS[1]])
    assert client_of(app, "secret").models.list().data[0].id == "m"
    stream = client.post(PATHS[0], json=BODIES[PATHS[0]] | {"stream": True}, headers=key)
    assert events_of(stream.text)


@pytest.mark.parametrize("options", [{"api_key": ""}, {"api_key": "a b"}, {"api_key": "schlüssel"}, {"waiting": -1}])
def test_options_of_the_application_are_checked(options):
    with pytest.raises(MasformerError):
        make_app(**options)
