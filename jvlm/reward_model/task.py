"""Training a reward model: the chosen answer of a pair shall score higher than the rejected one (Bradley and Terry).

The score of a conversation is what the model's ``score`` matrix makes of its last token, as in transformers'
ForSequenceClassification. Axes: B sequences, S tokens, N segments and P pairs that there is room for.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jvlm.data.preferences import MARGIN
from jvlm.errors import UserError
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.preference import log_probs
from jvlm.preference.checks import check_data
from jvlm.preference.losses import reward_model_loss
from jvlm.training.task import Loss, Mean, Task
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.data.packing import PackedSequences
    from jvlm.training.config import Experiment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MarginBatch:
    """A packed batch of pairs, and by how much each chosen answer is better.

    Attributes:
      margin: 0 where an example does not say, and where there is no pair.
    """

    packed: PackedBatch
    margin: Float[Array | np.ndarray, "*A B P"]


@dataclasses.dataclass(frozen=True)
class RewardTask(Task):
    """The Bradley-Terry loss of pairs, averaged over pairs, with the ``margin`` that examples may have.

    Beside it are logged, as in TRL: accuracy (pairs whose chosen answer scores higher; ties count as wrong), margin
    (the mean difference), mean_reward.

    Attributes:
      centre: weight of the squared sum of both rewards, which keeps their mean at 0 (arXiv 2312.09244).
    """

    centre: float = 0.0

    def __post_init__(self):
        check_fields(self, "task.", {"centre": "[0, inf)"})

    def check(self, experiment: Experiment, template: VLM) -> None:
        check_data(experiment, "pairs")
        labels = getattr(template.config.decoder, "labels", None)
        if labels != 1:
            raise UserError(
                f"RewardTask trains a model with one score, and this one has {labels or 'none'}: set adapt.labels = 1"
            )

    def batch_of(self, packed: PackedSequences) -> MarginBatch:
        shape = packed.batch.tokens.shape
        margin = np.zeros((shape[0], log_probs.room(shape[1]) // 2), np.float32)
        for row, values in enumerate(packed.values):
            for number, value in enumerate(values[::2]):
                margin[row, number] = value.get(MARGIN, 0.0)
        return MarginBatch(packed.batch, margin)

    def loss(
        self,
        model: VLM,
        batch: MarginBatch,
        *,
        reference: VLM | None = None,
        rng: jax.Array | None = None,
        denominators: None = None,
    ) -> Loss:
        hidden = model.hidden(batch.packed)
        rewards, is_there = segment_scores(model, batch.packed, hidden.hidden)
        is_pair = (is_there[:, ::2] * is_there[:, 1::2]).reshape(-1) > 0
        chosen, rejected = (jnp.where(is_pair, rewards[:, first::2].reshape(-1), 0.0) for first in (0, 1))
        losses = reward_model_loss(chosen, rejected, jnp.asarray(batch.margin).reshape(-1), centre=self.centre)
        pairs = is_pair.sum().astype(jnp.float32)
        total = jnp.where(is_pair, losses, 0.0).sum()
        difference, mean = jax.lax.stop_gradient((chosen - rejected, (chosen + rejected) / 2))
        metrics = {
            "accuracy": Mean((difference > 0).sum().astype(jnp.float32), pairs),
            "margin": Mean(difference.sum(), pairs),
            "mean_reward": Mean(mean.sum(), pairs),
        }
        if "loss" in hidden.aux:  # of a mixture of experts
            balance = hidden.aux["loss"].mean() * pairs
            metrics["aux_loss"] = Mean(balance, pairs)
            total += balance
        return Loss(total, pairs, metrics)


def segment_scores(
    model: VLM, batch: PackedBatch, hidden: Float[Array, "B S D"] | None = None
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Return the first score of each segment, at its last token, and 1 for each segment that is there.

    Args:
      hidden: last hidden states of the batch; None computes them.
    """
    hidden = model.hidden(batch).hidden if hidden is None else hidden
    scores = model.decoder.scores(hidden)[..., 0]
    segments = jnp.asarray(batch.segment_ids)
    after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    is_last = ((segments != after) & (segments > 0)).astype(jnp.float32)
    return log_probs.by_segment(scores * is_last, batch), log_probs.by_segment(is_last, batch)
