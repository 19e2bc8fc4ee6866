"""Defects of published scorers, each pinned by answers that they get wrong (lmms-eval 0.7, VLMEvalKit, VLM-R1)."""

from __future__ import annotations

import pytest

from jvlm.data.boxes import Sizes
from jvlm.data.content import Image, Text
from jvlm.data.examples import parse_example
from jvlm.evaluation import registry
from jvlm.evaluation.clients import EndpointClient
from jvlm.evaluation.endpoint import Endpoint
from jvlm.evaluation.metrics import METRICS, Answered
from jvlm.evaluation.prompting import prompt
from jvlm.evaluation.task import Item
from tests.evaluation.benchmarks import png

SIZES = (Sizes((640, 480), (640, 480)),)


def _score(metric, text, gold, *, space=None, **facts):
    return METRICS[metric].scores([Answered(Item("1", (), gold, facts), text, sizes=SIZES, space=space)])[0]


def test_many_boxes_are_no_way_to_hit_one():
    box = [100, 100, 200, 200]
    spam = " ".join(f"[{x}, 100, {x + 100}, 200]" for x in range(0, 500, 100))
    assert _score("box_iou50", spam, box).reason == "several_answers"
    assert _score("point_in_box", "[10, 10] [150, 150]", box).reason == "several_answers"


def test_numbers_below_a_thousand_are_pixels_where_pixels_are_declared():
    box = [100, 100, 200, 200]
    assert _score("box_iou50", "[100, 100, 200, 200]", box).value == 1
    assert _score("box_iou50", "[156, 208, 312, 417]", box).value == 0
    assert _score("box_iou50", "[156, 208, 312, 417]", box, space="norm1000").value == 1


def test_a_box_of_the_thinking_is_no_answer():
    score = _score("box_iou50", "<think>[100, 100, 200, 200]</think> I cannot see it.", [100, 100, 200, 200])
    assert (score.value, score.reason) == (0, "unparsed")


def test_points_are_never_rescaled_by_what_they_look_like():
    assert _score("point_in_box", "[0.5, 0.5]", [300, 200, 340, 280]).value == 0
    assert _score("point_in_box", "[0.5, 0.5]", [300, 200, 340, 280], space="norm1").value == 1


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("The best answer is A because Dogs are not Cats", "A", 1),
        ("The best answer is A because Dogs are not Cats", "D", 0),
        ("A cat sits here, so the answer is B.", "B", 1),
        ("I see a dog. The answer is C", "C", 1),
        ("It could be A or B", "A", 0),
        ("<think>A, no, B</think>C", "C", 1),
        ("\\boxed{A} no wait \\boxed{B}", "B", 1),
    ],
)
def test_letters_of_words_are_no_options(text, gold, value):
    assert _score("choice", text, gold, options=["red", "blue", "green", "black"]).value == value


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B, not A.", "B"),
        ("Option A shows a cat and C a dog, so the correct answer is: **(D)**.", "D"),
        ("Comparing A with B and C:\n- A is blue\n- B is red\n\nAnswer: C", "C"),
        ("A is too small, B is too large.\n\nC", "C"),
        ("The best answer is A because B is wrong", "A"),
        ("It must be the red one", "A"),
        ("The car is dark blue.", "B"),
        ("The answer is A or B", None),
        ("The answer is A. But the answer is B.", None),
        ("Is the answer A, B or C? I cannot say.", None),
        ("The answer is not A but B", "B"),
        ("The answer is A, B or both", None),
        ("It is not the red one", None),
        ("red or green", None),
        ("A\n\nExplanation: B is too light, and D has another shade.", "A"),
        ("B. dark blue\n\nOption A is red, option C green.", "B"),
        ("A\n\nNo, wait: C is too dark. The answer is D.", "D"),
        ("Not A", None),
        ("It isn't option (B).", None),
        ("It is not A. It is A, but for the colour", "A"),
        ("\u7b54\u6848\u662fA", "A"),
        ("\u7b54\u6848\uff1aC\u3002", "C"),
        ("\u6b63\u786e\u7b54\u6848\u662f B\uff0c\u4e0d\u662fA\u3002", "B"),
        ("\u9009\u9879A\u548cC\u90fd\u4e0d\u5bf9\uff0c\u7b54\u6848\u4e3a\uff08D\uff09", "D"),
        ("\u7b54\u6848\u662fA\u6216B", None),
        ("\u4e0d\u662fA", None),
        ("I looked at the whole picture for a long time, and what I make of it in the end is that it is red", None),
    ],
)
def test_sentences_conclude_with_one_option_or_with_none(text, letter):
    options = ["red", "dark blue", "green", "blue"]
    for gold in "ABCD":
        score = _score("choice", text, gold, options=options)
        assert (score.value, score.reason) == (
            (0, "unparsed") if letter is None else (1, "ok") if gold == letter else (0, "wrong")
        )


def test_an_option_in_chinese_that_ends_with_a_letter_is_no_letter():
    options = ["\u7ef4\u751f\u7d20C", "\u7ef4\u751f\u7d20A", "\u7ef4\u751f\u7d20K"]
    for gold, value in zip("ABC", (0, 1, 0), strict=True):
        for text in ("\u7ef4\u751f\u7d20A", "\u7b54\u6848\u662f\u7ef4\u751f\u7d20A\u3002", "B. \u7ef4\u751f\u7d20A"):
            assert (text, _score("choice", text, gold, options=options).value) == (text, value)


LITERAL = "anls relaxed exact_document vqa vqa_normalised squad_f1 drop_f1 ocrbench".split()


