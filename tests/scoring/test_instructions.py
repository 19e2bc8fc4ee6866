"""IFEval's instructions against verdicts of its own code; MathVista's and DynaMath's readings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jvlm.scoring.benchmarks import instructions, mathvista

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ifeval.json").read_text())


@pytest.mark.parametrize(("name", "given", "verdicts"), GOLDEN["cases"], ids=lambda value: str(value)[:40])
def test_each_instruction_is_judged_as_by_the_benchmarks_code(name, given, verdicts):
    found = [
        bool(instructions.follows(text, [{"id": name, "kwargs": given}], "Tell me a story.").value)
        for text in GOLDEN["texts"]
    ]
    wrong = [text for text, one, other in zip(GOLDEN["texts"], found, verdicts, strict=True) if one != other]
    assert wrong == []


def test_all_twenty_five_kinds_are_there_and_an_unknown_one_is_no_wrong_answer():
    assert len(instructions.CHECKS) == 25
    assert {name for name, *_ in GOLDEN["cases"]} == set(instructions.CHECKS)
    score = instructions.follows("text", [{"id": "made:up", "kwargs": {}}])
    assert (score.value, score.reason) == (None, "gold_unusable")


def test_all_instructions_of_a_prompt_must_be_followed_and_nulls_are_nothing():
    both = [
        {"id": "punctuation:no_comma", "kwargs": {"num_words": None}},
        {"id": "detectable_format:title", "kwargs": {}},
    ]
    assert instructions.follows("<<t>> text", both).value == 1
    score = instructions.follows("<<t>> text, more", both)
    assert (score.value, score.parsed) == (0, [False, True])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 12.", 12),
        ("3 apples and 4 pears make 3 + 4 = 7", 7),
        ("1,200", 1200),
        ("\\frac{3}{4}", 0.75),
        ("-\\frac{1}{2}", -0.5),
        ("3/8", 0.375),
        ("12 or 13", None),
        ("__import__('os').system('x')", None),
        ("9**9**9**9", None),
        ("no number", None),
        ("1.5e3", 1500),
        ("2x", None),
    ],
)
def test_the_only_number_of_an_answer(text, value):
    assert mathvista.only_number(text) == value


@pytest.mark.parametrize(
    ("text", "gold", "facts", "value", "reason"),
    [
        ("1.237", "1.24", {"answer_type": "float", "precision": 2.0}, 1, "ok"),
        ("1.23", "1.24", {"answer_type": "float", "precision": 2.0}, 0, "wrong"),
        ("it is 5.0", "5", {"answer_type": "integer"}, 1, "ok"),
        ("5 or 6", "5", {"answer_type": "integer"}, 0, "unparsed"),
        ("[1, 2]", "[1.0, 2.0]", {"answer_type": "list"}, 1, "ok"),
        ("[1, 2] [3, 4]", "[1, 2]", {"answer_type": "list"}, 0, "unparsed"),
        ("B", "cat", {"question_type": "multi_choice", "options": ["dog", "cat"]}, 1, "ok"),
        ("cats", "cat", {"question_type": "multi_choice", "options": ["dog", "cat"]}, 1, "ok"),
        ("A or B", "cat", {"question_type": "multi_choice", "options": ["dog", "cat"]}, 0, "unparsed"),
        ("Yes.", "yes", {}, 1, "ok"),
    ],
)
def test_mathvista(text, gold, facts, value, reason):
    score = mathvista.mathvista(text, gold, **facts)
    assert (score.value, score.reason) == (value, reason)


@pytest.mark.parametrize(
    ("text", "gold", "kind", "value"),
    [
        ("3.1409", "3.141", "float", 1),
        ("3.139", "3.141", "float", 0),
        ("(B)", "B", "multiple choice", 1),
        ("x", "X", "text", 1),
    ],
)
def test_dynamath(text, gold, kind, value):
    assert mathvista.dynamath(text, gold, kind).value == value
