"""One address for several engines (data parallel): each request goes to one of them, its answer comes through.

Every request is checked here (`jvlm.server.guard`), and again by the engine's own server, which gets the same headers
and body.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

from jvlm.server import stream
from jvlm.server.backend_client import BackendAnswer, BackendFailed, Headers, fetch
from jvlm.server.errors import APIError
from jvlm.server.guard import AnswerCut, App, Guard, Receive, Scope, Send
from jvlm.server.keys import KeyRing
from jvlm.server.metrics import CONTENT_TYPE
from jvlm.server.routing import Backend, Router, keys_of
from jvlm.server.settings import KeyLimits, ServerSettings

_POLL_SECONDS = 1.0
_TRIES = 3
# of one connection, and what the guard writes itself
_OF_CONNECTION = frozenset(
    b"host connection keep-alive transfer-encoding content-length te trailer upgrade expect proxy-connection".split()
)
_OF_GUARD = frozenset(
    b"x-request-id x-content-type-options cache-control access-control-allow-origin vary date server".split()
)
_ON_ALL = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_ROUTES = _ON_ALL | frozenset(
    "/ /health /ping /metrics /load /version /v1/models /v1/chat/completions /v1/completions /v1/responses /tokenize "
    "/detokenize /openapi.json".split()
)
_ENGINE = re.compile(r'engine="[0-9]+"')


class Front:
    """The ASGI application before several backends.

    Args:
      router: chooses among them.
    """

    def __init__(self, router: Router):
        self.router = router
        self._poller: asyncio.Task | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it. Raises APIError."""
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        path = scope["path"]
        if path in _ROUTES:
            scope["route"] = types.SimpleNamespace(path=path)  # what the log calls it
        if path in ("/health", "/ping"):
            return await _answer(send, 200 if any(one.healthy for one in self.router.backends) else 503, b"")
        if path == "/metrics":
            return await _answer(send, 200, await self._metrics(_passed(scope)), CONTENT_TYPE)
        if path == "/load":
            load = {"server_load": sum(one.in_flight for one in self.router.backends)}
            return await _answer(send, 200, json.dumps(load).encode(), "application/json")
        body = await _body(receive)
        if path in _ON_ALL:
            return await self._on_all(scope, body, send)
        await self._forward(scope, body, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._poller = asyncio.ensure_future(self._poll())
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                self._poller.cancel()
                return await send({"type": "lifespan.shutdown.complete"})

    async def _poll(self) -> None:
        """Look again and again which backends are healthy."""
        while True:
            await asyncio.gather(*map(self._look, self.router.backends))
            await asyncio.sleep(_POLL_SECONDS)

    async def _look(self, backend: Backend) -> None:
        try:
            backend.healthy = (await fetch(backend.url, "/health"))[0] == 200
        except BackendFailed:
            backend.healthy = False

    async def _forward(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        keys = keys_of(body) if scope["method"] == "POST" else ()
        tried: list[Backend] = []
        while True:
            backend = self.router.choose(keys, tried)
            if backend is None or len(tried) == _TRIES:
                raise APIError(503, "no engine is ready", headers={"retry-after": "5"})
            backend.in_flight += 1
            try:
                async with _asked(backend, scope, body, receive) as answer:
                    if answer is not None:
                        await _pass_on(answer, send)
                return
            except BackendFailed:  # before its answer began: another one may answer
                backend.healthy = False
                tried.append(backend)
            finally:
                backend.in_flight -= 1

    async def _on_all(self, scope: Scope, body: bytes, send: Send) -> None:
        """Ask all backends; the first that refuses decides the answer."""
        path, headers = _path(scope), _passed(scope)
        try:
            answers = []
            for backend in self.router.backends:
                with await BackendAnswer.ask(backend.url, scope["method"], path, headers, body) as answer:
                    answers.append((answer.status, await answer.body()))
        except BackendFailed:
            raise APIError(503, "an engine cannot be reached; ask again") from None
        refused = [one for one in answers if one[0] >= 400]
        status, content = (refused or answers)[0]
        await _answer(send, status, content, "application/json")

    async def _metrics(self, headers: Headers) -> bytes:
        """Return the metrics of all backends, told apart by their label ``engine``."""
        found = await asyncio.gather(
            *(fetch(backend.url, "/metrics", headers) for backend in self.router.backends), return_exceptions=True
        )
        texts = [(k, one[1].decode()) for k, one in enumerate(found) if isinstance(one, tuple) and one[0] == 200]
        return joined_metrics(texts).encode()


def joined_metrics(texts: list[tuple[int, str]]) -> str:
    """Return Prometheus' texts of several engines as one: the samples of a metric stand together."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for number, text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
            if line.startswith("#"):
                if line not in heads.setdefault(name, []):
                    heads[name].append(line)
            elif line:
                samples.setdefault(name, []).append(_ENGINE.sub(f'engine="{number}"', line))
    lines = [line for name, head in heads.items() for line in (*head, *samples.get(name, ()))]
    return "\n".join(lines) + "\n"


@contextlib.asynccontextmanager
async def _asked(backend: Backend, scope: Scope, body: bytes, receive: Receive) -> AsyncIterator[BackendAnswer | None]:
    """Yield the backend's answer; None where the client has gone meanwhile, so that nobody waits for it."""
    asking = asyncio.ensure_future(BackendAnswer.ask(backend.url, scope["method"], _path(scope), _passed(scope), body))
    open_answer: BackendAnswer | None = None
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        asking.cancel()
        if open_answer is not None:
            open_answer.close()

    try:
        async with stream.watching(receive, leave):
            try:
                open_answer = await asking
            except asyncio.CancelledError:
                if not gone:
                    raise
                yield None
                return
            with open_answer:
                yield open_answer
    finally:
        asking.cancel()


async def _pass_on(answer: BackendAnswer, send: Send) -> None:
    headers = [one for one in answer.headers if one[0] not in _OF_CONNECTION | _OF_GUARD]
    headers += [one for one in answer.headers if one[0] in (b"content-length", b"cache-control")]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    try:
        async for piece in answer.pieces():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except BackendFailed:
        if (b"content-type", stream.HEADERS[0][1]) not in answer.headers:
            raise AnswerCut from None
        failed = stream.event(APIError(503, "the engine has stopped").body) + stream.DONE
        await send({"type": "http.response.body", "body": failed, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(receive: Receive) -> bytes:
    pieces, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


def _path(scope: Scope) -> str:
    raw, query = scope.get("raw_path") or scope["path"].encode(), scope.get("query_string", b"")
    return (raw + (b"?" + query if query else b"")).decode("latin-1")


def _passed(scope: Scope) -> Headers:
    return [header for header in scope["headers"] if header[0] not in _OF_CONNECTION]


async def _answer(send: Send, status: int, body: bytes, kind: str | None = None) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    headers += [] if kind is None else [(b"content-type", kind.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def build(urls: list[str], settings: ServerSettings, *, log: Callable[[str], None] | None = None) -> App:
    """Return the application before the servers at some addresses."""
    ring = KeyRing(settings.keys, KeyLimits())
    app: Any = Front(Router(urls))
    return Guard(app, settings, ring, log)
