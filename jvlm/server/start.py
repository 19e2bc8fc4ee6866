"""Starts the server around an engine."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

from jvlm.data.processor import Processor
from jvlm.inference.async_engine import AsyncEngine, StepEngine
from jvlm.server import app
from jvlm.server.adapters import AdapterAdmin, Adapters
from jvlm.server.listen import listen, print_line
from jvlm.server.metrics import Metrics
from jvlm.server.sampling import ModelFacts, default_values
from jvlm.server.service import Service
from jvlm.server.settings import ServerSettings


def service_of(
    engine: StepEngine,
    processor: Processor,
    settings: ServerSettings,
    *,
    end_ids: frozenset[int],
    slots: int,
    warm_up: Callable[[], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> Service:
    """Return the service of an engine.

    Args:
      end_ids: the checkpoint's own end tokens.
      slots: answers that the engine decodes together.
      warm_up: called in the engine's thread before the first request.
      log: takes lines about fields that are not read.
    """
    threads = AsyncEngine(engine, warm_up=warm_up)
    facts = ModelFacts(
        default_values(processor.generation),
        processor.model.decoder.vocab_size,
        end_ids,
        settings.max_model_len,
        settings.max_n,
        settings.max_logprobs,
    )
    more: dict[str, Any] = {} if log is None else {"log": log}
    metrics = Metrics(settings.model_name, threads.stats, **more)
    threads.observe = metrics.step
    return Service(settings, threads, processor, facts, metrics, slots=slots)


def admin_of(service: Service, adapters: Adapters, take: Callable[[Any], None]) -> AdapterAdmin:
    """Return what loads adapters; ``take`` gives the engine another model, in the engine's thread."""
    return AdapterAdmin(service, adapters, take)


def run(service: Service, host: str, port: int, *, log_requests: bool = True, admin: AdapterAdmin | None = None) -> int:
    """Serve until SIGINT or SIGTERM; answers that run then have half a minute to end.

    An engine that fails ends the server, for whoever starts it again.

    Returns:
      the status of the process: 1 where the engine has failed.
    """
    service.engine.on_failure = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    log = print_line if log_requests else None
    listen(app.build(service, log=log, admin=admin), service.settings.limits, host, port)
    return int(service.engine.failed)


def describe(service: Service, host: str, port: int) -> list[str]:
    """Return lines that tell the operator what is served and how."""
    settings = service.settings
    defaults = ", ".join(f"{name} {value:g}" for name, value in service.facts.defaults.items())
    return [
        f"jvlm serves {', '.join(service.names)} at http://{host}:{port}/v1",
        f"where a request names none: {defaults}; context {settings.max_model_len} tokens",
        f"thinking {'is' if service.tells_reasoning else 'is not'} told apart; calls of tools "
        f"{'are' if service.reads_tools else 'are not'} read",
        f"keys: {len(settings.keys) or 'none'}; media hosts: {', '.join(settings.media.domains) or 'none'}; "
        f"media folder: {settings.media.local_path or 'none'}",
    ]
