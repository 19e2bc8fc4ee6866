"""Engines that share the groups of a rollout over TCP: whoever draws them, they are the same groups."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from jvlm.errors import UserError
from jvlm.parallel.hosts import PeerFailed
from jvlm.rl.config import RewardConfig, RolloutConfig
from jvlm.rl.journal import Journal
from jvlm.rl.prompt_stream import PromptStream, PromptStreamConfig
from jvlm.rl.rollouts import Rollouts
from jvlm.rl.selection import SelectionConfig
from jvlm.rl.shared_engine import Address, RemoteEngine, SharedEngine, roll_out
from tests.rl.fakes import FakeEngine, SlowJudge
from tests.rl.test_rollouts import ANSWERS, PROMPTS, Run, encode, unbroken  # noqa: F401

SLOTS = 4  # a group and a third
OTHERS = (1, 2)


class Process:
    """A process with an engine; `step` is to be called on all at once."""

    def __init__(self, folder, engine, engines):
        self.run, self.engine, self.engines = Run(folder), engine, engines

    def step(self, judge):
        run = self.run
        stream = PromptStream(PROMPTS, 5, PromptStreamConfig(easy_share=0.3), run.state)
        config = RolloutConfig(answers=ANSWERS, max_tokens=8, slots=SLOTS)
        parts = (self.engines, encode, judge, Journal(run.folder), config, RewardConfig())
        rollouts = Rollouts(*parts, seed=7, slots=SLOTS * (1 + len(OTHERS)))

        def alone():
            return rollouts.run(stream, SelectionConfig(3), run.rate, run.version, {"weights": 1})

        try:
            return run.take(stream, roll_out(self.engines, alone, encode))
        finally:
            rollouts.close()


@pytest.fixture
def processes(tmp_path):
    """Of three processes, whose engines take any time."""
    shared = SharedEngine(FakeEngine(random.Random(0)), SLOTS)
    address = shared.listen()
    found = [Process(tmp_path / "0", shared._engine, shared)]
    for number in OTHERS:
        engine = FakeEngine(random.Random(number))
        found.append(Process(tmp_path / str(number), engine, RemoteEngine(engine, SLOTS, address, number)))
    yield found
    for process in found:
        process.engines.close()


def test_whoever_draws_a_group_it_is_the_same(processes, unbroken):  # noqa: F811
    taken = dict.fromkeys((0, *OTHERS), 0)
    with ThreadPoolExecutor(len(processes)) as pool:
        for _ in range(6):
            list(pool.map(lambda process: process.step(SlowJudge(random.Random(3))), processes))
            for number, count in processes[0].engines.taken.items():
                taken[number] += count
    assert min(taken.values()) > 0
    for process in processes:
        assert process.run.trained == unbroken.trained
        assert process.run.state == unbroken.state
        assert process.run.rate == unbroken.rate
        assert not process.engine.has_work


def test_what_fails_on_the_first_process_fails_on_all(processes):
    class Refuses(SlowJudge):
        def scores(self, items):
            raise UserError("no such reward")

    with ThreadPoolExecutor(len(processes)) as pool:
        first, *others = [pool.submit(process.step, Refuses()) for process in processes]
        with pytest.raises(UserError, match="no such reward"):
            first.result()
        for other in others:
            with pytest.raises(PeerFailed, match="no such reward") as error:
                other.result()
            assert error.value.is_user_error


def test_a_process_that_ends_ends_the_others(processes):
    first, second, third = processes
    third.engines.close()
    with ThreadPoolExecutor(2) as pool:
        told = [pool.submit(process.step, SlowJudge()) for process in (first, second)]
        with pytest.raises(PeerFailed, match="process 2, which draws answers, has ended"):
            told[0].result()
        with pytest.raises(PeerFailed, match="process 0 failed"):
            told[1].result()


def test_a_wrong_key_is_not_let_in(processes):
    address = processes[0].engines._listener.address
    with pytest.raises(ConnectionError, match="process 0 is not found"):
        RemoteEngine(FakeEngine(), SLOTS, Address(("127.0.0.1",), address[1], "guessed"), 3)
