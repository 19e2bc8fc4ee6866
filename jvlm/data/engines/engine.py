"""Work on numbered things, a part of them at a time, wherever it is done; and the way to do it in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class Task(Protocol):
    """Work on things by their numbers. Pickled to where it is done, it opens its files there."""

    def __call__(self, some: range) -> list[Any]:
        """Return a value of each, as msgpack can hold them; the same values whoever works."""
        ...


class Engine(Protocol):
    """What does tasks."""

    def run(self, task: Task, parts: Sequence[range]) -> Iterator[tuple[int, list[Any]]]:
        """Yield the index of a part and its values, when they are there: in any order, each part once.

        Raises:
          UserError: one that the task raises.
        """
        ...


class InProcess:
    """Does the parts one after the other, in this process."""

    def run(self, task: Task, parts: Sequence[range]) -> Iterator[tuple[int, list[Any]]]:
        """See `Engine`."""
        for index, some in enumerate(parts):
            yield index, task(some)


def in_order(engine: Engine, task: Task, parts: Sequence[range]) -> Iterator[list[Any]]:
    """Yield the values of each part, in the order of the parts; those that are early wait in memory."""
    done: dict[int, list[Any]] = {}
    found = engine.run(task, parts)
    for index in range(len(parts)):
        while index not in done:
            at, values = next(found)
            done[at] = values
        yield done.pop(index)
