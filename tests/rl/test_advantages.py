"""Advantages against golden values, and groups that have nothing to teach."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jvlm.rl.advantages import advantages

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "advantages.json").read_text())
LENGTHS = np.array([6, 3, 5, 2, 4, 6, 1, 6])
ESTIMATORS = {
    "group_std_sample_eps0": ("group", 0.0),
    "group_std_population_eps0": ("group_population", 0.0),
    "group_std_sample_eps1e-4 (trl)": ("group", 1e-4),
    "group_std_sample_eps1e-6 (verl, tunix)": ("group", 1e-6),
    "dr_grpo (mean only)": ("mean", 0.0),
    "rloo": ("rloo", 0.0),
    "batch_std (trl scale_rewards=batch, eps 0)": ("batch", 0.0),
    "opo (length-weighted mean)": ("opo", 0.0),
    "reinforce++ (whitened over tokens, gamma 1; same for all tokens of an answer)": ("reinforce++", 0.0),
    "reinforce++-baseline (group mean out, then whitened over tokens)": ("reinforce++_baseline", 0.0),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_golden(name):
    estimator, eps = ESTIMATORS[name]
    found = advantages(np.asarray(GOLDEN["rewards"]), np.asarray(GOLDEN["groups"]), LENGTHS, estimator, eps=eps)
    np.testing.assert_allclose(found, GOLDEN[name], atol=1e-8)


@pytest.mark.parametrize("case", ["one right of eight", "seven right of eight", "all equal", "one answer"])
@pytest.mark.parametrize(
    ("estimator", "key"), [("group", "sample"), ("group_population", "population"), ("mean", "mean_only")]
)
def test_edges(case, estimator, key):
    case = GOLDEN["edge_cases"][case]
    count = len(case["rewards"])
    found = advantages(np.asarray(case["rewards"], float), np.zeros(count, int), np.ones(count, int), estimator)
    np.testing.assert_allclose(found, case[key], atol=1e-8)


@pytest.mark.parametrize("estimator", sorted({e for e, _ in ESTIMATORS.values()}))
def test_equal_rewards_teach_nothing_though_their_deviation_is_not_zero(estimator):
    for case in GOLDEN["all_equal_but_std_is_not_0"]:
        rewards = np.full(case["answers"], case["value"], case["dtype"])
        assert rewards.std(ddof=1) != 0 or case["dtype"] == "float32"
        others = np.array([0.0, 1.0])  # another group, so that the batch has a deviation
        found = advantages(
            np.concatenate([rewards, others]),
            np.repeat([0, 1], [len(rewards), 2]),
            np.ones(len(rewards) + 2, int),
            estimator,
        )
        assert not found[: len(rewards)].any()


def test_a_missing_reward_is_no_zero():
    rewards = np.array([1.0, 0.0, np.nan, 0.5, np.nan])
    groups = np.array([0, 0, 0, 1, 1])
    found = advantages(rewards, groups, np.ones(5, int))
    np.testing.assert_allclose(found[:2], [2**-0.5, -(2**-0.5)])
    assert not found[2:].any()  # missing, and a group with one reward
