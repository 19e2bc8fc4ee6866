"""Which aims are missed by which scores."""

import pytest

from jvlm.errors import UserError
from jvlm.evaluation.aim import aims_of, missed_aims
from jvlm.evaluation.gains import Gain
from jvlm.evaluation.score import Scores
from jvlm.scoring.statistics import Interval
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


def change(name: str, unit: float, value: float) -> Gain:
    return Gain(name, unit, 10, Interval(0.5, 0, 1), Interval(0.5 + value, 0, 1), Interval(value, value - 1, value + 1))


@pytest.mark.parametrize(
    ("words", "boxes", "said"),
    [
        (0.0, 0.05, []),
        (0.02, 0.2, []),
        (-0.001, 0.05, ["words changed by -0.1 [-100.1, +99.9], evaluation.aim_gain is 0"]),
        (0.0, 0.049, ["mean IoU of boxes changed by +0.049 [-0.951, +1.049], evaluation.aim_iou_gain is 0.05"]),
    ],
)
def test_a_gain_below_its_aim_is_said_with_both_numbers(words, boxes, said):
    config = EvaluationConfig(before_training=True, aim_gain=0, aim_iou_gain=0.05)
    changes = [change("words", 100.0, words), change("mean IoU of boxes", 1.0, boxes)]
    assert missed_aims(config, scores(5, 10, 0.5), changes) == said
    assert aims_of(config) == ["aim_gain 0", "aim_iou_gain 0.05"]


def test_a_gain_of_what_was_not_asked_is_missed():
    config = EvaluationConfig(before_training=True, aim_iou_gain=0.05)
    (line,) = missed_aims(config, scores(5, 10, None), [change("words", 100.0, 0.1)])
    assert (
        line
        == "evaluation.aim_iou_gain is 0.05, but there are no scores of mean IoU of boxes before and after training"
    )


def test_an_aim_at_a_gain_needs_the_scores_before_training():
    with pytest.raises(UserError, match=r"set evaluation\.before_training"):
        EvaluationConfig(aim_gain=0)
