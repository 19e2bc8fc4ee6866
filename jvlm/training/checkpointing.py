"""The hook that restores a run and saves it: state, data position, and what the other hooks want to go on from."""

from __future__ import annotations

from typing import Any

from jvlm.parallel import hosts
from jvlm.training.checkpoint import Checkpoints
from jvlm.training.config import CheckpointConfig
from jvlm.training.frozen_parameters import FrozenParameters
from jvlm.training.hooks import Hook, StepResult
from jvlm.training.run_storage import RunStorage
from jvlm.training.trainer import Trainer


def is_scheduled(trainer: Trainer, interval: int) -> bool:
    """Return whether a checkpoint at the trainer's step is one of those asked for.

    Orbax also saves the first step of every run.
    """
    asked = trainer.save_requested or trainer.stop_reason is not None
    return asked or trainer.step % interval == 0 or trainer.step == trainer.steps


class Checkpointing(Hook):
    """Restores the last good checkpoint, and saves at intervals, at the end, at a stop and on request.

    Put it first among the hooks: it so restores before the others begin and saves after them.

    Args:
      storage: of the run.
      base: folder whose parameters the model has unchanged, as in the experiment; None where there is none.

    Attributes:
      best: what is known of the best checkpoint, for whoever reads the run: step, metric and value. Set by a hook.
    """

    def __init__(self, storage: RunStorage, config: CheckpointConfig, base: str | None = None):
        self.storage, self.config = storage, config
        self.frozen = FrozenParameters(storage, base, full=config.full)
        self.best: dict[str, Any] | None = None
        self._checkpoints: Checkpoints | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        self._checkpoints = checkpoints = Checkpoints(self.storage.store, self.config, use_ema=trainer.use_ema)
        try:
            trainer.state = self.frozen.restore(trainer.state)
            restored = checkpoints.restore_latest(trainer.state)
            if restored is not None:
                trainer.step, trainer.state, data = restored
                self.frozen.check(data["frozen"])
                trainer.restore_data(data["batches"])
                self.best = data["best"]
                if self.best is not None and self.best["step"] not in checkpoints.steps():
                    hosts.log_rank0(f"the best checkpoint, of step {self.best['step']}, is gone")
                    self.best = None
                for hook in trainer.hooks:
                    if hook.name in data["hooks"]:
                        hook.restore(data["hooks"][hook.name], trainer.step)
            self.frozen.record(trainer.state)
            evaluates = any(hook.keeps_best for hook in trainer.hooks)
            checkpoints.best = self.best and self.best["step"]
            ahead = range(trainer.step + 1, trainer.steps + 1)
            checkpoints.check_space(trainer.state, ahead, more=int(evaluates))
        except BaseException:
            self.on_stop(trainer, None)
            raise

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        step, checkpoints = trainer.step, self._checkpoints
        last = step == trainer.steps or trainer.stop_reason is not None
        if not (last or trainer.save_requested or checkpoints.due(step)):
            return
        states = {hook.name: hook.state() for hook in trainer.hooks}
        data = {"batches": trainer.data_position(), "best": self.best, "frozen": self.frozen.digest}
        data["hooks"] = {name: state for name, state in states.items() if state is not None}
        checkpoints.best = self.best and self.best["step"]
        checkpoints.save(step, trainer.state, data, force=True)
        for hook in trainer.hooks:
            hook.on_save(trainer)

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        checkpoints, self._checkpoints = self._checkpoints, None
        if checkpoints is not None:
            checkpoints.__exit__(None, None, None)

    def is_due(self, trainer: Trainer, step: int) -> bool:
        return self._checkpoints.due(step)


class StorageSync(Hook):
    """Copies small files of a run in an object store to it, at each checkpoint and at the end."""

    def __init__(self, storage: RunStorage):
        self.storage = storage

    def on_save(self, trainer: Trainer) -> None:
        self.storage.push()

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        if error is None or isinstance(error, Exception):
            self.storage.push()
