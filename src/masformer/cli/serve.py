"""`masformer serve`."""

from __future__ import annotations

import os

from masformer.cli.options import OneModelOptions, console
from masformer.errors import check_int
from masformer.extras import need


def serve(
    model: str,
    options: OneModelOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    queue: int = 16,
    compile: bool = False,
) -> None:
    """Serves a model to OpenAI clients (chat, completions), one request after the other.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        name: what clients call the model (default: MODEL).
        api_key: what clients must bring (default: MASFORMER_API_KEY of the environment, which other users do not see).
        queue: requests that may wait while one is answered; more are told to try again.
        compile: on an NVIDIA GPU, compile what a token does beside attention: some seconds once, faster from the
            ninth token on.

    Example:
        masformer serve MODEL --plan 'full@11-18; window:512+4' --port 8000 --name mixed
    """
    need("serve", "masformer serve")
    from masformer import serving
    from masformer.models.checkpoint import load_config
    from masformer.models.graphs import compile_tokens

    key = os.environ.get("MASFORMER_API_KEY") if api_key is None else api_key
    check_int("--queue", queue, 0)
    chosen = options.one(load_config(model)[1])
    with serving.listen(host, port) as listener:
        loaded, tokenizer = options.load(model, chosen)
        if compile:
            compile_tokens(loaded)
        app = serving.build_app(loaded, tokenizer, name or model, api_key=key, waiting=queue)
        address, bound = listener.getsockname()[:2]
        where = f"[{address}]" if ":" in address else address
        console.print(f"{name or model} with {chosen}: http://{where}:{bound}/v1", markup=False, soft_wrap=True)
        serving.run(app, listener)
