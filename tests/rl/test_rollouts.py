"""Rollouts with an engine and rewards that take any time: the same groups are trained on, and none is made twice."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from jvlm.data.errors import ExampleError, Origin
from jvlm.errors import UserError
from jvlm.inference.requests import Event, TokenLogprob
from jvlm.rl.config import RewardConfig, RolloutConfig
from jvlm.rl.journal import Journal
from jvlm.rl.prompt_stream import PromptStream, PromptStreamConfig
from jvlm.rl.prompts import EncodedPrompt
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rollouts import Rollouts, is_useful
from jvlm.rl.selection import SelectionConfig
from jvlm.scoring.score import Score

PROMPTS, ANSWERS = 9, 3
BAD = 4  # a prompt that cannot be read


class Killed(BaseException):
    """The process ends here."""


class FakeEngine:
    """Draws tokens as the real one does: by seed, number of the answer and of the token. ``chance`` decides the order
    in which answers come forward."""

    def __init__(self, chance: random.Random | None = None, dies_after: int | None = None):
        self.chance, self.left = chance, dies_after
        self.answers: dict[tuple[str, int], list] = {}
        self.drawn = 0

    def submit(self, request):
        for index in range(request.sampling.n):
            draw = np.random.default_rng([request.sampling.seed, request.sampling.number + index])
            tokens = draw.integers(0, 50, int(draw.integers(1, 7))).tolist()
            self.answers[request.id, index] = [tokens, 0]

    def step(self):
        events = []
        keys = list(self.answers)
        if self.chance is not None:
            time.sleep(self.chance.random() * 1e-3)
            keys = [key for key in keys if self.chance.random() < 0.6]
        for key in keys:
            tokens, done = self.answers[key]
            self.drawn += 1
            if self.left is not None and self.drawn > self.left:
                raise Killed
            ends = done + 1 == len(tokens)
            logprob = TokenLogprob(tokens[done], -float(tokens[done]) / 7, entropy=0.5)
            events.append(Event(*key, tokens[done], f"{tokens[done]} ", logprob, "stop" if ends else None))
            self.answers[key][1] += 1
            if ends:
                del self.answers[key]
        return events

    def abort(self, request_id):
        self.answers = {key: value for key, value in self.answers.items() if key[0] != request_id}

    @property
    def has_work(self):
        return bool(self.answers)


class SlowJudge:
    """Rewards that depend on the answer alone, and take any time."""

    def __init__(self, chance: random.Random | None = None):
        self.chance = chance

    def scores(self, items):
        if self.chance is not None:
            time.sleep(self.chance.random() * 3e-3)
        return [Score(0.0 if item.token_ids[0] % 3 else 1.0, "ok", list(item.token_ids)) for item in items]


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
        stream.finish_step(rollout.last, rollout.outcomes)
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
    chance, run = random.Random(seed), Run(tmp_path)
    kills = reused = 0
    while run.version < 6:
        try:
            reused += run.step(FakeEngine(chance, dies_after=chance.randint(0, 120)), SlowJudge(chance)).timing.reused
        except Killed:
            kills += 1
            for path in (tmp_path / "journal").glob("*.jsonl"):  # the last line may be cut anywhere
                whole = path.read_bytes()
                cut = whole.rfind(b"\n", 0, -1) + 1 if whole.count(b"\n") > 1 else len(whole)
                path.write_bytes(whole[: chance.randint(cut, len(whole))])
    assert run.trained == unbroken.trained
    assert run.state == unbroken.state
    assert kills > 1
    assert reused > 0


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
