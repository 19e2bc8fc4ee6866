"""Training on answers that are good or bad by themselves: KTO (arXiv 2402.01306), and APO-zero without pairs.

Segments of odd number are the examples; the one after each has the same prompt with another example's answer
(`jvlm.data.preferences.with_other_answers`), by which the model's distance from its reference is estimated.

Axes: B sequences, P examples that there is room for.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jvlm.data.preferences import DESIRABLE
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.preference import log_probs
from jvlm.preference.checks import check_data, check_reference
from jvlm.preference.log_probs import Reference
from jvlm.preference.losses import Answers, kto_loss
from jvlm.training.task import Loss, Mean, Task
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.data.packing import PackedSequences
    from jvlm.training.config import Experiment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledBatch:
    """A packed batch, and which of its examples are good.

    Attributes:
      desirable: 1 for a good answer, 0 for a bad one and for no answer.
    """

    packed: PackedBatch
    desirable: Float[Array | np.ndarray, "*A B P"]


@dataclasses.dataclass(frozen=True)
class LabelledTask(Task):
    """A loss of answers with a label, averaged over answers.

    Beside it are logged, under TRL's names: rewards/chosen and logps/chosen of good answers, rewards/rejected and
    logps/rejected of bad ones, and kl, the estimated divergence from the reference.

    Attributes:
      loss_type: "kto"; or "apo_zero_unpaired", which takes the divergence to be 0.
      beta: strength of the pull towards the reference.
      desirable_weight: of the loss of good answers.
      undesirable_weight: of the loss of bad answers.
      reference: as of `jvlm.preference.pairs.PreferenceTask`.
    """

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Reference = "copy"

    uses_dropout = False

    def __post_init__(self):
        positive = dict.fromkeys(("desirable_weight", "undesirable_weight"), "[0, inf)")
        check_fields(self, "task.", {"beta": "(0, inf)", **positive})

    @property
    def needs_reference(self) -> bool:
        return self.reference == "copy"

    def check(self, experiment: Experiment, template: VLM) -> None:
        check_data(experiment, "labels")
        check_reference(self.reference, experiment, template)

    def batch_of(self, packed: PackedSequences) -> LabelledBatch:
        shape = packed.batch.tokens.shape
        desirable = np.zeros((shape[0], log_probs.room(shape[1]) // 2), np.float32)
        for row, values in enumerate(packed.values):
            for number, value in enumerate(values[::2]):
                desirable[row, number] = value[DESIRABLE]
        return LabelledBatch(packed.batch, desirable)

    def loss(
        self,
        model: VLM,
        batch: LabelledBatch,
        *,
        reference: VLM | None = None,
        rng: jax.Array | None = None,
        denominators: None = None,
    ) -> Loss:
        other = log_probs.reference_of(self.reference, model, reference)
        tokens = log_probs.of_both(model, batch.packed, other)
        sums = [log_probs.by_segment(x, batch.packed) for x in (tokens.policy, tokens.reference)]
        counts = log_probs.by_segment(log_probs.answer_mask(batch.packed), batch.packed)
        own, mismatched = (Answers(*(x[:, first::2].reshape(-1) for x in (*sums, counts))) for first in (0, 1))
        is_good = jnp.asarray(batch.desirable).reshape(-1) > 0
        is_there = own.tokens > 0
        others = (mismatched.tokens > 0).sum().astype(jnp.float32)
        drift = jax.lax.stop_gradient(mismatched.ratio.sum())  # what is not there has a ratio of 0
        shift = jnp.maximum(drift / jnp.maximum(others, 1.0), 0.0) * (self.loss_type == "kto")
        weights = {name: getattr(self, name) for name in ("desirable_weight", "undesirable_weight")}
        losses = kto_loss(own, is_good, shift, beta=self.beta, **weights)
        total, answers = jnp.where(is_there, losses, 0.0).sum(), is_there.sum().astype(jnp.float32)
        metrics = {"kl": Mean(shift * others, others), **self._metrics(own, is_good, is_there)}
        if "loss" in tokens.aux:  # of a mixture of experts
            balance = tokens.aux["loss"].mean() * answers
            metrics["aux_loss"] = Mean(balance, answers)
            total += balance
        return Loss(total, answers, metrics)

    def _metrics(self, answers: Answers, is_good: Bool[Array, " P"], is_there: Bool[Array, " P"]) -> dict[str, Mean]:
        metrics = {}
        for name, chosen in (("chosen", is_there & is_good), ("rejected", is_there & ~is_good)):
            count = chosen.sum().astype(jnp.float32)
            for what, values in (("rewards", self.beta * answers.ratio), ("logps", answers.policy)):
                total = jax.lax.stop_gradient(jnp.where(chosen, values, 0.0).sum())
                metrics[f"{what}/{name}"] = Mean(total, count)
        return metrics
