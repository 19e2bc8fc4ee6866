"""Two sides that take turns: the seconds of each round, their ratio with its spread, and a file of earlier ratios.

The speed of a machine drifts, above all where others use it. So both sides run one right after the other, a ratio is
that of one round, and what counts is the median over the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).parents[1] / "docs/results/bench.jsonl"
# A ratio below this share of the stored one has fallen; the stored one is the median of so many runs.
TOLERANCE, REMEMBERED = 0.9, 5

Clock = Callable[[], float]
Timed = Callable[[], float]


def timed(run: Callable[[], Any], clock: Clock = time.perf_counter) -> Timed:
    """Return what runs something and returns the seconds that it took."""

    def seconds() -> float:
        began = clock()
        run()
        return clock() - began

    return seconds


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Seconds of each round of both sides.

    Attributes:
      way: how the other side ran.
    """

    ours: list[float]
    theirs: list[float]
    way: str

    @property
    def ratios(self) -> list[float]:
        """How many times as fast our side was, in each round."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]


def race(
    ours: Timed,
    theirs: Mapping[str, Timed],
    *,
    seconds: float,
    rounds: int,
    fewest: int = 2,
    clock: Clock = time.perf_counter,
) -> Rounds:
    """Return up to ``rounds`` rounds of our side and of the other's fastest way.

    Each runs before to compile and to warm up; where the other side has several ways, those run twice.

    Args:
      seconds: no round begins that would not end within them, once there are ``fewest``.
    """
    began = clock()
    ours()
    for run in theirs.values():
        run()
    (way, *others) = theirs
    if others:
        tried = {way: run() for way, run in theirs.items()}
        way = min(tried, key=tried.get)
    result = Rounds([], [], way)
    for number in range(rounds):
        before = clock()
        result.ours.append(ours())
        result.theirs.append(theirs[way]())
        now = clock()
        if number + 1 >= fewest and 2 * now - before - began > seconds:
            break
    return result


@dataclasses.dataclass(frozen=True)
class Result:
    """What one part of the bench gave.

    Attributes:
      name: of the part.
      work: done in a round, in ``unit`` without "/s".
      check: how it was made sure that both sides compute the same.
    """

    name: str
    work: float
    unit: str
    rounds: Rounds
    check: str

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(self.rounds.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of a round."""
        return min(self.rounds.ratios), max(self.rounds.ratios)

    @property
    def speeds(self) -> tuple[float, float]:
        """Median speed of our side and of the other, in ``unit``."""
        return self.work / statistics.median(self.rounds.ours), self.work / statistics.median(self.rounds.theirs)

    def entry(self) -> dict[str, Any]:
        """Return the result as a line of the history."""
        ours, theirs = self.speeds
        low, high = self.spread
        numbers = {"ratio": self.ratio, "lowest": low, "highest": high, "jvlm": ours, "torch": theirs}
        return {
            "part": self.name,
            **{name: float(f"{value:.4g}") for name, value in numbers.items()},
            "unit": self.unit,
            "rounds": len(self.rounds.ours),
            "torch_way": self.rounds.way,
        }


HEADER = f"{'':<24}{'jvlm':>9}{'torch':>9}   ratio (lowest to highest round)   before"


def line(result: Result, stored: float | None, *, colour: bool) -> str:
    """Return a result as a line of the table, in red where it fell below `TOLERANCE` of the stored ratio."""
    (ours, theirs), (low, high) = result.speeds, result.spread
    fell = stored is not None and result.ratio < TOLERANCE * stored
    before = "new" if stored is None else f"{stored:.2f}x"
    text = (
        f"{result.name:<24}{ours:>9,.0f}{theirs:>9,.0f}  {result.ratio:>5.2f}x ({low:.2f} to {high:.2f} in "
        f"{len(result.rounds.ours)} rounds)  {before:>7}{'  FELL' if fell else ''}   {result.unit}; "
        f"{result.rounds.way}; {result.check}"
    )
    return f"\x1b[31m{text}\x1b[0m" if fell and colour else text


def machine() -> str:
    """Return the processor and how many of its cores may be used."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = (one.partition(":") for one in Path("/proc/cpuinfo").read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    return f"{len(os.sched_getaffinity(0))} x {model}"


def stored_ratio(entries: Iterable[Mapping[str, Any]], part: str, on: str) -> float | None:
    """Return the median of a part's last ratios on such a machine; None if there is none."""
    ratios = [entry["ratio"] for entry in entries if entry["part"] == part and entry["machine"] == on]
    return statistics.median(ratios[-REMEMBERED:]) if ratios else None


def read_history(path: Path = HISTORY) -> list[dict[str, Any]]:
    """Return the lines of the history, the oldest first."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


def append_history(results: Iterable[Result], versions: Mapping[str, str], path: Path = HISTORY) -> None:
    """Add results to the history, with date, commit, machine and versions."""
    shared = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": _commit(), "machine": machine(), **versions}
    with path.open("a") as file:
        file.writelines(json.dumps({**shared, **result.entry()}) + "\n" for result in results)


def _commit() -> str:
    """Return the short name of the commit that is checked out, with "+" behind it where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
