"""`masformer serve` on the command line."""

import socket
import sys

import pytest

from masformer import cli, serving
from served import BODIES, PATHS, plain_client, refused
from tiny import PLAN, tiny


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf"], "model file missing.gguf does not exist"),
        (["MODEL", "--plan", "full", "--plan", "window:4"], "--plan is given twice; serve takes one"),
        (["MODEL", "--plan", "window:0"], "window size must be at least 1, got 0"),
        (["MODEL", "--port", "PORT"], "cannot listen on 127.0.0.1, port PORT: Address already in use"),
        (["MODEL", "--port", "70000"], "cannot listen on 127.0.0.1, port 70000: "),
        (["MODEL", "--host", "no host"], "cannot listen on no host, port 8000: "),
        (["MODEL", "--port", "x"], "--port 'x' is not allowed; allowed: a whole number"),
        (["MODEL", "--queue", "-1"], "--queue must be at least 0, got -1"),
        (["MODEL", "--port", "0", "--api-key", "a b"], "the API key must be"),
        (["MODEL", "--port", "0", "--api-key", ""], "the API key must be"),
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


def test_the_key_and_the_queue_reach_the_server(folder, monkeypatch, capsys):
    apps = []
    monkeypatch.setattr(serving, "run", lambda app, listener: apps.append(app))
    command = ["serve", folder, "--plan", str(PLAN), "--port", "0", "--name", "m"]
    monkeypatch.setenv("MASFORMER_API_KEY", "from-the-environment")
    assert cli.main(command) == 0
    assert cli.main([*command, "--api-key", "from-the-command"]) == 0
    monkeypatch.delenv("MASFORMER_API_KEY")
    assert cli.main(command) == 0
    assert "from-the" not in "".join(capsys.readouterr())
    for app, key in zip(apps, ("from-the-environment", "from-the-command", None), strict=True):
        body, client = BODIES[PATHS[1]], plain_client(app)
        if key is not None:
            refused(client.post(PATHS[1], json=body), 401)
            client.headers["authorization"] = f"Bearer {key}"
        assert client.post(PATHS[1], json=body).status_code == 200
