"""Where a run stands in its data, in a form that does not depend on how many processes read it.

The examples of a run have one endless order: the seed's permutation of each epoch, one after the other. Windows of
``pack_window`` examples are packed by themselves; window w begins at example w * pack_window. A process packs the
windows of its share, and gives out their packed sequences at its own pace. So what a run has used is all windows before
a first untouched one, except those that are still open, of which the first few packed sequences are used.

Promised: after any number of restarts, each with any number of processes, every window is packed as it would have been
by one process, and each of its packed sequences is given out once. So each conversation comes once an epoch. With the
number of processes unchanged, batches after a restart equal those of an unbroken run. Where processes are many, one may
already be some windows into the next epoch while another ends the last.

Where files are copied as they are read, a process takes many windows in a row, about a pass over the data divided by
the processes, so that each reads other files. The windows are the same.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of the data that a process reads, of the windows left.

    They are dealt out in turn, ``run`` of them in a row: first those from ``index * run`` on.
    """

    index: int = 0
    count: int = 1
    run: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(f"share {self.index} of {self.count} does not exist")

    def of(self, sequences: int) -> int:
        """Sequences of each batch that are this process's. Raises UserError where they do not divide."""
        if sequences % self.count:
            raise UserError(f"data.batch_size = {sequences} cannot be shared evenly by {self.count} processes")
        return sequences // self.count

    def window(self, done: int) -> int:
        """Return the window that comes after so many of this process, as a number among those left."""
        rounds, within = divmod(done, self.run)
        return (rounds * self.count + self.index) * self.run + within

    def before(self, window: int) -> int | None:
        """Return how many windows of this process come before one of its own; None for one of another process."""
        turn, within = divmod(window, self.run)
        rounds, index = divmod(turn, self.count)
        return rounds * self.run + within if index == self.index else None


@dataclasses.dataclass(frozen=True)
class Position:
    """What was left when the processes last began.

    Attributes:
      next: all windows from here on.
      open: (first, count, sequences given out of each) of windows before.
    """

    next: int = 0
    open: tuple[tuple[int, int, int], ...] = ()

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(count for _, count, _ in self.open))

    @property
    def num_open(self) -> int:
        """How many windows are open."""
        return self._ends[-1] if self.open else 0

    def item(self, number: int) -> tuple[int, int]:
        """Return window that is ``number``-th in turn, and how many of its packed sequences were given out before."""
        later = number - self.num_open
        if later >= 0:
            return self.next + later, 0
        part = bisect.bisect_right(self._ends, number)
        first, count, given = self.open[part]
        return first + number - (self._ends[part] - count), given


@dataclasses.dataclass(frozen=True)
class Progress:
    """One process since it began: windows done with, and packed sequences of the present one given out (ever)."""

    position: Position = Position()
    share: Share = Share()
    done: int = 0
    given: int = 0

    @property
    def item(self) -> tuple[int, int]:
        """The present window, and its packed sequences given out before."""
        return self.position.item(self.share.window(self.done))

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "next": self.position.next,
            "open": [list(part) for part in self.position.open],
            **dataclasses.asdict(self.share),
            "done": self.done,
            "given": self.given,
        }


def start_states(count: int) -> list[dict[str, Any]]:
    """Return the states of so many processes at the first window."""
    return [Progress(share=Share(index, count)).state() for index in range(count)]


def _progress(state: dict[str, Any]) -> Progress:
    # checkpoints of 0.2 have single windows, each (number, given), dealt out one at a time
    parts = (part if len(part) == 3 else (part[0], 1, part[1]) for part in state["open"])
    position = Position(state["next"], tuple(map(tuple, parts)))
    share = Share(state["index"], state["count"], state.get("run", 1))
    return Progress(position, share, state["done"], state["given"])


def merge(progress: Sequence[Progress]) -> Position:
    """Return what is left when all processes stop, whoever goes on."""
    position, share = progress[0].position, progress[0].share
    by_index = sorted(progress, key=lambda p: p.share.index)
    shares = [dataclasses.replace(share, index=index) for index in range(share.count)]
    if [p.share for p in by_index] != shares or any(p.position != position for p in progress):
        raise UserError(f"the data position has {len(progress)} of {share.count} processes, or those of several starts")
    touched = max(p.share.window(p.done - 1) + 1 if p.done else 0 for p in progress)
    touched = max(touched, *(p.share.window(p.done) + 1 for p in progress if p.given), position.num_open)
    left: list[tuple[int, int, int]] = []
    for number in range(touched):
        process = by_index[number // share.run % share.count]
        at = process.share.before(number)
        if at < process.done:
            continue
        window, given = position.item(number)
        given = process.given if at == process.done and process.given else given
        first, count, before = left[-1] if left else (window, 0, given)
        if (first + count, before) == (window, given):
            left[-1:] = [(first, count + 1, given)]
        else:
            left.append((window, 1, given))
    return Position(position.item(touched)[0], tuple(left))


def go_on(states: Sequence[dict[str, Any]], share: Share) -> Progress:
    """Where a process goes on from the states of all processes that a checkpoint holds."""
    progress = [_progress(state) for state in states]
    same = next((p for p in progress if p.share == share), None)
    if same is not None and len(progress) == share.count:
        return same
    start = Progress(merge(progress), share)
    return dataclasses.replace(start, given=start.item[1])
