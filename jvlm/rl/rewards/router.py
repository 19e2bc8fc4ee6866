"""Which reward judges which task, and what holds for all of them: no unfinished answers, and the format as a gate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from jvlm.errors import UserError
from jvlm.rl.rewards.source import RewardItem, RewardSource, UnfitReward, missing
from jvlm.scoring.score import Score
from jvlm.scoring.thinking import thinking_format


@dataclasses.dataclass(frozen=True)
class Route:
    """How the answers of a task are judged.

    Attributes:
      source: judges them.
      format_gate: whether an answer without one closed ``<think>`` part and something after it earns 0, unread. As a
        bonus a form is learnt first, and hides that answers get worse.
    """

    source: RewardSource
    format_gate: bool = False


class Router:
    """Judges answers by the reward of their task. Use it as a context manager, or call `close`.

    Args:
      routes: by name of the task.
      otherwise: of all other tasks; None refuses them.
    """

    def __init__(self, routes: Mapping[str, Route], otherwise: Route | None = None):
        if not routes and otherwise is None:
            raise UserError("there is no reward; name at least one task with its reward")
        self.routes, self.otherwise = dict(routes), otherwise

    @property
    def _named(self) -> dict[str, Route]:
        """All routes, that of other tasks as "*"."""
        return self.routes if self.otherwise is None else {**self.routes, "*": self.otherwise}

    @property
    def sources(self) -> list[RewardSource]:
        """What judges."""
        return [route.source for route in self._named.values()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """Return what decides the rewards of each task."""
        return {
            task: {**route.source.describe(), "format_gate": route.format_gate} for task, route in self._named.items()
        }

    def route(self, item: RewardItem) -> Route:
        """Return the route of an item. Raises UserError for a task without one."""
        route = self.routes.get(item.task, self.otherwise)
        if route is None:
            raise UserError(f"item {item.id}, task: {item.task!r} has no reward; there are {', '.join(self.routes)}")
        return route

    def check(self, item: RewardItem) -> None:
        """Raise UserError where an item's task has no reward, or its reference cannot be used."""
        self.route(item).source.check(item)

    def scores(self, items: Sequence[RewardItem]) -> list[Score]:
        """Return the reward of each item, in their order.

        An unfinished answer earns 0. Where a source fails, the items that it was asked are missing (None), no others.

        Raises:
          UserError: a task without a reward; `UnfitReward` where a source may not be used at all.
        """
        found: list[Score | None] = [None] * len(items)
        asked: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            route = self.route(item)
            if item.truncated:
                found[number] = Score(0.0, "truncated")
            elif route.format_gate and not thinking_format(item.answer, thinking_opened=item.thinking_opened).value:
                found[number] = Score(0.0, "wrong_format")
            else:
                asked.setdefault(item.task, []).append(number)
        for numbers in asked.values():
            for number, score in zip(numbers, self._ask([items[n] for n in numbers]), strict=True):
                found[number] = score
        return [score for score in found if score is not None]

    def _ask(self, items: list[RewardItem]) -> list[Score]:
        """Return the rewards of items of one task."""
        try:
            return self.route(items[0]).source.scores(items)
        except UnfitReward:
            raise
        except UserError as error:
            return [missing(error)] * len(items)

    def close(self) -> None:
        """Close the sources."""
        with contextlib.ExitStack() as stack:
            for source in self.sources:
                stack.callback(source.close)
