"""Strict scores against golden cases made by an independent reference, and the property that guessing does not pay."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvlm.scoring.actions import action
from jvlm.scoring.choice import choice
from jvlm.scoring.counts import count
from jvlm.scoring.regions import boxes, points
from jvlm.scoring.spans import span
from jvlm.scoring.thinking import thinking_format
from jvlm.scoring.words import words

CASES = json.loads((Path(__file__).parents[1] / "golden" / "rewards.json").read_text())["cases"]
FUNCTIONS = {
    "boxes": boxes,
    "points": points,
    "count": count,
    "choice": choice,
    "words": words,
    "span": span,
    "gui": action,
    "fmt": thinking_format,
}
# option of the reference -> ours
OPTIONS = {"opened": "thinking_opened", "kind": "overlap"}
OVERLAPS = {"giou": "giou01", "giou+": "giou", "iou": "iou"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['reward']}: {case['case']}")
def test_golden(case):
    options = {OPTIONS.get(name, name): value for name, value in case["options"].items()}
    if "overlap" in options:
        options["overlap"] = OVERLAPS[options["overlap"]]
    score = FUNCTIONS[case["reward"]](*case["args"], **options)
    assert (score.value, score.reason) == (pytest.approx(case["value"], abs=1e-8), case["reason"])


def test_all_rewards_have_cases():
    assert {case["reward"] for case in CASES} == set(FUNCTIONS)


_BOX = st.tuples(*[st.integers(0, 90)] * 2, *[st.integers(1, 60)] * 2).map(
    lambda b: [b[0], b[1], min(b[0] + b[2], 100), min(b[1] + b[3], 100)]
)


@settings(max_examples=200, deadline=None)
@given(_BOX, st.lists(_BOX, min_size=1, max_size=6), st.sampled_from(["giou01", "giou", "iou"]))
def test_several_guesses_never_beat_the_mean_of_each(gold, guesses, overlap):
    def score(values):
        return boxes(json.dumps(values)[1:-1], [("", gold)], (100, 100), overlap=overlap).value

    assert score(guesses) <= sum(score([g]) for g in guesses) / len(guesses) + 1e-9


@settings(max_examples=200, deadline=None)
@given(_BOX, st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=6))
def test_several_points_never_beat_the_mean_of_each(gold, guesses):
    def score(values):
        return points(" ".join(f"[{x}, {y}]" for x, y in values), [gold]).value

    assert score(guesses) <= sum(score([g]) for g in guesses) / len(guesses) + 1e-9


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.text("[](){}<>\\boxed,:.0123456789 ABCDthink/", max_size=80))
def test_no_text_raises(text):
    for value in (
        boxes(text, [("", [1, 2, 3, 4])], (9, 9)),
        points(text, [[1, 2, 3, 4]]),
        count(text, 3),
        choice(text, "B", ["a", "b", "c"]),
        words(text, ["x"]),
        span(text, (1, 2)),
        span(text, (1, 2), strict=False),
        action(text, {"action": "click", "box": [1, 2, 3, 4]}),
        thinking_format(text),
    ):
        assert value.value is not None
        assert 0 <= value.value <= 1


@pytest.mark.parametrize(
    ("text", "gold", "value", "reason"),
    [
        ("A cat sits on B", "B", 1, "ok"),  # an article is no letter
        ("A cat sits here", "A", 0, "unparsed"),
        ("I think it is C.", "C", 1, "ok"),
        ("The answer is A because dogs bark", "A", 1, "ok"),
        ("Answer: (C)", "C", 1, "ok"),
        ("The answer is: 5 cm.", "C", 1, "ok"),
        ("It is not B", "B", 1, "ok"),  # words around a single letter are not understood
        ("A and C", "AC", 1, "ok"),
        ("A, C, D", "AC", 0, "wrong"),
        ("A", "AC", 0, "wrong"),
        ("I'd say D", "D", 1, "ok"),
    ],
)
def test_choice(text, gold, value, reason):
    score = choice(text, gold, ["3 cm", "4 cm", "5 cm", "6 cm"])
    assert (score.value, score.reason) == (value, reason)


def test_counts_of_random_numbers():
    draw = random.Random(0)
    for _ in range(200):
        number = draw.randrange(10**6)
        for text in (f"{number}", f"{number:,}", f"There are {number}.", f"\\boxed{{{number}}}", f"{number}.00"):
            assert count(text, number).value == 1, text


TIMES = ["7:30 A.M.", "2:55 P.M.", "8:45 A.M.", "8:05 A.M."]


@pytest.mark.parametrize(
    ("text", "gold", "options", "value"),
    [
        ("8:45 A.M.", "C", TIMES, 1),
        ("C. 8:45 A.M.", "C", TIMES, 1),
        ("The train leaves at 8:45 A.M.", "C", TIMES, 1),
        ("The train leaves at 8:45 a.m., so D", "D", TIMES, 1),
        ("7:30 P.M.", "A", TIMES, 0),
        ("vitamin A", "B", ["vitamin C", "vitamin A", "vitamin K"], 1),
        ("The answer is vitamin A.", "B", ["vitamin C", "vitamin A", "vitamin K"], 1),
        ("Both A and B", "D", ["red", "blue", "green", "Both A and B"], 1),
        ("B", "B", ["A", "B"], 1),
    ],
)
def test_letters_in_the_texts_of_options_and_in_hours_are_no_answers(text, gold, options, value):
    assert choice(text, gold, options, prose=True).value == value
