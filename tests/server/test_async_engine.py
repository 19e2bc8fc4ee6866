"""The engine's thread and the event loop: who is woken when, and what runs between steps."""

import asyncio
import threading
import time
import types

import pytest

from jvlm.errors import UserError
from jvlm.inference import async_engine
from jvlm.inference.async_engine import AsyncEngine, EngineDead
from jvlm.inference.requests import EngineStats, Event, Request, SamplingParams


class Steps:
    """An engine that gives each request a token a step, of so many seconds."""

    def __init__(self, seconds):
        self.seconds, self.left, self.called = seconds, {}, []

    failure = None

    @property
    def has_work(self):
        return bool(self.left)

    def prepare(self, request):
        pass

    def submit(self, request):
        if request.id == "bug":
            raise KeyError("a bug")
        self.left[request.id] = request.sampling.max_tokens

    def abort(self, request_id):
        self.left.pop(request_id, None)

    def step(self):
        time.sleep(self.seconds)
        events = []
        for name in list(self.left):
            self.left[name] -= 1
            ended = self.left[name] == 0
            events.append(Event(name, token=1, text="a", finish_reason="length" if ended else None))
            if ended:
                del self.left[name]
        return events

    def stats(self):
        return EngineStats()


def request(name, tokens):
    return Request(name, types.SimpleNamespace(length=1), SamplingParams(max_tokens=tokens))


async def read(answer, seconds=None):
    """(events, seconds since the beginning) of each time that something came."""
    began, found = time.monotonic(), []
    while not answer.done:
        found.append((await answer.events(seconds), time.monotonic() - began))
    return found


def run(seconds, use):
    async def main():
        engine = AsyncEngine(Steps(seconds))
        engine.start()
        while not engine.ready.is_set():
            await asyncio.sleep(0.001)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def test_tokens_of_short_steps_come_together_and_those_of_long_ones_at_once(monkeypatch):
    monkeypatch.setattr(async_engine, "_GATHER_SECONDS", 0.1)
    short = run(0.0002, lambda engine: read(engine.submit(request("a", 200))))
    assert sum(len(events) for events, _ in short) == 200
    assert len(short) < 100
    monkeypatch.setattr(async_engine, "_GATHER_SECONDS", 0.001)
    long = run(0.1, lambda engine: read(engine.submit(request("a", 4))))
    assert [len(events) for events, _ in long] == [1] * 4


def test_first_and_last_tokens_are_not_held_back(monkeypatch):
    monkeypatch.setattr(async_engine, "_GATHER_SECONDS", 5.0)

    async def use(engine):
        began = time.monotonic()
        for number in range(20):
            await read(engine.submit(request(str(number), 1)))
        return time.monotonic() - began

    assert run(0.0, use) < 5.0


def test_a_wait_without_events_ends_after_its_seconds_and_leaves_no_timer():
    async def use(engine):
        answer = engine.submit(request("a", 3))
        found = await read(answer, 0.05)
        assert answer._timer is None
        return found

    found = run(0.12, use)
    assert sum(events == [] for events, _ in found) >= 3
    assert sum(len(events) for events, _ in found) == 3


def test_a_task_runs_in_the_engines_thread_and_its_error_is_its_callers():
    async def use(engine):
        answer = engine.submit(request("a", 50))
        reading = asyncio.ensure_future(read(answer))
        assert await engine.call(lambda: engine.engine.called.append(1) or "done") == "done"

        def fails():
            raise UserError("no")

        with pytest.raises(UserError, match="no"):
            await engine.call(fails)
        assert sum(len(events) for events, _ in await reading) == 50
        assert engine.healthy

    run(0.001, use)


def test_after_the_end_nothing_is_taken_and_what_waits_is_told():
    async def use(engine):
        answer = engine.submit(request("a", 10**6))
        await answer.events()
        await engine.close()
        with pytest.raises(EngineDead):
            await read(answer)
        with pytest.raises(EngineDead):
            await engine.call(lambda: None)

    run(0.001, use)


def test_an_error_of_one_request_ends_it_alone():
    async def use(engine):
        other = asyncio.ensure_future(read(engine.submit(request("a", 50))))
        with pytest.raises(KeyError):
            await read(engine.submit(request("bug", 5)))
        assert sum(len(events) for events, _ in await other) == 50
        assert engine.healthy
        assert not engine.failed

    run(0.001, use)


def test_an_engine_that_fails_says_so_once():
    told = []

    async def use(engine):
        engine.on_failure = lambda: told.append(engine.failed)
        engine.engine.step = lambda: 1 / 0
        with pytest.raises(EngineDead):
            await read(engine.submit(request("a", 5)))
        assert engine.failed

    excepthook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        run(0.001, use)
    finally:
        threading.excepthook = excepthook
    assert told == [True]
