"""Listens until the process is asked to stop."""

from __future__ import annotations

import signal
import sys

import uvicorn

from jvlm.server.connections import protocol
from jvlm.server.guard import App
from jvlm.server.settings import HTTPLimits

_KEEP_ALIVE_SECONDS = 10
SHUTDOWN_SECONDS = 30


def listen(app: App, limits: HTTPLimits, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; answers that run then have half a minute to end.

    Called in the main thread. It returns after SIGTERM, so that the process ends with status 0.
    """
    signal.signal(signal.SIGTERM, _nothing)  # uvicorn raises the signal again when it has ended
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol(limits.header_seconds),
        limit_concurrency=limits.connections,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        access_log=False,
        server_header=False,
        log_level="warning",
    )
    uvicorn.Server(config).run()


def _nothing(number: int, frame: object) -> None:
    """Do nothing about a signal."""


def print_line(line: str) -> None:
    """Print a line of the log."""
    print(line, file=sys.stderr)
