"""Which aims are missed by which scores."""

import pytest

from jvlm.errors import UserError
from jvlm.evaluation.aim import missed_aims
from jvlm.evaluation.score import Scores
from jvlm.training.config import EvaluationConfig


def scores(right: int, questions: int, mean_iou: float | None) -> Scores:
    accuracy = right / questions if questions else None
    boxes = 0 if mean_iou is None else 10
    return Scores(questions, accuracy, accuracy, None, boxes, mean_iou, mean_iou, 0)


@pytest.mark.parametrize(
    ("aim", "aim_iou", "reached", "said"),
    [
        (None, None, (0, 10, 0.0), []),
        (92, 0.8, (92, 100, 0.8), []),
        (92, 0.8, (100, 100, 1.0), []),
        (92, 0.8, (91999, 100000, 0.9), ["92.00 % of 100000 questions are answered right, evaluation.aim is 92 %"]),
        (92, 0.8, (95, 100, 0.7999), ["the mean IoU of 10 boxes is 0.7999, evaluation.aim_iou is 0.8"]),
        (92, 0.8, (1, 100, 0.1), ["1.00 % of 100 questions", "the mean IoU of 10 boxes is 0.1000"]),
        (0, 0, (0, 100, 0.0), []),
        (92, None, (0, 0, 0.9), ["no question of evaluation.data has its answer in words"]),
        (None, 0.8, (1, 1, None), ["no answer of evaluation.data has a box"]),
    ],
)
def test_each_missed_aim_is_said_with_both_numbers(aim, aim_iou, reached, said):
    missed = missed_aims(EvaluationConfig(aim=aim, aim_iou=aim_iou), scores(*reached))
    assert len(missed) == len(said)
    assert all(part in line for part, line in zip(said, missed, strict=True))


def test_nothing_is_missed_where_nothing_was_scored():
    assert missed_aims(EvaluationConfig(aim=92), None) == []


@pytest.mark.parametrize(("field", "value"), [("aim", 101), ("aim", -1), ("aim_iou", 80), ("aim", float("nan"))])
def test_an_aim_that_nothing_can_reach_is_refused(field, value):
    with pytest.raises(UserError, match=f"evaluation.{field} must be from 0 to"):
        EvaluationConfig(**{field: value})
