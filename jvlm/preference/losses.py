"""Preference losses, from log-probabilities of whole answers to one loss a pair.

Names are those of TRL, whose code the values are held against. Axes: P pairs, N answers, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

PairLoss = Literal[
    *("sigmoid", "hinge", "ipo", "robust", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "exo_pair"),
    *("sigmoid_norm", "discopop", "aot", "aot_unpaired", "cpo", "simpo", "orpo"),
]
# those that need no reference model
REFERENCE_FREE = ("cpo", "simpo", "orpo")


class Answers(NamedTuple):
    """Sums over the tokens of answers.

    Attributes:
      policy: log-probability under the model that is trained.
      reference: the same under the reference; zeros where the loss needs none.
      tokens: how many.
    """

    policy: Float[Array, " P"]
    reference: Float[Array, " P"]
    tokens: Float[Array, " P"]

    @property
    def ratio(self) -> Float[Array, " P"]:
        """Log of the ratio of both probabilities."""
        return self.policy - self.reference

    @property
    def mean(self) -> Float[Array, " P"]:
        """Mean log-probability of a token."""
        return self.policy / self.tokens


@dataclasses.dataclass(frozen=True)
class PairLossSettings:
    """Settings of `pair_loss`.

    Attributes:
      beta: strength of the pull towards the reference; of "simpo" the scale of its margin (2 in its paper).
      label_smoothing: share of pairs whose order is taken to be wrong: conservative DPO ("sigmoid"), "robust",
        "exo_pair".
      gamma: "simpo": the margin that a chosen answer must have.
      bco_shift: "bco_pair": running mean of the rewards, which is taken off.
      discopop_tau: "discopop": temperature of its modulation.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    bco_shift: float = 0.0
    discopop_tau: float = 0.05


