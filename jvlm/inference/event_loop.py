"""Requests of one caller to their end, in an engine that may have others'."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING

from jvlm.errors import UserError
from jvlm.inference.requests import Event, Request

if TYPE_CHECKING:
    from jvlm.inference.engine import Engine


def run(
    engine: Engine, mail: MutableMapping[str, deque[Event]], requests: Iterable[Request], most: int | None
) -> Iterator[Event]:
    """Do what `Engine.run` says.

    Args:
      mail: events that are kept for whoever runs a request, by its id.
    """
    own: dict[str, int] = {}  # id -> answers that have not ended
    source, more = iter(requests), True
    try:
        while more or own:
            # what waits for larger shapes waits until nothing runs, so nothing is added to what runs meanwhile
            while more and (most is None or len(own) < most) and not engine.drains:
                request = next(source, None)
                if request is None:
                    more = False
                    break
                try:
                    engine.submit(request)
                except UserError as error:
                    yield Event(request.id, finish_reason="error", error=error)
                    continue
                own[request.id], mail[request.id] = request.sampling.n, deque()
            if not any(mail[name] for name in own):
                for event in engine.step():
                    if event.request_id in mail:
                        mail[event.request_id].append(event)
            for name in [name for name in own if mail[name]]:
                yield from _events_of(engine, mail, own, name)
    finally:
        for name in own:
            mail.pop(name, None)
            engine.abort(name)


def _events_of(
    engine: Engine, mail: MutableMapping[str, deque[Event]], own: dict[str, int], name: str
) -> Iterator[Event]:
    """Yield the events of a request that have come, and forget it with its last."""
    while mail[name]:
        event = mail[name].popleft()
        own[name] -= event.finish_reason is not None
        if not own[name] or event.finish_reason == "error":
            engine.abort(name)  # answers beside one with an error
            del own[name], mail[name]
            yield event
            return
        yield event
