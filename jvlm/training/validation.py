"""Validation during training: loss and metrics of each data source on held-out data, the best step, and early stop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jvlm.data.errors import Rejected, grouped
from jvlm.data.packing import PackedSequences
from jvlm.errors import UserError
from jvlm.parallel import hosts
from jvlm.parallel.data_shards import make_global_batch
from jvlm.training.config import ValidationConfig
from jvlm.training.hooks import Hook, StepResult
from jvlm.training.task import Loss
from jvlm.training.throughput import Throughput

if TYPE_CHECKING:
    from jvlm.training.checkpointing import Checkpointing
    from jvlm.training.trainer import Trainer


class Totals:
    """Sums of losses and metrics in float64, over batches, sources and processes' batches alike.

    Args:
      channels: names of the sums in `Loss.sources`, which are reported where there are any.
    """

    def __init__(self, channels: Sequence[str] = ()) -> None:
        self.channels = tuple(channels)
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, loss: Loss) -> None:
        """Add a batch."""
        metrics = {"loss": (loss.total, loss.weight), **loss.metrics}
        for name, (value, count) in jax.device_get(metrics).items():
            self._add(name, float(value), float(count))
        if loss.sources is not None:
            for name, (value, weight, correct, tokens, _) in zip(
                self.channels, jax.device_get(loss.sources).tolist(), strict=True
            ):
                if tokens:
                    self._add(f"loss/{name}", value, weight)
                    self._add(f"token_acc/{name}", correct, tokens)

    def merge(self, other: Totals) -> None:
        """Add another's sums."""
        for name, (value, count) in other.sums.items():
            self._add(name, value, count)

    def _add(self, name: str, value: float, count: float) -> None:
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + value, before[1] + count

    def means(self) -> dict[str, float]:
        """Return each sum over its count; NaN where nothing was counted."""
        return {name: value / count if count else math.nan for name, (value, count) in self.sums.items()}


@dataclasses.dataclass
class EarlyStop:
    """Which evaluation is the best so far, and how many have passed without enough gain.

    Attributes:
      best, step: of the best evaluation; of equal ones the first; None before any. What is not finite is never it.
      reference: the value that the next gain is measured from.
      without_gain: evaluations since that value was reached.
    """

    best: float | None = None
    step: int | None = None
    reference: float | None = None
    without_gain: int = 0

    def update(self, value: float, step: int, *, maximise: bool, min_delta: float) -> bool:
        """Take an evaluation; returns whether it is the best."""
        sign = 1 if maximise else -1
        if not math.isfinite(value):
            self.without_gain += 1
            return False
        gain = math.inf if self.reference is None else sign * (value - self.reference)
        if gain > 0 and gain >= min_delta:
            self.reference, self.without_gain = value, 0
        else:
            self.without_gain += 1
        if self.best is not None and sign * (value - self.best) <= 0:
            return False
        self.best, self.step = value, step
        return True


