"""The simulated rollouts: their clock against single steps, and the table against MiMo's and another simulation."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jvlm.rl import simulation
from jvlm.rl.selection import Selection, SelectionConfig
from jvlm.rl.simulation import PAPER, SCHEDULES, Prompts, Row, Workload, simulate
from tests.support import GOLDEN

GIVEN = json.loads((GOLDEN / "simulation.json").read_text())
SMALL = Workload(groups=12, answers=4, devices=3, slots=4, log_length=3.0, longest=200, prior_groups=16)


def _step_by_step(workload, prompts):
    """Seconds and busy seconds of a single round, one decode step after the other."""
    queues = [[] for _ in range(workload.devices)]
    row = 0
    for serial in range(workload.groups):
        for tokens in prompts(serial)[1]:
            queues[row % workload.devices].append(tokens)
            row += 1
    busy = []
    for queue in queues:
        live, seconds = [], 0.0
        while queue or live:
            while queue and len(live) < workload.slots:
                live.append(queue.pop(0))
            seconds += workload.step_seconds + workload.row_seconds * len(live)
            live = [left - 1 for left in live if left > 1]
        busy.append(seconds)
    return max(busy), sum(busy)


def test_the_clock_agrees_with_single_steps():
    workload = dataclasses.replace(SMALL, reward_seconds=0.0)
    seconds, busy = _step_by_step(workload, Prompts(workload, 3))
    phase = simulate("plain", workload, 3)
    assert phase.seconds == pytest.approx(seconds, rel=1e-9)
    assert phase.idle == pytest.approx(1 - busy / (workload.devices * seconds), abs=1e-9)


def test_lengths_are_those_of_the_other_simulation():
    prompts = Prompts(Workload(), 0)
    lengths = np.array([length for serial in range(3000) for length in prompts(serial)[1]])
    useful = np.mean([prompts(serial)[0] for serial in range(3000)])
    assert lengths.mean() == pytest.approx(1845, rel=0.06)
    assert np.median(lengths) == pytest.approx(906, rel=0.06)
    assert lengths.max() == 32768
    assert useful == pytest.approx(0.43, abs=0.03)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_a_function_of_its_seed_and_wastes_what_it_says(schedule):
    phase = simulate(schedule, SMALL, 5)
    assert phase == simulate(schedule, SMALL, 5) != simulate(schedule, SMALL, 6)
    assert 0 < phase.idle < 1
    if schedule != "plain":
        prompts, needed = Prompts(SMALL, 5), round(phase.started * (1 - phase.waste))
        assert sum(prompts(serial)[0] for serial in range(needed)) == SMALL.groups


def test_rewards_in_line_are_waited_for_and_beside_one_another_are_not():
    slow = dataclasses.replace(SMALL, reward_seconds=5.0)
    in_line, beside = simulate("continuous", slow, 1), simulate("async", slow, 1)
    assert in_line.reward_wait > 5 * slow.groups / 2
    assert beside.reward_wait <= 10
    assert beside.seconds < in_line.seconds


def test_no_group_is_started_that_cannot_be_selected():
    selection = Selection(SelectionConfig(2, margin=5.0), 0)
    for _ in range(4):
        selection.start()
    selection.judge(2, True)
    assert selection.wants_more()
    selection.judge(3, True)  # two useful ones: those selected have been started, whatever becomes of 0 and 1
    assert not selection.wants_more()


def test_the_defaults_are_the_golden_parameters():
    w, given = Workload(), GIVEN["parameters"]
    assert (w.groups, w.answers, w.devices, w.slots) == tuple(
        given[k] for k in ("prompts", "group", "engines", "slots")
    )
    assert (w.step_seconds, w.row_seconds, w.log_length) == (given["a"], given["c"], given["mu"])
    assert (w.prompt_spread, w.answer_spread, w.longest) == (given["s_prompt"], given["s_answer"], given["cap"])
    assert (w.perfect_share, w.hopeless_share) == (given["p_easy"], given["p_hard"])
    assert (w.perfect_length, w.hopeless_length) == (given["f_easy"], given["f_hard"])
    assert (w.reward_seconds, w.train_share, w.margin) == (given["reward"], given["train_share"], given["margin"])
    assert (w.prior_groups, w.prior_share) == (given["prior_n"], given["prior_p"])
    for schedule, values in PAPER.items():
        expected = [np.nan if value is None else value for value in GIVEN["paper"][schedule]]
        np.testing.assert_array_equal(values, expected)


def _check(mean, schedule):
    """Compare with the other simulation: within 15 %, or twice its own spread over seeds where that is wider."""
    for name, value in dataclasses.asdict(mean).items():
        expected, spread = GIVEN["simulated"][schedule][name]
        assert value == pytest.approx(expected, abs=max(0.15 * expected, 2 * spread) + 1e-9), (schedule, name)


def test_mimo_s_speed_up_of_2_29_on_one_seed():
    naive, early = simulate("naive", seed=0), simulate("early", seed=0)
    train = 0.095 * naive.seconds
    assert (naive.seconds + train) / (early.seconds + train) == pytest.approx(2.29, rel=0.05)


def test_a_step_by_which_answers_may_be_behind_leaves_devices_busy():
    kept, ahead = (simulation.stale(SMALL, Prompts(SMALL, 2), staleness) for staleness in (0.0, 2.0))
    assert ahead.seconds < kept.seconds
    assert ahead.idle < kept.idle
    assert kept.age < ahead.age <= ahead.oldest
    judged = {1, 2, 3, 5}
    useful = lambda serial: (serial != 2, [])  # noqa: E731
    assert simulation._lowest(useful, judged, 1, 2) == [1, 3]
    assert simulation._lowest(useful, judged, 1, 3) is None  # 4 is not judged
    assert simulation._lowest(useful, judged, 0, 1) is None


@pytest.fixture(scope="module")
def stale_rows():
    return simulation.stale_table(seeds=range(1), behind=(0.5, 1.0, 2.0))


@pytest.fixture(scope="module")
def five_rows():
    return simulation.table()


@pytest.mark.slow
@pytest.mark.parametrize("staleness", ["0.5", "1", "2"])
def test_rows_of_stale_answers_are_those_of_the_other_simulation(stale_rows, staleness):
    given = GIVEN["carry"][staleness]
    overall, rollout, idle, age, oldest = stale_rows[float(staleness)]
    assert (overall, rollout, age) == pytest.approx((given["overall"], given["rollout"], given["age"]), rel=0.15)
    assert idle == pytest.approx(given["idle"], abs=0.05)
    assert oldest == given["age_max"]


@pytest.mark.slow
def test_all_five_rows_are_those_of_the_other_simulation_and_speeds_those_of_mimo(five_rows):
    for schedule, (mean, _) in five_rows.items():
        _check(mean, schedule)
        assert isinstance(mean, Row)
        for here, paper in zip((mean.overall, mean.rollout), PAPER[schedule][:2], strict=True):
            assert here == pytest.approx(paper, rel=0.10), schedule


@pytest.mark.slow
def test_the_command_prints_the_rows_beside_the_published_ones(five_rows, stale_rows, monkeypatch, capsys):
    monkeypatch.setattr(simulation, "table", lambda seeds: five_rows if seeds == range(3) else {})
    monkeypatch.setattr(simulation, "stale_table", lambda seeds: stale_rows if seeds == range(3) else {})
    assert simulation.main(["--seeds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| early | 2.29 / 2.") for line in lines) == 1
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| 0.5", "| 1", "| 2"]
