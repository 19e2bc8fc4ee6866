"""Metrics of published tasks against outputs of the tasks' own code, and published values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jvlm.data.boxes import Box, Sizes
from jvlm.scoring.benchmarks import captions, documents, grounding, mmmu, reading, reasoning, vqa

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())["cases"]


def test_vqa_normalisation_is_the_official_one():
    wrong = [(text, vqa.normalise(text), expected) for text, expected in GOLDEN["vqa_normalise"]]
    assert [case for case in wrong if case[1] != case[2]] == []


def test_vqa_accuracy_is_the_official_one():
    given = [vqa.vqa_accuracy(answer, golds) for answer, golds, _ in GOLDEN["vqa_accuracy"]]
    np.testing.assert_allclose(given, [expected for *_, expected in GOLDEN["vqa_accuracy"]], atol=1e-9)


def test_vqa_accuracy_compares_as_it_is_where_annotators_agree():
    assert vqa.vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa.vqa_accuracy("Yes", ["yes"] * 10, always_normalise=True) == 1


def test_squad_f1_and_exact_match_are_the_official_ones():
    given = [
        (reading.squad_f1(answer, golds), reading.squad_exact(answer, golds)) for answer, golds, *_ in GOLDEN["squad"]
    ]
    np.testing.assert_allclose(given, [case[2:] for case in GOLDEN["squad"]], atol=1e-9)
    assert reading.squad_f1("red red red", ["red blue"], sets=True) > reading.squad_f1("red red red", ["red blue"])


def test_drop_f1_is_the_official_one():
    given = [reading.drop_f1(answer, [gold]) for answer, gold, _ in GOLDEN["drop"]]
    np.testing.assert_allclose(given, [expected for *_, expected in GOLDEN["drop"]], atol=1e-9)


def test_mmmu_choices_are_read_as_by_its_code_which_guesses_where_nothing_is_there():
    for text, options, expected in GOLDEN["mmmu_choice"]:
        score = mmmu.mmmu_choice(text, "A", options)
        if expected == "?":
            assert score.reason == "unparsed" or f"{score.parsed}." in text, text
        else:
            assert score.parsed == expected, text
    assert any(expected == "?" for *_, expected in GOLDEN["mmmu_choice"])
    assert mmmu.mmmu_choice("nothing", "A", ["x", "y"]).reason == "unparsed"


def test_mmmu_open_answers_are_read_as_by_its_code():
    for text, golds, expected in GOLDEN["mmmu_open"]:
        assert mmmu.mmmu_open(text, golds).value == expected, (text, golds)


def test_cider_is_that_of_the_coco_code():
    case = GOLDEN["cider"]
    scores = captions.cider(case["captions"], case["references"])
    np.testing.assert_allclose(scores, case["scores"], atol=1e-6)


def test_values_that_pix2struct_publishes():
    answers = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
    golds = [["abc"], ["Abc"], ["abc"], ["96%"], ["94%"], ["0.96"], ["0.94"], ["Won't"]]
    pairs = list(zip(answers, golds, strict=True))
    assert np.mean([documents.anls(a, g) for a, g in pairs]) == pytest.approx(0.475)
    assert np.mean([documents.relaxed(a, g) for a, g in pairs]) == pytest.approx(0.625)
    assert 100 * captions.cider(answers, golds).mean() == pytest.approx(128.6, abs=0.05)


@pytest.mark.parametrize(
    ("answer", "golds", "value"),
    [
        ("Paris", ["paris"], 1),
        ("Pari", ["paris"], 0.8),
        ("London", ["paris"], 0),
        ("", [""], 1),
        (" Paris  City ", ["paris city"], 1),
    ],
)
def test_anls(answer, golds, value):
    assert documents.anls(answer, golds) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        ("2010", "2015", 1),  # a known weakness of the metric
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("12 kg", "12", 0),
        ("1e400", "5", 0),
        ("nan", "5", 0),
        ("Yes", "yes", 1),
    ],
)
def test_relaxed(answer, gold, value):
    assert documents.relaxed(answer, [gold]) == value


def test_ocrbench():
    assert documents.ocrbench("It says HELLO there", ["hello"]) == 1
    assert documents.ocrbench("x ^ 2", ["x^2"], formula=True) == 1
    assert documents.ocrbench("X^2", ["x^2"], formula=True) == 0


def test_rouge():
    assert captions.rouge_l("the cat sat", ["the cat sat down"]) == pytest.approx(6 / 7)


SIZES = Sizes((640, 480), (644, 476))


def test_a_box_is_in_one_declared_space_and_never_chosen_by_the_reference():
    gold = Box(100, 100, 200, 200, "original")
    x, y = 644 / 640, 476 / 480
    right = f"[{100 * x:.0f}, {100 * y:.0f}, {200 * x:.0f}, {200 * y:.0f}]"
    assert grounding.box_at_iou(right, gold, SIZES).value == 1
    assert grounding.box_at_iou(f"[0, 0, 9, 9] {right}", gold, SIZES).reason == "several_answers"
    assert grounding.box_at_iou(f"<think>{right}</think> none", gold, SIZES).reason == "unparsed"
    thousandths = "[156, 208, 312, 417]"
    assert grounding.box_at_iou(thousandths, gold, SIZES).value == 0
    assert grounding.box_at_iou(thousandths, gold, SIZES, space="norm1000").value == 1


def test_points_and_centres_of_boxes():
    gold = Box(0, 0, 322, 238, "resized")
    assert grounding.point_in_box("(322, 238)", gold, SIZES).value == 1
    assert grounding.point_in_box("[323, 238]", gold, SIZES).value == 0
    assert grounding.point_in_box("[0, 0, 600, 400]", gold, SIZES).value == 1
    assert grounding.polygon_holds([(0, 0), (4, 0), (0, 4)], (1, 1))
    assert not grounding.polygon_holds([(0, 0), (4, 0), (0, 4)], (3, 3))


def test_worst_case_needs_every_variant():
    assert reasoning.worst_case([(1, 1), (1, 1), (2, 1), (2, 0)]) == 0.5


def test_wemath():
    problems = [
        {"composed": 1, "steps": [1, 1]},
        {"composed": 1, "steps": [1, 0, 1]},
        {"composed": 0, "steps": [1, 1]},
        {"composed": 0, "steps": [0, 1]},
    ]
    strict, loose = reasoning.wemath(problems), reasoning.wemath(problems, loose=True)
    assert strict.strict == (4 - 0.5 - 1 - 1) / 4
    assert (strict.rote_memorization, loose.rote_memorization, loose.complete_mastery) == (0.25, 0, 0.5)
