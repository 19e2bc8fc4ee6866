"""Draws from a mixture against closed forms: shares, phases, keys, limits and orders."""

import itertools
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvlm.data.mixture.config import Mixture, Phase, Source
from jvlm.data.mixture.order import BlockOrder, FileOrder, GlobalOrder, source_seed
from jvlm.data.mixture.plan import enters, plan_of
from jvlm.data.mixture.shares import SourceSize, shares_of
from jvlm.data.mixture.spread import Spread, spread_of
from jvlm.errors import UserError


def _tree(weights, **settings_of_root):
    return Mixture(members={f"s{i}": Source(weight=w) for i, w in enumerate(weights)}, **settings_of_root)


def _sizes(examples, means=None):
    means = means or [None] * len(examples)
    return {f"s{i}": SourceSize(n, m) for i, (n, m) in enumerate(zip(examples, means, strict=True))}


def _draws(plan, count, start=0):
    return np.asarray([plan[k] for k in range(start, start + count)])


def _deviation(sources, shares):
    """The largest difference of any source's count from its share, after any number of draws."""
    counts = np.cumsum(np.eye(len(shares), dtype=int)[sources], axis=0)
    numbers = np.arange(1, len(sources) + 1)[:, None]
    return np.abs(counts - numbers * np.asarray(shares, float)).max()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_after_any_number_of_draws_each_source_is_within_one_of_its_share(counts, far):
    spread = Spread(counts)
    drawn = np.asarray([spread[k] for k in range(2 * spread.period)])
    assert _deviation(drawn[:, 0], np.asarray(counts) / spread.period) < 1
    for source, count in enumerate(counts):  # keys count a source's own draws
        assert drawn[drawn[:, 0] == source, 1].tolist() == list(range(2 * count))
    source, key = spread[far]
    assert [spread.drawn(far + more)[source] for more in (0, 1)] == [key, key + 1]
    assert abs(key - Fraction(far * counts[source], spread.period)) < 1


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=70), st.integers(100, 2000))
@settings(max_examples=40, deadline=None)
def test_shares_that_are_no_small_ratios_are_rounded_to_the_period(weights, longest):
    total = sum(map(Fraction, weights))
    shares = [Fraction(w) / total for w in weights]
    spread = spread_of(shares, longest)
    assert min(spread.counts) >= 1
    if spread.period != longest:  # small ratios after all
        assert [Fraction(count, spread.period) for count in spread.counts] == shares
    tiny = sum(share * longest < 1 for share in shares)  # each of these takes one draw more than its share
    for count, share in zip(spread.counts, shares, strict=True):
        assert abs(count - share * spread.period) <= 1 + tiny


def test_shares_of_the_unit_examples_multiply_down_the_tree():
    inner = Mixture(weight=0.8, members={"a": Source(weight=1), "b": Source(weight=3)})
    tree = Mixture(members={"x": inner, "y": Source(weight=0.2)})
    sizes = {"x/a": SourceSize(7), "x/b": SourceSize(9), "y": SourceSize(100)}
    assert shares_of(tree, sizes).of == {"x/a": Fraction(1, 5), "x/b": Fraction(3, 5), "y": Fraction(1, 5)}


def test_times_are_passes_over_each_member_in_one_over_the_mixture():
    inner = Mixture(weight=2, members={"a": Source(weight=1), "b": Source(weight=3)})
    tree = Mixture(members={"x": inner, "y": Source(weight=0.5)}, unit="times")
    sizes = {"x/a": SourceSize(7), "x/b": SourceSize(9), "y": SourceSize(100)}
    plan = plan_of(tree, sizes)
    assert plan.examples_per_pass == 2 * 7 + 6 * 9 + 50
    assert plan.drawn(plan.examples_per_pass).tolist() == [14, 54, 50]


