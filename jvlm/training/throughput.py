"""Where the time goes and how full the batches are, between two lines of the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from jvlm.data.packing import PackedSequences
from jvlm.hardware import peak_flops
from jvlm.models.vlm import VLM
from jvlm.parallel import hosts
from jvlm.training import flops
from jvlm.training.hooks import Hook
from jvlm.training.optimizer import schedules
from jvlm.training.optimizer.config import OptimizerConfig

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer


class Throughput(Hook):
    """Logs tokens per second, padding, time spent waiting for data, and arithmetic.

    Args:
      tokens: in a batch of all processes, padding included.
      trainable: path -> variable of the trainable parameters.
    """

    def __init__(self, template: VLM, trainable: dict[str, nnx.Variable], tokens: int):
        self.template, self.tokens = template, tokens
        self._trained = flops.Trained.of(template, trainable)
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._has_arithmetic = True
        try:
            flops.of_batch(template, [], self._trained)
        except TypeError as error:  # a new architecture can be trained before its arithmetic is declared
            self._has_arithmetic = False
            hosts.log_rank0(f"the log has no tflops_per_s and mfu: {error}")
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._waited = self._flops = self._apart = 0.0
        self._text: list[float] = []
        self._patches: list[float] = []

    def on_train_start(self, trainer: Trainer) -> None:
        self._reset()

    def on_batch(self, trainer: Trainer, packed: Sequence[PackedSequences]) -> None:
        self._waited += trainer.waited
        if self._has_arithmetic and trainer.shard.is_primary_reader:
            self._flops += flops.of_batch(self.template, [one.batch for one in packed], self._trained).total
        self._text += [one.batch.text_padding for one in packed]
        self._patches += [one.batch.patch_padding for one in packed]

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds: they were no training."""
        self._apart += seconds

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        """Return the figures since the last call, of all processes; each must ask."""
        seconds = time.perf_counter() - self._since - self._apart
        tokens = len(self._text) * self.tokens
        mine = [float(np.mean(self._text)), float(np.mean(self._patches)), self._waited, self._flops]
        text_padding, patch_padding, waited, arithmetic = np.asarray(hosts.all_gather_object(mine)).mean(0).tolist()
        self._reset()
        return {
            "data_wait": waited / seconds,
            "padding_text": text_padding,
            "padding_patches": patch_padding,
            "tokens_per_s": tokens * (1 - text_padding) / seconds,
            **self._speed(arithmetic / seconds),
        }

    def _speed(self, arithmetic: float) -> dict[str, float]:
        """Return the useful arithmetic of a device; its share of what the device could do, where that is known."""
        if not self._has_arithmetic:
            return {}
        each = arithmetic / (jax.device_count() / jax.process_count())
        return {"tflops_per_s": each / 1e12, **({"mfu": each / self._peak} if self._peak else {})}


class LearningRates(Hook):
    """Logs the learning rate of the last update.

    Args:
      skipped: returns how many steps were skipped, which the schedule does not count.
    """

    def __init__(self, config: OptimizerConfig, steps: int, skipped: Callable[[], int]):
        self.config, self._skipped = config, skipped
        self._factor = schedules.factor(config, steps)

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        share = float(self._factor(trainer.step - self._skipped() - 1))
        groups = self.config.groups(trainer.compiled.trainable)
        rates = {f"learning_rate/{name}": share * peak for name, peak in groups.items()}
        highest = max(rates.values())
        # one number where the groups agree, as ms-swift users expect; a number each where they do not
        return {"learning_rate": highest} if len(set(rates.values())) == 1 else {"learning_rate": highest, **rates}
