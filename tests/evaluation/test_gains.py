"""What training changed: means before and after, and the interval of the change."""

import dataclasses
import json

import numpy as np
import pytest

from jvlm.data.boxes import Box
from jvlm.data.content import Conversation, ObjectBox
from jvlm.data.errors import Origin
from jvlm.evaluation.gains import gains, table
from jvlm.evaluation.questions import Question
from jvlm.evaluation.score import Answer
from tools import gains_over_seeds


def answers(scores, expected="circle", boxes=(), per_image=2):
    made = []
    for number, score in enumerate(scores):
        origin = Origin("test.jsonl", number // per_image)
        question = Question(Conversation((), origin=origin), expected, boxes, number % per_image)
        made.append(Answer(question, "an answer", score))
    return made


@pytest.fixture
def box():
    return (ObjectBox(Box(0, 0, 1, 1, "norm1")),)


def test_each_kind_of_question_has_its_means(box):
    before = answers([0.0, 1.0, 0.0, 0.0]) + answers([1.0, 1.0], "Yes") + answers([0.4, 0.6], "<bbox>", box)
    after = answers([1.0, 1.0, 1.0, 0.0]) + answers([0.0, 1.0], "Yes") + answers([0.5, 0.8], "<bbox>", box)
    found = {gain.name: gain for gain in gains(before, after)}
    seen = {name: (g.questions, g.before.value, g.after.value, round(g.change.value, 12)) for name, g in found.items()}
    assert seen == {
        "words": (6, 3 / 6, 4 / 6, round(1 / 6, 12)),
        "- yes/no": (2, 1.0, 0.5, -0.5),
        "- other": (4, 0.25, 0.75, 0.5),
        "mean IoU of boxes": (2, 0.5, 0.65, 0.15),
        "- IoU of 0.5 or more": (2, 0.5, 1.0, 0.5),
    }
    lines = table(gains(before, after)).splitlines()
    assert len(lines) == 6
    assert [text in line for text, line in (("50.0 [", lines[1]), ("+16.7 [", lines[1]), ("+0.150 [", lines[4]))] == [
        True
    ] * 3


def test_the_interval_is_of_images_and_not_of_questions():
    """Ten questions about each of 40 images that go together say no more than one would: numpy's standard error."""
    rng = np.random.default_rng(0)
    of_image = rng.normal(0.1, 0.3, 40)
    before, after = np.zeros(400), np.repeat(of_image, 10)
    (gain,) = [g for g in gains(answers(before, per_image=10), answers(after, per_image=10)) if g.name == "words"]
    error = of_image.std(ddof=1) / np.sqrt(40)
    assert gain.change.value == pytest.approx(of_image.mean())
    assert gain.change.high - gain.change.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_answers_to_other_questions_are_refused():
    with pytest.raises(ValueError, match="not to the same questions"):
        gains(answers([1.0, 0.0]), answers([1.0, 0.0, 1.0]))


def test_the_table_of_several_seeds_has_every_run_and_ends_with_status_3_where_one_missed_its_aim(tmp_path, capsys):
    runs = []
    for seed, (after, missed) in {42: ([1.0, 1.0, 0.0, 1.0], []), 43: ([1.0, 0.0, 0.0, 0.0], ["too few"])}.items():
        changes = [dataclasses.asdict(gain) for gain in gains(answers([0.0, 1.0, 0.0, 0.0]), answers(after))]
        runs.append(tmp_path / f"run_{seed}")
        runs[-1].mkdir()
        scores = {"changes": changes, "training_seconds": 61.0, "missed_aims": missed}
        (runs[-1] / "scores.json").write_text(json.dumps(scores))
    assert gains_over_seeds.main([str(runs[0])]) == 0
    assert gains_over_seeds.main([str(run) for run in runs]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-7:-3]] == ["run_42", "run_42", "run_43", "run_43"]
    assert "+50.0 [" in lines[-7]
    assert lines[-3] == f"{'run_43':<20} MISSED: too few"
    assert lines[-2] == "2 runs, change of words: mean +25.000, +0.000 to +50.000"
