"""The engines of several processes as one: requests wait in one queue, and whichever engine has room takes the next.

Process 0 decides what is asked and has the answers; the others draw. Which process draws an answer changes nothing in
it, as draws depend on numbers of the request alone. Processes talk over TCP connections that prove a key, which is made
for the run and handed out through JAX's own network.
"""

from __future__ import annotations

import collections
import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NamedTuple, TypeVar

import jax

from jvlm.errors import UserError
from jvlm.inference.requests import Event, Request
from jvlm.parallel import hosts
from jvlm.rl.prompts import EncodedPrompt
from jvlm.rl.rollouts import Rollout, SamplingEngine

T = TypeVar("T")
_POLL = 0.05  # seconds that a process without work waits before it looks again
_KEPT = 64  # ends of rollouts, for processes that are behind: more than there are between two training steps
_CONNECT = 60.0  # seconds in which the processes must find each other


class Address(NamedTuple):
    """Where process 0 is to be found: any of the hosts, at a port, with a key."""

    hosts: tuple[str, ...]
    port: int
    key: str


class _Work(NamedTuple):
    """What a process is to do next: requests to begin with, ids to give up."""

    requests: tuple[Request, ...]
    aborted: tuple[str, ...]


class _End(NamedTuple):
    """The end of a rollout, with what the others must know of it; or why there is none."""

    value: Any = None
    failure: str | None = None
    is_user_error: bool = False


class SharedEngine:
    """All engines as seen by process 0: a `SamplingEngine` between ``with rollout()`` and its end.

    Args:
      engine: of this process.
      slots: answers that each of the engines decodes together.
    """

    ahead = False

    def __init__(self, engine: SamplingEngine, slots: int):
        self._engine, self._slots = engine, slots
        self._changed = threading.Condition()
        self._pending: collections.deque[Request] = collections.deque()
        self._left: dict[str, int] = {}  # answers that have not ended
        self._place: dict[str, int] = {}  # of requests that were taken: the process
        self._events: collections.deque[Event] = collections.deque()  # of other processes
        self._aborted: dict[int, list[str]] = {}
        self._begun, self._ends = 0, {}  # rollouts; how each of them ended
        self._failure: str | None = None
        self._listener: Listener | None = None
        self._closed = False
        self.taken: collections.Counter[int] = collections.Counter()  # requests by process, of the present rollout

    # -- connections

    def listen(self) -> Address:
        """Wait for the other processes in the background; return where they find this one."""
        key = secrets.token_hex(32)
        self._listener = Listener(("", 0), backlog=64, authkey=key.encode())
        threading.Thread(target=self._accept, daemon=True, name="engines").start()
        return Address(_own_hosts(), self._listener.address[1], key)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, OSError):
                if self._closed:
                    return
                continue  # a stranger, or one that only looks whether somebody is here
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="engine").start()

    def _serve(self, connection: Connection) -> None:
        """Answer a process, which asks again and again what to do."""
        process, ended = None, 0
        try:
            process = connection.recv()
            while True:
                events, free, is_busy = connection.recv()
                reply = self._reply(process, ended, events, free, is_busy)
                ended += isinstance(reply, _End)
                connection.send(reply)
        except (EOFError, OSError) as error:
            with self._changed:
                self._failure = f"process {process}, which draws answers, has ended ({type(error).__name__})"
                self._changed.notify_all()

    def _reply(self, process: int, rollout: int, events: Sequence[Event], free: int, is_busy: bool) -> _Work | _End:
        with self._changed:
            if rollout not in self._ends:
                self._events.extend(event for event in events if event.request_id in self._left)
                self._changed.notify_all()
            if self._begun <= rollout and rollout not in self._ends:  # it is here before process 0
                self._changed.wait_for(lambda: self._begun > rollout or rollout in self._ends)
            if not is_busy:
                self._changed.wait_for(lambda: self._pending or rollout in self._ends, _POLL)
            if rollout in self._ends:
                return self._ends[rollout]
            return _Work(tuple(self._take(process, free, is_busy)), tuple(self._aborted.pop(process, ())))

    def _take(self, process: int, free: int, is_busy: bool) -> Iterator[Request]:
        """Return requests that a process has room for; one without work always takes one."""
        while self._pending and (free >= self._pending[0].sampling.n or not is_busy):
            request = self._pending.popleft()
            self._place[request.id] = process
            self.taken[process] += 1
            free, is_busy = free - request.sampling.n, True
            yield request

    def close(self) -> None:
        """Let the other processes go."""
        self._closed = True
        if self._listener is not None:
            self._listener.close()

    # -- rollouts

    @contextlib.contextmanager
    def rollout(self) -> Iterator[Callable[[Any], None]]:
        """Have the other processes draw too; gives the function that takes what they are to know at the end.

        Where the rollout fails here, it fails on all of them.
        """
        end = _End(failure="the rollout has no result")
        with self._changed:
            number, self._begun = self._begun, self._begun + 1
            self._left, self._place, self._aborted = {}, {}, {}
            self._pending.clear()
            self._events.clear()
            self.taken.clear()
            self._changed.notify_all()

        def ends(value: Any) -> None:
            nonlocal end
            end = _End(value)

        try:
            yield ends
        except BaseException as error:
            is_user_error = isinstance(error, UserError)
            end = _End(failure=f"process 0 failed: {type(error).__name__}: {error}", is_user_error=is_user_error)
            raise
        finally:
            with self._changed:
                self._ends[number] = end
                self._ends.pop(number - _KEPT, None)
                self._changed.notify_all()

    # -- SamplingEngine

    def submit(self, request: Request) -> None:
        """Take a request, for the engine that has room first."""
        with self._changed:
            self._left[request.id] = request.sampling.n
            self._pending.append(request)
            self._changed.notify_all()

    def step(self) -> list[Event]:
        """Do what the engine of this process can do; return its events and those that came from the others.

        Raises:
          PeerFailed: another process has ended.
        """
        with self._changed:
            if self._failure is not None:
                raise hosts.PeerFailed(self._failure, is_user_error=False)
            own = sum(left for id, left in self._left.items() if self._place.get(id) == 0)
            requests = list(self._take(0, self._slots - own, own > 0))
        for request in requests:
            self._engine.submit(request)
        found = self._engine.step() if self._engine.has_work else []
        with self._changed:
            if not found and not self._events:
                self._changed.wait(_POLL)
            found = [event for event in found if event.request_id in self._left] + list(self._events)
            self._events.clear()
            for event in found:
                self._note(event)
        return found

    def _note(self, event: Event) -> None:
        if event.finish_reason is None or event.request_id not in self._left:
            return
        self._left[event.request_id] -= 1
        if not self._left[event.request_id]:
            del self._left[event.request_id]

    def abort(self, request_id: str) -> None:
        """Give up a request, wherever it is."""
        with self._changed:
            self._left.pop(request_id, None)
            place = self._place.get(request_id)
            if place is None:
                self._pending = collections.deque(one for one in self._pending if one.id != request_id)
            elif place:
                self._aborted.setdefault(place, []).append(request_id)
        if place == 0:
            self._engine.abort(request_id)

    @property
    def has_work(self) -> bool:
        with self._changed:
            return bool(self._left) or self._engine.has_work