@pytest.mark.parametrize(
    "gold", ["25 m\u00b2", "\u2116 5", "\uff08\u4e00\uff09\u5317\u4eac\uff0c", "Acme\u2122 \u2026"]
)
def test_what_is_written_letter_by_letter_as_the_reference_is_right(gold):
    for metric in LITERAL:
        golds = [[gold]] if metric == "drop_f1" else [gold] * 10
        assert _score(metric, f"<think>m2</think>{gold}", golds).value == 1, metric


@pytest.mark.parametrize(
    ("text", "golds", "value"),
    [
        ("Beyonc\u00e9, 1,200 and Oslo", ["Oslo", "1200", "Beyonce"], 1),
        ("Oslo\n1200", ["1,200", "oslo"], 1),
        ("Oslo", ["Oslo", "Bergen"], 0),
        ("Oslo, Bergen, Paris", ["Oslo", "Bergen"], 0),
        ("Oslo, Norway", ["Oslo, Norway"], 1),
        ("Oslo", ["Oslo, Norway"], 0),
        ("$1,200.0", ["1200"], 1),
        ("12", ["12.5"], 0),
        ("Oslo, Norway | Bonn, Germany", ["Bonn, Germany", "Oslo, Norway"], 1),
    ],
)
def test_a_table_has_all_values_of_an_answer_or_it_is_wrong(text, golds, value):
    assert _score("table_answer", text, golds).value == value


def test_words_and_stray_numbers_are_no_moments():
    assert _score("temporal_iou", "He goes to the door at 3, 5 people tomorrow", [3, 5]).reason == "unparsed"
    assert _score("temporal_iou", "\\boxed{[00:03, 00:05]}", [3.0, 5.0]).value == 1
    assert _score("temporal_iou", "[00:00, 00:01] [00:03, 00:05]", [3, 5]).reason == "several_answers"


def test_two_scorings_in_one_process_do_not_add_up():
    many = [Answered(Item("1", (), ["cat"]), "a cat")] * 3
    first, second = (METRICS["ocrbench"].scores(many) for _ in range(2))
    assert [one.value for one in first] == [one.value for one in second] == [1, 1, 1]


def test_open_answers_are_not_taken_apart_into_letters():
    assert _score("mmmu", "So the answer is 4.2 m", ["4.2"], options=[]).value == 1
    assert _score("mmmu", "So the answer is 24", ["4"], options=[]).value == 0


@pytest.mark.parametrize("metric", ["mathvista", "dynamath", "exact", "count", "relaxed", "drop_f1", "choice"])
def test_code_in_an_answer_is_text(metric, tmp_path):
    mark = tmp_path / "mark"
    facts = {"answer_type": "float"} if metric in ("mathvista", "dynamath") else {}
    gold = [["1"]] if metric == "drop_f1" else "A" if metric == "choice" else ["1"]
    assert _score(metric, f"__import__('pathlib').Path({str(mark)!r}).touch() or 1+0", gold, **facts).value == 0
    assert not mark.exists()


def test_floats_with_spaces_are_boxes_and_further_boxes_are_not_ignored():
    box = [100, 100, 200, 200]
    assert _score("box_iou50", "<answer>[100.5, 100.0, 199.5, 200.0]</answer>", box).value == 1
    assert _score("box_iou50", "[100, 100, 200, 200], [0, 0, 1, 1]", box).value == 0


def test_a_judgment_for_both_is_none():
    both = "Answer 1 is better at colour, but Answer 2 is better. Overall Judgment: Answer 1 is better."
    assert _score("judgment", both, 1).reason == "several_answers"
    assert _score("judgment", "Overall Judgment: Answer 2 is slightly better", 2).value == 1


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("16", "6", 0),
        ("The answer is 0.6", "6", 0),
        ("It is 6.0 metres", "6", 1),
        ("therefore 1,500", "1500", 1),
        ("I would guess a hexagon or a square", "pentagon", 0),
    ],
)
def test_an_open_answer_that_holds_the_reference_as_a_part_of_a_number_is_not_right(text, gold, value):
    """Half of what two harnesses scored differently on MMMU, of the same answers, was this kind of right answer."""
    assert _score("mmmu", text, [gold], options=[]).value == value


@pytest.mark.parametrize(
    ("text", "reason"), [("I cannot tell.", "unparsed"), ("All of them seem likely to me", "unparsed")]
)
def test_an_option_is_never_drawn_at_random(text, reason):
    scores = [_score("mmmu", text, gold, options=["red", "blue", "green", "black"]) for gold in "ABCD"]
    assert [(score.value, score.reason) for score in scores] == [(0, "unparsed")] * 4


def test_one_picture_takes_no_turn_away():
    """With one image VLMEvalKit's ScreenSpot begins its messages anew, and the system turn is gone."""
    turns = [{"role": "system", "content": "You click."}, {"role": "user", "content": "<image>Press it."}]
    example = parse_example({"messages": turns, "images": [png()]})
    messages, sizes = EndpointClient(Endpoint("http://127.0.0.1:1/v1", "x"))._messages(example)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[0]["content"] == "You click."
    assert ([part["type"] for part in messages[1]["content"]], len(sizes)) == (["image_url", "text"], 1)
    task = registry.tasks()["screenspot"]
    item = Item("1", (Image(png()), Text("Locate it.")), [0, 0, 1, 1])
    for style in ("task", "boxed"):
        (turn,) = prompt(task, item, style=style).messages
        assert turn.text == f"Locate it.\n{task.instruction}"
