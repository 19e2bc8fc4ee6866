"""Where a run stands in its data, in a form that does not depend on how many processes read it.

The examples of a run have one endless order: the seed's permutation of each epoch, one after the other. Windows of
``pack_window`` examples are packed by themselves; window w begins at example w * pack_window. A process packs the
windows of its share, and gives out their packed sequences at its own pace. So what a run has used is all windows before
a first untouched one, except those that are still open, of which the first few packed sequences are used.

Promised: after any number of restarts, each with any number of processes, every window is packed as it would have been
by one process, and each of its packed sequences is given out once. So each conversation comes once an epoch. With the
number of processes unchanged, batches after a restart equal those of an unbroken run. Where processes are many, one may
already be some windows into the next epoch while another ends the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of the data that a process reads: every ``count``-th of the windows left, from number ``index`` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(f"share {self.index} of {self.count} does not exist")

    def of(self, sequences: int) -> int:
        """Sequences of each batch that are this process's. Raises UserError where they do not divide."""
        if sequences % self.count:
            raise UserError(f"data.batch_size = {sequences} cannot be shared evenly by {self.count} processes")
        return sequences // self.count


@dataclasses.dataclass(frozen=True)
class Position:
    """What was left when the processes last began: open windows (number, sequences given out); all from ``next``."""

    next: int = 0
    open: tuple[tuple[int, int], ...] = ()

    def item(self, number: int) -> tuple[int, int]:
        """Return window that is ``number``-th in turn, and how many of its packed sequences were given out before."""
        later = number - len(self.open)
        return self.open[number] if later < 0 else (self.next + later, 0)


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
        return self.position.item(self.share.index + self.done * self.share.count)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "next": self.position.next,
            "open": [list(pair) for pair in self.position.open],
            "index": self.share.index,
            "count": self.share.count,
            "done": self.done,
            "given": self.given,
        }


def start_states(count: int) -> list[dict[str, Any]]:
    """Return the states of so many processes at the first window."""
    return [Progress(share=Share(index, count)).state() for index in range(count)]


def _progress(state: dict[str, Any]) -> Progress:
    position = Position(state["next"], tuple((window, given) for window, given in state["open"]))
    return Progress(position, Share(state["index"], state["count"]), state["done"], state["given"])


def merge(progress: Sequence[Progress]) -> Position:
    """Return what is left when all processes stop, whoever goes on."""
    position, count = progress[0].position, progress[0].share.count
    indices = sorted(p.share.index for p in progress)
    if indices != list(range(count)) or any(p.position != position for p in progress):
        raise UserError(f"the data position has {len(progress)} of {count} processes, or those of several starts")
    touched = max(p.share.index + p.done * count + (p.given > 0) for p in progress)
    touched = max(touched, len(position.open))
    left = []
    for number in range(touched):
        process = next(p for p in progress if p.share.index == number % count)
        at = number // count
        if at < process.done:
            continue
        window, given = position.item(number)
        left.append((window, process.given if at == process.done and process.given else given))
    return Position(position.item(touched)[0], tuple(left))


def go_on(states: Sequence[dict[str, Any]], share: Share) -> Progress:
    """Where a process goes on from the states of all processes that a checkpoint holds."""
    progress = [_progress(state) for state in states]
    if len(progress) == share.count:
        return next(p for p in progress if p.share.index == share.index)
    position = merge(progress)
    start = Progress(position, share)
    return dataclasses.replace(start, given=start.item[1])
