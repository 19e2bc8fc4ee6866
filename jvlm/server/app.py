"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

import jvlm
from jvlm.server import metrics, responses
from jvlm.server.adapters import AdapterAdmin
from jvlm.server.chat import chat
from jvlm.server.completions import completions
from jvlm.server.errors import APIError, bad
from jvlm.server.guard import App, Guard
from jvlm.server.page import chat_page
from jvlm.server.progress import tell_progress
from jvlm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    ResponsesRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from jvlm.server.reading import json_only, parse_json, validated
from jvlm.server.service import Service
from jvlm.server.tools import check_tools

T = TypeVar("T", bound=BaseModel)
_WITH_IDS = ("/v1/completions", "/detokenize")


def build(service: Service, *, log: Callable[[str], None] | None = None, admin: AdapterAdmin | None = None) -> App:
    """Return the application of a service, whose engine starts and stops with it.

    Args:
      log: takes a line for each request.
      admin: loads adapters; None has no routes for that.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        telling = asyncio.ensure_future(tell_progress(service.engine, service.settings.log_interval))
        try:
            yield
        finally:
            telling.cancel()
            await service.engine.close()
            service.close()

    app = FastAPI(title="jvlm", version=jvlm.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.redirect_slashes = False
    _generation(app, service)
    _models(app, service)
    _tokens(app, service)
    _state(app, service)
    if admin is not None:
        _adapters(app, service, admin)
    if service.settings.page:
        _page(app)

    @app.exception_handler(StarletteHTTPException)
    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> Response:
        texts = {404: "no such route", 405: "this route has another method"}
        return _error(APIError(error.status_code, texts.get(error.status_code, "the request cannot be answered")))

    @app.exception_handler(APIError)
    async def api_error(_: Request, error: APIError) -> Response:
        return _error(error)

    return Guard(app, service.settings, service.ring, log)


def _error(error: APIError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    """Return what OpenAPI says of a body that the route reads itself."""
    schema = {"schema": kind.model_json_schema(ref_template="#/components/schemas/{model}")}
    schema["schema"].pop("$defs", None)
    return {"openapi_extra": {"requestBody": {"required": True, "content": {"application/json": schema}}}}


async def _read(service: Service, request: Request, kind: type[T]) -> T:
    """Return the body of a request. Raises APIError."""
    json_only(request.headers.get("content-type"))
    limits = service.settings.limits
    nodes = limits.ids if request.url.path in _WITH_IDS else limits.nodes
    value = parse_json(await request.body(), depth=limits.depth, nodes=nodes)
    found = validated(kind, value)
    service.metrics.ignored(found.unknown())
    return found


def _identity(request: Request, prefix: str) -> str:
    return f"{prefix}-{request.scope['state']['id']}"


def _generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body, owner = await _read(service, request, ChatRequest), request.scope["state"]["owner"]
        service.check_ready()
        return await chat(service, body, _identity(request, "chatcmpl"), owner, request.receive)

    @app.post("/v1/completions", **_body(CompletionRequest))
    async def create_completions(request: Request) -> Response:
        body, owner = await _read(service, request, CompletionRequest), request.scope["state"]["owner"]
        service.check_ready()
        return await completions(service, body, _identity(request, "cmpl"), owner, request.receive)

    @app.post("/v1/responses", **_body(ResponsesRequest))
    async def create_response(request: Request) -> Response:
        body, owner = await _read(service, request, ResponsesRequest), request.scope["state"]["owner"]
        service.check_ready()
        return await responses.respond(service, body, _identity(request, "resp"), owner, request.receive)


def _models(app: FastAPI, service: Service) -> None:
    settings = service.settings

    def card(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "jvlm",
            "root": settings.root or settings.model_name,
            "parent": parent,
            "max_model_len": settings.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        cards = [card(name, None) for name in (settings.model_name, *settings.aliases)]
        cards += [card(name, settings.model_name) for name in service.adapters]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(card(name, None if service.adapter_of(name) is None else settings.model_name))


def _tokens(app: FastAPI, service: Service) -> None:
    tokenizer = service.processor.tokenizer

    @app.post("/tokenize", **_body(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        body, owner = await _read(service, request, TokenizeRequest), request.scope["state"]["owner"]
        service.adapter_of(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad("give prompt or messages", "prompt")
        if body.messages is None:
            prompt = await service.completion_prompt(body.prompt)
        else:
            prompt = await service.prompt_of(body, check_tools(body.tools or ()), owner)
        ids = prompt.example.tokens.tolist()
        strings = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        body = {"count": len(ids), "max_model_len": service.facts.max_model_len, "tokens": ids, "token_strs": strings}
        return JSONResponse({**body, **service.sizes_body(prompt)})

    @app.post("/detokenize", **_body(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        body = await _read(service, request, DetokenizeRequest)
        service.adapter_of(body.model)
        if any(i >= service.facts.vocabulary for i in body.tokens):
            raise bad(f"a token id is not below {service.facts.vocabulary}", "tokens")
        text = await service.in_thread(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return JSONResponse({"prompt": text})


def _adapters(app: FastAPI, service: Service, admin: AdapterAdmin) -> None:
    @app.post("/v1/load_lora_adapter", **_body(LoadAdapterRequest))
    async def load(request: Request) -> Response:
        body, owner = await _read(service, request, LoadAdapterRequest), request.scope["state"]["owner"]
        return PlainTextResponse(await admin.load(owner, body.lora_name, body.lora_path))

    @app.post("/v1/unload_lora_adapter", **_body(UnloadAdapterRequest))
    async def unload(request: Request) -> Response:
        body, owner = await _read(service, request, UnloadAdapterRequest), request.scope["state"]["owner"]
        return PlainTextResponse(await admin.unload(owner, body.lora_name))


def _state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        return Response(status_code=200 if service.engine.healthy else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": jvlm.__version__})

    @app.get("/load")
    async def load() -> Response:
        return JSONResponse({"server_load": service.engine.in_flight})


def _page(app: FastAPI) -> None:
    """Add the chat page."""
    text, headers = chat_page()

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(text, headers=dict(headers))
