"""Traces of some steps, for xprof or TensorBoard's profile page.

What the trace shows is named: encoder, connector, decoder, and inside them attention, mlp and norm; loss; update.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jvlm.training.config import profiled_steps
from jvlm.training.hooks import Hook, StepResult

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer

PROFILE = "profile"


class Profile(Hook):
    """Traces steps of a run into ``<run>/profile``.

    Args:
      text: as `Experiment.profile`, "10:13".
    """

    def __init__(self, folder: Path, text: str):
        self.folder, self.steps = folder / PROFILE, profiled_steps(text)
        self._running = False

    def on_step_start(self, trainer: Trainer) -> None:
        if self.steps and trainer.step + 1 - trainer.start == self.steps[0]:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if self._running and result.step - trainer.start == self.steps[-1]:
            jax.block_until_ready(result.metrics)
            self._stop()

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile of steps {self.steps[0]} to {self.steps[-1]} of this start: xprof --logdir {self.folder}")
