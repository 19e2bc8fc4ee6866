"""Streamed requests to a server of OpenAI's API, some at a time or at random times, and what each took.

Answers are kept as bytes while the clock runs and read afterwards, so that the load costs the server's cores little.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

_END = b"\r\n0\r\n\r\n"


class LoadError(Exception):
    """An answer that is no answer: another status than 200, an error in a stream, or fewer tokens than asked for."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer, and `time.perf_counter` of when it was sent, and of its first and last words.

    Attributes:
      tokens, prompt_tokens, cached_tokens: as the server's usage says.
    """

    sent: float
    first: float
    last: float
    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def first_seconds(self) -> float:
        """Return the time to the first token."""
        return self.first - self.sent

    @property
    def token_seconds(self) -> float:
        """Return the time for each token after the first; 0 for one token."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


class _Connection(asyncio.Protocol):
    """One connection, on which requests follow one another."""

    def __init__(self):
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future | None = None
        self._pieces: list[bytes] = []
        self._first = self._last = 0.0
        self._tail = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._first and b"data: " in data:
            self._first = now
        self._pieces.append(data)
        self._tail = (self._tail + data)[-len(_END) :]
        if self._tail == _END or (not self._first and self._is_whole()):
            if not self._done.done():
                self._done.set_result(None)
        elif b'"content"' in data:
            self._last = now

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(LoadError(f"the server closed the connection: {error}"))

    def _is_whole(self) -> bool:
        """Whether an answer that is not streamed, an error, is there."""
        head, _, body = b"".join(self._pieces).partition(b"\r\n\r\n")
        return _length(head) is not None and len(body) >= _length(head)

    async def ask(self, request: bytes) -> tuple[float, float, float, bytes]:
        """Send a request; returns when it was sent, the first and last words came, and all bytes."""
        self._pieces, self._tail, self._first, self._last = [], b"", 0.0, 0.0
        self._done = asyncio.get_running_loop().create_future()
        sent = time.perf_counter()
        self._transport.write(request)
        await self._done
        return sent, self._first, self._last or self._first, b"".join(self._pieces)

    def close(self) -> None:
        self._transport.close()


def _length(head: bytes) -> int | None:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return None


def as_http(body: dict[str, Any]) -> bytes:
    """Return the request of a chat body, streamed and with its usage."""
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _read(sent: float, first: float, last: float, answer: bytes) -> Answered:
    """Return the answer in bytes of HTTP. Raises LoadError."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise LoadError(body[:500].decode(errors="replace"))
    plain, at = [], 0
    while size := int(body[at : (end := body.index(b"\r\n", at))], 16):
        plain.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    events = [event.removeprefix(b"data: ") for event in b"".join(plain).split(b"\n\n") if event.startswith(b"data: ")]
    if events[-1] != b"[DONE]":
        raise LoadError("the stream has no end")
    chunks = [json.loads(event) for event in events[:-1]]
    failed = [chunk["error"]["message"] for chunk in chunks if "error" in chunk]
    if failed:
        raise LoadError(failed[0])
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    usage = chunks[-1]["usage"]
    return Answered(
        sent,
        first,
        last,
        text,
        usage["completion_tokens"],
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
    )


async def _at_once(port: int, requests: Sequence[bytes], streams: int) -> list[tuple[float, float, float, bytes]]:
    loop, left, found = asyncio.get_running_loop(), list(enumerate(requests))[::-1], {}

    async def ask_one_after_another() -> None:
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", port)
        while left:
            number, request = left.pop()
            found[number] = await connection.ask(request)
        connection.close()

    await asyncio.gather(*(ask_one_after_another() for _ in range(streams)))
    return [found[number] for number in range(len(requests))]


async def _at_times(
    port: int, requests: Sequence[bytes], times: Sequence[float]
) -> list[tuple[float, float, float, bytes]]:
    loop, began = asyncio.get_running_loop(), time.perf_counter()

    async def ask(request: bytes, at: float) -> tuple[float, float, float, bytes]:
        await asyncio.sleep(max(began + at - time.perf_counter(), 0))
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", port)
        try:
            return await connection.ask(request)
        finally:
            connection.close()

    return list(await asyncio.gather(*map(ask, requests, times)))


def _answers(run: Callable[[], Awaitable[Any]], bodies: Sequence[dict[str, Any]]) -> list[Answered]:
    found = [_read(*one) for one in asyncio.run(run())]
    for body, one in zip(bodies, found, strict=True):
        if body.get("ignore_eos") and one.tokens != body["max_tokens"]:
            raise LoadError(f"{one.tokens} tokens of the {body['max_tokens']} that were asked for")
    return found


def ask_at_once(port: int, bodies: Sequence[dict[str, Any]], streams: int) -> list[Answered]:
    """Return the answers to chat bodies, of which so many are asked at a time. Raises LoadError."""
    requests = [as_http(body) for body in bodies]
    return _answers(lambda: _at_once(port, requests, streams), bodies)


def ask_at_times(port: int, bodies: Sequence[dict[str, Any]], times: Sequence[float]) -> list[Answered]:
    """Return the answers to chat bodies that are sent so many seconds after the beginning. Raises LoadError."""
    requests = [as_http(body) for body in bodies]
    return _answers(lambda: _at_times(port, requests, times), bodies)


def tokens_per_second(answers: Sequence[Answered]) -> float:
    """Return the generated tokens over the time from the first request to the last answer."""
    return sum(one.tokens for one in answers) / (max(one.last for one in answers) - min(one.sent for one in answers))


def percentiles(answers: Sequence[Answered]) -> dict[str, tuple[float, float, float]]:
    """Return p50, p90 and p99 of the times to the first token, and of those for each further token, in ms."""
    columns = {"TTFT": [one.first_seconds for one in answers], "TPOT": [one.token_seconds for one in answers]}
    return {name: tuple(1e3 * np.percentile(values, (50, 90, 99))) for name, values in columns.items()}
