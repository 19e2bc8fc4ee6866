"""Whole runs of a small policy: the reward rises, and a run that was stopped goes on bit by bit."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jvlm.errors import UserError
from jvlm.rl import run
from jvlm.rl.losses import PolicyLoss
from jvlm.training.config import CheckpointConfig
from jvlm.training.hooks import Hook
from jvlm.training.runs import train as train_supervised
from tests.rl.support import policy_experiment


def log_of(folder):
    return [json.loads(line) for line in (folder / "run" / "logging.jsonl").read_text().splitlines()]


def trained(folder):
    """What decides a run: (step, loss, reward) of each line."""
    return [(line["step_number"], line["loss"], line["grad_norm"], line["reward"]) for line in log_of(folder)]


class Killed(BaseException):
    """The process ends here."""


@dataclasses.dataclass(frozen=True)
class DiesAfter(Hook):
    """Ends the process behind a step, before it is saved."""

    step: int

    def on_batch(self, trainer, packed):
        if trainer.step == self.step:
            raise Killed


@pytest.mark.slow
def test_the_reward_rises_and_a_restart_repeats_the_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run.train(policy_experiment(whole, steps=24))
    lines = log_of(whole)
    early, late = (sum(line["reward"] for line in some) / 4 for some in (lines[:4], lines[-4:]))
    assert late > early + 0.1
    assert max(line["rollout/difference"] for line in lines) < 2e-6
    assert lines[0]["rollout/equal"] > 0.2
    checkpoint = CheckpointConfig(save_interval_steps=4)
    with pytest.raises(Killed):
        run.train(policy_experiment(parts, steps=24, checkpoint=checkpoint, hooks=(DiesAfter(9),)))
    with pytest.raises(Killed):  # which is to save time
        run.train(policy_experiment(parts, steps=24, checkpoint=checkpoint, hooks=(DiesAfter(12),)))
    lines = log_of(parts)
    assert next(line["reused"] for line in lines if line["step_number"] == 9) > 0  # of the journal
    assert [line["age_max"] for line in lines] == [0] * 12
    assert trained(parts) == trained(whole)[:12]


@pytest.mark.slow
def test_several_updates_of_a_rollout_go_on_in_their_middle(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loss = PolicyLoss(kind="ppo", normalise="batch", correction="token_truncate")
    task = {"updates": 2, "policy_loss": loss, "old_log_probs": "trainer"}
    settings = {"task": task, "steps": 6, "checkpoint": CheckpointConfig(save_interval_steps=1)}
    run.train(policy_experiment(whole, **settings))
    lines = log_of(whole)
    assert [line["started"] > 0 for line in lines] == [True] * 6
    # the first update is of the policy that sampled, the second is not
    differences = sorted(line["rollout/difference"] for line in lines)
    assert differences[1] < 2e-6 < 1e-4 < differences[-2]
    # which is, to the last bit, the one whose log-probabilities were computed before
    first, later = ([line for line in lines if bool(line["age_max"]) == is_later] for is_later in (False, True))
    assert {(line["old/difference"], line["old/equal"]) for line in first} == {(0, 1)}
    assert min(line["old/difference"] for line in later) > 1e-4
    assert min(line["rollout/drawn_again"] for line in lines) > 0.99
    with pytest.raises(Killed):
        run.train(policy_experiment(parts, **settings, hooks=(DiesAfter(3),)))
    run.train(policy_experiment(parts, **settings))
    assert trained(parts) == trained(whole)


def test_supervised_training_of_a_policy_task_names_the_command(tmp_path):
    experiment = policy_experiment(tmp_path, steps=1)
    data = dataclasses.replace(experiment.data, train=(str(tmp_path / "examples.jsonl"),))
    with pytest.raises(UserError, match="jvlm rl"):
        train_supervised(dataclasses.replace(experiment, data=data))
