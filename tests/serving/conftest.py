"""One model folder, and the command that serves it."""

import signal
import subprocess
import sys

import openai
import pytest

from served import make_app, make_model, make_tokenizer, plain_client
from tiny import PLAN


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A stock model with a byte-level tokenizer, as people have it."""
    path = tmp_path_factory.mktemp("served") / "model"
    make_model(max_position_embeddings=256).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
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
            errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=server, api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="session")
def plain():
    """An HTTP client of the application in this process."""
    return plain_client(make_app())
