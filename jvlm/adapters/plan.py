"""Which matrices of a model have adapters, and of what rank: the structure of an adapter without its numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jvlm import config as config_tree
from jvlm import json_files
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.weights import AdapterWeights, Target
from jvlm.weights import table

FILE = "adapter.json"


@dataclasses.dataclass(frozen=True)
class Group:
    """The adapters of one parameter, which may be a stack of matrices.

    Attributes:
      path: of the parameter.
      lead: shape of its axes for layers and experts.
      ranks: of each matrix, in the order of those axes; 0 where it has no adapter.
      alphas, scales: the same.
      magnitude, bias: whether the adapters have them.
    """

    path: str
    lead: tuple[int, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scales: tuple[float, ...]
    magnitude: bool = False
    bias: bool = False

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks)

    @property
    def indices(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """(index, position in ``ranks``) of each matrix that has an adapter."""
        return ((index, i) for i, index in enumerate(np.ndindex(self.lead)) if self.ranks[i])


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """What adapters a model has. Hashable.

    Attributes:
      config: with which it was made.
      groups: by parameter, sorted by path.
      parameters: paths of parameters of the base that are trained whole.
      token_ids: tokens whose embedding rows are trained.
    """

    config: AdapterConfig
    groups: tuple[Group, ...]
    parameters: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()

    def group(self, path: str) -> Group | None:
        """Return the adapters of a parameter."""
        return next((group for group in self.groups if group.path == path), None)

    def write(self, folder: Path) -> None:
        """Write adapter.json, whole or not at all."""
        beside = folder / f".{FILE}.part"
        beside.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        beside.replace(folder / FILE)


def read(folder: Path) -> AdapterPlan | None:
    """Return the plan of a run; None for a run without adapters."""
    path = folder / FILE
    if not path.is_file():
        return None

    def parse(values: dict[str, Any]) -> AdapterPlan:
        return config_tree.from_dict(AdapterPlan, values)

    return table.read_values(path, parse, json_files.read_object(path))


def scale_of(config: AdapterConfig, rank: int, alpha: float) -> float:
    """Return what the output of an adapter is multiplied with."""
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def of_weights(weights: AdapterWeights, lead_of: dict[str, tuple[int, ...]]) -> AdapterPlan:
    """Return the plan of given weights.

    Args:
      lead_of: path -> shape of the axes before the last two, of the model's parameters.
    """
    by_path: dict[str, dict[tuple[int, ...], Any]] = {}
    for target, one in weights.low_rank.items():
        by_path.setdefault(target.path, {})[target.index] = one
    groups = []
    for path, low_rank in sorted(by_path.items()):
        ones = [low_rank.get(index) for index in np.ndindex(lead_of[path])]
        present = [one for one in ones if one is not None]
        groups.append(
            Group(
                path,
                lead_of[path],
                tuple(one.rank if one else 0 for one in ones),
                tuple(one.alpha if one else 0.0 for one in ones),
                tuple(one.scale if one else 0.0 for one in ones),
                magnitude=present[0].magnitude is not None,
                bias=present[0].bias is not None,
            )
        )
    tokens = next((tuple(map(int, rows.token_ids)) for rows in weights.token_rows.values()), ())
    parameters = tuple(sorted({target.path for target in weights.parameters}))
    return AdapterPlan(weights.config, tuple(groups), parameters, tokens)


def targets(plan: AdapterPlan) -> Iterator[tuple[Target, Group, int]]:
    """Yield every matrix that has an adapter, with its group and its position in the group's ranks."""
    for group in plan.groups:
        for index, i in group.indices:
            yield Target(group.path, index), group, i
