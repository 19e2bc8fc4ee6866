"""The state of a run, as loop, checkpoint and compiled step see it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from jvlm.adapters.layers import is_adapter_path

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters and optimizer of a run.

    Attributes:
      step: steps run, skipped ones included.
      trainable: path -> parameter.
      opt_state: of the optimizer.
      frozen: path -> parameter; never enters a gradient or an update.
      reference: the trainable parameters before the first step, for tasks that compare with them; else None.
    """

    step: Int[Array | np.ndarray, ""]
    trainable: Params
    opt_state: Any
    frozen: Params = dataclasses.field(default_factory=dict)
    reference: Params | None = None

    @property
    def params(self) -> Params:
        """All parameters by path."""
        return {**self.frozen, **self.trainable}

    @property
    def frozen_base(self) -> Params:
        """Frozen parameters of the base: without the constants of adapters, which checkpoints hold."""
        return {path: value for path, value in self.frozen.items() if not is_adapter_path(path)}

    @property
    def saved(self) -> Params:
        """What a checkpoint holds: the trainable parameters, and all of the adapters."""
        constants = {path: value for path, value in self.frozen.items() if is_adapter_path(path)}
        return {**constants, **self.trainable}

    def split(self) -> tuple[TrainState, dict[str, Any]]:
        """Return what a step changes, whose memory it may reuse, and what it only reads."""
        changing = dataclasses.replace(self, frozen={}, reference=None)
        return changing, {"frozen": self.frozen, "reference": self.reference}

    def merge(self, constant: dict[str, Any]) -> TrainState:
        """Return the state again from the two parts of `split`."""
        return dataclasses.replace(self, **constant)
