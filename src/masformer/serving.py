"""One model behind the OpenAI-compatible server of transformers, which calls `model.generate` for every request.

What is added: the model comes loaded, with its plan; a request stays within the positions of the model; what cannot be
done is answered with status 400 and the reason. Transformers' continuous batching stays off, since its paged cache has
attention of its own. Every request starts with an empty cache, so no answer depends on those before it.

To import this module needs the packages of the extra `serve`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState

from masformer.errors import MasformerError
from masformer.models.positions import position_limit

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/load_model", "/health")
"""What is served; the other paths of transformers' server are for other kinds of models, or unload this one."""

OFF: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
}
"""Fields that transformers' server ignores though they change the answer, and the value that asks for nothing."""


def build_app(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> FastAPI:
    """The server's application, for any ASGI server.

    As OpenAI's, it samples unless a request has `temperature` 0.

    Args:
        model: a model with a plan, on its device.
        tokenizer: a fast tokenizer; chats need its chat template.
        name: what clients call the model.

    Raises:
        MasformerError: there is no tokenizer, or no fast one.
    """
    if tokenizer is None:
        raise MasformerError(f"{name} has no tokenizer")
    if not tokenizer.is_fast:
        raise MasformerError(f"{type(tokenizer).__name__} cannot stream text; serving needs a fast tokenizer")
    manager, state = _OneModel(name, model, tokenizer), _OneQueue()
    handlers = {"chat_handler": _Chat, "completion_handler": _Completion}
    arguments: dict[str, Any] = {"model_manager": manager, "generation_state": state}
    for key in inspect.signature(build_server).parameters:  # it has more handlers from version to version
        if key.endswith("_handler"):
            arguments[key] = handlers[key](manager, state) if key in handlers else None
    app: FastAPI = build_server(**arguments)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]

    for kind in (ValueError, HTTPException):
        app.add_exception_handler(kind, _refuse)
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """The reason, where OpenAI's clients look for it."""
    reason, status = (error.detail, error.status_code) if isinstance(error, HTTPException) else (str(error), 400)
    message = " ".join(str(reason).split())
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)


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
    logging.getLogger("transformers.cli.serving").setLevel(logging.WARNING)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    if server.started:
        raise KeyboardInterrupt


class _OneModel(ModelManager):  # type: ignore[misc]
    """Knows one model, under one name."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.force_model = name
        self._served = model, tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(
        self, model_id: str, progress_callback: Any = None, tqdm_class: Any = None, gguf_file: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        name = model_id if gguf_file is None else f"{model_id}:{gguf_file}"
        if name != self.force_model:
            raise MasformerError(f"this server has {self.force_model}, not {name}")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": name, "cached": True})
        return self._served

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "masformer"}]

    get_gen_models = list_models  # its name before transformers 5.24


class _Handler(BaseHandler):  # type: ignore[misc]
    """Refuses what would be ignored, and samples where a temperature would be."""

    off = OFF

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        for field, nothing in self.off.items():
            if body.get(field) and body[field] != nothing:
                raise MasformerError(f"{field} {body[field]!r} is not supported")

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, **options: Any) -> Any:
        sampling = copy.deepcopy(model_generation_config)
        sampling.do_sample = True
        return super()._build_generation_config(body, sampling, **options)


class _Chat(_Handler, ChatCompletionHandler):  # type: ignore[misc]
    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        if body.get("max_completion_tokens") is not None:  # transformers 5.17 reads only the older name
            body["max_tokens"] = body["max_completion_tokens"]


class _Completion(_Handler, CompletionHandler):  # type: ignore[misc]
    off = OFF | {"logit_bias": {}}


class _OneQueue(GenerationState):  # type: ignore[misc]
    """One request after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._manager = _WithinPositions()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._manager


class _WithinPositions(GenerateManager):  # type: ignore[misc]
    """Ends an answer where the positions of the model end; beyond them are garbage or an out-of-range index."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any) -> Any:
        _bound(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, **options)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any
    ) -> Any:
        _bound(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, **options)


def _bound(model: PreTrainedModel, inputs: Any, generation: Any) -> None:
    limit, prompt = position_limit(model.config), inputs["input_ids"].shape[-1]
    if prompt == 0:
        raise MasformerError("the prompt holds no token")
    if limit is None:
        return
    if prompt >= limit:
        raise MasformerError(f"the prompt has {prompt} tokens, and the model {limit} positions for it and its answer")
    asked = generation.max_new_tokens
    if asked is None:
        asked = (generation.max_length or limit) - prompt
    generation.max_new_tokens = min(asked, limit - prompt)
