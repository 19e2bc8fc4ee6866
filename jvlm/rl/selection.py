"""Which groups of answers a step trains on: the first useful ones by serial number, whichever ends first.

A step that took the groups that end first would train on short answers; one that takes them by number trains on the
same groups at any speed of engines and rewards.
"""

from __future__ import annotations

import dataclasses
import math

from jvlm.validation import check_fields


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """How many groups are started.

    Attributes:
      groups: that a step trains on.
      margin: more groups are started than are likely to be needed, by this share.
      most_started: groups that a step starts at most, in multiples of ``groups``; it then trains on what is useful.
      ahead: groups that are started for later steps, in multiples of those of one step, and go on while a step trains:
        the staleness of what is trained on. 0 is on-policy.
      prior_share: share of useful groups that is expected at first.
      prior_groups: so many judged groups weigh as much as that expectation.
    """

    groups: int
    margin: float = 0.15
    most_started: float = 8.0
    ahead: float = 0.0
    prior_share: float = 0.5
    prior_groups: float = 64.0

    def __post_init__(self):
        bounds = {"groups": "[1, inf)", "margin": "[0, inf)", "most_started": "[1, inf)", "prior_share": "(0, 1]"}
        check_fields(self, "selection.", {**bounds, "ahead": "[0, inf)", "prior_groups": "(0, inf)"})


class Selection:
    """The groups of one step.

    Args:
      first: serial number of the step's first group.
      judged: groups judged in earlier steps, and how many of them were useful, for the expectation.
    """

    def __init__(self, config: SelectionConfig, first: int, judged: tuple[int, int] = (0, 0)):
        self.config, self.first = config, first
        self.started = 0
        self._useful: dict[int, bool] = {}
        self._earlier = judged
        self._next_unjudged = first
        self._selected: list[int] = []  # useful ones before the first that is not judged

    @property
    def judged(self) -> tuple[int, int]:
        """How many groups were judged, and how many of them were useful, earlier steps included."""
        return self._earlier[0] + len(self._useful), self._earlier[1] + sum(self._useful.values())

    @property
    def expected_share(self) -> float:
        """The share of useful groups that is expected."""
        config, (judged, useful) = self.config, self.judged
        prior = config.prior_share * config.prior_groups
        return (prior + useful) / (config.prior_groups + judged)

    @property
    def capped(self) -> bool:
        """Whether as many groups were started as a step may."""
        most = self.config.most_started * (1 + self.config.ahead) * self.config.groups
        return self.started >= math.ceil(most)

    def wants_more(self, waiting_for_rewards: int = 0) -> bool:
        """Return whether another group should be started now, if an engine has room.

        Args:
          waiting_for_rewards: groups that are answered and not judged; too many hold the engines back.
        """
        if self.capped or waiting_for_rewards >= 2 * self.config.groups:
            return False
        useful, running = sum(self._useful.values()), self.started - len(self._useful)
        wanted = (1 + self.config.ahead) * self.config.groups
        if useful >= wanted:
            return False  # those selected are among them, or were started before one of them
        likely = useful + self.expected_share * running
        return likely < (1 + self.config.margin) * wanted

    def start(self) -> int:
        """Return the serial number of a group that is started."""
        self.started += 1
        return self.first + self.started - 1

    def judge(self, serial: int, useful: bool) -> None:
        """Note a group whose rewards are all there. Raises ValueError for one that was not started, or twice."""
        if not self.first <= serial < self.first + self.started or serial in self._useful:
            raise ValueError(f"group {serial} was not started, or is judged already")
        self._useful[serial] = useful
        while self._next_unjudged in self._useful:
            if self._useful[self._next_unjudged]:
                self._selected.append(self._next_unjudged)
            self._next_unjudged += 1

    def selected(self) -> list[int] | None:
        """Return the serial numbers that the step trains on; None while that is not decided.

        They are fewer than wanted, or none, where as many groups were started as a step may.
        """
        count = self.config.groups
        if len(self._selected) >= count:
            return self._selected[:count]
        if self.capped and self._next_unjudged == self.first + self.started:
            return list(self._selected)
        return None
