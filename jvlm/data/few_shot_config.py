"""The settings of demonstrations before an example. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Other examples as demonstrations before each one.

    Attributes:
      shots: fewest and most demonstrations; how many an example has is drawn, from the seed and its index alone.
      same: what they share with the example: its source, or its ``channel`` as well.
      loss: "last" gives demonstrations no loss; "all" leaves them theirs.
    """

    shots: tuple[int, int] = (1, 8)
    same: Literal["source", "channel"] = "channel"
    loss: Literal["last", "all"] = "last"

    def __post_init__(self):
        low, high = self.shots
        if not 1 <= low <= high:
            raise UserError(f"few_shot.shots is a smaller and a larger number, both from 1 on, got {low}, {high}")
