"""A run leaves enough behind to be judged again, looked at, and repeated step by step to the last bit."""

from __future__ import annotations

import dataclasses
import json

import pytest

import jvlm
from jvlm import cli
from jvlm.errors import UserError
from jvlm.rl import replay, run
from jvlm.rl.log_config import RolloutLogConfig
from jvlm.rl.rollout_files import ROLLOUTS, RolloutWriter, path_of, read_groups, read_image, read_summary, steps
from jvlm.rl.step_log import values_of
from jvlm.training.config import CheckpointConfig, ValidationConfig
from tests.rl.support import policy_experiment, write_prompts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, each of which is saved, with held-out prompts."""
    folder = tmp_path_factory.mktemp("run")
    write_prompts(folder)
    run.train(
        policy_experiment(
            folder,
            task={"log": RolloutLogConfig(samples_interval_steps=2, held_out_prompts=5)},
            steps=4,
            checkpoint=CheckpointConfig(save_interval_steps=1, max_to_keep=10),
            validation=ValidationConfig(data=(str(folder / "prompts.jsonl"),), interval_steps=2),
        )
    )
    return folder / "run"


def test_every_step_is_stored_with_what_the_log_says_of_it(finished):
    folder = finished / ROLLOUTS
    _, processor = jvlm.load(finished)
    stops = set(processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert steps(folder) == [1, 2, 3, 4]
    lines = {line["step_number"]: line for line in map(json.loads, (finished / "logging.jsonl").open())}
    for step in (1, 2, 3, 4):
        stored = list(read_groups(folder, [step]))
        assert 1 <= sum(one.group.selected for one in stored) <= 4
        assert all(len(one.group.answers) == 4 for one in stored)
        again = values_of([one.group for one in stored])
        summary = read_summary(folder, step)
        assert {name: summary[name] for name in again} == again
        for one in stored:
            assert {len(a.tokens) == len(a.log_probs) == len(a.versions) for a in one.group.answers} == {True}
            assert {version for a in one.group.answers for version in a.versions} == {step - 1}
            assert [read_image(folder, name) for name in one.images] or "<image>" not in str(one.prompt.messages)
            ends = {token for a in one.group.answers if a.finish == "stop" for token in a.tokens[-1:]}
            assert ends <= stops
        assert summary["age_max"] == 0
        assert summary["rewards"]["letters"]["plugin"]
        assert summary["loss"] == lines[step]["loss"] if "loss" in lines[step] else True
    held_out = [line for line in lines.values() if "eval_reward/letters" in line]
    assert len(held_out) >= 1
    assert "Rollouts of step 4" in (finished / "samples.html").read_text()


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_is_repeated_to_the_last_bit(finished, step, capsys):
    assert cli.main(["replay", str(finished), "--step", str(step)]) == 0
    told = capsys.readouterr().out
    for name in ("shaped rewards", "advantages", "loss", "grad_norm", "rollout/difference"):
        assert f"{name}: equal" in told


def test_what_was_changed_is_found(finished, tmp_path, capsys):
    """A reward of another value, and a run without the checkpoint of the step before."""
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "experiment.json").write_bytes((finished / "experiment.json").read_bytes())
    writer = RolloutWriter(copy / ROLLOUTS, last_step=2)
    for one in read_groups(finished / ROLLOUTS, [3]):
        group = one.group
        if group.selected:
            first = dataclasses.replace(group.answers[0], reward=(group.answers[0].reward + 0.5) % 1)
            group = dataclasses.replace(group, answers=(first, *group.answers[1:]))
        writer.append(3, group, one.prompt)
    writer.finish_step(3, read_summary(finished / ROLLOUTS, 3))
    groups = sum(one.group.selected for one in read_groups(finished / ROLLOUTS, [3]))
    assert path_of(copy / ROLLOUTS, 3).exists()
    assert cli.main(["replay", str(copy), "--step", "3"]) == 1
    told = capsys.readouterr().out
    assert f"shaped rewards: {4 * groups} of {4 * groups} stored, {3 * groups} of {4 * groups} now" in told
    assert "loss:" not in told
    assert "the model before step 3 is not stored" in told
    with pytest.raises(UserError, match="no step 9"):
        list(replay.replay(finished, 9))
    with pytest.raises(UserError, match="is no run"):
        list(replay.replay(tmp_path, 1))


def test_the_rewards_of_a_run_are_computed_again_from_its_files(finished, capsys):
    assert cli.main(["rl-rescore", str(finished), "--rewards", str(finished.parent / "rewards.json")]) == 0
    assert capsys.readouterr().out.startswith("letters: ")
