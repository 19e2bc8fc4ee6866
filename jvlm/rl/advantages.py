"""Advantages of answers, from the rewards of each group (the answers to one prompt). On the host, in float64.

Axes: N answers.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Estimator = Literal[
    *("group", "group_population", "mean", "rloo", "batch", "reinforce++", "reinforce++_baseline", "opo"),
]
# Rewards of a group that differ by less than this are equal: a standard deviation of equal floats need not be 0.
EQUAL = 1e-6


def advantages(
    rewards: Float[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    lengths: Int[np.ndarray, " N"],
    estimator: Estimator = "group",
    *,
    eps: float = 0.0,
) -> Float[np.ndarray, " N"]:
    """Return the advantage of each answer; the same for all its tokens.

    - "group": (r - mean) / standard deviation of the group's sample (GRPO, arXiv 2402.03300); "group_population": of
      the group as a whole.
    - "mean": r - mean (Dr. GRPO, 2503.20783). "rloo": r - mean of the others (2402.14740). "opo": r - mean weighted by
      length (2505.23585).
    - "batch": (r - mean of the group) / standard deviation of all rewards.
    - "reinforce++": whitened over all tokens; "reinforce++_baseline": after the group's mean is taken off (2501.03262).

    A missing reward (NaN: a service failed) leaves the group's statistics and gets 0, and so does a group with fewer
    than two rewards, or whose rewards are all equal.

    Args:
      lengths: tokens of each answer.
      eps: added to standard deviations; TRL has 1e-4.
    """
    rewards = np.asarray(rewards, np.float64)
    scored = ~np.isnan(rewards)
    values, lengths = np.where(scored, rewards, 0.0), np.asarray(lengths, np.float64)
    _, numbers = np.unique(groups, return_inverse=True)

    def of_group(x: np.ndarray) -> np.ndarray:
        return np.bincount(numbers, np.where(scored, x, 0.0))[numbers]

    count = of_group(np.ones_like(values))
    mean = of_group(values) / np.maximum(count, 1)
    low, high = (_extreme(f, values, numbers, scored) for f in (np.minimum, np.maximum))
    useful = scored & (count >= 2) & (high - low > EQUAL)
    centred = values - mean
    if estimator in ("group", "group_population"):
        spare = 1 if estimator == "group" else 0
        deviation = np.sqrt(of_group(centred**2) / np.maximum(count - spare, 1))
        result = centred / np.where(useful, deviation + eps, 1.0)
    elif estimator == "mean":
        result = centred
    elif estimator == "rloo":
        result = centred * count / np.maximum(count - 1, 1)
    elif estimator == "opo":
        result = values - of_group(values * lengths) / np.maximum(of_group(lengths), 1)
    elif estimator == "batch":
        deviation = values[scored].std(ddof=1) if scored.sum() > 1 else 1.0
        result = centred / (deviation + eps if deviation > EQUAL else 1.0)
    else:
        base = values if estimator == "reinforce++" else centred
        result = _whitened(base, lengths * scored)
    return np.where(useful, result, 0.0)


def _extreme(choose: np.ufunc, values: np.ndarray, numbers: np.ndarray, scored: np.ndarray) -> np.ndarray:
    start = np.inf if choose is np.minimum else -np.inf
    found = np.full(numbers.max() + 1, start)
    choose.at(found, numbers[scored], values[scored])
    return np.where(np.isfinite(found), found, 0.0)[numbers]


def _whitened(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 (of the sample) over tokens."""
    total = tokens.sum()
    mean = (values * tokens).sum() / total
    variance = ((values - mean) ** 2 * tokens).sum() / total * (total / max(total - 1, 1))
    return (values - mean) / np.sqrt(variance + 1e-8)
