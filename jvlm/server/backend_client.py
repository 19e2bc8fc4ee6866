"""Requests of one server to another over plain HTTP: one connection each, the answer's parts as they come."""

from __future__ import annotations

import asyncio
import dataclasses
import urllib.parse
from collections.abc import AsyncIterator, Sequence

import httptools

_CONNECT_SECONDS = 5.0
_CHUNK = 256 * 1024
Headers = Sequence[tuple[bytes, bytes]]


class BackendFailed(Exception):
    """A server that cannot be reached, or that ends in the middle of an answer."""


@dataclasses.dataclass
class _Parsed:
    """What `httptools.HttpResponseParser` has found so far."""

    headers: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    pieces: list[bytes] = dataclasses.field(default_factory=list)
    has_head: bool = False
    is_whole: bool = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.has_head = True

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        self.is_whole = True


class BackendAnswer:
    """The answer of a backend. Use it as a context manager: its end closes the connection, and so the request.

    Attributes:
      status, headers: of the answer.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self._parsed = _Parsed()
        self._parser = httptools.HttpResponseParser(self._parsed)
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    @classmethod
    async def ask(cls, url: str, method: str, path: str, headers: Headers, body: bytes) -> BackendAnswer:
        """Send a request and return its answer once the headers are there. Raises BackendFailed."""
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(host, port)
        except (OSError, TimeoutError) as error:
            raise BackendFailed(f"{url} cannot be reached") from error
        answer = cls(reader, writer)
        try:
            own = [(b"host", f"{host}:{port}".encode()), (b"connection", b"close")]
            own.append((b"content-length", str(len(body)).encode()))
            lines = b"".join(b"%s: %s\r\n" % header for header in (*headers, *own))
            writer.write(f"{method} {path} HTTP/1.1\r\n".encode("latin-1") + lines + b"\r\n" + body)
            await answer._read_head(url)
        except BaseException:
            answer.close()
            raise
        return answer

    async def _read_head(self, url: str) -> None:
        while not self._parsed.has_head:
            await self._more(url)
        self.status, self.headers = self._parser.get_status_code(), self._parsed.headers

    async def _more(self, url: str = "the backend") -> None:
        try:
            data = await self._reader.read(_CHUNK)
            self._parser.feed_data(data)
        except (OSError, httptools.HttpParserError) as error:
            raise BackendFailed(f"{url} ended in the middle of an answer") from error
        if not data and not self._parsed.is_whole:
            raise BackendFailed(f"{url} ended in the middle of an answer")

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises BackendFailed where it has no end."""
        parsed = self._parsed
        while True:
            if parsed.pieces:
                data = b"".join(parsed.pieces)
                parsed.pieces.clear()
                yield data
            elif parsed.is_whole:
                return
            else:
                await self._more()

    async def body(self) -> bytes:
        """Return the whole body. Raises BackendFailed."""
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        """Close the connection; a request that is still answered is given up by the backend."""
        self._writer.close()

    def __enter__(self) -> BackendAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def fetch(url: str, path: str, headers: Headers = (), *, seconds: float = 10.0) -> tuple[int, bytes]:
    """Return status and body of a GET. Raises BackendFailed."""
    try:
        async with asyncio.timeout(seconds):
            with await BackendAnswer.ask(url, "GET", path, headers, b"") as answer:
                return answer.status, await answer.body()
    except TimeoutError as error:
        raise BackendFailed(f"{url} does not answer") from error
