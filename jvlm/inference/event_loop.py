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
      mail: where events of a request are kept for whoever runs it, by its id.
    """
    own: dict[str, int] = {}  # id -> answers that have not ended
    come: deque[Event] = deque()  # events of all of them: nothing is looked for request by request
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
                own[request.id], mail[request.id] = request.sampling.n, come
            if not come:
                for event in engine.step():
                    if event.request_id in mail:
                        mail[event.request_id].append(event)
            while come:
                event = come.popleft()
                if event.request_id not in own:
                    continue  # of an answer beside one with an error
                if event.finish_reason is not None:
                    _count_end(engine, mail, own, event)
                yield event
    finally:
        for name in own:
            mail.pop(name, None)
            engine.abort(name)


def _count_end(engine: Engine, mail: MutableMapping[str, deque[Event]], own: dict[str, int], event: Event) -> None:
    """Count the end of an answer, and forget its request with the last, or with an error."""
    name = event.request_id
    own[name] -= 1
    if not own[name] or event.finish_reason == "error":
        engine.abort(name)  # answers beside one with an error
        del own[name], mail[name]
