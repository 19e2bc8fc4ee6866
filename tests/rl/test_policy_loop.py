"""What the loop hands to the trainer, step by step, and after restarts anywhere: with an engine without a model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jvlm.data.errors import Origin
from jvlm.data.packing import Example
from jvlm.errors import UserError
from jvlm.rl.config import AdvantageConfig, RewardConfig, RolloutConfig
from jvlm.rl.journal import Journal
from jvlm.rl.loop import PolicyLoop
from jvlm.rl.losses import PolicyLoss
from jvlm.rl.meshes import EnginePlace
from jvlm.rl.packing import Shape
from jvlm.rl.prompts import EncodedPrompt
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rollouts import Rollouts
from jvlm.rl.selection import SelectionConfig
from jvlm.rl.task import PolicyTask
from jvlm.scoring.score import Score
from tests.rl.fakes import FakeEngine, SlowJudge

PROMPTS = 9
TASK = PolicyTask(
    policy_loss=PolicyLoss(kind="ppo"),
    rollout=RolloutConfig(answers=3, max_tokens=8, slots=9),
    selection=SelectionConfig(groups=5),
    updates=2,
)
SHAPE = Shape(2, 32, 0, None, None, 4, 2)


class Engine(FakeEngine):
    """With the parts that the loop needs."""

    banned, banned_first = np.arange(50) > 48, None

    def load(self, model):
        pass

    def release(self):
        assert not self.has_work


def encode(number):
    count = 2 + number % 3
    none, zeros = np.zeros(0, np.int32), np.zeros(count, np.int32)
    example = Example(
        tokens=np.full(count, number, np.int32),
        positions=np.repeat(np.arange(count, dtype=np.int32)[:, None], 3, 1),
        loss_weights=np.zeros(count, np.float32),
        turns=zeros,
        vision_index=zeros - 1,
        media=zeros,
        vision_segment_ids=none,
        patches=np.zeros((0, 4), np.uint8),
        patch_segment_ids=none,
        patch_window_ids=none,
        patch_positions=np.zeros((0, 2), np.int32),
        sizes=(),
        origin=Origin("prompts.jsonl", number),
    )
    return EncodedPrompt(example, RewardItem(f"line {number}", "letters", ""))


class Process:
    """A start of the run; ``state`` is what the checkpoint after so many steps holds."""

    def __init__(self, folder, task=TASK, judge=None, step=0, state=None, weights=None):
        self.engine = Engine()
        parts = (self.engine, encode, judge or SlowJudge(), Journal(folder), task.rollout, RewardConfig())
        rollouts = Rollouts(*parts, seed=7)
        place = EnginePlace(None, jax.local_devices()[0], is_apart=False)
        self.loop = PolicyLoop(task, self.engine, place, rollouts, PROMPTS, SHAPE, seed=5, settings={}, keep=100)
        self.trainer = SimpleNamespace(step=step, model=None, accumulation=1)
        if state is not None:
            self.loop.set_state(state)

    def step(self):
        """Return the arrays of a step."""
        # other weights after each step
        trainable = {"w": np.full(3, self.trainer.step, np.float32)}
        self.trainer.state = SimpleNamespace(trainable=trainable)
        self.loop.on_step_start(self.trainer)
        batches = [next(self.loop).policy for _ in range(self.trainer.accumulation)]
        self.trainer.step += 1
        self.loop.on_step_end(self.trainer, SimpleNamespace(metrics={}, began=0.0))
        return batches


@pytest.fixture(autouse=True)
def plain_fingerprints(monkeypatch):
    monkeypatch.setattr("jvlm.rl.loop.fingerprints", lambda tree: {path: int(x[0]) for path, x in tree.items()})


def arrays(batches):
    names = ("advantages", "weights", "rollout", "is_first", "share")
    packed = ("tokens", "segment_ids", "positions", "loss_weights")
    return [
        np.concatenate([np.ravel(getattr(one, n)) for n in names] + [np.ravel(getattr(one.packed, n)) for n in packed])
        for one in batches
    ]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_restart_anywhere_hands_on_the_same(tmp_path):
    whole = Process(tmp_path / "whole")
    expected = [arrays(whole.step()) for _ in range(6)]
    assert not same(expected[0], expected[1])  # updates of other groups
    process, states = Process(tmp_path / "parts"), []
    for step in range(6):
        assert same(arrays(process.step()), expected[step]), step
        states.append(process.loop.get_state())
        process = Process(tmp_path / "parts", step=step + 1, state=states[-1])
    for step in (2, 3):  # and further back: the journal is kept
        process = Process(tmp_path / "parts", step=step + 1, state=states[step])
        assert same(arrays(process.step()), expected[step + 1])


def test_updates_share_the_groups_and_weigh_their_own(tmp_path):
    process = Process(tmp_path)
    first, second = process.step(), process.step()
    for batches in (first, second):
        weights = np.concatenate([one.weights.ravel() for one in batches])
        assert weights.sum() == pytest.approx(1)
        assert sum(one.share.sum() for one in batches) == 1
    segments = [sum((one.is_first).sum() for one in batches) for batches in (first, second)]
    assert segments == [9, 6]  # three groups and two, of three answers
    together = dataclasses.replace(TASK, updates=1)
    whole = Process(tmp_path / "whole", together).step()
    values = [
        sorted(np.concatenate([b.advantages[b.weights > 0] for b in some]).tolist())
        for some in (whole, [*first, *second])
    ]
    assert values[0] == pytest.approx(values[1])


def test_between_updates_the_journal_is_needed(tmp_path):
    process = Process(tmp_path)
    process.step()
    state = process.loop.get_state()
    for path in (tmp_path / "journal").glob("*"):
        path.unlink()
    with pytest.raises(UserError, match="not all answers of the rollout of step 0"):
        Process(tmp_path, step=1, state=state).step()


def test_rollouts_without_a_useful_group_are_made_again_and_end_the_run(tmp_path):
    class Same(SlowJudge):
        def __init__(self, useful_after):
            super().__init__()
            self.left = useful_after

        def scores(self, items):
            self.left -= 1
            return [Score(0.5) for _ in items] if self.left >= 0 else super().scores(items)

    process = Process(tmp_path / "some", judge=Same(50))
    process.step()
    assert process.loop.stream.serial > 40
    assert {group.serial for group in process.loop.groups} >= set(range(40))
    few = dataclasses.replace(TASK, selection=SelectionConfig(2, most_started=1))
    with pytest.raises(UserError, match="10 times in a row"):
        Process(tmp_path / "none", few, judge=Same(10**6)).step()


def test_answers_that_were_cut_are_left_out_where_that_is_asked_for(tmp_path):
    task = dataclasses.replace(TASK, updates=1, advantage=AdvantageConfig(truncated="mask"))

    class Cuts(Engine):
        def step(self):
            events = super().step()
            return [dataclasses.replace(e, finish_reason=e.finish_reason and "length") for e in events]

    process = Process(tmp_path, task)
    process.loop.rollouts.engine = process.loop.engine = Cuts()
    with pytest.raises(UserError, match="truncated is mask"):
        process.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_loss": PolicyLoss()}, "the second update is off-policy"),
        ({"updates": 6}, "have no group each"),
        ({"selection": SelectionConfig(5, ahead=1.0), "updates": 1}, "answers of earlier weights"),
        (
            {"selection": SelectionConfig(5, ahead=1.0), "policy_loss": PolicyLoss(correction="token_mask")},
            "one of them is enough",
        ),
        ({"policy_loss": PolicyLoss(kind="ppo", correction="token_mask")}, "compares the engine with itself"),
    ],
)
def test_settings_that_need_one_another(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TASK, **changes)
