"""How sure a score is, and whether two runs differ; Elo ratings of models from duels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from jvlm.errors import UserError

_NORMAL = NormalDist()  # scipy.stats takes a second to import


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(
    scores: Float[np.ndarray, " N"], *, confidence: float = 0.95, groups: Sequence | None = None, draws: int = 2000
) -> Interval:
    """Return the mean of scores: with Wilson's interval if all are 0 or 1, else by the bootstrap.

    Args:
      groups: what scores belong together (questions about one image); then groups are drawn, not scores.

    Raises:
      UserError: no scores.
    """
    scores = np.asarray(scores, np.float64)
    if not scores.size:
        raise UserError("there is no score to take the mean of; look at what was left out")
    if groups is None and np.isin(scores, (0, 1)).all():
        return wilson(int(scores.sum()), scores.size, confidence=confidence)
    sums, counts = _by_group(scores, groups)
    drawn = np.random.default_rng(0).integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(scores.mean()), float(low), float(high))


def _by_group(scores: np.ndarray, groups: Sequence | None) -> tuple[np.ndarray, np.ndarray]:
    if groups is None:
        return scores, np.ones(scores.size)
    _, numbers = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    return np.bincount(numbers, scores), np.bincount(numbers)


def wilson(right: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Return a share with Wilson's score interval."""
    z = _NORMAL.inv_cdf((1 + confidence) / 2)
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs on the same questions.

    Attributes:
      difference: mean of the second minus mean of the first, with its interval over questions.
      p_value: of a permutation test of signs, two-sided.
      detectable: smallest true difference that so many questions would show in 80 % of cases, at 5 %.
      changed: questions whose scores differ.

    Where every question changed alike (or none did), the spread of changes is unknown. It is then taken from the upper
    end of Wilson's interval of no exception in so many: that share may have changed by a whole point of a 0 to 1 score.
    """

    difference: Interval
    p_value: float
    detectable: float
    changed: int


def compare(
    first: Float[np.ndarray, " N"],
    second: Float[np.ndarray, " N"],
    *,
    confidence: float = 0.95,
    groups: Sequence | None = None,
    draws: int = 10_000,
) -> Comparison:
    """Return how two runs differ, question by question.

    Args:
      groups: what questions belong together (those about one image); then groups are drawn, not questions.
    """
    change = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    rng = np.random.default_rng(0)
    sums, counts = _by_group(change, groups)
    n = sums.size
    means = []
    for _ in range(max(draws // 1000, 1)):
        drawn = rng.integers(0, n, (1000, n))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    moved = np.abs(sums[sums != 0])
    signs = [(rng.integers(0, 2, (1000, moved.size)) * 2 - 1) @ moved for _ in range(max(draws // 1000, 1))]
    extreme = np.abs(np.concatenate(signs)) >= abs(change.sum()) - 1e-12
    deviation = float((sums - change.mean() * counts).std(ddof=1)) if n > 1 else math.nan
    if np.ptp(change) < 1e-12:
        exceptions, most = wilson(0, n, confidence=confidence).high, max(abs(change.mean()), 1.0)
        low, high = max(change.mean() - exceptions, -most), min(change.mean() + exceptions, most)
        deviation = math.sqrt(exceptions) * change.size / n
    detectable = (_NORMAL.inv_cdf(0.975) + _NORMAL.inv_cdf(0.8)) * deviation * math.sqrt(n) / change.size
    p_value = (extreme.sum() + 1) / (extreme.size + 1)
    interval = Interval(float(change.mean()), float(low), float(high))
    return Comparison(interval, float(p_value), float(detectable), int((change != 0).sum()))


@dataclasses.dataclass(frozen=True)
class Duel:
    """What a judge content of two models' answers to one question.

    Attributes:
      result: share of the first: 1 it is better, 0 the second is, 0.5 neither.
      style: differences of style, first minus second (length, lists, ...), for `elo` to control for.
    """

    first: str
    second: str
    result: float
    style: tuple[float, ...] = ()


def elo(
    duels: Sequence[Duel], *, base: float = 1000.0, draws: int = 200, confidence: float = 0.95, ridge: float = 1e-3
) -> dict[str, Interval]:
    """Return the rating of each model by the Bradley-Terry model, in units of 400 / ln 10, with bootstrap intervals.

    Ratings have the mean ``base``. Where duels have ``style``, its effect is estimated beside and taken out.

    Args:
      ridge: weight of a penalty that keeps the rating of a model that always wins finite.

    Raises:
      UserError: no duels, or models that never met, directly or over others.
    """
    names = sorted({name for duel in duels for name in (duel.first, duel.second)})
    if not names:
        raise UserError("there is no duel to rate models by")
    _check_connected(duels, names)
    index = {name: number for number, name in enumerate(names)}
    pairs = np.array([(index[duel.first], index[duel.second]) for duel in duels])
    results = np.array([duel.result for duel in duels], np.float64)
    style = np.array([duel.style for duel in duels], np.float64).reshape(len(duels), -1)
    if style.size:
        style = style / np.maximum(style.std(0), 1e-12)
    value = _bradley_terry(pairs, results, style, len(names), ridge)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(duels), len(duels)) for _ in range(draws)]
    samples = np.array([_bradley_terry(pairs[d], results[d], style[d], len(names), ridge) for d in drawn])
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return {
        name: Interval(*(base + 400 / math.log(10) * float(x[i]) for x in (value, low, high)))
        for i, name in enumerate(names)
    }


def _bradley_terry(
    pairs: Int[np.ndarray, "N 2"],
    results: Float[np.ndarray, " N"],
    style: Float[np.ndarray, "N F"],
    M: int,
    ridge: float,
) -> Float[np.ndarray, " M"]:
    """Return log strengths with mean 0."""
    design = np.zeros((len(pairs), M + style.shape[1]))
    rows = np.arange(len(pairs))
    design[rows, pairs[:, 0]] += 1
    design[rows, pairs[:, 1]] -= 1
    design[:, M:] = style

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ weights
        total = np.logaddexp(0, logits).sum() - results @ logits + 0.5 * ridge * weights @ weights
        return float(total), design.T @ (1 / (1 + np.exp(-logits)) - results) + ridge * weights

    found = optimize.minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B").x[:M]
    return found - found.mean()


def _check_connected(duels: Sequence[Duel], names: Sequence[str]) -> None:
    reached, edges = {names[0]}, [{duel.first, duel.second} for duel in duels]
    while more := {name for edge in edges if edge & reached for name in edge} - reached:
        reached |= more
    apart = sorted(set(names) - reached)
    if apart:
        raise UserError(f"{', '.join(apart)} never met {names[0]}, nor a model that did: no rating compares them")
