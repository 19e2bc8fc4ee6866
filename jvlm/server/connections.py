"""uvicorn's connections, which it keeps open without end, with limits on the time that headers may take."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def protocol(header_seconds: float) -> type[HttpToolsProtocol]:
    """Return the class of connections that must send the headers of their first request in time.

    Between requests uvicorn's own ``timeout_keep_alive`` holds; once a next one has begun, its headers have the same
    time.
    """

    class LimitedProtocol(HttpToolsProtocol):
        _headers_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_headers()

        def data_received(self, data: bytes) -> None:
            if self._headers_timer is None and self.cycle is not None and self.cycle.response_complete:
                self._wait_for_headers()
            super().data_received(data)

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(error)

        def _wait_for_headers(self) -> None:
            self._headers_timer = self.loop.call_later(header_seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._headers_timer is not None:
                self._headers_timer.cancel()
                self._headers_timer = None

        def _give_up(self) -> None:
            self._headers_timer = None
            if self.transport is not None and not self.transport.is_closing():
                self.transport.close()

    return LimitedProtocol
