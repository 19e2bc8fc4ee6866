"""Which source each draw of a run takes: phases of weights, and limits on passes over a source."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from jvlm.data.mixture.config import Mixture, Source
from jvlm.data.mixture.shares import Shares, SourceSize, shares_of
from jvlm.data.mixture.spread import LONGEST, Spread, spread_of
from jvlm.errors import UserError

RAMP_STEPS = 10
_FINE = 64  # a short phase needs no longer period than so many times itself


@dataclasses.dataclass(frozen=True)
class Limited:
    """A source that ``max_epochs`` holds back: what it would give in the run, and what it gives."""

    source: str
    asked: int
    given: int
    max_epochs: float


class Plan:
    """Source and key of each draw; a pure function of its number.

    The n-th draw of a source, over all phases, has key n: keys of a source are 0, 1, 2, ... without gaps.

    Args:
      names: of the sources.
      phases: (first draw, how its draws are spread over the sources), the first at 0.
      examples_per_pass: draws of one pass over the mixture.

    Attributes:
      limited: sources held back by ``max_epochs``.
    """

    def __init__(
        self,
        names: Sequence[str],
        phases: Sequence[tuple[int, Spread]],
        examples_per_pass: int,
        limited: Sequence[Limited] = (),
    ):
        self.names, self.phases, self.limited = tuple(names), tuple(phases), tuple(limited)
        self.examples_per_pass = examples_per_pass
        self._starts = [start for start, _ in phases]
        before = [np.zeros(len(names), np.int64)]
        for (start, spread), (end, _) in itertools.pairwise(phases):
            before.append(before[-1] + spread.drawn(end - start))
        self._before = [counts.tolist() for counts in before]

    def __repr__(self) -> str:
        return f"Plan({self.names}, {self.phases})"

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """Return (number of the source, key): the key-th draw of that source."""
        phase = bisect.bisect_right(self._starts, draw) - 1
        start, spread = self.phases[phase]
        source, key = spread[draw - start]
        return source, self._before[phase][source] + key

    def drawn(self, draws: int) -> Int[np.ndarray, " S"]:
        """Return how often each source is among the first ``draws``."""
        phase = max(bisect.bisect_left(self._starts, draws) - 1, 0)
        start, spread = self.phases[phase]
        return np.asarray(self._before[phase]) + spread.drawn(draws - start)


def plan_of(mixture: Mixture, sizes: Mapping[str, SourceSize], run_examples: int | None = None) -> Plan:
    """Return the plan of a run.

    Args:
      sizes: by path of each source that has a weight in any phase.
      run_examples: draws of the run, which a schedule's shares and ``max_epochs`` refer to.

    Raises:
      UserError: a schedule or ``max_epochs`` without ``run_examples``; so little may be given that the run cannot be
        filled.
    """
    sources = {path: source for path, source in mixture.sources().items() if path in sizes}
    names = tuple(sources)
    limits = {path: s.max_epochs * sizes[path].examples for path, s in sources.items() if s.max_epochs is not None}
    if run_examples is None and (mixture.schedule or limits):
        raise UserError(
            "a schedule of weights, or max_epochs, counts in shares of the run: give data.run_examples, the number of "
            "examples that it draws"
        )
    starts, shares = [], []
    for start, weights in weights_of(mixture):
        first = round(start * (run_examples or 0))
        if starts and first == starts[-1]:  # a phase shorter than one draw
            starts.pop()
            shares.pop()
        found = shares_of(mixture, sizes, weights)
        starts.append(first)
        shares.append([found.of.get(name, Fraction(0)) for name in names])
    passes = round(shares_of(mixture, sizes).examples_per_pass)
    lengths = [end - start for start, end in zip(starts, [*starts[1:], run_examples or 0], strict=True)]
    limited: list[Limited] = []
    held = [False] * len(names)
    if limits:
        asked = [sum(share[s] * n for share, n in zip(shares, lengths, strict=True)) for s in range(len(names))]
        shares = _held_back(names, shares, lengths, limits)
        held = [name in limits for name in names]
        for s, name in enumerate(names):
            given = sum(share[s] * n for share, n in zip(shares, lengths, strict=True))
            if given < asked[s] and name in limits:
                limited.append(Limited(name, int(asked[s]), int(given), sources[name].max_epochs))
    phases = [
        (start, spread_of(share, min(LONGEST, max(_FINE * length, 1024 * len(names)) if length else LONGEST), held))
        for start, share, length in zip(starts, shares, lengths, strict=True)
    ]
    return Plan(names, phases, max(passes, 1), limited)


def average_shares(mixture: Mixture, sizes: Mapping[str, SourceSize]) -> Shares:
    """Return the shares of the examples of a run, all phases of its schedule together; ``max_epochs`` left aside."""
    phases = list(weights_of(mixture))
    ends = [start for start, _ in phases[1:]] + [Fraction(1)]
    total: dict[str, Fraction] = dict.fromkeys(sizes, Fraction(0))
    for (start, weights), end in zip(phases, ends, strict=True):
        for name, share in shares_of(mixture, sizes, weights).of.items():
            total[name] += share * (end - start)
    return Shares(total, shares_of(mixture, sizes).examples_per_pass)


def weights_of(mixture: Mixture) -> Iterator[tuple[Fraction, dict[str, float]]]:
    """Yield (start as a share of the run, weights by path that differ from the tree's) of each phase.

    A linear change is ten steps, each of the weight at its middle.
    """
    members = dict(mixture.walk())
    now: dict[str, float] = {}
    if not mixture.schedule or mixture.schedule[0].start > 0:
        yield Fraction(0), {}
    for phase in mixture.schedule:
        start = Fraction(str(phase.start))
        after = {**now, **phase.weights}
        if phase.end is not None:
            length = (Fraction(str(phase.end)) - start) / RAMP_STEPS
            before = {path: now.get(path, members[path].weight) for path in phase.weights}
            for step in range(RAMP_STEPS):
                done = (step + 0.5) / RAMP_STEPS
                between = {p: round(before[p] + (w - before[p]) * done, 12) for p, w in phase.weights.items()}
                yield start + step * length, {**now, **between}
            start = Fraction(str(phase.end))
        now = after
        if start < 1:
            yield start, now


def _held_back(
    names: Sequence[str], shares: Sequence[Sequence[Fraction]], lengths: Sequence[int], limits: Mapping[str, float]
) -> list[list[Fraction]]:
    """Return shares of each phase with which no source gives more than its limit; others take over in proportion."""
    # what rounding may add in each phase is left to it
    most = {names.index(name): max(int(limit) - len(lengths), 0) for name, limit in limits.items()}
    now = [list(map(Fraction, share)) for share in shares]
    full: set[int] = set()
    while True:
        given = {s: sum(share[s] * n for share, n in zip(now, lengths, strict=True)) for s in most if s not in full}
        over = {s: Fraction(most[s]) / total for s, total in given.items() if total > most[s]}
        if not over:
            return now
        full |= set(over)
        for share, asked in zip(now, shares, strict=True):
            freed = sum(share[s] * (1 - keep) for s, keep in over.items())
            for s, keep in over.items():
                share[s] *= keep
            rest = sum(asked[s] for s in range(len(names)) if s not in full)
            if freed and not rest:
                total = sum(lengths)
                raise UserError(
                    f"max_epochs allows too little for a run of {total:,} examples: "
                    + ", ".join(f"{name} {int(limit):,}" for name, limit in limits.items())
                    + " and no other source takes over. Raise max_epochs, or run fewer steps"
                )
            for s in range(len(names)):
                if s not in full and freed:
                    share[s] += freed * asked[s] / rest


def enters(mixture: Mixture) -> dict[str, Source]:
    """Return the sources that have a weight in any phase, by path."""
    members = dict(mixture.walk())
    drawn = {}
    for path, source in mixture.sources().items():
        parts = path.split("/")
        ancestors = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(all(w.get(p, members[p].weight) for p in ancestors) for _, w in weights_of(mixture)):
            drawn[path] = source
    return drawn
