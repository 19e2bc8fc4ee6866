"""Rollouts with an engine and rewards that take any time: the same groups are trained on, and none is made twice."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from jvlm.data.errors import ExampleError, Origin
from jvlm.errors import UserError
from jvlm.rl.config import RewardConfig, RolloutConfig
from jvlm.rl.journal import Journal
from jvlm.rl.prompt_stream import PromptStream, PromptStreamConfig
from jvlm.rl.prompts import EncodedPrompt
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rollouts import Rollouts, is_useful
from jvlm.rl.selection import SelectionConfig
from jvlm.scoring.score import Score
from tests.rl.fakes import FakeEngine, Killed, SlowJudge

PROMPTS, ANSWERS = 9, 3
BAD = 4  # a prompt that cannot be read


def encode(example):
    if example == BAD:
        raise ExampleError(Origin("prompts.jsonl", example), "images", "gone", "Put it back")
    return EncodedPrompt(
        SimpleNamespace(origin=f"line {example}", length=3), RewardItem(f"line {example}", "letters", "")
    )


class Run:
    """Steps of a run that goes on from its state; ``state`` and the journal are what a killed process leaves."""

    def __init__(self, folder):
        self.folder, self.state, self.rate, self.version, self.trained = folder, None, (0, 0), 0, []

    def step(self, engine, judge, slots=8, groups=3):
        stream = PromptStream(PROMPTS, 5, PromptStreamConfig(easy_share=0.3), self.state)
        config = RolloutConfig(answers=ANSWERS, max_tokens=8, slots=slots)
        rollouts = Rollouts(engine, encode, judge, Journal(self.folder), config, RewardConfig(), seed=7)
        try:
            rollout = rollouts.run(stream, SelectionConfig(groups), self.rate, self.version, {"weights": 1})
        finally:
            rollouts.close()
        return self.take(stream, rollout)

    def take(self, stream, rollout):
        stream.finish_step(rollout.last, rollout.outcomes, rollout.kept)
        self.state = stream.state()
        self.rate = self.rate[0] + len(rollout.judged), self.rate[1] + sum(map(is_useful, rollout.judged))
        self.version += 1
        self.trained.append(
            [(g.serial, g.example, [(a.tokens, a.log_probs, a.reward) for a in g.answers]) for g, _ in rollout.selected]
        )
        return rollout


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("unbroken"))
    for _ in range(6):
        run.step(FakeEngine(), SlowJudge())
    return run


@pytest.mark.parametrize("seed", range(4))
def test_delays_and_slots_change_nothing_that_is_trained_on(tmp_path, unbroken, seed):
    chance, run = random.Random(seed), Run(tmp_path)
    for _ in range(6):
        run.step(FakeEngine(chance), SlowJudge(chance), slots=chance.choice((3, 8, 40)))
    assert run.trained == unbroken.trained
    assert run.state == unbroken.state
    assert run.rate == unbroken.rate


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, unbroken, seed):
    fate, chance, run, kills = random.Random(seed), random.Random(seed), Run(tmp_path), 0
    while run.version < 6:
        # the first start of a step always dies; a later one perhaps
        most = fate.randint(0, 20 if kills <= run.version else 120)
        try:
            run.step(FakeEngine(chance, dies_after=most), SlowJudge(chance))
        except Killed:
            kills += 1
            for path in (tmp_path / "journal").glob("*.jsonl"):  # the last line may be cut anywhere
                whole = path.read_bytes()
                cut = whole.rfind(b"\n", 0, -1) + 1 if whole.count(b"\n") > 1 else len(whole)
                path.write_bytes(whole[: chance.randint(cut, len(whole))])
    assert run.trained == unbroken.trained
    assert run.state == unbroken.state
    assert kills >= 6


def test_judged_groups_are_not_made_again_unless_the_weights_are_others(tmp_path, unbroken):
    first, again = Run(tmp_path), Run(tmp_path)
    first.step(FakeEngine(), SlowJudge())
    engine = FakeEngine()
    rollout = again.step(engine, SlowJudge())
    assert again.trained == first.trained
    assert rollout.timing.reused == rollout.timing.judged - sum(g.problem != "" for g in rollout.judged)
    path = tmp_path / "journal" / "00000000.jsonl"
    path.write_text(path.read_text().replace('"weights": 1', '"weights": 2', 1))
    assert Run(tmp_path).step(FakeEngine(), SlowJudge()).timing.reused == 0


def test_a_prompt_that_cannot_be_read_is_judged_and_listed(unbroken, tmp_path):
    run = Run(tmp_path)
    groups = [group for _ in range(6) for group in run.step(FakeEngine(), SlowJudge()).judged]
    bad = [group for group in groups if group.example == BAD]
    assert bad
    assert all("gone" in group.problem and not group.answers for group in bad)


def test_a_judge_that_returns_fewer_rewards_is_refused(tmp_path):
    judge = SimpleNamespace(scores=lambda items: [Score(1.0)])
    with pytest.raises(UserError, match="1 rewards came for the 3 answers"):
        Run(tmp_path).step(FakeEngine(), judge)


def test_missing_rewards_are_no_zeros(tmp_path):
    class Lacking(SlowJudge):
        def scores(self, items):
            scores = super().scores(items)
            return [Score(None, "service_error") if n == 0 else score for n, score in enumerate(scores)]

    rollout = Run(tmp_path).step(FakeEngine(), Lacking())
    assert rollout.lacking == sum(bool(group.answers) for group in rollout.judged)
    assert not any(outcome.perfect or outcome.hopeless for outcome in rollout.outcomes.values())
    for group, _ in rollout.selected:
        assert group.rewards[0] is None
        assert set(group.rewards[1:]) == {0.0, 1.0}


@pytest.mark.parametrize(("seed", "meanwhile"), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 2), (2, 9)])
def test_groups_of_later_steps_go_on_with_the_weights_of_their_time(tmp_path, seed, meanwhile):
    """Each is trained on once, in order; each token has the version that drew it; ages are bounded.

    ``meanwhile``: steps of the engine while a step trains.
    """
    chance, run, engine = random.Random(seed), Run(tmp_path), FakeEngine(random.Random(seed))
    config, selection = RolloutConfig(answers=ANSWERS, max_tokens=8, slots=12), SelectionConfig(3, ahead=1.0)
    rollouts = Rollouts(engine, encode, SlowJudge(chance), Journal(tmp_path), config, RewardConfig(), seed=7)
    stream, serials, mixed, ages, went_on = PromptStream(PROMPTS, 5), [], 0, [], 0
    for version in range(8):
        rollout = rollouts.run(stream, selection, run.rate, version, {"weights": version})
        before = {serial: stream.prompt(serial) for serial in range(rollout.last + 1, rollout.last + 1 + rollout.kept)}
        run.take(stream, rollout)
        left, drawn = [meanwhile], engine.drawn
        rollouts.go_on_until(lambda left=left: left.append(left.pop() - 1) or left[0] < 0)
        went_on += engine.drawn - drawn
        assert {serial: stream.prompt(serial) for serial in before} == before
        again = PromptStream(PROMPTS, 5, state=stream.state())
        assert {serial: again.prompt(serial) for serial in before} == before
        serials += [group.serial for group in rollout.judged]
        for group, _ in rollout.selected:
            for answer in group.answers:
                assert list(answer.versions) == sorted(answer.versions)
                assert answer.versions[-1] <= version
                mixed += len(set(answer.versions)) > 1
                ages.append(version - answer.versions[0])
    rollouts.close()
    assert serials == list(range(len(serials)))
    assert mixed > 0 or meanwhile == 9  # then all answers have ended before the weights are others
    assert (went_on > 0) == (meanwhile > 0)
    assert 0 < max(ages) <= 3
    tokens = {serial: answers for step in run.trained for serial, _, answers in step}
    for serial, answers in tokens.items():  # they are what the engine draws for these numbers, whole
        for index, (drawn, _, _) in enumerate(answers):
            draw = np.random.default_rng([7, serial * ANSWERS + index])
            assert list(drawn) == draw.integers(0, 50, int(draw.integers(1, 7))).tolist()


def test_a_rollout_may_have_nothing_to_train_on(tmp_path):
    class Same(SlowJudge):
        def scores(self, items):
            return [Score(0.7) for _ in items]

    run = Run(tmp_path)
    rollout = run.step(FakeEngine(), Same())
    assert rollout.selected == []
    assert run.rate == (24, 0)  # eight times as many as wanted, and the next ones are others
    assert run.state["serial"] == 24
