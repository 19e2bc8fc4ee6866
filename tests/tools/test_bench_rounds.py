"""Rounds of the bench, by a clock that only what runs moves on."""

import json

import pytest

from tools import bench_rounds
from tools.bench_rounds import Result, Rounds


class Clock:
    """Shows the seconds of what ran so far, and what that was."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, *seconds: float):
        """Return what takes the first of ``seconds`` at its first call, and so on; the last at all later ones."""
        left = list(seconds)

        def run() -> float:
            taken = left.pop(0) if len(left) > 1 else left[0]
            self.ran.append(name)
            self.now += taken
            return taken

        return run


def test_both_sides_take_turns_and_the_other_goes_on_in_its_fastest_way():
    clock = Clock()
    ways = {"slow": clock.runner("slow", 9, 4), "fast": clock.runner("fast", 10, 3)}
    rounds = bench_rounds.race(clock.runner("ours", 5, 2), ways, seconds=1e9, rounds=3, clock=clock)
    assert clock.ran == ["ours", "slow", "fast", "slow", "fast", *["ours", "fast"] * 3]
    assert rounds == Rounds([2] * 3, [3] * 3, "fast")
    assert rounds.ratios == [1.5] * 3


@pytest.mark.parametrize(("seconds", "count"), [(0, 2), (15, 2), (16, 3), (28, 6), (1000, 7)])
def test_no_round_begins_that_would_not_end_in_time_but_there_are_always_two(seconds, count):
    clock = Clock()  # warming up takes 4 seconds, and so does each round
    rounds = bench_rounds.race(
        clock.runner("ours", 1), {"a": clock.runner("a", 3)}, seconds=seconds, rounds=7, clock=clock
    )
    assert len(rounds.ours) == count
    assert count == 2 or clock.now <= seconds


def result(*ratios: float) -> Result:
    return Result("training step", 100, "tokens/s", Rounds([1.0] * len(ratios), list(ratios), "padded"), "checked")


def test_the_ratio_is_the_median_of_the_rounds_not_of_the_best_of_each_side():
    found = Result("part", 100, "tokens/s", Rounds([1.0, 10.0, 2.0], [1.5, 20.0, 2.0], "padded"), "")
    assert (found.ratio, found.spread, found.speeds) == (1.5, (1.0, 2.0), (50.0, 50.0))


def test_a_ratio_is_compared_with_the_median_of_earlier_runs_on_such_a_machine_alone(tmp_path):
    path = tmp_path / "bench.jsonl"
    assert bench_rounds.read_history(path) == []
    for ratio in (9.0, 1.0, 1.2, 1.1, 1.3, 0.4):
        bench_rounds.append_history([result(ratio)], {"jax": "1"}, path)
    entries = bench_rounds.read_history(path)
    assert [e["ratio"] for e in entries] == [9.0, 1.0, 1.2, 1.1, 1.3, 0.4]
    assert entries[0].keys() >= {"date", "commit", "machine", "jax", "part", "lowest", "highest", "rounds"}
    assert all(json.loads(line) for line in path.read_text().splitlines())
    here = bench_rounds.machine()
    assert bench_rounds.stored_ratio(entries, "training step", here) == 1.1
    assert bench_rounds.stored_ratio(entries, "training step", "another") is None
    assert bench_rounds.stored_ratio(entries, "prefill", here) is None


@pytest.mark.parametrize(("ratio", "fell"), [(1.09, True), (1.1, False), (1.4, False)])
def test_a_fall_of_more_than_a_tenth_is_red(ratio, fell):
    text = bench_rounds.line(result(ratio), 1.22, colour=True)
    assert text.startswith("\x1b[31m") == fell
    assert ("FELL" in text) == fell
    assert "\x1b" not in bench_rounds.line(result(ratio), 1.22, colour=False)
    assert "FELL" not in bench_rounds.line(result(ratio), None, colour=True)
