"""The engine for asyncio: one thread calls `Engine.step`, events go to whoever awaits them.

Health means progress: a thread that is inside a step for too long, or that has died, is not healthy.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from jvlm.errors import UserError
from jvlm.inference.requests import EngineStats, Event, Request, StepFailed

T = TypeVar("T")
HUNG_SECONDS = 10.0
_STATS_SECONDS = 0.2
# Events of steps that are shorter are given together: waking up for each of them would cost more than the step.
_GATHER_SECONDS = 0.004


class StepEngine(Protocol):
    """What is asked of an engine; all of it but `prepare` is called from one thread."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        ...

    def prepare(self, request: Request) -> None:
        """Do what takes long before `submit`, in any thread. Raises UserError."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing can be computed any more; None while the engine can go on."""
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


class EngineDead(StepFailed):
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
        self._waiting_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._error: BaseException | None = None
        self.aborted = False

    @property
    def done(self) -> bool:
        """Whether every event has been given to `events`' caller; not where it must be told of an error yet."""
        return not self._events and (self.aborted or (self._left <= 0 and self._error is None))

    async def events(self, seconds: float | None = None) -> list[Event]:
        """Return the events since the last call, at least one; [] after so many seconds without one, or at the end.

        Raises:
          UserError: the request cannot be answered. StepFailed: it was not. EngineDead: nothing is any more.
        """
        if not self._events and self._error is None and not self.done:
            loop = asyncio.get_running_loop()
            self._waiter, self._waiting_since = loop.create_future(), loop.time()
            if seconds is not None and self._timer is None:  # one for many events
                self._timer = loop.call_later(seconds, self._wake_after, seconds)
            try:
                await self._waiter
            finally:
                self._waiter = None
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

    def _put(self, event: Event, now: float) -> None:
        self.last = now
        self.first = self.first or now
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
        if self._timer is not None and (self._left <= 0 or self.aborted):
            self._timer.cancel()
            self._timer = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _wake_after(self, seconds: float) -> None:
        """Wake up who has waited for so long; the timer goes on where the wait began later than it."""
        self._timer = None
        if self._waiter is None:
            return
        loop = asyncio.get_running_loop()
        left = self._waiting_since + seconds - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._wake_after, seconds)
        else:
            self._wake()


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
        self._events: deque[Event] = deque()  # of the engine's thread, before the event loop has them
        self._is_told = False
        self._delivered_at = 0.0
        self._calls: set[concurrent.futures.Future] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="jvlm-engine", daemon=True)
        self.observe: Callable[[list[Event], float], None] | None = None
        self.on_failure: Callable[[], None] | None = None

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
    def failed(self) -> bool:
        """Whether the engine's thread ended by an error."""
        return self._dead

    @property
    def dead(self) -> bool:
        """Whether nothing will ever be answered."""
        return self._dead or self._stopping

    def answers_with(self, adapter: str) -> int:
        """Return how many requests of an adapter have not ended."""
        return sum(answer.request.adapter == adapter for answer in self._answers.values())

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

    async def call(self, task: Callable[[], T]) -> T:
        """Return what a task returns that the engine's thread runs between two steps. Raises EngineDead."""
        if self.dead:
            raise EngineDead("the engine has stopped")
        result: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.add(result)
        self._tell(functools.partial(_run_into, task, result))
        try:
            return await asyncio.wrap_future(result)
        finally:
            self._calls.discard(result)

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
        except (UserError, StepFailed) as error:
            self._publish([Event(request.id, finish_reason="error", error=error)])
        except Exception as error:  # noqa: BLE001  (a bug ends this request alone, whose caller raises it)
            self._loop.call_soon_threadsafe(self._fail_one, request.id, error)

    def _fail_one(self, request_id: str, error: Exception) -> None:
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            answer._fail(error)

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
            if self.on_failure is not None:
                self.on_failure()
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
        if self.engine.failure is not None:
            raise EngineDead(self.engine.failure)

    def _refresh(self, now: float) -> None:
        self._stats, self._stats_at = self.engine.stats(), now

    def _publish(self, events: Iterable[Event]) -> None:
        """Hand events to the event loop, which is woken once for all that come before it looks."""
        self._events.extend(events)
        if self._loop is None or self._loop.is_closed():
            return
        if any(event.finish_reason is not None for event in events):
            self._is_told = True
            self._loop.call_soon_threadsafe(self._deliver)
        elif not self._is_told:
            self._is_told = True
            self._loop.call_soon_threadsafe(self._gather)

    def _gather(self) -> None:
        """Deliver, or do so a moment later where the last delivery was just now."""
        left = self._delivered_at + _GATHER_SECONDS - time.monotonic()
        if left > 0:
            self._loop.call_later(left, self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        self._is_told = False  # before the events are taken: what comes from now on tells again
        now = time.monotonic()
        if self._events:
            self._delivered_at = now
        while self._events:
            event = self._events.popleft()
            answer = self._answers.get(event.request_id)
            if answer is not None and not answer.aborted:
                answer._put(event, now)
                if answer._left <= 0:
                    del self._answers[event.request_id]

    def _fail_all(self, error: Exception) -> None:
        self._deliver()
        for result in self._calls:
            if not result.done():
                result.set_exception(error)
        answers, self._answers = list(self._answers.values()), {}
        for answer in answers:
            answer._fail(error)


def _run_into(task: Callable[[], Any], result: concurrent.futures.Future) -> None:
    try:
        result.set_result(task())
    except Exception as error:  # noqa: BLE001  (whoever asked for the task is told)
        result.set_exception(error)
