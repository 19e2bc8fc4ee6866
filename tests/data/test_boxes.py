"""Boxes: into text in the pixels of the resized picture, and back from what models write."""

import json

import pytest

from jvlm.data.boxes import iou, parse_boxes, render_box, scale_box

ANSWERS = {
    "MiMo's fenced list": (
        'Here:\n```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, '
        '{"bbox_2d": [5, 6, 7.5, 8], "label": "dog"}]\n```',
        [([1, 2, 30, 40], "cat"), ([5, 6, 7.5, 8], "dog")],
    ),
    "a fence without a language": ('```\n[{"bbox_2d": [1, 2, 3, 4]}]\n```', [([1, 2, 3, 4], "")]),
    "JSON without a fence": ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]', [([1, 2, 3, 4], "a")]),
    "one object": ('{"bbox_2d": [1, 2, 3, 4], "label": "a"}', [([1, 2, 3, 4], "a")]),
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
    "negative and fractional": ("[-1.5, 0, 3.25, 4]", [([-1.5, 0, 3.25, 4], "")]),
    "no box": ("there is none", []),
    "an empty list": ("```json\n[]\n```", []),
    "points only": ("click (3, 4)", []),
    "nothing": ("", []),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_boxes_are_read_from_every_form_that_models_write(kind):
    text, expected = ANSWERS[kind]
    assert [(b["bbox_2d"], b["label"]) for b in parse_boxes(text)] == expected


@pytest.mark.parametrize("form", ["json", "qwen_tokens"])
def test_a_rendered_box_is_read_back(form):
    assert parse_boxes(render_box([3.2, 4.6, 50, 60.4], form)) == [{"bbox_2d": [3, 5, 50, 60], "label": ""}]


def test_boxes_and_points_are_written_as_the_models_were_trained():
    assert render_box([3.2, 4.6, 50, 60.4], "json") == "[3, 5, 50, 60]"
    assert render_box([3.2, 4.6, 50, 60.4], "qwen_tokens") == "<|box_start|>(3,5),(50,60)<|box_end|>"
    assert render_box([3.2, 4.6], "json") == "[3, 5]"
    assert json.loads(render_box([1, 2, 3, 4], "json")) == [1, 2, 3, 4]


def test_a_box_moves_to_another_size_and_back():
    box = scale_box([64, 48, 320, 240], (640, 480), (644, 476))
    assert box == pytest.approx([64.4, 47.6, 322, 238])
    assert scale_box(box, (644, 476), (640, 480)) == pytest.approx([64, 48, 320, 240])


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
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == pytest.approx(expected)
