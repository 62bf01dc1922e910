"""The way in: routes, the key, the body's size, clients that leave, and a listening socket."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from masformer.errors import MasformerError, check_int
from masformer.models.wrappers import bare_model
from masformer.serving.answers import Answer, ChatAnswer, error_body
from masformer.serving.bodies import Asked, AskedChat, AskedCompletion, RequestError, parse
from masformer.serving.worker import Gone, Job, Worker

WAITING = 16
"""Requests that may wait while one runs."""
MAX_BYTES = 8 * 2**20
"""Of a request's body: more than a million tokens of text."""
CLIENT_LEFT = 499
"""The status that nobody reads."""


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    *,
    api_key: str | None = None,
    waiting: int = WAITING,
    max_bytes: int = MAX_BYTES,
) -> FastAPI:
    """The server's application, for any ASGI server.

    As OpenAI's, it samples unless a request has `temperature` 0.

    Args:
        model: a model with a plan, on its device.
        tokenizer: a fast tokenizer; chats need its chat template.
        name: what clients call the model.
        api_key: what clients must bring as `Authorization: Bearer KEY`; None asks for nothing.
        waiting: requests that may wait while one runs; more are turned away.
        max_bytes: the longest body of a request.

    Raises:
        MasformerError: there is no tokenizer, or no fast one, or a value is out of range.
    """
    model = bare_model(model)
    if tokenizer is None:
        raise MasformerError(f"{name} has no tokenizer")
    if not tokenizer.is_fast:
        raise MasformerError(f"{type(tokenizer).__name__} cannot stream text; serving needs a fast tokenizer")
    check_int("waiting", waiting, 0)
    check_int("max_bytes", max_bytes, 1)
    if api_key is not None and not (api_key and all("!" <= letter <= "~" for letter in api_key)):
        raise MasformerError("the API key must be letters, digits and signs of ASCII, without spaces")
    worker = Worker(model, tokenizer, waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    async def check_key(request: Request) -> None:
        if api_key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secrets.compare_digest(given.encode(), api_key.encode()):
            message = "this server asks for its API key: Authorization: Bearer KEY"
            raise RequestError(message, status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    async def answer(request: Request, kind: Any, form: type[Answer]) -> Response:
        asked = parse(kind, await _body(request, max_bytes))
        _check_name(asked.model, name)
        return await _answer(request, worker.submit(asked), asked, name, form)

    card = {"id": name, "object": "model", "created": 0, "owned_by": "masformer"}
    api = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    @api.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, AskedChat, ChatAnswer)

    @api.post("/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, AskedCompletion, Answer)

    @api.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @api.get("/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        _check_name(asked, name)
        return card

    app = FastAPI(title="masformer", lifespan=lifespan, openapi_url=None)
    app.include_router(api)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": len(worker.jobs)}

    for error in (MasformerError, Gone, HTTPException, Exception):
        app.add_exception_handler(error, _refuse)
    return app


def _check_name(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        message = f"the model {asked!r:.200} is not served here; this server has {name!r}"
        raise RequestError(message, status=404, param="model", code="model_not_found")


async def _body(request: Request, max_bytes: int) -> bytes:
    """The bytes of a JSON body: no other kind, for those a browser sends from any page."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the content type must be application/json, not {kind or 'missing'}", status=415)
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise RequestError(
                    f"the body is longer than {max_bytes} bytes", status=413, headers={"connection": "close"}
                )
    except ClientDisconnect:
        raise Gone from None
    return bytes(body)


async def _answer(request: Request, job: Job, asked: Asked, name: str, form: type[Answer]) -> Response:
    watch = asyncio.create_task(_watch(request, job))
    job.future.add_done_callback(lambda future: job.call(watch.cancel))
    try:
        made = form(asked, name, (await job.began()).prompt_tokens)
        if asked.stream:
            headers = {"cache-control": "no-cache"}
            return StreamingResponse(made.stream(job), media_type="text/event-stream", headers=headers)
        return JSONResponse(await made.whole(job))
    except BaseException:
        job.cancel()
        raise


async def _watch(request: Request, job: Job) -> None:
    """Cancels the job of a client that leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _refuse(request: Request, error: Exception) -> Response:
    status, headers = 500, None
    if isinstance(error, RequestError):
        status, headers = error.status, error.headers
    elif isinstance(error, HTTPException):
        status, headers = error.status_code, error.headers
    elif isinstance(error, (MasformerError, Gone)):
        status = 400 if isinstance(error, MasformerError) else CLIENT_LEFT
    return JSONResponse(error_body(error, status), status_code=status, headers=headers)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        MasformerError: the address cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MasformerError(f"cannot listen on {host}, port {port}: {reason}") from error


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serves until interrupted; a line for each request goes to standard error.

    Raises:
        KeyboardInterrupt: it was; uvicorn does not say so each time.
    """
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    requests = logging.getLogger("uvicorn.access")
    requests.setLevel(logging.INFO)
    for handler in requests.handlers:
        handler.setStream(sys.stderr)  # type: ignore[attr-defined]
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    if server.started:
        raise KeyboardInterrupt