@pytest.mark.parametrize("unit", ["tokens", "loss_tokens", "patches", "sequences"])
def test_of_measured_units_the_weight_is_the_share_of_what_is_measured(unit):
    plan = plan_of(_tree([0.5, 0.3, 0.2], unit=unit), _sizes([10, 20, 30], [100.0, 7.5, 33.0]))
    measured = plan.drawn(10**6) * np.asarray([100.0, 7.5, 33.0])
    np.testing.assert_allclose(measured / measured.sum(), [0.5, 0.3, 0.2], rtol=2e-4)


def test_a_measured_share_inside_of_one_of_examples_counts_within_its_node():
    inner = Mixture(weight=1, members={"a": Source(weight=1), "b": Source(weight=1)}, unit="tokens")
    tree = Mixture(members={"x": inner, "y": Source(weight=1)}, unit="examples")
    sizes = {"x/a": SourceSize(1, 30.0), "x/b": SourceSize(1, 10.0), "y": SourceSize(1, 5.0)}
    assert shares_of(tree, sizes).of == {"x/a": Fraction(1, 8), "x/b": Fraction(3, 8), "y": Fraction(1, 2)}


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_with_a_temperature_shares_are_powers_of_the_sizes(temperature):
    examples = [5, 50, 500]
    shares = shares_of(_tree([1, 1, 9], temperature=temperature), _sizes(examples)).of
    powers = np.asarray(examples, float) ** temperature
    np.testing.assert_allclose([float(s) for s in shares.values()], powers / powers.sum(), rtol=1e-12)


SCHEDULE = (Phase(0.3, {"s0": 0.0, "s1": 4.0}), Phase(0.6, {"s0": 3.0, "s2": 2.0}, end=0.9))


def test_counts_of_each_phase_are_within_one_of_its_shares_and_keys_have_no_gaps():
    run = 2_000
    plan = plan_of(_tree([1, 2, 3], schedule=SCHEDULE), _sizes([7, 11, 13]), run)
    drawn = _draws(plan, run + 500)
    bounds = [0, 600, *(1200 + 60 * step for step in range(10)), 1800, run + 500]
    middle = [(step + 0.5) / 10 for step in range(10)]
    weights = [(1, 2, 3), (0, 4, 3), *((3 * m, 4, 3 - m) for m in middle), (3, 4, 2)]
    for (start, end), weight in zip(itertools.pairwise(bounds), weights, strict=True):
        assert _deviation(drawn[start:end, 0], np.asarray(weight) / sum(weight)) < 1, (start, end)
    for source in range(3):
        assert drawn[drawn[:, 0] == source, 1].tolist() == list(range((drawn[:, 0] == source).sum()))
    for draws in (0, 1, 599, 600, 601, 1234, 1800, 2400):
        assert plan.drawn(draws).tolist() == np.bincount(drawn[:draws, 0], minlength=3).tolist()
    again = pickle.loads(pickle.dumps(plan))
    assert [again[k] for k in (0, 700, 1999)] == [plan[k] for k in (0, 700, 1999)]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9), st.none() | st.integers(1, 4)), min_size=1, max_size=8),
    st.integers(10, 3_000),
)
@settings(max_examples=60, deadline=None)
def test_no_source_gives_more_than_max_epochs_and_the_others_take_over_by_weight(sources, run):
    members = {f"s{i}": Source(weight=w, max_epochs=m) for i, (_, w, m) in enumerate(sources)}
    sizes = _sizes([n for n, _, _ in sources])
    free = [i for i, (_, _, m) in enumerate(sources) if m is None]
    room = sum(n * m for n, _, m in sources if m is not None)
    if not free and room - len(sources) < run:  # one draw of each source is left to rounding
        with pytest.raises(UserError, match="max_epochs allows too little"):
            plan_of(Mixture(members=members), sizes, run)
        return
    plan = plan_of(Mixture(members=members), sizes, run)
    counts = plan.drawn(run)
    assert counts.sum() == run
    assert all(counts[i] <= n * m for i, (n, _, m) in enumerate(sources) if m is not None)
    per_weight = [counts[i] / sources[i][1] for i in free]
    if free:
        assert max(per_weight) - min(per_weight) <= 3
    limited = {one.source for one in plan.limited}
    total = sum(w for _, w, _ in sources)
    for i, (n, w, m) in enumerate(sources):
        if f"s{i}" not in limited:  # it gives what it was asked for, or more
            assert counts[i] >= run * w / total - 2 - len(sources) * (m is not None)
        else:
            assert run * w / total > n * m - 1 - 1e-9 or counts[i] >= n * m - 2


