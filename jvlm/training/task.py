"""What a run minimises: a task turns a batch into a loss, and may bring batch fields and a reference model of its own.

Losses and metrics are sums with their weights, so those of micro-batches, of devices and of validation batches add up
to what one large batch would give.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jvlm.models.vlm import VLM

if TYPE_CHECKING:
    from jvlm.data.packing import PackedSequences
    from jvlm.data.processor import Processor
    from jvlm.training.config import Experiment
    from jvlm.training.trainer import Trainer


# What `Loss.sources` adds up for each data source: weighted losses and their weights, right answers among so many
# supervised tokens, and examples.
SOURCE_SUMS = ("loss", "weight", "correct", "tokens", "examples")


class Mean(NamedTuple):
    """A metric as a sum and what to divide it by. Means of several batches add up, field by field."""

    sum: Float[Array | np.ndarray, ""]
    count: Float[Array | np.ndarray, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a batch, not yet averaged.

    Attributes:
      total: weighted sum that is minimised once it is divided by the weights of all accumulated batches.
      weight: sum of the weights.
      metrics: what is logged beside it, by name. "loss" replaces ``total / weight`` in the log, where what is minimised
        has parts (a balance loss, a KL penalty) that are no loss of the task. Names under "router/" stay off the
        terminal.
      sources: sums of each data source, columns `SOURCE_SUMS`, for curves of their own; None without them.
    """

    total: Float[Array | np.ndarray, ""]
    weight: Float[Array | np.ndarray, ""]
    metrics: Mapping[str, Mean] = dataclasses.field(default_factory=dict)
    sources: Float[Array, "G 5"] | None = None


class Task(abc.ABC):
    """What a run minimises. Subclass it as a frozen dataclass: its fields are saved with the experiment.

    Attributes:
      needs_reference: whether `loss` gets the model as it was before the first step, for a KL penalty or a preference
        loss. Frozen parameters are shared with it; of the trainable ones a second copy is held.
      measures_update: whether "update_norm" and "parameter_norm", of the update and of the parameters before it, are
        among the metrics.
      uses_dropout: whether adapters drop inputs in training. A loss that compares log-probabilities with those of a
        reference must not: they would differ from the first step on.
    """

    needs_reference: bool = False
    uses_dropout: bool = True
    measures_update: bool = False

    def check(self, experiment: Experiment, template: VLM) -> None:  # noqa: B027  (most tasks go with all)
        """Raise UserError for an experiment that the task does not go with.

        Args:
          template: the model, with its adapters, without arrays.
        """

    def before_training(self, trainer: Trainer, processor: Processor, experiment: Experiment) -> None:  # noqa: B027
        """Do what takes a pass over the data with the model to start from. Called before the first step of each start,
        by every process, when the trainer's state is that model's and no checkpoint is restored yet.
        """

    def denominators(self, batches: Any) -> Any:
        """Return what `loss` divides by that must be known for the whole step; None for nothing.

        For losses of several parts, each a mean over something else: an average over all accumulated batches, and over
        all devices, has to be taken of each part by itself. Traced under ``jit``; no gradient flows.

        Args:
          batches: those of `batch_of` with a leading axis of gradient accumulation.
        """
        return None

    @abc.abstractmethod
    def loss(
        self,
        model: VLM,
        batch: Any,
        *,
        reference: VLM | None = None,
        rng: jax.Array | None = None,
        denominators: Any = None,
    ) -> Loss:
        """Return the loss of a batch. Traced under ``jit`` and differentiated by the trainable parameters.

        Args:
          model: call it as often as the loss needs.
          batch: what `batch_of` returned, as device arrays.
          reference: the model before the first step, if ``needs_reference``; no gradient flows into it. Parameters
            that are frozen are the same arrays as the model's.
          rng: key of this batch, for noise; a function of the run's seed, the step and the number of the micro-batch
            alone. None outside training: validation draws nothing.
          denominators: what `denominators` returned; only given to tasks that return something there.
        """

    def batch_of(self, packed: PackedSequences) -> Any:
        """Return the arrays of one batch, on the host: a tree whose leaves have the packed sequences as first axis.

        Called with an empty batch once, which tells the shapes: they must not depend on the data. Leaves that are
        fields of a `PackedBatch` are sharded as those; of others the first axis is.
        """
        return packed.batch
