"""What watches or steers a run: a hook is told what happens, and may ask the trainer to save or to stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jvlm.data.packing import PackedSequences
    from jvlm.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class StepResult:
    """A step that was handed to the device. Reading a metric waits for the step.

    Attributes:
      step: its number, from 1.
      packed: what the data gave for it, a batch for each micro-batch.
      metrics: on the device, see `TrainStep`.
      began: `time.perf_counter` when it was handed over.
    """

    step: int
    packed: Sequence[PackedSequences]
    metrics: Mapping[str, jax.Array]
    began: float


class Hook:
    """Base of all hooks: does nothing. Override what you need.

    Hooks of a trainer are called in order by `on_train_start`, `on_step_start`, `on_batch` and `on_evaluation`, and in
    reverse order by `on_step_end` and `on_stop`, as nested context managers would be. The first hook so restores the
    run before all others, and saves it after all others. Every process calls every hook, so a hook may use collectives.
    """

    keeps_best = False  # whether it may have one checkpoint kept beside the latest

    @property
    def name(self) -> str:
        """The key of the hook's state in checkpoints."""
        return type(self).__name__

    def on_train_start(self, trainer: Trainer) -> None:
        """Training is about to begin; ``trainer.step`` steps are behind it."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Act before the batch of step ``trainer.step + 1`` is fetched."""

    def on_batch(self, trainer: Trainer, packed: Sequence[PackedSequences]) -> None:
        """Act when the batch is fetched, and not yet handed to the device."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Step ``trainer.step`` was handed to the device, and ``trainer.state`` is the state after it."""

    def goes_on(self, trainer: Trainer) -> str:
        """Return what goes on from the step that a stopped run has saved; "" where the same command does."""
        return ""

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Act when the model after step ``trainer.step`` was evaluated."""

    def on_save(self, trainer: Trainer) -> None:
        """Act when a checkpoint of ``trainer.step`` was handed to its writer."""

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        """Training has ended, by itself or by an error. Called for each hook whose `on_train_start` was."""

    def is_due(self, trainer: Trainer, step: int) -> bool:
        """Return whether the hook reads metrics or parameters of this step; steps before it are then waited for."""
        return False

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        """Return what the hook adds to a line of the log; called at each line."""
        return {}

    def state(self) -> Any:
        """Return plain values for JSON that `restore` goes on from; None keeps nothing."""
        return None

    def restore(self, state: Any, step: int) -> None:
        """Go on from a state that was saved after ``step``. Called before the hook's `on_train_start`."""
