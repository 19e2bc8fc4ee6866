"""Supervised training: next-token cross-entropy over packed sequences, without all the logits in memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jvlm.models import device_ops
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.training.neftune import EmbeddingNoise, Where
from jvlm.training.task import Loss, Mean, Task
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.data.packing import PackedSequences


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourcedBatch:
    """A packed batch, and which data source its examples are of.

    Attributes:
      sources: number of the source of each token's example; -1 for none.
      count: of the sources (static).
    """

    packed: PackedBatch
    sources: Int[Array | np.ndarray, "*A B S"]
    count: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class SupervisedTask(Task):
    """Cross-entropy of the supervised tokens, each with its loss weight, plus what layers ask to have minimised.

    Attributes:
      neftune_alpha: scale of NEFTune's noise on the embeddings in training (`jvlm.training.neftune`); 0 adds none, 5 is
        the usual value.
      neftune_where: "text" adds it before vision tokens are put in, as transformers and TRL do; "merged" afterwards, to
        vision tokens as well, as Idefics2's training code does.
    """

    neftune_alpha: float = 0.0
    neftune_where: Where = "text"

    def __post_init__(self):
        check_fields(self, "task.", {"neftune_alpha": "[0, inf)"})

    def batch_of(self, packed: PackedSequences) -> PackedBatch | SourcedBatch:
        """Return the packed batch; with the source of each token where the data has names for them."""
        if not packed.source_names:
            return packed.batch
        segments = packed.batch.segment_ids
        numbers = np.full((len(segments), segments.shape[1] + 1), -1, np.int32)
        for row, sources in enumerate(packed.sources):
            numbers[row, 1 : len(sources) + 1] = sources
        return SourcedBatch(packed.batch, np.take_along_axis(numbers, segments, 1), len(packed.source_names))

    def loss(
        self,
        model: VLM,
        batch: PackedBatch | SourcedBatch,
        *,
        reference: VLM | None = None,
        rng: jax.Array | None = None,
        denominators: Any = None,
    ) -> Loss:
        noise = None
        if rng is not None and self.neftune_alpha:
            noise = EmbeddingNoise(rng, self.neftune_alpha, self.neftune_where)
        if isinstance(batch, SourcedBatch):
            sources = jnp.asarray(batch.sources), batch.count
            return supervised_loss(model, batch.packed, noise=noise, sources=sources)
        return supervised_loss(model, batch, noise=noise)


def supervised_loss(
    model: VLM,
    batch: PackedBatch,
    block: int | None = None,
    *,
    noise: EmbeddingNoise | None = None,
    sources: tuple[Int[Array, "B S"], int] | None = None,
) -> Loss:
    """Return the cross-entropy of a batch in nats.

    Its metrics are "loss", "token_acc" (targets of weight > 0 that are the most likely token) and what layers report:
    a mixture of experts "aux_loss", which is minimised as well, and "router/...", each averaged over those layers.

    Args:
      block: tokens whose logits exist at a time; None chooses by memory. Only supervised tokens have any.
      noise: added to the embeddings.
      sources: number of each token's data source, and how many there are, for sums of each.
    """
    hidden, _, aux = model.hidden(batch, noise)
    with jax.named_scope("loss"):
        targets, weights = next_tokens(batch)
        kernel, vocabulary_first = model.decoder.output_kernel()
        groups = {} if sources is None else {"groups": sources[0], "num_groups": sources[1]}
        sums = device_ops.current().cross_entropy_sum(
            hidden, kernel, targets, weights, vocabulary_first=vocabulary_first, block=block, **groups
        )
        weight = weights.sum()
        reports = {name: value.mean() * weight for name, value in aux.items()}
        metrics = {
            "loss": Mean(sums.loss, weight),
            "token_acc": Mean(sums.correct.astype(jnp.float32), (weights > 0).sum().astype(jnp.float32)),
            **{"aux_loss" if name == "loss" else name: Mean(value, weight) for name, value in reports.items()},
        }
        by_source = None if sources is None else _source_sums(batch, weights, *sources, sums.by_group)
        return Loss(sums.loss + reports.get("loss", 0.0), weight, metrics, by_source)


def _source_sums(
    batch: PackedBatch,
    weights: Float[Array, "B S"],
    sources: Int[Array, "B S"],
    count: int,
    by_group: Float[Array, "G 2"],
) -> Float[Array, "G 5"]:
    """Return the sums of `SOURCE_SUMS` for each data source."""
    segments = jnp.asarray(batch.segment_ids)
    begins = (segments > 0) & (segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1])
    member = sources[..., None] == jnp.arange(count)
    weight, tokens, examples = (
        jnp.where(member, x[..., None], 0).astype(jnp.float32).sum((0, 1)) for x in (weights, weights > 0, begins)
    )
    return jnp.stack([by_group[:, 0], weight, by_group[:, 1], tokens, examples], -1)


def next_tokens(batch: PackedBatch) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
    """Return (targets, weights): position t predicts token t + 1, the last of a conversation nothing."""
    tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.loss_weights)
    segments = jnp.asarray(batch.segment_ids)
    same = segments[:, 1:] == segments[:, :-1]
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return targets, jnp.pad(weights[:, 1:] * same, ((0, 0), (0, 1)))


def token_log_probs(
    model: VLM, batch: PackedBatch, block: int = 256, *, hidden: Float[Array, "B S D"] | None = None
) -> Float[Array, "B S"]:
    """Return the log-probability of the token after each position, float32; 0 where `next_tokens` has weight 0.

    For preference, policy and distillation losses. Logits of ``block`` positions exist at a time, and are computed
    again for the gradient; blocks without a supervised token have none.

    Args:
      hidden: last hidden states of the batch; None computes them.
    """
    hidden = model.hidden(batch).hidden if hidden is None else hidden
    targets, weights = next_tokens(batch)
    B, S = targets.shape
    block = min(block, S)
    count = -(-S // block)
    padding = ((0, 0), (0, count * block - S))

    def blocks(x: Array) -> Array:
        return jnp.moveaxis(jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)).reshape(B, count, block, *x.shape[2:]), 1, 0)

    def of_block(hidden_BTD: Array, targets_BT: Array) -> Array:
        logits = model.decoder.logits(hidden_BTD).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, -1)

    @jax.checkpoint
    def log_probs(hidden_BTD: Array, targets_BT: Array, weights_BT: Array) -> Array:
        nothing = lambda _, targets: jnp.zeros(targets.shape, jnp.float32)  # noqa: E731
        return jax.lax.cond((weights_BT > 0).any(), of_block, nothing, hidden_BTD, targets_BT)

    _, by_block = jax.lax.scan(
        lambda _, xs: (None, log_probs(*xs)), None, (blocks(hidden), blocks(targets), blocks(weights))
    )
    by_block = jnp.moveaxis(by_block, 0, 1).reshape(B, count * block)[:, :S]
    return jnp.where(weights > 0, by_block, 0.0)
