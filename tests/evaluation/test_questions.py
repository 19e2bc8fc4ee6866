"""Questions out of examples, and their scores."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from jvlm.data.boxes import Box
from jvlm.data.content import ObjectBox, ObjectName
from jvlm.data.errors import Origin
from jvlm.data.examples import parse_example, tagged
from jvlm.evaluation import questions, report, score
from jvlm.evaluation.questions import TextOnlyBaseline, questions_of
from jvlm.evaluation.score import Scores
from jvlm.training import starting_model
from tests.training import support

PICTURE = np.zeros((32, 64, 3), np.uint8)


def _example(*turns, **fields):
    return parse_example({**_messages(*turns), **fields})


def _messages(*turns):
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    return starting_model.start_model(support.experiment(folder, support.write_examples(folder, 1)))[1]


def test_each_turn_is_asked_alone_with_the_pictures_seen_so_far():
    example = _example(("<image>first?", "a"), ("second?", "b"), ("<image>third?", "c"), images=[PICTURE, PICTURE + 1])
    asked = questions_of(example)
    contents = [[tagged(m.content) for m in q.conversation.messages] for q in asked]
    assert contents == [["<image>first?"], ["<image>second?"], ["<image><image>third?"]]
    assert [len(q.conversation.images) for q in asked] == [1, 1, 2]
    assert [q.expected for q in asked] == ["a", "b", "c"]


def test_a_system_turn_stays_and_no_answer_is_given_away():
    example = parse_example(
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "one?"},
                {"role": "assistant", "content": "secret"},
                {"role": "user", "content": "two?"},
                {"role": "assistant", "content": "2"},
            ]
        }
    )
    assert [tagged(m.content) for m in questions_of(example)[1].conversation.messages] == ["be brief", "two?"]


def test_references_and_boxes_go_to_the_turns_that_use_them():
    example = _example(
        ("<image>where is <ref-object>?", "at <bbox>"),
        ("what is at <bbox>?", "<ref-object>"),
        images=[PICTURE],
        objects={"ref": ["the cat", "a dog"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]},
    )
    first, second = questions_of(example)
    answered, given = Box(1, 2, 3, 4, "original"), Box(5, 6, 7, 8, "original")
    assert ObjectName("the cat") in first.conversation.messages[0].content
    assert (first.boxes, first.conversation.boxes) == ((ObjectBox(answered),), ())
    assert (second.expected, second.boxes, second.conversation.boxes) == ("a dog", (), (ObjectBox(given),))


@pytest.mark.parametrize(
    ("response", "right"),
    [("Yes", 1), (" yes. ", 1), ("<think>no?</think>\n\nyes", 1), ("no", 0), ("yes it is", 0), ("", 0)],
)
def test_words_count_when_they_match_exactly_but_for_case_space_full_stop_and_thinking(processor, response, right):
    (question,) = questions_of(_example(("is it?", "yes")))
    assert score.score(question, response, processor).score == right


def test_a_box_is_compared_in_pixels_of_the_original_picture(processor):
    example = _example(("<image>where?", "<bbox>"), images=[PICTURE], objects={"bbox": [[16, 8, 48, 24]]})
    (question,) = questions_of(example)
    (_, (width, height)) = processor.encode(question.conversation).sizes[0]
    inside = [round(v * s) for v, s in zip((0.25, 0.25, 0.75, 0.75), (width, height) * 2, strict=True)]
    answer = score.score(question, f'```json\n[{{"bbox_2d": {inside}, "label": "x"}}]\n```', processor)
    assert answer.score == pytest.approx(1.0)
    assert answer.predicted[0].values == pytest.approx((16, 8, 48, 24))
    half = score.score(question, str([inside[0], inside[1], inside[2], (inside[1] + inside[3]) // 2]), processor)
    assert half.score == pytest.approx(0.5, abs=0.1)
    nothing = score.score(question, "I see no such thing", processor)
    assert (nothing.score, nothing.parsed) == (0.0, False)


def test_a_box_is_compared_on_the_picture_it_is_on_whatever_comes_before(processor):
    example = _example(
        ("<video><image><image>where?", "<bbox>"),
        images=[PICTURE, np.zeros((64, 32, 3), np.uint8)],
        videos=[[np.zeros((96, 16, 3), np.uint8)] * 2],
        objects={"bbox": [[0.5, 0.5, 1, 1]], "bbox_type": "norm1", "image_id": [1]},
    )
    (question,) = questions_of(example)
    width, height = processor.encode(question.conversation).sizes[2].resized
    answer = score.score(question, str([width // 2, height // 2, width, height]), processor)
    assert answer.score == pytest.approx(1.0)
    assert answer.reference[0].values == answer.predicted[0].values == pytest.approx((16, 32, 32, 64))


def test_a_point_is_right_inside_the_expected_box_and_near_the_expected_point(processor):
    example = _example(("<image>click", "<bbox>"), images=[PICTURE], objects={"bbox": [[48, 8]]})
    (question,) = questions_of(example)
    width, height = processor.encode(question.conversation).sizes[0].resized
    assert score.score(question, f"click({width * 3 // 4}, {height // 4})", processor).score == 1
    assert score.score(question, f"click({width // 4}, {height // 4})", processor).score == 0


def test_several_boxes_are_matched_one_to_one_and_a_missing_one_counts_zero(processor):
    example = _example(
        ("<image>where?", "<bbox><bbox>"), images=[PICTURE], objects={"bbox": [[0, 0, 8, 8], [32, 0, 64, 32]]}
    )
    (question,) = questions_of(example)
    ((_, resized),) = processor.encode(question.conversation).sizes
    second = [resized[0] // 2, 0, resized[0], resized[1]]
    assert score.score(question, str(second), processor).score == pytest.approx(0.5)
    assert score.score(question, f"{second} {second}", processor).score == pytest.approx(0.5, abs=0.05)


def test_the_text_only_baseline_is_the_most_frequent_training_answer_to_the_same_words():
    train = [_example(("red?", "yes")), _example(("red?", "no")), _example(("red?", "no")), _example(("blue?", "yes"))]
    test = [
        q
        for example in (_example(("red?", "no")), _example(("blue?", "no")), _example(("new?", "no")))
        for q in questions_of(example)
    ]
    baseline = TextOnlyBaseline(train, test)
    # "new?" was never asked: the answers of all training questions are tied, the first seen wins
    assert [baseline.answer(q) for q in test] == ["no", "yes", "yes"]
    assert baseline.accuracy(test) == pytest.approx(1 / 3)


def test_the_text_only_baseline_holds_one_training_conversation_at_a_time_and_a_bounded_number_of_answers(monkeypatch):
    monkeypatch.setattr(questions, "_MOST_ANSWERS", 10)
    alive = weakref.WeakSet()

    def stream():
        for number in range(300):
            example = _example((f"question {number % 50}?", "no" if number % 3 else f"answer {number}"))
            alive.add(example)
            most.append(len(alive))
            yield example
            del example

    most: list[int] = []
    test = questions_of(_example(("question 1?", "no"), ("never asked?", "no")))
    baseline = TextOnlyBaseline(stream(), test)
    assert max(most) <= 3
    assert [baseline.answer(question) for question in test] == ["no", "no"]
    assert set(baseline._answers) == {"question 1?", "never asked?"}


def test_scores_keep_words_and_boxes_apart(processor):
    example = _example(
        ("<image>red?", "yes"), ("where?", "<bbox>"), images=[PICTURE], objects={"bbox": [[0, 0, 64, 32]]}
    )
    words, boxed = questions_of(example)
    ((_, resized),) = processor.encode(boxed.conversation).sizes
    answers = [score.score(words, "no", processor), score.score(boxed, str([0, 0, *resized]), processor)]
    result = Scores.of(answers)
    assert (result.questions, result.accuracy, result.boxes, result.mean_iou) == (1, 0.0, 1, pytest.approx(1.0))


def test_the_report_shows_answers_on_their_picture_only(processor):
    other = np.full((32, 64, 3), 200, np.uint8)
    boxes = {"objects": {"bbox": [[0, 0, 64, 32], [0, 0, 32, 32]], "image_id": [0, 1]}}
    examples = {
        "one picture": {"turns": [("<image>red?", "yes"), ("where?", "no")], "images": [PICTURE]},
        "another one later": {
            "turns": [("<image>where?", "<bbox>"), ("<image>and here?", "<bbox>")],
            "images": [PICTURE, other],
            **boxes,
        },
        "a picture that is first asked about later": {"turns": [("hi", "yes"), ("<image>?", "no")], "images": [other]},
    }
    answers = []
    for number, (name, fields) in enumerate(examples.items(), 1):
        fields = dict(fields)
        example = parse_example(_messages(*fields.pop("turns")) | fields, Origin(name, number))
        answers += [score.score(question, "no", processor) for question in questions_of(example)]
    assert [(p.name, len(p.answers)) for p in report.shown_images(answers, ())] == [("one picture #1", 2)]


def test_a_page_explains_the_mark_of_a_baseline_where_there_is_one(tmp_path):
    content = {"curves": [], "images": [], "facts": {}, "changes": []}
    for baseline in (None, 0.5):
        path = tmp_path / "report.html"
        report.write(path, title="", headline=[], bars=[("all", 0.8, None), ("yes/no", 0.7, baseline)], **content)
        assert ("The dark mark" in path.read_text()) == (baseline is not None)
