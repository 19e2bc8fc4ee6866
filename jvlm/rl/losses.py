"""Policy losses over the tokens of sampled answers.

A loss is a sum over tokens of their term times their weight. The weights, which hold what a loss is divided by, are
made on the host from all answers of a step, so that micro batches, devices and packed sequences only add up.
Log-probabilities are those of the distribution that was sampled from: its temperature, its banned tokens.

Axes: N tokens of all answers, in any order; A answers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jvlm.errors import UserError
from jvlm.validation import check_fields

Kind = Literal["on_policy", "ppo", "gspo", "cispo"]
Normalise = Literal["group", "batch", "sequence", "constant"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_LARGEST = 20.0  # of an exponent


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """A policy loss.

    Attributes:
      kind: "on_policy" is MiMo-VL's: one update for each rollout, no clipping. "ppo" clips the ratio of each token to
        the policy before the update (GRPO, DAPO); "gspo" that of the whole answer (arXiv 2507.18071); "cispo" weights
        log-probabilities by the clipped ratio (2506.13585).
      ratio_low: smallest ratio that has a gradient; "cispo": smallest weight, 0 for none.
      ratio_high: largest ratio that has a gradient; DAPO takes 1.28; "cispo": largest weight.
      dual_clip: "ppo": most that the term of a negative advantage may be, as a multiple of it; None sets no bound.
      ratio_cap: "ppo": largest ratio of the branch that is not clipped; None sets no bound.
      normalise: what a loss is divided by. "group": the tokens of each prompt's answers, then the number of prompts, as
        MiMo-VL prints it. "batch": all tokens of the step (DAPO). "sequence": the tokens of each answer, then their
        number (GRPO). "constant": answers times ``constant_length`` (Dr. GRPO).
      constant_length: tokens.
      correction: weight for tokens whose probability was another one in the engine that sampled them: "token_truncate"
        is min(ratio, ``correction_high``), "token_mask" is 0 outside of both bounds; "sequence_..." takes the product
        over the answer.
      correction_low: smallest ratio that is not masked.
      correction_high: largest ratio.
      kl_weight: of the divergence from the reference model, estimated as ``exp(d) - d - 1`` with d its log ratio.
    """

    kind: Kind = "on_policy"
    ratio_low: float = 0.8
    ratio_high: float = 1.2
    dual_clip: float | None = None
    ratio_cap: float | None = None
    normalise: Normalise = "group"
    constant_length: int | None = None
    correction: Correction = "none"
    correction_low: float = 0.5
    correction_high: float = 2.0
    kl_weight: float = 0.0

    def __post_init__(self):
        bounds = {"ratio_low": "[0, 1]", "ratio_high": "[1, inf)", "dual_clip": "(1, inf)", "ratio_cap": "(1, inf)"}
        bounds |= {"correction_low": "[0, 1]", "correction_high": "[1, inf)", "kl_weight": "[0, inf)"}
        check_fields(self, "loss.", {**bounds, "constant_length": "[1, inf)"})
        if (self.normalise == "constant") != (self.constant_length is not None):
            raise UserError('loss.constant_length is what loss.normalise "constant" divides by: set both, or neither')


def token_weights(
    lengths: Int[np.ndarray, " A"],
    groups: Int[np.ndarray, " A"],
    settings: PolicyLoss,
    *,
    left_out: Bool[np.ndarray, " A"] | None = None,
) -> Float[np.ndarray, " A"]:
    """Return the weight of each token of an answer; over a step the weights of all tokens sum to 1 unless "constant".

    Args:
      left_out: answers without a gradient (truncated ones); they leave the denominators too.
    """
    trained = np.ones(len(lengths), bool) if left_out is None else ~np.asarray(left_out, bool)
    tokens = np.where(trained, lengths, 0).astype(np.float64)
    if not tokens.sum():
        return np.zeros(len(lengths))
    if settings.normalise == "batch":
        weights = np.full(len(lengths), 1 / tokens.sum())
    elif settings.normalise == "sequence":
        weights = 1 / (np.maximum(tokens, 1) * (tokens > 0).sum())
    elif settings.normalise == "constant":
        weights = np.full(len(lengths), 1 / (trained.sum() * settings.constant_length))
    else:
        _, numbers = np.unique(groups, return_inverse=True)
        of_group = np.bincount(numbers, tokens)
        weights = 1 / (np.maximum(of_group, 1)[numbers] * (of_group > 0).sum())
    return np.where(trained, weights, 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """Tokens of sampled answers.

    Attributes:
      advantages: of each token's answer.
      weights: `token_weights` of each token; 0 for what is no token of an answer.
      answers: number of each token's answer.
      old: log-probability before the first update with this batch; None where there is one update, which is the
        present value.
      rollout: log-probability in the engine, for the correction and its metrics; None where it is the same program.
      reference: log-probability under the reference model; None without ``kl_weight``.
      num_answers: of the batch (static).
    """

    advantages: Float[Array, " N"]
    weights: Float[Array, " N"]
    answers: Int[Array, " N"]
    old: Float[Array, " N"] | None
    rollout: Float[Array, " N"] | None
    reference: Float[Array, " N"] | None
    num_answers: int = dataclasses.field(metadata={"static": True})


def policy_loss(
    settings: PolicyLoss, log_probs: Float[Array, " N"], tokens: SampledTokens
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return (loss, metrics) of sampled tokens; losses of parts of a step add up, and so do metrics.

    Metrics are sums over tokens: "tokens", "clip_low", "clip_high" (tokens beyond a bound of the ratio in the direction
    of their advantage), "kl", "rollout_kl1", "rollout_kl3", "correction" and "correction_squared" (for the effective
    sample size).
    """
    mask = (tokens.weights > 0).astype(jnp.float32)
    fixed = jax.lax.stop_gradient(log_probs)
    old = fixed if tokens.old is None else tokens.old
    log_ratio = log_probs - old
    if settings.kind == "gspo":
        log_ratio = _of_answers(log_ratio, mask, tokens, mean=True)
    ratio = _exp(log_ratio)
    correction = _correction(settings, old, mask, tokens)
    terms = _terms(settings, log_probs, ratio, tokens.advantages) * correction
    metrics = _metrics(settings, ratio, old, correction, mask, tokens)
    if settings.kl_weight:
        if tokens.reference is None:
            raise ValueError("kl_weight needs the reference model's log-probabilities")
        away = tokens.reference - log_probs
        divergence = _exp(away) - away - 1
        metrics["kl"] = (jax.lax.stop_gradient(divergence) * mask).sum()
        terms = terms + settings.kl_weight * divergence
    return jnp.where(mask > 0, tokens.weights * terms, 0.0).sum(), metrics


