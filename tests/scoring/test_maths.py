"""Mathematical answers against the verdicts that a reward must give, Math-Verify's own ones beside."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from jvlm.scoring import math_worker
from jvlm.scoring.maths import MathVerifier, is_words

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "math_answers.json").read_text())


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(2) as verifier:
        yield verifier


def test_golden(verifier):
    pairs = [(case["answer"], case["gold"]) for case in GOLDEN["cases"]]
    scores = verifier.scores(pairs)
    wrong = [
        (case, score) for case, score in zip(GOLDEN["cases"], scores, strict=True) if score.value != case["required"]
    ]
    assert wrong == []


def test_math_verify_alone_accepts_more_than_may_be_rewarded():
    accepted = [c for c in GOLDEN["cases"] if c["math_verify"] and not c["required"] and "think" not in c["answer"]]
    assert len(accepted) >= 10
    inner = [c["answer"].removeprefix("\\boxed{").removesuffix("}") for c in accepted]
    assert all(math_worker.equal(c["gold"], said) for c, said in zip(accepted, inner, strict=True))


@pytest.mark.slow
def test_an_answer_that_never_ends_is_a_timeout_and_the_pool_goes_on():
    with MathVerifier(1, seconds=4.0) as verifier:
        scores = verifier.scores([("\\boxed{9^{9^{9^{9}}}}", "7"), ("\\boxed{\\frac{2}{4}}", "0.5")])
    assert [(score.value, score.reason) for score in scores] == [(0, "timeout"), (1, "ok")]


@pytest.mark.slow
def test_answers_that_never_end_cost_the_time_of_one_and_the_pool_goes_on():
    # the reference has the same forms, so that nothing is refused beforehand
    hostile = [f"\\boxed{{10^{{10^{{{n}}}}} - x!}}" for n in range(10, 14)]
    with MathVerifier(4, seconds=3.0) as verifier:
        assert verifier("5", "5").value == 1  # started
        began = time.monotonic()
        scores = verifier.scores([(text, "10^{10^{30}} - x! - \\sum_{k=1}^{9} k") for text in hostile])
        assert time.monotonic() - began < 12
        assert {(score.value, score.reason) for score in scores} <= {(0.0, "timeout"), (0.0, "wrong")}
        assert verifier("\\boxed{\\frac{2}{4}}", "0.5").value == 1


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("\\boxed{(1, 2)}", "(1,2)", 1),
        ("\\boxed{1,2}", "(1,2)", 0),
        ("\\boxed{x \\in [1, 2]}", "[1,2]", 1),
        ("\\boxed{3 \\text{ cm}}", "3 \\text{ cm}", 1),
        ("\\boxed{\\dfrac{\\pi}{2}}", "\\frac{\\pi}{2}", 1),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", 1),
        ("\\boxed{x^2 + 1}", "x^2+1", 1),
        ("\\boxed{-2}", "2", 0),
        ("\\boxed{1 - 3}", "-2", 0),
        ("\\boxed{\\text{Yes}}", "yes", 1),
        ("The result is $\\frac{7}{2}$.", "3.5", 1),
        ("We get $x = 4$, so the area is 12.", "4", 1),  # a formula counts before words
        ("So the area is 12.", "12", 1),
        ("It is 3 or 12.", "12", 0),
    ],
)
def test_forms(verifier, text, gold, value):
    assert verifier(text, gold).value == value


def test_a_reference_that_cannot_be_read_is_no_zero(verifier):
    score = verifier("\\boxed{5}", "\\frac{")
    assert (score.value, score.reason) == (None, "gold_unusable")


def test_words_are_never_multiplied():
    assert is_words("yes")
    assert is_words("isosceles triangle")
    assert not is_words("x^2")
    assert not is_words("5")
