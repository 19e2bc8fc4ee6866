"""Points and boxes: between the spaces, into text, and back from what models write."""

import fractions
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jvlm.data.box_formats import FORMATS, Detection, parse, render, render_named
from jvlm.data.boxes import Box, Point, Sizes, iou, match_score, region

FORMS = list(FORMATS)
SPACES = ["original", "resized", "norm1", "norm1000"]
ANSWERS = {
    "MiMo's fenced list": (
        'Here:\n```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, '
        '{"bbox_2d": [5, 6, 7.5, 8], "label": "dog"}]\n```',
        [([1, 2, 30, 40], "cat"), ([5, 6, 7.5, 8], "dog")],
    ),
    "points in a list": ('[{"point_2d": [1, 2], "label": "cat"}]', [([1, 2], "cat")]),
    "a fence without a language": ('```\n[{"bbox_2d": [1, 2, 3, 4]}]\n```', [([1, 2, 3, 4], "")]),
    "JSON without a fence": ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]', [([1, 2, 3, 4], "a")]),
    "one object": ('{"bbox_2d": [1, 2, 3, 4], "label": "a"}', [([1, 2, 3, 4], "a")]),
    "a label that is null": ('[{"bbox_2d": [1, 2, 3, 4], "label": null}]', [([1, 2, 3, 4], "")]),
    "what are no numbers": (
        '[{"bbox_2d": [true, 2, 3, 4]}, {"bbox_2d": [NaN, 2, 3, 4]}, {"bbox_2d": [0, 0, Infinity, 4]}, '
        '{"bbox_2d": [0, 0, ' + "9" * 400 + ', 4]}, {"bbox_2d": [1, 2, 3, 4]}]',
        [([1, 2, 3, 4], "")],
    ),
    "after thinking": (
        '<think>maybe [9, 9, 9, 9]</think>[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]',
        [([1, 2, 3, 4], "a")],
    ),
    "a list cut off": (
        '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6,',
        [([1, 2, 3, 4], "")],
    ),
    "bare brackets": ("it is at [1, 2, 3, 4].", [([1, 2, 3, 4], "")]),
    "bare parentheses": ("(1,2,3,4) and (5, 6, 7, 8)", [([1, 2, 3, 4], ""), ([5, 6, 7, 8], "")]),
    "Qwen's pair of points": ("<|box_start|>(1,2),(3,4)<|box_end|>", [([1, 2, 3, 4], "")]),
    "Qwen's pair without its tokens": ("(1,2),(3,4) (5,6),(7,8)", [([1, 2, 3, 4], ""), ([5, 6, 7, 8], "")]),
    "angles": ("<1,2,3,4> <5,6>", [([1, 2, 3, 4], ""), ([5, 6], "")]),
    "negative and fractional": ("[-1.5, 0, 3.25, 4]", [([-1.5, 0, 3.25, 4], "")]),
    "no box": ("there is none", []),
    "an empty list": ("```json\n[]\n```", []),
    "points only": ("click (3, 4)", [([3, 4], "")]),
    "swapped corners": ("[9, 2, 3, 4] or [1, 2, 3, 4]", [([1, 2, 3, 4], "")]),
    "words for numbers": ('[{"bbox_2d": ["a", 2, 3, 4]}, {"bbox_2d": [1, 2, 3, true]}]', []),
    "a number without end": (f'[{{"bbox_2d": [1, 2, 3, {"9" * 5000}]}}]', []),
    "lists without end": ("[" * 100_000, []),
    "nothing": ("", []),
}
# What is true of a picture of 200 x 100 seen as 196 x 112.
SIZES = Sizes((200, 100), (196, 112))

sizes = st.builds(Sizes, *[st.tuples(st.integers(1, 9000), st.integers(1, 9000))] * 2)
shares = st.floats(0, 1)


@st.composite
def places(draw, space="norm1"):
    """A point or box anywhere in a picture."""
    if draw(st.booleans()):
        return Point(draw(shares), draw(shares), space)
    (x1, x2), (y1, y2) = sorted([draw(shares), draw(shares)]), sorted([draw(shares), draw(shares)])
    return Box(x1, y1, x2, y2, space)


@pytest.mark.parametrize("kind", ANSWERS)
def test_places_are_read_from_every_form_that_models_write(kind):
    text, expected = ANSWERS[kind]
    found = parse(text, "json")
    assert [(list(item.region.values), item.label) for item in found] == expected
    assert all(item.region.space == "resized" for item in found)


