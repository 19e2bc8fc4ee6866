"""Rewards on a scale from 0 to 1 that is fixed once, and stored with the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jvlm import json_files
from jvlm.errors import UserError
from jvlm.training.side_files import write_json

FILE = "reward_scale.json"


@dataclasses.dataclass(frozen=True)
class RewardScale:
    """``sigmoid((reward - mean) / std)``: 0.5 is the average answer of the data that it was fitted on.

    It is monotonic, so it changes no comparison. It is not fitted again while a policy is trained: a scale that moved
    with the policy would hide whether the rewards do.

    Attributes:
      mean, std: of the rewards of ``answers`` answers.
      data: the files that they are of.
    """

    mean: float
    std: float
    answers: int
    data: tuple[str, ...] = ()

    def __post_init__(self):
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise UserError(f"a scale of rewards needs a mean and a standard deviation above 0, got {self}")

    @classmethod
    def fit(cls, rewards: Sequence[float], data: Sequence[str] = ()) -> RewardScale:
        """Return the scale of rewards. Raises UserError where they are all the same."""
        values = np.asarray(rewards, np.float64)
        if values.size < 2 or not values.std() > 0:
            raise UserError(
                f"{values.size} rewards that do not differ have no scale: give more pairs, or train the model longer"
            )
        return cls(float(values.mean()), float(values.std()), int(values.size), tuple(data))

    def __call__(self, reward: float) -> float:
        """Return a reward between 0 and 1."""
        z = (reward - self.mean) / self.std
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    def write(self, folder: Path) -> None:
        """Write it beside a model."""
        write_json(folder / FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> RewardScale | None:
        """Return the scale of a model's folder; None where it has none. Raises UserError for a damaged file."""
        path = folder / FILE
        if not path.is_file():
            return None
        values = json_files.read_object(path)
        try:
            return cls(**{**values, "data": tuple(values["data"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: {error}; write it again with jvlm reward-check --fit_scale") from error