def test_a_schedule_and_max_epochs_need_the_length_of_the_run():
    for tree in (_tree([1, 1, 1], schedule=SCHEDULE), Mixture(members={"s0": Source(max_epochs=1.0)})):
        with pytest.raises(UserError, match=r"give data.run_examples"):
            plan_of(tree, _sizes([1, 1, 1][: len(tree.members)]))


def test_sources_that_no_phase_draws_from_are_not_opened():
    inner = Mixture(weight=0, members={"a": Source()})
    tree = Mixture(
        members={"x": inner, "y": Source(), "z": Source(weight=0), "late": Source(weight=0)},
        schedule=(Phase(0.5, {"late": 1.0}),),
    )
    assert list(enters(tree)) == ["y", "late"]


@pytest.mark.parametrize(
    ("tree", "sizes", "message"),
    [
        (_tree([0, 0]), _sizes([1, 1]), r"every member of it has weight 0"),
        (_tree([1, 1]), _sizes([1, 0]), r"source 's1' has no examples; give it files, or weight 0"),
        (_tree([1, 1], unit="patches"), _sizes([1, 1], [5.0, 0.0]), r"'s1' has no patches of which its weight"),
    ],
)
def test_what_gives_no_shares_is_refused(tree, sizes, message):
    with pytest.raises(UserError, match=message):
        plan_of(tree, sizes)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_each_pass_of_a_block_order_is_a_permutation_that_stays_in_its_window(lengths, blocks, seed):
    starts = np.cumsum([0, *lengths])
    order, total = BlockOrder(starts, seed, blocks), int(starts[-1])
    for epoch in range(2):
        drawn = np.asarray([order[epoch * total + i] for i in range(total)])
        assert sorted(drawn.tolist()) == list(range(total))
        block = np.searchsorted(starts, drawn, "right") - 1
        seen, at = [], 0
        while at < total:  # whole windows of so many blocks, one after the other
            size = 0
            window = set()
            while len(window) < blocks and at + size < total:
                window.add(int(block[at + size]))
                size = max(int(sum(lengths[b] for b in window)), size + 1) if len(window) == blocks else size + 1
            members = block[at : at + sum(lengths[b] for b in set(block[at : at + size].tolist()))]
            seen.append(frozenset(members.tolist()))
            at += len(members)
        assert sum(map(len, seen)) == len(lengths) == len(frozenset().union(*seen))


def test_neighbours_in_a_file_are_a_third_of_a_window_apart():
    starts = np.arange(0, 6401, 100)
    order = BlockOrder(starts, 3, blocks=16)
    place = np.argsort([order[i] for i in range(6400)])
    within = np.abs(np.diff(place))[np.arange(1, 6400) % 100 != 0]
    assert within.mean() == pytest.approx(1600 / 3, rel=0.05)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
def test_each_pass_of_all_orders_is_a_permutation_and_sources_of_one_length_differ(length):
    orders = [GlobalOrder(length, source_seed(0, "a")), GlobalOrder(length, source_seed(0, "b")), FileOrder(length)]
    passes = [[[order[e * length + i] for i in range(length)] for e in range(2)] for order in orders]
    assert all(sorted(one) == list(range(length)) for both in passes for one in both)
    assert passes[2][0] == passes[2][1] == list(range(length))
    if length == 100:
        assert len({tuple(one) for both in passes[:2] for one in both}) == 4