class RemoteEngine:
    """The engine of another process than 0, which takes what that one hands out.

    Args:
      slots: answers that the engine decodes together.

    Raises:
      OSError: process 0 is not found.
    """

    def __init__(self, engine: SamplingEngine, slots: int, address: Address, process: int):
        self._engine, self._slots = engine, slots
        self._connection = _connect(address)
        self._connection.send(process)

    def rollout(self) -> Any:
        """Draw until the rollout ends; return what process 0 says of it.

        Raises:
          PeerFailed: it failed there, or that process has ended.
        """
        left: dict[str, int] = {}
        events: list[Event] = []
        while True:
            reply = self._ask(events, self._slots - sum(left.values()), bool(left))
            if isinstance(reply, _End):
                break
            for request in reply.requests:
                self._engine.submit(request)
                left[request.id] = request.sampling.n
            for request_id in reply.aborted:
                if left.pop(request_id, None) is not None:
                    self._engine.abort(request_id)
            events = self._engine.step() if self._engine.has_work else []
            for event in events:
                if event.finish_reason is not None and event.request_id in left:
                    left[event.request_id] -= 1
                    if not left[event.request_id]:
                        del left[event.request_id]
        for request_id in left:
            self._engine.abort(request_id)
        while self._engine.has_work:
            self._engine.step()
        if reply.failure is not None:
            raise hosts.PeerFailed(reply.failure, reply.is_user_error)
        return reply.value

    def _ask(self, events: Sequence[Event], free: int, is_busy: bool) -> _Work | _End:
        try:
            self._connection.send((list(events), free, is_busy))
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise hosts.PeerFailed("process 0, which hands out prompts, has ended", is_user_error=False) from error

    def close(self) -> None:
        """Leave; process 0 notices."""
        self._connection.close()


def roll_out(
    engines: SharedEngine | RemoteEngine, run: Callable[[], Rollout], encode: Callable[[int], EncodedPrompt]
) -> Rollout:
    """Return a rollout of all processes. Every process must call it.

    Args:
      run: makes the rollout with the `SharedEngine`, on process 0.
      encode: returns the prompt of an example by its number; on the others, of the groups to train on.
    """
    if isinstance(engines, RemoteEngine):
        told = engines.rollout()
        return told._replace(selected=[(group, encode(group.example)) for group, _ in told.selected])
    with engines.rollout() as ends:
        rollout = run()
        ends(rollout._replace(selected=[(group, None) for group, _ in rollout.selected], items={}))
    return rollout


def join(engine: SamplingEngine, slots: int) -> SharedEngine | RemoteEngine | None:
    """Return this process's part of the engines of all processes; None where there is one. Every process must call it.

    Raises:
      PeerFailed, OSError: a process does not find the first one.
    """
    if jax.process_count() == 1:
        return None
    shared = SharedEngine(engine, slots) if hosts.is_rank0() else None
    known = hosts.broadcast_from_0(None if shared is None else shared.listen()._asdict())
    address = Address(tuple(known["hosts"]), known["port"], known["key"])

    def remote() -> SharedEngine | RemoteEngine:
        return shared or RemoteEngine(engine, slots, address, jax.process_index())

    return hosts.run_on_all(remote)


def _own_hosts() -> tuple[str, ...]:
    """Return addresses of this machine, as others may know it; the loopback last."""
    name, found = socket.gethostname(), []
    with contextlib.suppress(OSError):  # a name that means nothing here may mean something elsewhere
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)]
    return tuple(dict.fromkeys([*found, name, "127.0.0.1"]))


def _connect(address: Address) -> Connection:
    """Return a connection to process 0. Raises OSError."""
    tried = []
    for host in address.hosts:
        try:
            socket.create_connection((host, address.port), _CONNECT / len(address.hosts)).close()
            return Client((host, address.port), authkey=address.key.encode())
        except (OSError, EOFError, AuthenticationError) as error:
            tried.append(f"{host} ({type(error).__name__})")
    raise ConnectionError(
        f"process 0 is not found at {', '.join(tried)}, port {address.port}: the machines of a run must reach each "
        "other by TCP"
    )