@pytest.mark.parametrize(
    ("form", "box", "point"),
    [
        ("json", "[3, 5, 50, 60]", "[3, 5]"),
        ("qwen_tokens", "<|box_start|>(3,5),(50,60)<|box_end|>", "<|box_start|>(3,5)<|box_end|>"),
        ("ferret", "[16, 41, 255, 539]", "[16, 41]"),
        ("mm1_5", "<16,41,255,539>", "<16,41>"),
    ],
)
def test_places_are_written_as_the_models_were_trained(form, box, point):
    assert render(Box(3.2, 4.6, 50, 60.4, "resized"), form, SIZES) == box
    assert render(Point(3.2, 4.6, "resized"), form, SIZES) == point


@pytest.mark.parametrize("form", FORMS)
@given(place=places(), sizes=sizes, label=st.text("abz é,.0", max_size=9).map(lambda s: s.strip(" ,.")))
def test_what_is_written_is_read_back_within_one_unit_and_writes_the_same_text_again(form, place, sizes, label):
    text = render_named([Detection("", place), Detection(label, place)], form, sizes)
    first, second = parse(text, form)
    assert (first.label, second.label, first.region) == ("", label, second.region)
    assert type(first.region) is type(place)
    assert first.region.space == FORMATS[form].space
    exact = place.to(first.region.space, sizes).values
    assert all(abs(a - b) <= 1 for a, b in zip(first.region.values, exact, strict=True))
    # through the original picture and back: nothing drifts
    there = first.region.to("original", sizes)
    assert render_named([Detection("", there), Detection(label, there)], form, sizes) == text


@given(place=places(), sizes=sizes, path=st.lists(st.sampled_from(SPACES), max_size=4))
def test_a_place_comes_back_from_any_way_through_the_spaces(place, sizes, path):
    moved = place
    for space in path:
        moved = moved.to(space, sizes)
    assert moved.to("norm1", sizes).values == pytest.approx(place.values, abs=1e-12)


@given(x=st.integers(0, 5000), width=st.integers(1, 5000))
def test_thousandths_are_cut_off_as_ferret_does_in_exact_arithmetic(x, width):
    x = min(x, width)
    exact = min(int(fractions.Fraction(x, width) * 1000), 999)
    assert render(Point(x, 0, "original"), "ferret", Sizes((width, 1), (7, 7))) == f"[{exact}, 0]"


def test_the_space_of_a_format_can_be_replaced():
    box = Box(20, 10, 100, 50, "original")
    assert render(box, "json", SIZES, space="norm1000") == "[100, 100, 500, 500]"
    assert render(box, "json", SIZES, space="norm1") == "[0.100, 0.100, 0.500, 0.500]"
    assert parse("[100, 100, 500, 500]", "json", space="norm1000")[0].region.to("original", SIZES) == box


def test_an_answer_in_json_is_json_with_labels_and_points():
    named = [Detection('the "cat"', Box(1, 2, 3, 4, "resized")), Detection("dog", Point(5, 6, "resized"))]
    text = render_named(named, "json")
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == [
        {"bbox_2d": [1, 2, 3, 4], "label": 'the "cat"'},
        {"point_2d": [5, 6], "label": "dog"},
    ]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, float("nan"), 4],
        [9, 2, 3, 4],
        [1, 5, 3, 4],
        [float("inf"), 0],
        [1, 2, 3],
        [True, 2],
        ["1", 2],
        [None, 2],
        [10**400, 2],
    ],
)
def test_what_is_no_place_is_refused(values):
    with pytest.raises(ValueError, match=r"not finite|swapped|2 or 4"):
        region(values, "original")


def test_pixels_need_the_size_of_the_picture_and_spaces_do_not_mix():
    with pytest.raises(ValueError, match="size of the image is needed"):
        Point(0.5, 0.5, "norm1").to("resized")
    assert Point(0.5, 0.25, "norm1").to("norm1000") == Point(500, 250, "norm1000")
    with pytest.raises(ValueError, match="norm1 cannot be compared with one in original"):
        iou(Box(0, 0, 1, 1, "norm1"), Box(0, 0, 1, 1, "original"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 10, 10], [0, 0, 10, 10], 1.0),
        ([0, 0, 10, 10], [5, 0, 15, 10], 1 / 3),
        ([0, 0, 10, 10], [20, 20, 30, 30], 0.0),
        ([0, 0, 10, 10], [10, 0, 20, 10], 0.0),
        ([3, 3, 3, 3], [3, 3, 3, 3], 0.0),
        ([0, 0, 10, 10], [2, 2, 4, 4], 0.04),
    ],
)
def test_iou_of_known_boxes(a, b, expected):
    a, b = region(a, "original"), region(b, "original")
    assert iou(a, b) == iou(b, a) == pytest.approx(expected)
    assert match_score(a, b.to("resized", SIZES), SIZES) == pytest.approx(expected)
