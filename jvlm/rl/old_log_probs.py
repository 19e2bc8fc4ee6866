"""Log-probabilities of a rollout by the trainer's own program, in its packed sequences: before the first update, and
those of the model that the run started from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jvlm.inference.requests import SamplingParams
from jvlm.parallel.data_shards import local_sequences, make_global_batch
from jvlm.rl.log_probs import Draws
from jvlm.rl.packing import SampledAnswer, draws_of
from jvlm.rl.records import GroupRecord
from jvlm.rl.task import AnswerSequences, PolicyTask
from jvlm.training import train_step
from jvlm.training.state import Params

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer


class OldLogProbs:
    """Fills `PolicyBatch.old` of micro-batches, once for each rollout.

    Attributes:
      drawn_again: share of the last rollout's tokens that the trainer draws too with the engine's random numbers; None
        before the first.
    """

    def __init__(self, task: PolicyTask):
        self._task = task
        self._forward: tuple[Callable[..., Any], Draws] | None = None
        self._found: dict[tuple[int, int], tuple[float, ...]] = {}
        self.drawn_again: float | None = None

    def fill(self, trainer: Trainer, batches: Sequence[AnswerSequences]) -> None:
        """Compute them with the weights of the trainer."""
        self._found, again, count = {}, 0, 0
        for batch in batches:
            log_probs, same = self._score(trainer, batch)
            for answer, row, span in batch.places:
                batch.policy.old[row, span] = log_probs[row, span]
                self._found[answer.seed, answer.number] = tuple(log_probs[row, span].tolist())
                again, count = again + int(same[row, span].sum()), count + len(answer.tokens)
        self.drawn_again = again / count if count else None

    def noted(self, group: GroupRecord, sampling: SamplingParams) -> GroupRecord:
        """Return a group with what `fill` found; answers that no step trains on have nothing.

        Args:
          sampling: how its answers were drawn.
        """
        found = (self._found.get((sampling.seed, sampling.number + number)) for number in range(len(group.answers)))
        answers = (
            answer if values is None else dataclasses.replace(answer, old_log_probs=values)
            for answer, values in zip(group.answers, found, strict=True)
        )
        return dataclasses.replace(group, answers=tuple(answers))

    def distance_from_start(self, trainer: Trainer, batches: Sequence[AnswerSequences]) -> float:
        """Return how far the engine's distribution is from that of the model before the first step: the mean over
        tokens of ``exp(d) - d - 1``, with d the log ratio."""
        total, count = 0.0, 0
        for batch in batches:
            log_probs, _ = self._score(trainer, batch, trainer.state.reference)
            for answer, row, span in batch.places:
                away = np.clip(log_probs[row, span].astype(np.float64) - np.asarray(answer.log_probs), -20, 20)
                total, count = total + float((np.exp(away) - away - 1).sum()), count + len(away)
        return total / max(count, 1)

    def _score(self, trainer: Trainer, batch: AnswerSequences, params: Params | None = None) -> tuple[np.ndarray, ...]:
        """Return log-probabilities and whether the same tokens are drawn, with the trainer's parameters or others."""
        (forward, shapes), shard = self._compiled(trainer), trainer.shard
        policy, draws = ([local_sequences(one, shard)] for one in (batch.policy, draws_of(batch)))
        arguments = (
            make_global_batch(train_step.stack(policy), shard, trainer.shapes_of(1)),
            make_global_batch(train_step.stack(draws), shard, shapes),
        )
        changing, constant = trainer.state.split()
        found = forward(changing.trainable if params is None else params, constant, *arguments)
        return tuple(np.asarray(x.addressable_data(0)) for x in found)

    def _compiled(self, trainer: Trainer) -> tuple[Callable[..., Any], Draws]:
        if self._forward is None:
            compiled = trainer.compiled
            like = compiled.batch.advantages
            kinds = (jnp.uint32, jnp.int32, jnp.int32)
            draws = Draws(*(jax.ShapeDtypeStruct(like.shape, kind, sharding=like.sharding) for kind in kinds))
            self._forward = compiled.forward(self._task.score, compiled.batch, draws), draws
        return self._forward


def answers_of(updates: Sequence[Sequence[AnswerSequences]]) -> Iterator[SampledAnswer]:
    """Return the answers that stand in micro-batches."""
    return (place.answer for update in updates for batch in update for place in batch.places)
