"""What a run has to reach, and which of it was missed."""

from __future__ import annotations

from collections.abc import Sequence

from jvlm.evaluation.gains import BOXES, WORDS, Gain
from jvlm.evaluation.score import Scores
from jvlm.training.config import EvaluationConfig

# Of `jvlm train`: trained, scored, exported and reported, but below an aim. The same command scores the same again.
EXIT_STATUS = 3


class AimMissed(Exception):
    """The run is finished and its report written, but it scored below an aim of its configuration."""


_ROUNDING = 1e-9


def missed_aims(config: EvaluationConfig, scores: Scores | None, changes: Sequence[Gain] = ()) -> list[str]:
    """Return one sentence for each aim that was missed, an aim at what was never asked among them; none without
    scoring.

    Args:
      changes: what training changed, for the aims at gains.
    """
    if scores is None:
        return []
    missed = []
    if config.aim is not None:
        if scores.accuracy is None:
            missed.append(
                f"evaluation.aim is {config.aim:g} %, but no question of evaluation.data has its answer in words"
            )
        elif 100 * scores.accuracy < config.aim:
            reached = f"{100 * scores.accuracy:.2f} % of {scores.questions} questions are answered right"
            missed.append(f"{reached}, evaluation.aim is {config.aim:g} %")
    if config.aim_iou is not None:
        if scores.mean_iou is None:
            missed.append(f"evaluation.aim_iou is {config.aim_iou:g}, but no answer of evaluation.data has a box")
        elif scores.mean_iou < config.aim_iou:
            missed.append(
                f"the mean IoU of {scores.boxes} boxes is {scores.mean_iou:.4f}, "
                f"evaluation.aim_iou is {config.aim_iou:g}"
            )
    missed += _missed_gain(config.aim_gain, "evaluation.aim_gain", WORDS, changes)
    missed += _missed_gain(config.aim_iou_gain, "evaluation.aim_iou_gain", BOXES, changes)
    return missed


def _missed_gain(aim: float | None, field: str, name: str, changes: Sequence[Gain]) -> list[str]:
    if aim is None:
        return []
    of_name = [gain for gain in changes if gain.name == name]
    if not of_name:
        return [f"{field} is {aim:g}, but there are no scores of {name} before and after training"]
    (gain,) = of_name
    if gain.unit * gain.change.value >= aim - _ROUNDING:
        return []
    return [f"{name} changed by {gain.shown(gain.change, sign=True)}, {field} is {aim:g}"]


def aims_of(config: EvaluationConfig) -> list[str]:
    """Return the aims of a configuration, each as text."""
    names = ("aim", "aim_iou", "aim_gain", "aim_iou_gain")
    return [f"{name} {getattr(config, name):g}" for name in names if getattr(config, name) is not None]
