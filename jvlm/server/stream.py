"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(value: Any, name: str | None = None) -> bytes:
    """Return an event. Everything but ASCII is escaped: some clients end lines at U+0085, U+2028 and U+2029."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


class EventStream(Response):
    """A response that sends events as they come, and stops their source when the client has gone.

    Args:
      source: yields bytes; closed at the end, however that comes.
      abandon: called when the client has gone, so that the source ends.
    """

    def __init__(self, source: AsyncIterator[bytes], abandon: Callable[[], None]):
        super().__init__()
        self._source, self._abandon = source, abandon

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable]
    ) -> None:
        """Answer one request, as ASGI has it."""
        watcher = asyncio.ensure_future(_until_gone(receive, self._abandon))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            # the layers between the guard and here have seen that the answer has begun, and need not see the rest
            send = scope["state"]["send"]
            async with contextlib.aclosing(self._source) as source:
                async for piece in source:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watcher.cancel()
            self._abandon()


async def _until_gone(receive: Callable[[], Awaitable[Any]], abandon: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    abandon()


@contextlib.asynccontextmanager
async def watching(receive: Callable[[], Awaitable[Any]], abandon: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``abandon`` where the client goes away inside, whose answer is not streamed."""
    watcher = asyncio.ensure_future(_until_gone(receive, abandon))
    try:
        yield
    finally:
        watcher.cancel()


class ChunkWriter:
    """Writes the chunks of one stream; what is the same in all of them is written once.

    Args:
      head: fields of every chunk before its choices.
    """

    def __init__(self, head: dict[str, Any]):
        text = json.dumps(head, separators=(",", ":"))
        self._head = b"data: " + text[:-1].encode() + b',"choices":['

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, **more: Any) -> bytes:
        """Return a chunk with whole choices, and usage where it is told."""
        body = json.dumps(choices, separators=(",", ":"), allow_nan=False)[1:]
        tail = "".join(f',"{name}":{json.dumps(value, separators=(",", ":"))}' for name, value in more.items())
        if usage is not None:
            tail += f',"usage":{json.dumps(usage, separators=(",", ":"))}'
        return self._head + body.encode() + tail.encode() + b"}\n\n"

    def words(self, index: int, text: str) -> bytes:
        """Return a chunk with words of a choice and nothing else: most are."""
        return b'%s{"index":%d,"delta":{"content":%s},"logprobs":null,"finish_reason":null}]}\n\n' % (
            self._head,
            index,
            json.dumps(text).encode(),
        )


def merged(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return deltas with neighbours joined that hold only words, or only thinking."""
    found: list[dict[str, Any]] = []
    for delta in deltas:
        if found and found[-1].keys() == delta.keys() and "tool_calls" not in delta and "role" not in delta:
            found[-1] = {name: found[-1][name] + value for name, value in delta.items()}
        else:
            found.append(delta)
    return found
