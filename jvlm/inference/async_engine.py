"""The engine for asyncio: one thread calls `Engine.step`, events go to whoever awaits them.

Health means progress: a thread that is inside a step for too long, or that has died, is not healthy.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from jvlm.errors import UserError
from jvlm.inference.requests import EngineStats, Event, Request

HUNG_SECONDS = 10.0
_STATS_SECONDS = 0.2


class StepEngine(Protocol):
    """What is asked of an engine; all of it is called from one thread."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        ...

    def submit(self, request: Request) -> None:
        """Take a request. Raises UserError for one that can never be answered."""
        ...

    def abort(self, request_id: str) -> None:
        """Drop a request, which may have ended already."""
        ...

    def step(self) -> list[Event]:
        """Run one program and return what became of it."""
        ...

    def stats(self) -> EngineStats:
        """Return counters and gauges."""
        ...


class EngineDead(Exception):
    """The engine's thread has ended: nothing is answered any more."""


class Answer:
    """The events of one request, as they come. Await `events` until `done`.

    Attributes:
      request: what was asked.
      submitted, first, last: `time.monotonic` of the request, of its first and of its last event; 0 before.
    """

    def __init__(self, owner: AsyncEngine, request: Request):
        self.request, self._owner = request, owner
        self.submitted, self.first, self.last = time.monotonic(), 0.0, 0.0
        self._events: list[Event] = []
        self._left = request.sampling.n
        self._waiter: asyncio.Future | None = None
        self._error: BaseException | None = None
        self.aborted = False

    @property
    def done(self) -> bool:
        """Whether every event has been given to `events`' caller."""
        return not self._events and (self._left <= 0 or self.aborted)

    async def events(self, seconds: float | None = None) -> list[Event]:
        """Return the events since the last call, at least one; [] after so many seconds without one, or at the end.

        Raises:
          UserError: the request cannot be answered. EngineDead: nothing can.
        """
        if not self._events and self._error is None and not self.done:
            self._waiter = asyncio.get_running_loop().create_future()
            timer = None
            if seconds is not None:
                timer = asyncio.get_running_loop().call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        if self._events:
            events, self._events = self._events, []
            return events
        if self._error is not None:
            raise self._error
        return []

    def abort(self) -> None:
        """Give the request up; its slot and pages are free within a step."""
        if self._left > 0 and not self.aborted:
            self.aborted = True
            self._owner.abort(self.request.id)
            self._wake()

    def _put(self, event: Event) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        if event.finish_reason == "error":
            self._fail(event.error or UserError("the request could not be answered"))
        else:
            self._events.append(event)
            self._left -= event.finish_reason is not None
        self._wake()

    def _fail(self, error: BaseException) -> None:
        self._error, self._left = error, 0
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """Runs an engine in a thread of its own.

    Args:
      engine: called from that thread only.
      warm_up: called in it before anything is answered; compiles, say.
      hung_seconds: a step that takes longer is no progress.
    """

    def __init__(
        self, engine: StepEngine, *, warm_up: Callable[[], None] | None = None, hung_seconds: float = HUNG_SECONDS
    ):
        self.engine, self._warm_up, self._hung = engine, warm_up, hung_seconds
        self.ready = threading.Event()
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._stopping = self._dead = False
        self._busy_since: float | None = None
        self._stats, self._stats_at = EngineStats(), 0.0
        self._answers: dict[str, Answer] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="jvlm-engine", daemon=True)
        self.observe: Callable[[list[Event], float], None] | None = None

    def start(self) -> None:
        """Begin; called in the event loop that will await the events."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Stop after the step that runs now; requests that are left fail."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 30)
        self._fail_all(EngineDead("the server is shutting down"))

    @property
    def healthy(self) -> bool:
        """Whether the engine is warm, and idle or making progress."""
        since = self._busy_since
        stuck = since is not None and time.monotonic() - since > self._hung
        return self.ready.is_set() and not self._dead and not self._stopping and not stuck

    @property
    def dead(self) -> bool:
        """Whether nothing will ever be answered."""
        return self._dead or self._stopping

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._answers)

    @property
    def waiting(self) -> int:
        """Requests that the engine has not begun, as of its last step."""
        return self._stats.num_requests_waiting

    def stats(self) -> EngineStats:
        """Return the statistics after one of the last steps; never waits for the engine."""
        return self._stats

    def submit(self, request: Request) -> Answer:
        """Hand a request to the engine; called in the event loop. Raises EngineDead."""
        if self.dead:
            raise EngineDead("the engine has stopped")
        answer = self._answers[request.id] = Answer(self, request)
        self._tell(lambda: self._submit(request))
        return answer

    def abort(self, request_id: str) -> None:
        """Drop a request by its whole id."""
        self._answers.pop(request_id, None)
        self._tell(lambda: self.engine.abort(request_id))

    def _tell(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _submit(self, request: Request) -> None:
        try:
            self.engine.submit(request)
        except UserError as error:
            self._publish([Event(request.id, finish_reason="error", error=error)])

    def _run(self) -> None:
        try:
            self._busy_since = None
            if self._warm_up is not None:
                self._warm_up()
            self.ready.set()
            while self._wait():
                self._busy_since = time.monotonic()
                self._work()
                self._busy_since = None
        except BaseException as error:  # whatever it is, nothing is answered any more, and everybody is told
            self._dead = True
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(
                    self._fail_all, EngineDead(f"the engine failed: {type(error).__name__}")
                )
            raise

    def _wait(self) -> bool:
        """Wait for something to do; False at the end."""
        if not self.engine.has_work:
            self._refresh(time.monotonic())
        with self._condition:
            while not (self._commands or self._stopping or self.engine.has_work):
                self._condition.wait()
            return not self._stopping

    def _work(self) -> None:
        with self._condition:
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        if not self.engine.has_work:
            return
        began = time.monotonic()
        events = self.engine.step()
        now = time.monotonic()
        if now - self._stats_at > _STATS_SECONDS:
            self._refresh(now)
        if events:
            self._publish(events)
            if self.observe is not None:
                self.observe(events, now - began)

    def _refresh(self, now: float) -> None:
        self._stats, self._stats_at = self.engine.stats(), now

    def _publish(self, events: Iterable[Event]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Iterable[Event]) -> None:
        for event in events:
            answer = self._answers.get(event.request_id)
            if answer is not None and not answer.aborted:
                answer._put(event)
                if answer._left <= 0:
                    del self._answers[event.request_id]

    def _fail_all(self, error: Exception) -> None:
        answers, self._answers = list(self._answers.values()), {}
        for answer in answers:
            answer._fail(error)
