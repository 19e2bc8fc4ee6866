"""Training on pairs of answers, a chosen and a rejected one: DPO and its relatives, CPO, SimPO, ORPO, mixtures of them.

Both answers of a pair are neighbouring segments of one packed sequence: the chosen one has an odd number, the rejected
one the even number after it (`jvlm.data.preferences`). A picture of their prompt is encoded once for both.

Axes: B sequences, S tokens, P pairs that there is room for.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jvlm.errors import UserError
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.preference import log_probs, precomputed
from jvlm.preference.checks import check_data, check_reference
from jvlm.preference.log_probs import Reference
from jvlm.preference.losses import REFERENCE_FREE, Answers, PairLoss, PairLossSettings, pair_loss, sorted_answers
from jvlm.training.task import Loss, Mean, Task
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.data.packing import PackedSequences
    from jvlm.data.processor import Processor
    from jvlm.training.config import Experiment
    from jvlm.training.trainer import Trainer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReferencedBatch:
    """A packed batch, and the log-probability of each segment's answer under the reference."""

    packed: PackedBatch
    reference: Float[Array | np.ndarray, "*A B N"]


class StepTotals(NamedTuple):
    """Counts of a whole step: pairs, and tokens of chosen answers."""

    pairs: Float[Array, ""]
    chosen_tokens: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class PreferenceTask(Task):
    """A loss of pairs of answers, averaged over pairs; see `jvlm.preference.losses` for the kinds.

    Beside it are logged, under TRL's names: rewards/chosen and rewards/rejected (beta times the log ratio to the
    reference, or for losses without one the log-probability), rewards/margins, rewards/accuracies (pairs whose chosen
    answer has the higher reward; ties count as wrong), logps/chosen, logps/rejected, nll_loss.

    Attributes:
      losses: kinds of the loss; several are added up, as MPO's (arXiv 2411.10442) sigmoid and bco_pair.
      loss_weights: factor of each of them; empty is 1 each. MPO has 0.8 and 0.2, and an ``sft_weight`` of 1.
      sft_weight: factor of the supervised loss of the chosen answers, a mean over their tokens: RPO's alpha, CPO's and
        SimPO's; ORPO has 1.
      beta: strength of the pull towards the reference; of "orpo" the weight of its odds ratio, of "simpo" a scale.
      label_smoothing: share of pairs whose order is taken to be wrong.
      gamma: of "simpo": the margin that a chosen answer must have.
      ld_alpha: weight of the tokens of an answer beyond the length of the shorter one of its pair (LD-DPO); 1 is DPO.
      discopop_tau: of "discopop": temperature of its modulation.
      reference: what the model is compared with, where a loss needs that: "copy", what is trained as it was before the
        first step, beside the frozen rest; "adapter_off", the base of new adapters, without any copy; or "precomputed",
        log-probabilities of all answers that are computed once, before the first step.
      reference_file: the file for them, an npz (`jvlm.preference.precomputed`). One that is there is used again.
    """

    losses: tuple[PairLoss, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = ()
    sft_weight: float = 0.0
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    ld_alpha: float = 1.0
    discopop_tau: float = 0.05
    reference: Reference = "copy"
    reference_file: str | None = None

    uses_dropout = False

    def __post_init__(self):
        bounds = {"sft_weight": "[0, inf)", "beta": "(0, inf)", "label_smoothing": "[0, 0.5)", "ld_alpha": "[0, 1]"}
        check_fields(self, "task.", {**bounds, "discopop_tau": "(0, inf)"})
        if not self.losses:
            raise UserError("task.losses names no loss; DPO is ('sigmoid',)")
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise UserError(
                f"task.loss_weights has {len(self.loss_weights)} numbers for the {len(self.losses)} of task.losses"
            )
        if self.reference == "precomputed" and self.ld_alpha != 1.0:
            raise UserError("task.ld_alpha weighs single tokens, and a precomputed reference has sums: take 'copy'")

    @property
    def compares(self) -> bool:
        """Whether there is a reference."""
        return any(kind not in REFERENCE_FREE for kind in self.losses)

    @property
    def needs_reference(self) -> bool:
        return self.compares and self.reference == "copy"

    def check(self, experiment: Experiment, template: VLM) -> None:
        check_data(experiment, "pairs")
        if self.compares:
            check_reference(self.reference, experiment, template)

    @property
    def _looks_up(self) -> bool:
        return self.compares and self.reference == "precomputed"

    def before_training(self, trainer: Trainer, processor: Processor, experiment: Experiment) -> None:
        if self._looks_up:
            precomputed.compute(trainer, processor, experiment, self.reference_file)

    def batch_of(self, packed: PackedSequences) -> PackedBatch | ReferencedBatch:
        if not self._looks_up:
            return packed.batch
        return ReferencedBatch(packed.batch, precomputed.lookup(packed, self.reference_file))

    def denominators(self, batches: PackedBatch | ReferencedBatch) -> StepTotals:
        def one(batch: PackedBatch) -> StepTotals:
            tokens = log_probs.by_segment(log_probs.answer_mask(batch), batch)
            return StepTotals(_is_pair(tokens).sum().astype(jnp.float32), tokens[:, ::2].sum())

        packed = batches.packed if isinstance(batches, ReferencedBatch) else batches
        return jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(packed))

    def loss(
        self,
        model: VLM,
        batch: PackedBatch | ReferencedBatch,
        *,
        reference: VLM | None = None,
        rng: jax.Array | None = None,
        denominators: StepTotals | None = None,
    ) -> Loss:
        sums = None
        if isinstance(batch, ReferencedBatch):
            batch, sums = batch.packed, jnp.asarray(batch.reference)
        other = log_probs.reference_of(self.reference, model, reference) if self.compares else None
        tokens = log_probs.of_both(model, batch, other)
        chosen, rejected, is_pair = self._answers(tokens, batch, sums)
        settings = PairLossSettings(self.beta, self.label_smoothing, self.gamma, discopop_tau=self.discopop_tau)
        total = jnp.zeros(())
        for kind, weight in zip(self.losses, self.loss_weights or (1.0,) * len(self.losses), strict=True):
            both = sorted_answers(kind, chosen, rejected, is_pair)
            total += weight * jnp.where(is_pair, pair_loss(kind, *both, settings), 0.0).sum()
        pairs = is_pair.sum().astype(jnp.float32)
        nll = -jnp.where(is_pair, chosen.policy, 0.0).sum()
        nll_tokens = jnp.where(is_pair, chosen.tokens, 0.0).sum()
        metrics = {**self._metrics(chosen, rejected, is_pair), "nll_loss": Mean(nll, nll_tokens)}
        if self.sft_weight:
            step = StepTotals(pairs, nll_tokens) if denominators is None else denominators
            total += self.sft_weight * nll * step.pairs / jnp.maximum(step.chosen_tokens, 1.0)
        if "loss" in tokens.aux:  # of a mixture of experts
            balance = tokens.aux["loss"].mean() * pairs
            metrics["aux_loss"] = Mean(balance, pairs)
            total += balance
        return Loss(total, pairs, metrics)

    def _answers(
        self, tokens: log_probs.TokenLogProbs, batch: PackedBatch, reference: Float[Array, "B N"] | None
    ) -> tuple[Answers, Answers, Bool[Array, " P"]]:
        """Return chosen and rejected answers, and which of them are there; others have harmless numbers."""
        mask = log_probs.answer_mask(batch)
        counts = log_probs.by_segment(mask, batch)
        if self.ld_alpha != 1.0:
            shorter = jnp.repeat(jnp.minimum(counts[:, ::2], counts[:, 1::2]), 2, 1)
            beyond = log_probs.answer_token_number(mask, batch) > log_probs.at_segments(shorter, batch)
            mask = mask * jnp.where(beyond, self.ld_alpha, 1.0)
        policy = log_probs.by_segment(tokens.policy * mask, batch)
        reference = jnp.zeros_like(policy) if reference is None else reference
        if tokens.reference is not None:
            reference = log_probs.by_segment(tokens.reference * mask, batch)
        is_pair = _is_pair(counts).reshape(-1)

        def answers(first: int) -> Answers:
            p, r, n = (x[:, first::2].reshape(-1) for x in (policy, reference, counts))
            return Answers(*(jnp.where(is_pair, x, safe) for x, safe in ((p, -1.0), (r, -1.0), (n, 1.0))))

        return answers(0), answers(1), is_pair

    def _metrics(self, chosen: Answers, rejected: Answers, is_pair: Bool[Array, " P"]) -> dict[str, Mean]:
        pairs = is_pair.sum().astype(jnp.float32)

        def mean(values: Float[Array, " P"]) -> Mean:
            return Mean(jax.lax.stop_gradient(jnp.where(is_pair, values, 0.0).sum()), pairs)

        by_mean = not self.compares and set(self.losses) <= {"simpo", "orpo"}
        rewards = [
            self.beta * (a.ratio if self.compares else a.mean if by_mean else a.policy) for a in (chosen, rejected)
        ]
        return {
            "rewards/chosen": mean(rewards[0]),
            "rewards/rejected": mean(rewards[1]),
            "rewards/accuracies": mean((rewards[0] > rewards[1]).astype(jnp.float32)),
            "rewards/margins": mean(rewards[0] - rewards[1]),
            "logps/chosen": mean(chosen.policy),
            "logps/rejected": mean(rejected.policy),
        }


def _is_pair(tokens: Float[Array, "B N"]) -> Bool[Array, "B P"]:
    """Return which neighbouring segments both have tokens of an answer."""
    return (tokens[:, ::2] > 0) & (tokens[:, 1::2] > 0)