def pair_loss(
    kind: PairLoss, chosen: Answers, rejected: Answers, settings: PairLossSettings = PairLossSettings()
) -> Float[Array, " P"]:
    """Return the loss of each pair.

    "sigmoid" is DPO (arXiv 2305.18290), "hinge" SLiC (2305.10425), "ipo" 2310.12036, "robust" 2403.00409, "nca_pair"
    2402.05369, "bco_pair" 2404.04656, "sppo_hard" 2405.00675, "apo_zero" and "apo_down" 2408.06266, "exo_pair"
    2402.00856, "sigmoid_norm" DPO over mean log-probabilities, "cpo" 2401.08417, "simpo" 2405.14734, "orpo" the odds
    ratio of 2403.07691, times beta, "discopop" 2406.08414; "aot" and "aot_unpaired" (2406.05882) are DPO over answers
    that `sorted_answers` has put in order. CPO, SimPO and ORPO are meant to be added to the loss of the chosen answers.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid
    a, b = chosen.ratio, rejected.ratio
    margin = beta * (a - b)
    if kind in ("sigmoid", "aot", "aot_unpaired"):
        return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    if kind == "hinge":
        return jax.nn.relu(1 - margin)
    if kind == "ipo":
        return (a / chosen.tokens - b / rejected.tokens - 1 / (2 * beta)) ** 2
    if kind == "robust":
        both = -(1 - smoothing) * log_sigmoid(margin) + smoothing * log_sigmoid(-margin)
        return both / (1 - 2 * smoothing)
    if kind == "nca_pair":
        return -log_sigmoid(beta * a) - 0.5 * log_sigmoid(-beta * a) - 0.5 * log_sigmoid(-beta * b)
    if kind == "bco_pair":
        return -log_sigmoid(beta * a - settings.bco_shift) - log_sigmoid(-(beta * b - settings.bco_shift))
    if kind == "sppo_hard":
        return (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2
    if kind == "apo_zero":
        return 1 - sigmoid(beta * a) + sigmoid(beta * b)
    if kind == "apo_down":
        return sigmoid(beta * a) + 1 - sigmoid(margin)
    if kind == "exo_pair":
        smoothing = max(smoothing, 1e-3)  # the loss is infinite without
        better = sigmoid(margin) * (log_sigmoid(margin) - jnp.log(1 - smoothing))
        return better + sigmoid(-margin) * (log_sigmoid(-margin) - jnp.log(smoothing))
    if kind == "sigmoid_norm":
        return -log_sigmoid(beta * (a / chosen.tokens - b / rejected.tokens))
    if kind == "discopop":
        share = sigmoid(margin / settings.discopop_tau)
        return -log_sigmoid(margin) * (1 - share) + jnp.exp(-margin) * share
    if kind == "cpo":
        return -log_sigmoid(beta * (chosen.policy - rejected.policy))
    if kind == "simpo":
        return -log_sigmoid(beta * (chosen.mean - rejected.mean) - settings.gamma)
    return -beta * log_sigmoid(_log_odds(chosen.mean) - _log_odds(rejected.mean))


def sorted_answers(
    kind: PairLoss, chosen: Answers, rejected: Answers, is_pair: Bool[Array, " P"]
) -> tuple[Answers, Answers]:
    """Return the answers as they are, or of "aot" and "aot_unpaired" by rank, which compares distributions.

    "aot" orders the pairs by the difference of their log-probabilities, under the model and under the reference apart;
    "aot_unpaired" orders the log ratios of chosen and of rejected answers apart.

    Args:
      is_pair: which pairs are there; the ranks stand in their places.
    """
    if kind not in ("aot", "aot_unpaired"):
        return chosen, rejected
    order = jnp.argsort(~is_pair, stable=True)
    back = jnp.argsort(order, stable=True)

    def ranked(values: Float[Array, " P"]) -> Float[Array, " P"]:
        """Sort those that are there into the places where some are."""
        return jnp.sort(jnp.where(is_pair, values, jnp.finfo(values.dtype).max))[back]

    zeros, ones = jnp.zeros_like(chosen.policy), jnp.ones_like(chosen.policy)
    if kind == "aot":
        model, reference = ranked(chosen.policy - rejected.policy), ranked(chosen.reference - rejected.reference)
        first, second = Answers(model, reference, ones), Answers(zeros, zeros, ones)
    else:
        first, second = (Answers(ranked(answers.ratio), zeros, ones) for answers in (chosen, rejected))
    return tuple(
        Answers(*(jnp.where(is_pair, part, 0.0) for part in answers[:2]), answers.tokens) for answers in (first, second)
    )


def _log_odds(log_probability: Float[Array, " P"]) -> Float[Array, " P"]:
    """Return log(p / (1 - p)) of p = exp(log_probability)."""
    return log_probability - jnp.log1p(-jnp.exp(log_probability))


def shortened_sums(
    log_probs: Float[Array, "P T"], mask: Float[Array, "P T"], shorter: Float[Array, " P"], alpha: float
) -> Float[Array, " P"]:
    """Return sums in which tokens beyond the length of a pair's shorter answer count ``alpha`` (LD-DPO, 2409.06411).

    Args:
      mask: 1 for the tokens of the answer.
      shorter: tokens of the shorter answer of each pair.
    """
    number = jnp.cumsum(mask, -1)
    return (log_probs * mask * jnp.where(number <= shorter[:, None], 1.0, alpha)).sum(-1)


def kto_loss(
    answers: Answers,
    desirable: Bool[Array, " P"],
    shift: Float[Array, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, " P"]:
    """Return the loss of each answer that is good or bad by itself (KTO, arXiv 2402.01306).

    Args:
      shift: `kto_shift` of the batch; 0 is TRL's "apo_zero_unpaired".
    """
    shift = jax.lax.stop_gradient(shift)
    good = 1 - jax.nn.sigmoid(beta * (answers.ratio - shift))
    bad = 1 - jax.nn.sigmoid(beta * (shift - answers.ratio))
    return jnp.where(desirable, desirable_weight * good, undesirable_weight * bad)


def kto_shift(mismatched: Answers) -> Float[Array, ""]:
    """Return the mean log ratio of answers that belong to other prompts, at least 0: an estimate of the divergence."""
    return jax.lax.stop_gradient(jnp.maximum(mismatched.ratio.mean(), 0.0))


def reward_model_loss(
    chosen: Float[Array, " P"],
    rejected: Float[Array, " P"],
    margin: Float[Array, " P"] | None = None,
    *,
    centre: float = 0.0,
) -> Float[Array, " P"]:
    """Return the Bradley-Terry loss of rewards of pairs.

    Args:
      margin: by how much the chosen answer is better.
      centre: weight of the squared sum of both rewards, which keeps their mean at 0 (arXiv 2312.09244).
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -jax.nn.log_sigmoid(difference) + centre * (chosen + rejected) ** 2
