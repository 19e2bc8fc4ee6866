"""The log of a step: each figure by hand, and every alarm raised by what it is for and by nothing else."""

from __future__ import annotations

import json

import pytest

from jvlm.errors import UserError
from jvlm.rl import alarms
from jvlm.rl.alarms import AlarmConfig, Alarms
from jvlm.rl.records import AnswerRecord, GroupRecord
from jvlm.rl.step_log import ages_of, values_of


def answer(reward, tokens, *, reason="ok", finish="stop", **fields):
    tokens = tuple(tokens)
    return AnswerRecord(
        tokens, (-0.5,) * len(tokens), (0.25,) * len(tokens), (3,) * len(tokens), "", finish, reward, reason, **fields
    )


# group 0: boxes, rewards .5 and 1; group 1: all wrong, one cut; group 2: perfect; group 3: a reward is missing
GROUPS = [
    GroupRecord(0, 0, "a", "boxes", 3, False, 9, (
        answer(0.5, [7, 8, 7, 8, 7, 2], shaped=0.4, advantage=-1.0, parsed=[[0, 0, 1, 1]] * 3),
        answer(1.0, [7, 2], shaped=1.0, advantage=1.0, parsed=[[0, 0, 1, 1]]),
    ), selected=True, judge_seconds=0.5),
    GroupRecord(1, 1, "b", "text", 3, True, 9, (
        answer(0.0, [5, 2], reason="wrong"), answer(0.0, [5, 5, 5, 5], reason="truncated", finish="length"),
    ), judge_seconds=0.1),
    GroupRecord(2, 2, "c", "text", 3, False, 9, (answer(1.0, [5, 3]), answer(1.0, [5, 3]))),
    GroupRecord(3, 3, "d", "text", 3, False, 9, (
        answer(None, [4, 2], reason="service_error"), answer(0.0, [4, 2], reason="unparsed"),
    )),
    GroupRecord(4, 4, "e", "", 3, False, 0, (), problem="too long"),
]  # fmt: skip


def test_every_figure_of_a_step():
    values = values_of(GROUPS, golds={0: [[0, 0, 1, 1]]})
    expected = {
        "reward": (0.5 + 1 + 0 + 0 + 1 + 1 + 0) / 7,
        "reward/boxes": 0.75, "reward/boxes/std": 0.25, "reward/boxes/unparsed": 0, "reward/boxes/missing": 0,
        "reward/boxes/shaped": 0.7, "reward/boxes/reason/ok": 1, "reward/boxes/seconds_p99": 0.5,
        "reward/text": 2 / 5, "reward/text/std": 0.24**0.5, "reward/text/unparsed": 1 / 6, "reward/text/missing": 1,
        "reward/text/reason/ok": 2 / 6, "reward/text/reason/wrong": 1 / 6, "reward/text/reason/truncated": 1 / 6,
        "reward/text/reason/service_error": 1 / 6, "reward/text/reason/unparsed": 1 / 6,
        "pass_rate/boxes/0.75": 1, "pass_rate/text/0": 2 / 3, "pass_rate/text/1": 1 / 3,
        "valid_share": 1 / 5, "perfect_share": 1 / 4, "zero_share": 1 / 4, "easy_share": 1 / 5,
        "length/mean": (6 + 2 + 2 + 4 + 2 + 2 + 2 + 2) / 8, "length/p50": 2, "length/right": 12 / 4,
        "length/wrong": 8 / 3, "truncated_share": 1 / 8, "repetition_share": (1 / 4 + 1 / 2) / 8,
        "distinct_share": (1 + 1 + 0.5 + 0.5) / 4, "stop_token/2": 5 / 8, "stop_token/3": 2 / 8,
        "entropy": 0.25, "advantage_abs": 1, "gradient/groups/boxes": 1, "gradient/tokens/boxes": 8, "boxes/boxes": 2,
    }  # fmt: skip
    bars = {name: value for name, value in values.items() if name.startswith("pass_rate/")}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert set(values) - set(expected) - set(bars) == {"length/p95", "reward/text/seconds_p99"}
    assert sum(bars.values()) == pytest.approx(2)  # one for each task
    assert ages_of(GROUPS, 4) == {"age_max": 1, "age_mean": 1}


def test_a_step_without_answers_has_a_line_too():
    assert values_of([GROUPS[4]])["valid_share"] == 0
    assert values_of([])["valid_share"] == 0


QUIET = {"entropy": 0.2, "length/mean": 10, "truncated_share": 0.1, "rollout/kl3": 1e-4, "valid_share": 0.5}
QUIET |= {"reward/boxes/reason/ok": 0.9, "reward/boxes/reason/service_error": 0.005, "boxes/boxes": 1.2}
LOUD = {
    "truncated": {"truncated_share": 0.31},
    "entropy": {"entropy": 0.019},
    "length": {"length/mean": 41},
    "mismatch": {"rollout/kl3": 0.011},
    "missing": {"reward/boxes/reason/service_error": 0.02},
    "reason": {"reward/boxes/reason/unparsed": 0.51},
    "boxes": {"boxes/boxes": 2.1},
    "useless": {"valid_share": 0.0},
}


@pytest.mark.parametrize("name", LOUD)
def test_an_alarm_is_raised_by_its_sign_once_and_by_no_other(name):
    watch = Alarms(AlarmConfig(stop=(name,)))
    assert watch.check(QUIET) == []
    (raised,) = watch.check(QUIET | LOUD[name])
    assert (raised.name, raised.ends) == (name, True)
    watch = Alarms(AlarmConfig(), json.loads(json.dumps(watch.state())))
    assert watch.check(QUIET | LOUD[name]) == []  # it stays, and was told
    assert watch.check(QUIET) == []
    assert [alarm.name for alarm in watch.check(QUIET | LOUD[name])] == [name]
    with pytest.raises(UserError, match=name):
        alarms.stopped([raised])


def test_a_reward_that_rises_while_the_held_out_one_falls_is_an_alarm_after_three_evaluations():
    def told(series):
        watch, found = Alarms(AlarmConfig()), []
        for sampled, held_out in series:
            watch = Alarms(AlarmConfig(), json.loads(json.dumps(watch.state())))
            for _ in range(2):
                watch.check({"reward/boxes": sampled, "reward/boxes/std": 9.0, "reward/text": 1 - sampled})
            found.append([alarm.name for alarm in watch.evaluated({"reward/boxes": held_out, "reward/text": held_out})])
        return found

    assert told([(0.5, 0.6), (0.6, 0.5), (0.7, 0.4), (0.8, 0.3)]) == [[], [], [], ["hacking"]]
    assert told([(0.5, 0.6), (0.6, 0.5), (0.7, 0.4), (0.8, 0.3), (0.9, 0.2)])[-1] == []  # told already
    assert told([(0.5, 0.6), (0.6, 0.5), (0.7, 0.51), (0.8, 0.3)]) == [[], [], [], []]
    assert told([(0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9)]) == [[], [], [], []]
