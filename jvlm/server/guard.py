"""What every request passes before a route sees it: host, origin, key, size and time limits. Plain ASGI."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from jvlm.server.errors import APIError
from jvlm.server.keys import KeyRing
from jvlm.server.settings import ServerSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_ROUTES = frozenset({"/health", "/ping"})
PAGE_ROUTES = frozenset({"/"})
_SAFE_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class AnswerCut(Exception):
    """An answer cannot go on: nobody reads it, or nobody writes it any more."""


class Guard:
    """Wraps the application.

    Args:
      log: takes a line for each request: id, name of the key, route, status, times; nothing that was sent.
    """

    def __init__(self, app: App, settings: ServerSettings, ring: KeyRing, log: Callable[[str], None] | None = None):
        self._app, self._settings, self._ring = app, settings, ring
        self._log = log or (lambda line: print(line, file=sys.stderr))
        self._hosts = frozenset(name.lower() for name in settings.hosts)
        self._origins = frozenset(origin.encode() for origin in settings.cors_origins)
        self._logs = log is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection's event, as ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        request = _Request(scope, receive, send, self._settings)
        began = time.monotonic()
        try:
            owner = self._admit(scope, request)
            if owner is None:
                return await request.answer(204, b"", self._preflight(request))
            scope["state"] = {**scope.get("state", {}), "owner": owner, "id": request.id, "send": request.send}
            request.extra += self._cors(request)
            await self._app(scope, request.receive, request.send)
        except APIError as error:
            await request.fail(error)
        except asyncio.CancelledError:
            raise
        except (AnswerCut, ClientDisconnect):
            return  # uvicorn closes a connection whose answer is not whole
        except Exception:  # noqa: BLE001  (a bug ends this request alone; the log has where it is)
            traceback.print_exc()
            await request.fail(APIError(500, f"internal error, id {request.id}"))
        finally:
            request.end()
            if self._logs:
                owner = scope.get("state", {}).get("owner", "-")
                seconds = time.monotonic() - began
                self._log(f"{request.id} {owner} {_route(scope)} {request.status} {seconds:.3f}s")

    def _admit(self, scope: Scope, request: _Request) -> str | None:
        """Return the owner of the request's key; None for a browser's question whether it may ask. Raises APIError."""
        host = request.headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts and re.sub(r":[0-9]{1,5}$", "", host) not in self._hosts:
            raise APIError(403, "this Host is not served")
        origin = request.headers.get(b"origin")
        if scope["method"] == "OPTIONS" and origin is not None and b"access-control-request-method" in request.headers:
            if origin not in self._origins:
                raise APIError(403, "this origin is not allowed")
            return None
        path = scope["path"]
        if path in OPEN_ROUTES or path in PAGE_ROUTES:
            return "-"
        owner = self._ring.owner(request.headers.get(b"authorization"))
        if owner is None:
            raise APIError(401, "a valid key is needed", headers={"www-authenticate": "Bearer"})
        return owner

    def _cors(self, request: _Request) -> list[tuple[bytes, bytes]]:
        origin = request.headers.get(b"origin")
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")] if origin in self._origins else []

    def _preflight(self, request: _Request) -> list[tuple[bytes, bytes]]:
        allow = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
        ]
        return [*self._cors(request), *allow]


def _route(scope: Scope) -> str:
    """Return the method and route of the log, without what a caller could write into it."""
    route = scope.get("route")
    path = getattr(route, "path", "unknown route")
    method = scope["method"] if scope["method"] in ("GET", "POST", "PUT", "OPTIONS", "HEAD") else "?"
    return f"{method} {path}"


class _Request:
    """One request: its body counted and timed, its answer with headers of the server."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: ServerSettings):
        self.id = uuid.uuid4().hex
        self.headers = dict(reversed(scope["headers"]))
        self.extra: list[tuple[bytes, bytes]] = [(b"x-request-id", self.id.encode())]
        self.status = 0
        self._receive, self._send, self._limits = receive, send, settings.limits
        self._deadline = time.monotonic() + settings.limits.body_seconds
        self._size, self._whole = 0, False
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._sending_since: float | None = None
        self._gone = False
        length = self.headers.get(b"content-length", b"0")
        self._announced = int(length) if length.isdigit() and len(length) < 20 else 0

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next part of the body; once it is whole, what the connection tells."""
        if self._whole:
            return await self._receive()
        if self._announced > self._limits.body_bytes:
            raise self._too_large()
        try:
            message = await asyncio.wait_for(self._receive(), max(self._deadline - time.monotonic(), 0.001))
        except TimeoutError:
            raise APIError(408, "the body did not arrive in time", headers={"connection": "close"}) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limits.body_bytes:
                raise self._too_large()
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a part of the answer. Raises AnswerCut where nobody reads it for too long."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name for name, _ in message["headers"]}
            safe = [header for header in _SAFE_HEADERS if header[0] not in names]
            message = {**message, "headers": [*message["headers"], *self.extra, *safe]}
            if self._timer is None:
                self._watch()
        self._sending_since = time.monotonic()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            self._task.uncancel()
            raise AnswerCut from None
        finally:
            self._sending_since = None

    def _watch(self) -> None:
        """Look now and then whether a part of the answer waits for too long: cheaper than a timeout for each part."""
        since, most = self._sending_since, self._limits.write_seconds
        if since is not None and time.monotonic() - since >= most:
            self._gone = True
            self._task.cancel()
        else:
            self._timer = asyncio.get_running_loop().call_later(most, self._watch)

    def end(self) -> None:
        """Stop looking."""
        if self._timer is not None:
            self._timer.cancel()

    async def fail(self, error: APIError) -> None:
        """Answer with an error, unless the answer has begun."""
        if self.status:
            return
        headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        if not self._whole:  # what is left of the body is not read
            headers.append((b"connection", b"close"))
        await self.answer(error.status, json.dumps(error.body).encode(), headers)

    async def answer(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer with JSON."""
        length = [(b"content-length", str(len(body)).encode())]
        kind = [(b"content-type", b"application/json")] if body else []
        names = {name for name, _ in headers}
        unique = [header for header in (*kind, *length) if header[0] not in names]
        await self.send({"type": "http.response.start", "status": status, "headers": [*unique, *headers]})
        await self.send({"type": "http.response.body", "body": body})

    def _too_large(self) -> APIError:
        return APIError(
            413, f"the body is larger than {self._limits.body_bytes} bytes", headers={"connection": "close"}
        )
