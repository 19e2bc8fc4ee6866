"""Histograms of whole numbers as bars of SVG, stacked by source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 560, 140
_BINS = 28
_LEAST_BINS = 8  # so that few different values do not make bars as wide as the drawing
_EACH = 16  # bins up to which each has its number below
_REACH = 4  # a limit up to so many times the largest value stretches the axis; one beyond is at its end
COLOURS = ("#2456d6", "#d97706", "#16803c", "#9333ea", "#c62828", "#0e7490", "#a16207", "#be185d")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A rectangle in pixels of the drawing, and what it says."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    label: str


@dataclasses.dataclass(frozen=True)
class Histogram:
    """A drawing of `WIDTH` x `HEIGHT`.

    Attributes:
      counts: values in each bin, by source.
      marks: (x, text) of each limit.
      ticks: (x, text) of numbers below the axis, which begins at 0.
      end: last value of the axis.
      highest: values of the fullest bin.
    """

    title: str
    counts: Mapping[str, Sequence[int]]
    bars: tuple[Bar, ...]
    marks: tuple[tuple[float, str], ...]
    ticks: tuple[tuple[float, str], ...]
    end: int
    highest: int


def histogram(title: str, values: Mapping[str, Sequence[int]], limits: Mapping[str, Sequence[int]] = {}) -> Histogram:
    """Return the histogram of values of at least 0, by source.

    Args:
      limits: name -> numbers to draw in.
    """
    largest = max((max(some) for some in values.values() if len(some)), default=0)
    numbers = [(name, limit) for name, some in limits.items() for limit in sorted(set(some))]
    end = max([largest, _LEAST_BINS - 1, *(limit for _, limit in numbers if limit <= _REACH * largest)])
    step = _round_step(-(-(end + 1) // _BINS))
    bins = -(-(end + 1) // step)
    counts = {
        name: np.bincount(np.asarray(some, np.int64) // step, minlength=bins).tolist() for name, some in values.items()
    }
    highest = max(map(sum, zip(*counts.values(), strict=True)), default=0)
    width, bars = WIDTH / bins, []
    for index in range(bins):
        below = 0
        for number, (name, own) in enumerate(counts.items()):
            count = own[index]
            if not count:
                continue
            height = HEIGHT * count / highest
            below += height
            first, last = index * step, (index + 1) * step - 1
            between = f"{first:,}" if first == last else f"{first:,} to {last:,}"
            label = f"{name}: {count:,} with {between}"
            colour = COLOURS[number % len(COLOURS)]
            bars.append(Bar(index * width, HEIGHT - below, width * 0.92, height, colour, label))
    marks = [
        (WIDTH * (limit + 1) / (step * bins), f"{name} {limit:,}")
        if limit <= end
        else (WIDTH - 1, f"{name} {limit:,}, beyond the axis")
        for name, limit in numbers
    ]
    return Histogram(title, counts, tuple(bars), tuple(marks), tuple(_ticks(bins, step)), step * bins - 1, highest)


def _ticks(bins: int, step: int) -> Iterator[tuple[float, str]]:
    """Yield the middle of each bin of one value, or else the beginnings of some bins."""
    if step == 1 and bins <= _EACH:
        yield from ((WIDTH * (index + 0.46) / bins, str(index)) for index in range(bins))
        return
    yield from ((WIDTH * index / bins, f"{index * step:,}") for index in range(0, bins, 5))


def _round_step(least: int) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is not below ``least``."""
    unit = 10 ** (len(str(least)) - 1)
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= least)
