"""Loss and accuracy of each data source in training, and how many of its examples were seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jvlm.training.hooks import Hook, StepResult
from jvlm.training.task import SOURCE_SUMS
from jvlm.training.train_step import SOURCES

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer


_TOTALS = ("examples", "tokens")


class SourceCurves(Hook):
    """Logs "loss/NAME" and "token_acc/NAME" of each data source, over all steps since the last line of the log.

    A source without a supervised token in these steps has no value. "examples/NAME" and "tokens/NAME" count its
    examples and its tokens with a loss since the run began. Steps that were skipped are not counted. Put it behind the
    log: hooks end a step in reverse order.

    Args:
      names: of the sources, as the task numbers them.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._window = np.zeros((len(self.names), len(SOURCE_SUMS)))  # since the last line
        self._totals = np.zeros((len(self.names), len(_TOTALS)))  # before that
        self._pending: list[tuple[jax.Array, jax.Array]] = []

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if SOURCES in result.metrics:
            self._pending.append((result.metrics[SOURCES], result.metrics["skipped"]))

    def _add_pending(self) -> None:
        """Add what the device has computed; waits for it."""
        for sums, skipped in jax.device_get(self._pending):
            if not skipped:
                self._window += sums
        self._pending = []

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        self._add_pending()
        values = {}
        for name, (loss, weight, correct, tokens, _) in zip(self.names, self._window.tolist(), strict=True):
            if tokens:
                values |= {f"loss/{name}": loss / weight, f"token_acc/{name}": correct / tokens}
        self._totals += self._window[:, [SOURCE_SUMS.index(total) for total in _TOTALS]]
        self._window[:] = 0
        for name, counts in zip(self.names, self._totals.tolist(), strict=True):
            values |= {f"{total}/{name}": count for total, count in zip(_TOTALS, counts, strict=True)}
        return values

    def state(self) -> dict[str, Any]:
        self._add_pending()
        return {
            name: {"window": window, "totals": counts}
            for name, window, counts in zip(self.names, self._window.tolist(), self._totals.tolist(), strict=True)
        }

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        for number, name in enumerate(self.names):
            if name in state:
                self._window[number] = state[name]["window"]
                self._totals[number] = state[name]["totals"]
