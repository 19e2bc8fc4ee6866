"""Intervals, comparisons and ratings against scipy, simulation and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jvlm.errors import UserError
from jvlm.scoring.statistics import Duel, compare, elo, mean_interval, wilson


@pytest.mark.parametrize(("right", "total"), [(0, 10), (7, 10), (500, 1000), (10, 10)])
def test_wilson_is_scipys(right, total):
    interval, oracle = wilson(right, total), stats.binomtest(right, total).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.beta(3, 7, 80), draws=400) for _ in range(200)]
    covered = sum(interval.low <= 0.3 <= interval.high for interval in intervals)
    assert 180 <= covered <= 199


def test_questions_about_one_image_count_together():
    scores = np.repeat([0.0, 1.0, 0.2, 0.9], 50)
    alone, together = mean_interval(scores), mean_interval(scores, groups=np.repeat(range(4), 50).tolist())
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_comparison_is_that_of_scipys_permutation_test():
    rng = np.random.default_rng(2)
    first = rng.integers(0, 2, 60).astype(float)
    second = np.where(rng.random(60) < 0.2, 1.0, first)
    found = compare(first, second)
    oracle = stats.permutation_test(
        (second - first,), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(3)
    )
    assert found.p_value == pytest.approx(oracle.pvalue, abs=0.015)
    assert found.difference.value == pytest.approx((second - first).mean())
    deviation = (second - first).std(ddof=1)
    assert found.detectable == pytest.approx(
        stats.norm.isf(0.025) * deviation / 60**0.5 + stats.norm.isf(0.2) * deviation / 60**0.5
    )


def test_no_scores_is_an_error_and_no_zero():
    with pytest.raises(UserError, match="no score"):
        mean_interval(np.array([]))


def test_elo_finds_the_ratings_that_duels_were_drawn_with():
    rng = np.random.default_rng(4)
    true = {"a": 1100.0, "b": 1000.0, "c": 900.0}
    duels = []
    for _ in range(3000):
        first, second = rng.choice(list(true), 2, replace=False)
        chance = 1 / (1 + 10 ** ((true[second] - true[first]) / 400))
        duels.append(Duel(str(first), str(second), float(rng.random() < chance)))
    ratings = elo(duels, draws=50)
    for name, rating in ratings.items():
        assert rating.value == pytest.approx(true[name], abs=20)
        assert rating.low < rating.value < rating.high


def test_elo_of_two_models_is_the_closed_form():
    duels = [Duel("a", "b", 1.0)] * 75 + [Duel("b", "a", 1.0)] * 25
    ratings = elo(duels, draws=5, ridge=0)
    assert ratings["a"].value - ratings["b"].value == pytest.approx(400 / math.log(10) * math.log(3), abs=0.1)


def test_style_is_taken_out():
    rng = np.random.default_rng(5)
    duels = []
    for _ in range(2000):  # equal models; the judge likes long answers, and "a" writes them
        longer = rng.normal(1.0, 1.0)
        duels.append(Duel("a", "b", float(rng.random() < 1 / (1 + math.exp(-longer))), (longer,)))
    plain = elo([Duel(d.first, d.second, d.result) for d in duels], draws=2)
    controlled = elo(duels, draws=2)
    assert plain["a"].value - plain["b"].value > 100
    assert abs(controlled["a"].value - controlled["b"].value) < 40


def test_models_that_never_met_are_not_compared():
    with pytest.raises(UserError, match="never met"):
        elo([Duel("a", "b", 1.0), Duel("c", "d", 1.0)])


def test_questions_about_one_image_are_drawn_together():
    rng = np.random.default_rng(0)
    by_image = np.repeat(rng.integers(-1, 2, 40), 10).astype(float)
    first, second = np.zeros(400), by_image
    groups = np.repeat(np.arange(40), 10)
    alone, together = compare(first, second), compare(first, second, groups=groups)
    assert together.difference.value == alone.difference.value
    width = [one.difference.high - one.difference.low for one in (alone, together)]
    assert width[1] == pytest.approx(width[0] * 10**0.5, rel=0.1), "forty things are seen, and not four hundred"
    assert together.detectable == pytest.approx(alone.detectable * 10**0.5, rel=0.05)
    assert together.p_value > alone.p_value
    of_images = compare(np.zeros(40), by_image[::10])
    assert together.detectable == pytest.approx(of_images.detectable)


@pytest.mark.parametrize("change", [0.0, 1.0, -1.0, 0.25])
def test_questions_that_all_changed_alike_do_not_show_every_difference(change):
    """The truth behind them may be another: of a true share of changes just inside the interval, none is often seen."""
    n = 24
    found = compare(np.full(n, max(-change, 0.0)), np.full(n, max(-change, 0.0) + change))
    interval = found.difference
    assert found.changed == n * (change != 0)
    assert interval.value == pytest.approx(change)
    assert -1 <= interval.low <= change <= interval.high <= 1
    width = max(interval.high - change, change - interval.low)
    assert stats.binom.pmf(0, n, width) > 0.025 > stats.binom.pmf(0, n, 1.5 * width)
    assert 0.15 < found.detectable < 0.35
    many = compare(np.zeros(2400), np.full(2400, change), groups=np.repeat(np.arange(n), 100))
    assert many.detectable == pytest.approx(found.detectable), "groups count, and not questions"
