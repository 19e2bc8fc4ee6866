"""Traces of some steps, for xprof or TensorBoard's profile page.

What the trace shows is named: encoder, connector, decoder, and inside them attention, mlp and norm; loss; update.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from jvlm.training.config import profiled_steps

PROFILE = "profile"


class Profile:
    """Traces steps of a run into ``<run>/profile``. Use as a context manager.

    Args:
      text: as `Experiment.profile`, "10:13".
    """

    def __init__(self, folder: Path, text: str):
        self.folder, self.steps = folder / PROFILE, profiled_steps(text)
        self._running = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Step number ``step`` since the start is about to fetch its batch."""
        if self.steps and step == self.steps[0]:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def ran(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """It was handed to the device; the last one of the trace is waited for."""
        if self._running and step == self.steps[-1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile of steps {self.steps[0]} to {self.steps[-1]} of this start: xprof --logdir {self.folder}")
