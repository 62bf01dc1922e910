"""`masformer serve`."""

from __future__ import annotations

from importlib.util import find_spec

from masformer.cli.options import ModelOptions, console
from masformer.errors import MasformerError
from masformer.models.checkpoint import load_config

PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")


def serve(
    model: str,
    options: ModelOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
) -> None:
    """Serves a model to OpenAI clients (chat, completions), through transformers' own server.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        name: what clients call the model (default: MODEL).

    Example:
        masformer serve MODEL --plan 'full@11-18; window:512+4' --port 8000 --name mixed
    """
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise MasformerError(f"masformer serve needs {', '.join(missing)}: pip install 'masformer[serve]'")
    from masformer import serving  # here, for it needs these packages

    chosen = options.one(load_config(model)[1], "a server")
    with serving.listen(host, port) as listener:
        app = serving.build_app(*options.load(model, chosen), name or model)
        address, bound = listener.getsockname()[:2]
        where = f"[{address}]" if ":" in address else address
        console.print(f"{name or model} with {chosen}: http://{where}:{bound}/v1", markup=False, soft_wrap=True)
        serving.run(app, listener)
