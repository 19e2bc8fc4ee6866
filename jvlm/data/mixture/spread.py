"""Draws that are spread evenly over sources, as a function of their number alone."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int

LONGEST = 2**18  # draws of a period where shares are no ratios of smaller numbers


class Spread:
    """Which source each draw takes, with a period in which source s is drawn ``counts[s]`` times.

    After any number k of draws, each source was drawn less than one time more or less than k x counts[s] / period. Such
    an order exists for any counts (Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980); the
    earliest deadline first finds it: the j-th draw of a source may come from floor(j / share) on and must have come
    before ceil((j + 1) / share).

    Attributes:
      counts: draws of each source in a period.
      period: their sum.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts, self.period = tuple(map(int, counts)), int(sum(counts))
        self._made = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def __repr__(self) -> str:
        return f"Spread({self.counts})"

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """Return (source, how many draws before took it)."""
        if self._made is None:
            self._made = _table(self.counts)
        sources, ranks = self._made
        rounds, within = divmod(draw, self.period)
        source = int(sources[within])
        return source, rounds * self.counts[source] + int(ranks[within])

    def drawn(self, draws: int) -> Int[np.ndarray, " S"]:
        """Return how often each source is among the first ``draws``."""
        rounds, within = divmod(draws, self.period)
        first = np.bincount(_table(self.counts)[0][:within], minlength=len(self.counts))
        return rounds * np.asarray(self.counts, np.int64) + first


@functools.lru_cache(maxsize=64)
def _table(counts: tuple[int, ...]) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """(source, its draws before) of each draw of a period."""
    period, number = sum(counts), len(counts)
    owner = np.repeat(np.arange(number), counts)
    of_owner = np.asarray(counts, np.int64)[owner]
    j = np.arange(period) - np.repeat(np.cumsum(counts) - counts, counts)
    release, deadline = j * period // of_owner, -((j + 1) * -period // of_owner)
    order = np.argsort(release, kind="stable")
    # one whole number for each job, so that the heap compares nothing else: the deadline, then the source
    jobs = (deadline * number + owner)[order].tolist()
    ends = np.searchsorted(release[order], np.arange(period), "right").tolist()
    waiting: list[int] = []
    first, taken = 0, []
    for end in ends:
        for job in jobs[first:end]:
            heapq.heappush(waiting, job)
        first = end
        taken.append(heapq.heappop(waiting))
    sources = (np.asarray(taken) % number).astype(np.int32)
    ranks = np.empty(period, np.int32)
    ranks[np.argsort(sources, kind="stable")] = j  # jobs of a source are taken in order
    return sources, ranks


def spread_of(shares: Sequence[Fraction], rounded: int = LONGEST, most: Sequence[bool] | None = None) -> Spread:
    """Return the spread of shares that sum to 1: exact if a period of up to `LONGEST` draws has room for that.

    Otherwise shares are rounded to so many of ``rounded`` draws, each source with a share getting one at least.

    Args:
      most: sources whose share must not be rounded up.
    """
    exact = math.lcm(*(share.denominator for share in shares))
    if exact <= LONGEST:
        return Spread([int(share * exact) for share in shares])
    fixed = most or [False] * len(shares)
    wanted = [share * rounded for share in shares]
    counts = [max(int(value), 1 if value and not hold else 0) for value, hold in zip(wanted, fixed, strict=True)]
    order = sorted(range(len(shares)), key=lambda s: (fixed[s], counts[s] - wanted[s]))
    free = [s for s in order if not fixed[s]] or order
    while (left := rounded - sum(counts)) > 0:
        for s in free[:left]:
            counts[s] += 1
    while sum(counts) > rounded:  # where many tiny shares got one each, the largest pays
        counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
    return Spread(counts)