def _terms(
    settings: PolicyLoss, log_probs: Float[Array, " N"], ratio: Float[Array, " N"], advantages: Float[Array, " N"]
) -> Float[Array, " N"]:
    if settings.kind == "on_policy":
        return -advantages * ratio
    clipped = jnp.clip(ratio, settings.ratio_low, settings.ratio_high)
    if settings.kind == "cispo":
        return -jax.lax.stop_gradient(clipped) * advantages * log_probs
    free = ratio if settings.ratio_cap is None else jnp.minimum(ratio, settings.ratio_cap)
    terms = jnp.maximum(-advantages * free, -advantages * clipped)
    if settings.dual_clip is not None:
        terms = jnp.where(advantages < 0, jnp.minimum(terms, -settings.dual_clip * advantages), terms)
    return terms


def _exp(x: Float[Array, " N"]) -> Float[Array, " N"]:
    return jnp.exp(jnp.clip(x, -_LARGEST, _LARGEST))


def _of_answers(
    values: Float[Array, " N"], mask: Float[Array, " N"], tokens: SampledTokens, *, mean: bool
) -> Float[Array, " N"]:
    """Return the sum or mean over the answer of each token."""
    sums = jax.ops.segment_sum(values * mask, tokens.answers, tokens.num_answers)
    if mean:
        sums = sums / jnp.maximum(jax.ops.segment_sum(mask, tokens.answers, tokens.num_answers), 1)
    return sums[tokens.answers]


def _correction(
    settings: PolicyLoss, old: Float[Array, " N"], mask: Float[Array, " N"], tokens: SampledTokens
) -> Float[Array, " N"]:
    if settings.correction == "none":
        return jnp.ones_like(old)
    if tokens.rollout is None:
        raise ValueError("a correction needs the log-probabilities of the engine that sampled")
    difference = old - tokens.rollout
    if settings.correction.startswith("sequence"):
        difference = _of_answers(difference, mask, tokens, mean=False)
    ratio = _exp(difference)
    if settings.correction.endswith("truncate"):
        return jnp.minimum(ratio, settings.correction_high)
    inside = (ratio >= settings.correction_low) & (ratio <= settings.correction_high)
    return jnp.where(inside, ratio, 0.0)


def _metrics(
    settings: PolicyLoss,
    ratio: Float[Array, " N"],
    old: Float[Array, " N"],
    correction: Float[Array, " N"],
    mask: Float[Array, " N"],
    tokens: SampledTokens,
) -> dict[str, Float[Array, ""]]:
    ratio, A = jax.lax.stop_gradient(ratio), tokens.advantages
    metrics = {
        "tokens": mask.sum(),
        "clip_low": (mask * ((A < 0) & (ratio < settings.ratio_low))).sum(),
        "clip_high": (mask * ((A > 0) & (ratio > settings.ratio_high))).sum(),
    }
    if tokens.rollout is not None:
        d = old - tokens.rollout
        metrics |= {
            "rollout_kl1": (-d * mask).sum(),
            "rollout_kl3": ((_exp(d) - d - 1) * mask).sum(),
            "correction": (correction * mask).sum(),
            "correction_squared": (correction**2 * mask).sum(),
        }
    return metrics
