"""How many groups of answers may go without a reward before the run stops."""

from __future__ import annotations

import collections

from jvlm.errors import UserError


class Shortage:
    """Counts groups that left their batch because a reward was missing.

    Args:
      most_share: of the groups of ``steps`` steps that may.
      steps: of the window.
    """

    def __init__(self, most_share: float = 0.01, steps: int = 100):
        self._most, self._steps = most_share, steps
        self._window: collections.deque[tuple[int, int]] = collections.deque(maxlen=steps)

    def note(self, groups: int, lacking: int, why: str = "") -> None:
        """Note a step: how many groups it judged, and how many of them had a missing reward.

        Raises:
          UserError: more are missing than may, of as many groups as a whole window has.
        """
        self._window.append((groups, lacking))
        mean = sum(count for count, _ in self._window) / len(self._window)
        total = sum(count for _, count in self._window)
        if total > self._most * mean * self._steps:
            raise UserError(
                f"{total} groups of answers in {len(self._window)} steps had no reward, more than "
                f"{self._most:.0%} of {self._steps} steps: look at the rewards{f' ({why})' if why else ''}"
            )