class Validation(Hook):
    """Evaluates every ``interval_steps`` and at the end, has the best checkpoint kept, and stops without gain.

    Every token is counted once, whatever batch, mesh and padding. Values are reported as "loss", "token_acc" and what
    else the task measures, and for each source as "loss/SOURCE", if there are several.

    Args:
      sources: name -> batches of this process's share; iterating again begins anew.
      checkpointing: is told which step is the best; None keeps none.
      throughput: does not count the time.
      channels: names of the data sources that the task tells apart within a batch.
    """

    keeps_best = True

    def __init__(
        self,
        sources: Mapping[str, Iterable[PackedSequences]],
        config: ValidationConfig,
        checkpointing: Checkpointing | None = None,
        throughput: Throughput | None = None,
        channels: Sequence[str] = (),
    ):
        self.sources, self.config, self.channels = dict(sources), config, tuple(channels)
        self.checkpointing, self.throughput = checkpointing, throughput
        self.progress = EarlyStop()
        self.stopped = False
        self._reported = False

    def on_train_start(self, trainer: Trainer) -> None:
        lost = self.checkpointing is not None and self.checkpointing.best is None and self.progress.best is not None
        if lost:
            self.progress = EarlyStop()
        if self.stopped:
            trainer.stop("validation without gain", finished=True)

    def is_due(self, trainer: Trainer, step: int) -> bool:
        return step % self.config.interval_steps == 0 or step == trainer.steps

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if not self.is_due(trainer, result.step):
            return
        config = self.config
        values = self.evaluate(trainer)
        trainer.evaluated(values)
        if config.metric not in values:
            raise UserError(f"validation.metric {config.metric!r} was not measured; there are {', '.join(values)}")
        value = values[config.metric]
        if self.progress.update(value, result.step, maximise=config.maximise, min_delta=config.min_delta):
            if self.checkpointing is not None:
                self.checkpointing.best = {"step": result.step, "metric": config.metric, "value": value}
            trainer.request_save()
        if config.patience is not None and self.progress.without_gain >= config.patience:
            self.stopped = True
            hosts.log_rank0(
                f"stopping after step {result.step}: {self.progress.without_gain} evaluations without a gain of "
                f"{config.min_delta:g} in eval_{config.metric}"
                + (
                    f"; the best, {self.progress.best:.6g}, is of step {self.progress.step}"
                    if self.progress.step
                    else ""
                )
            )
            trainer.stop("validation without gain", finished=True)

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Return the metrics of the trainer's present state, in all and by source; every process must call it."""
        began = time.perf_counter()
        constant = trainer.state.split()[1]
        params = trainer.evaluated_params()
        everything, values, rejected = Totals(), {}, []
        for name, batches in self.sources.items():
            totals, last = Totals(self.channels), None
            for packed in _in_step(batches):
                rejected += packed.rejected if packed is not None else ()
                batch = make_global_batch(_host_batch(trainer, packed), trainer.shard, trainer.compiled.batch)
                if last is not None:  # one runs while the next is made
                    totals.add(last)
                last = trainer.compiled.evaluate(params, constant, batch)
            if last is not None:
                totals.add(last)
            everything.merge(totals)
            if len(self.sources) > 1:
                values |= {f"{metric}/{name}": mean for metric, mean in totals.means().items()}
        self._report(rejected)
        seconds = time.perf_counter() - began
        if self.throughput is not None:
            self.throughput.leave_out(seconds)
        return {**everything.means(), **values, "seconds": seconds}

    def _report(self, rejected: list[Rejected]) -> None:
        """Print, once, what cannot be validated on."""
        if self._reported:
            return
        self._reported = True
        rejected = [Rejected(**values) for values in hosts.all_gather_concat([dataclasses.asdict(r) for r in rejected])]
        if rejected:
            hosts.log_rank0(f"{len(rejected)} validation examples are left out:\n{grouped(rejected)}")

    def state(self) -> dict[str, Any]:
        progress = {**dataclasses.asdict(self.progress), "stopped": self.stopped}
        return {**progress, "metric": self.config.metric, "sources": sorted(self.sources)}

    def restore(self, state: dict[str, Any], step: int) -> None:
        if (state["metric"], state["sources"]) != (self.config.metric, sorted(self.sources)):
            hosts.log_rank0("validation has changed: the best step so far is forgotten")
            if self.checkpointing is not None:
                self.checkpointing.best = None
            return
        self.progress = EarlyStop(**{f.name: state[f.name] for f in dataclasses.fields(EarlyStop)})
        patience = self.config.patience
        self.stopped = state["stopped"] and patience is not None and self.progress.without_gain >= patience


def _in_step(batches: Iterable[PackedSequences]) -> Iterator[PackedSequences | None]:
    """Give a process's batches, and None while others still have some."""
    own = iter(batches)
    while True:
        packed = next(own, None)
        if not any(hosts.all_gather_object(packed is not None)):
            return
        yield packed


def _host_batch(trainer: Trainer, packed: PackedSequences | None) -> Any:
    """Return the arrays of a batch with an accumulation axis; zeros, without weight, where there is none."""
    if packed is not None:
        return jax.tree.map(lambda x: np.asarray(x)[None], trainer.task.batch_of(packed))
    sequences = len(trainer.shard.sequences)
    return jax.tree.map(lambda x: np.zeros((1, sequences, *x.shape[2:]), x.dtype), trainer.compiled.batch)
