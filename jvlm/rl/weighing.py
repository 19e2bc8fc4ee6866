"""From the raw rewards of a step to what each token weighs in its loss: a function of recorded values alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jvlm.rl import shaping
from jvlm.rl.advantages import advantages
from jvlm.rl.config import AdvantageConfig
from jvlm.rl.losses import PolicyLoss, token_weights
from jvlm.rl.records import AnswerRecord, GroupRecord


class Weighed(NamedTuple):
    """What the answers of a step are worth, group by group.

    Attributes:
      shaped: rewards with what is added for lengths; None where the reward is missing.
      advantages: of the tokens of each answer.
      weights: of each of these tokens.
      left_out: answers without a gradient.
    """

    shaped: list[float | None]
    advantages: Float[np.ndarray, " A"]
    weights: Float[np.ndarray, " A"]
    left_out: Bool[np.ndarray, " A"]


def weigh(groups: Sequence[GroupRecord], config: AdvantageConfig, loss: PolicyLoss, longest: int) -> Weighed:
    """Return what the answers of the groups that a step trains on weigh in its loss.

    Args:
      longest: tokens of an answer.
    """
    answers = [answer for group in groups for answer in group.answers]
    shaped = [shaped_reward(answer, config, longest) for answer in answers]
    lengths = np.array([len(answer.tokens) for answer in answers])
    numbers = np.repeat(np.arange(len(groups)), [len(group.answers) for group in groups])
    rewards = np.array([np.nan if value is None else value for value in shaped])
    truncated = np.array([answer.truncated for answer in answers])
    values = advantages(rewards, numbers, lengths, config.estimator, eps=config.eps)
    left_out = np.isnan(rewards) | (truncated & (config.truncated == "mask"))
    return Weighed(shaped, values, token_weights(lengths, numbers, loss, left_out=left_out), left_out)


def shaped_reward(answer: AnswerRecord, config: AdvantageConfig, longest: int) -> float | None:
    """Return the reward with what is added for the length of the answer."""
    if answer.reward is None:
        return None
    value = answer.reward
    if config.overlong_margin is not None:
        value += shaping.soft_overlong(len(answer.tokens), longest, config.overlong_margin)
    if config.repetition_weight:
        value += shaping.repetition(answer.tokens, weight=config.repetition_weight)
    return value
