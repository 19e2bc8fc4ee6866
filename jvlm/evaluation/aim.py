"""What a run has to reach, and which of it was missed."""

from __future__ import annotations

from jvlm.evaluation.score import Scores
from jvlm.training.config import EvaluationConfig

# Of `jvlm train`: trained, scored, exported and reported, but below an aim. The same command scores the same again.
EXIT_STATUS = 3


class AimMissed(Exception):
    """The run is finished and its report written, but it scored below an aim of its configuration."""


def missed_aims(config: EvaluationConfig, scores: Scores | None) -> list[str]:
    """One sentence for each aim that was missed, an aim at what was never asked among them. None without scoring."""
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
    return missed
