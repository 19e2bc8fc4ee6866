"""Policy optimisation as a task of the trainer: groups of sampled answers, packed, with their advantages."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jvlm.data.packing import PackedSequences
from jvlm.errors import UserError
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.rl.config import AdvantageConfig, RewardConfig, RolloutConfig
from jvlm.rl.log_config import RolloutLogConfig
from jvlm.rl.log_probs import MOST_BANNED, Draws, drawn_tokens, sampled_log_probs
from jvlm.rl.losses import PolicyLoss, SampledTokens, policy_loss
from jvlm.rl.prompt_stream import PromptStreamConfig
from jvlm.rl.selection import SelectionConfig
from jvlm.training.supervised import next_tokens
from jvlm.training.task import Loss, Mean, Task
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.training.config import Experiment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """A packed batch of sampled answers. Values of a token stand where it is predicted, one position before it.

    Attributes:
      advantages, weights: of `SampledTokens`.
      rollout: log-probability in the engine.
      old: log-probability before the first update with these answers, see `PolicyTask.old_log_probs`.
      is_first: whether the token is the first of its answer.
      banned: of `banned_ids`.
      share: of the step's weight; all sum to 1.
    """

    packed: PackedBatch
    advantages: Float[Array | np.ndarray, "*A B S"]
    weights: Float[Array | np.ndarray, "*A B S"]
    rollout: Float[Array | np.ndarray, "*A B S"]
    old: Float[Array | np.ndarray, "*A B S"]
    is_first: Bool[Array | np.ndarray, "*A B S"]
    banned: Int[Array | np.ndarray, "*A B 2 K"]
    share: Float[Array | np.ndarray, "*A B"]


@dataclasses.dataclass(frozen=True)
class AnswerSequences(PackedSequences):
    """Packed sequences of sampled answers.

    Attributes:
      policy: what the step reads.
      places: where which answer stands, `jvlm.rl.packing.Place`.
    """

    policy: PolicyBatch | None = None
    places: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class PolicyTask(Task):
    """Reinforcement learning from rewards of sampled answers. The defaults are MiMo-VL's (arXiv 2506.03569): on-policy,
    one update for each rollout, no clipping, no divergence from a reference.

    Beside the loss are logged "rollout/kl1" and "rollout/kl3", estimates of how far the engine's distribution is from
    the trainer's; "rollout/difference", the mean absolute difference of log-probabilities between both;
    "rollout/equal", the share of tokens where it is 0; "clip_low", "clip_high". Where ``old_log_probs`` are the
    trainer's also "old/difference" and "old/equal", of the step's log-probabilities to these: 0 and 1 at the first
    update; and "rollout/drawn_again", the share of tokens that the trainer draws too with the engine's random numbers.

    Attributes:
      policy_loss: what is minimised, see `jvlm.rl.losses`.
      advantage: how rewards become advantages.
      rollout: how answers are sampled.
      rewards: how they are judged.
      prompts: which prompts are asked.
      selection: how many groups are started, and how many are trained on together.
      updates: optimizer steps for each rollout, among which its groups are divided. From the second on the policy is
        another one than that which sampled: a loss with a ratio clips it ("ppo", "gspo", "cispo"), MiMo-VL's own needs
        a correction.
      old_log_probs: what the ratio is to, and what a correction compares with the engine. "engine": the
        log-probabilities that tokens were drawn with, which are the trainer's but for rounding. "trainer": those that
        the weights before the first update have in the trainer's packed sequences, to the last bit those of the first
        update. Costs two more passes without a gradient: before the update, and again in it.
      log: what is written down of rollouts, and what raises an alarm.
    """

    policy_loss: PolicyLoss = PolicyLoss()
    advantage: AdvantageConfig = AdvantageConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    prompts: PromptStreamConfig = PromptStreamConfig()
    selection: SelectionConfig = SelectionConfig(groups=32)
    updates: int = 1
    old_log_probs: Literal["engine", "trainer"] = "engine"
    log: RolloutLogConfig = RolloutLogConfig()

    uses_dropout = False
    measures_update = True

    def __post_init__(self):
        check_fields(self, "task.", {"updates": "[1, inf)"})
        corrected = self.policy_loss.correction != "none"
        if self.selection.ahead and not corrected:
            raise UserError(
                "task.selection.ahead trains on answers of earlier weights: set task.policy_loss.correction, "
                "token_truncate say"
            )
        if self.updates > 1 and self.policy_loss.kind == "on_policy" and not corrected:
            raise UserError(
                f"task.updates = {self.updates}: the second update is off-policy; set task.policy_loss.kind to ppo, "
                "gspo or cispo, or a task.policy_loss.correction"
            )
        if corrected and self.policy_loss.kind != "on_policy" and self.old_log_probs == "engine":
            raise UserError(
                f"task.policy_loss.correction {self.policy_loss.correction} compares the engine with itself: set "
                "task.old_log_probs to trainer"
            )
        if self.updates > self.selection.groups:
            raise UserError(
                f"task.updates = {self.updates} have no group each of task.selection.groups = {self.selection.groups}"
            )
        if self.updates > 1 and self.selection.ahead:
            raise UserError("task.updates and task.selection.ahead do not go together: one of them is enough")

    @property
    def needs_reference(self) -> bool:
        return self.policy_loss.kl_weight > 0 or self.log.start_interval_steps is not None

    def check(self, experiment: Experiment, template: VLM) -> None:
        if experiment.steps is None:
            raise UserError("steps: give the number of optimizer steps; there is no data whose passes could be counted")
        validation = experiment.validation
        if validation.split or validation.patience is not None or validation.use_best:
            raise UserError(
                "prompts of validation.data are answered and judged every validation.interval_steps; there is no loss "
                "of them by which to stop or to choose a checkpoint: leave validation.split, patience and use_best out"
            )
        if self.selection.ahead and experiment.validation.data:
            raise UserError(
                "task.selection.ahead keeps answers in the engine, and validation.data would be answered between them: "
                "leave one of them out"
            )
        if experiment.data.preference != "none":
            raise UserError(f"data.preference {experiment.data.preference!r} is for preference tasks: leave it out")

    def batch_of(self, packed: PackedSequences) -> PolicyBatch:
        if isinstance(packed, AnswerSequences) and packed.policy is not None:
            return packed.policy
        if packed.conversations:
            raise UserError("a PolicyTask trains on answers that it samples: run the experiment with jvlm rl")
        return empty_batch(packed.batch)

    def log_probs(self, model: VLM, batch: PolicyBatch) -> tuple[Float[Array, "B S"], dict[str, Array]]:
        """Return the log-probability of each sampled token, and what the model's layers report."""
        hidden, _, aux = model.hidden(batch.packed)
        values = sampled_log_probs(
            model,
            batch.packed,
            hidden,
            jnp.asarray(batch.banned),
            jnp.asarray(batch.is_first),
            self.rollout.temperature,
        )
        return values, aux

    def score(self, model: VLM, batch: PolicyBatch, draws: Draws) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
        """Return the log-probability of each sampled token, as `log_probs`, and whether the model draws it again with
        the random numbers that the engine drew it with."""
        batch = jax.tree.map(jnp.asarray, batch)
        hidden, _, _ = model.hidden(batch.packed)
        known = (model, batch.packed, hidden, batch.banned, batch.is_first, self.rollout.temperature)
        targets, weights = next_tokens(batch.packed)
        return sampled_log_probs(*known), (drawn_tokens(*known, draws) == targets) & (weights > 0)

    def loss(
        self,
        model: VLM,
        batch: PolicyBatch,
        *,
        reference: VLM | None = None,
        rng: jax.Array | None = None,
        denominators: Any = None,
    ) -> Loss:
        batch = jax.tree.map(jnp.asarray, batch)
        forward = functools.partial(self.log_probs, model)
        if self.old_log_probs == "trainer":
            # a forward pass that keeps nothing for the gradient is compiled as one without a gradient: to the same bits
            forward = jax.checkpoint(forward)
        log_probs, aux = forward(batch)
        other = None if not self.policy_loss.kl_weight else jax.lax.stop_gradient(self.log_probs(reference, batch)[0])
        B, S = batch.packed.tokens.shape
        room = S + 1  # numbers of segments, padding included
        answers = jnp.arange(B)[:, None] * room + batch.packed.segment_ids
        on_policy = self.policy_loss.kind == "on_policy"
        tokens = SampledTokens(
            batch.advantages.reshape(-1),
            batch.weights.reshape(-1),
            answers.reshape(-1),
            None if on_policy else batch.old.reshape(-1),
            batch.rollout.reshape(-1),
            None if other is None else other.reshape(-1),
            B * room,
        )
        total, sums = policy_loss(self.policy_loss, log_probs.reshape(-1), tokens)
        weight, count = batch.share.sum(), sums["tokens"]
        names = {"clip_low": "clip_low", "clip_high": "clip_high", "kl": "kl", "correction": "correction"}
        names |= {"rollout_kl1": "rollout/kl1", "rollout_kl3": "rollout/kl3"}
        metrics = {logged: Mean(sums[name], count) for name, logged in names.items() if name in sums}
        mask = batch.weights > 0
        difference = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(log_probs) - batch.rollout), 0.0)
        metrics["rollout/difference"] = Mean(difference.sum(), count)
        metrics["rollout/equal"] = Mean((mask & (difference == 0)).sum().astype(jnp.float32), count)
        if self.old_log_probs == "trainer":
            difference = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(log_probs) - batch.old), 0.0)
            metrics["old/difference"] = Mean(difference.sum(), count)
            metrics["old/equal"] = Mean((mask & (difference == 0)).sum().astype(jnp.float32), count)
        metrics["loss"] = Mean(jax.lax.stop_gradient(total), weight)
        if "loss" in aux:  # of a mixture of experts
            balance = aux["loss"].mean() * weight
            metrics["aux_loss"] = Mean(balance, weight)
            total += balance
        return Loss(total, weight, metrics)


def empty_batch(packed: PackedBatch) -> PolicyBatch:
    """Return a packed batch in which nothing was sampled."""
    shape = packed.tokens.shape
    numbers = [np.zeros(shape, np.float32) for _ in range(4)]
    banned = np.full((shape[0], 2, MOST_BANNED), -1, np.int32)
    return PolicyBatch(packed, *numbers, np.zeros(shape, bool), banned, np.zeros(shape[:1], np.float32))
