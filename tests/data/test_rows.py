"""Rows of the ms-swift format: what is wrong is said with row, field and fix, before any picture is opened."""

import pickle

import pytest

from jvlm.data.boxes import Box
from jvlm.data.errors import Origin, RowError
from jvlm.data.rows import fill_objects, parse_row

ORIGIN = Origin("rows.jsonl", 12)


def row(user="hi", answer="yes", **fields):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **fields}


def turns(*messages, **fields):
    return {"messages": list(messages), **fields}


def test_a_whole_row_is_read():
    conversation = parse_row(
        turns(
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "<image><video> where is <ref-object>?"},
            {"role": "assistant", "content": "<bbox>", "loss_scale": 0.5},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "no", "loss": False},
            images=["a.png"],
            videos=[["1.png", "2.png"]],
            objects={"ref": ["the cat"], "bbox": [[1, 2, 3, 4]], "bbox_type": "real", "image_id": [0]},
            chat_template_kwargs={"max_pixels": 50176, "fps": 1.0},
            id="seven",
        ),
        ORIGIN,
    )
    assert [m.loss_weight for m in conversation.messages] == [0, 0, 0.5, 0, 0]
    assert conversation.images == ("a.png",)
    assert conversation.videos == (("1.png", "2.png"),)
    assert (conversation.refs, conversation.boxes) == (("the cat",), (Box(1, 2, 3, 4, "original"),))
    assert conversation.media_order() == ["image", "video"]
    assert dict(conversation.limits) == {"max_pixels": 50176, "fps": 1.0}
    assert dict(conversation.extra) == {"id": "seven"}
    assert parse_row(conversation) is conversation


def test_content_blocks_equal_tags_and_lists():
    blocks = turns(
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "or"},
                {"type": "image_url", "image_url": {"url": "b.png"}},
                {"type": "video", "video": ["1.png", "2.png"]},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    )
    found = parse_row(blocks)
    expected = parse_row(
        row("<image>or<image><video>", images=["a.png", {"url": "b.png"}], videos=[["1.png", "2.png"]])
    )
    assert found == expected


def test_one_image_may_be_given_alone():
    assert parse_row(row("<image>", image="a.png")).images == ("a.png",)


BAD = {
    "no object": (["a"], "row", "a list, not an object"),
    "unknown field": (row(image_s=["a.png"]), "image_s", "unknown field. Did you mean 'images'?"),
    "unknown field like no other": (row(zzz=1), "zzz", "Known fields: .*messages"),
    "image and images": (row("<image>", images=["a"], image="a"), "image", "together with 'images'"),
    "no messages": ({"images": []}, "messages", "missing or empty"),
    "empty messages": ({"messages": []}, "messages", "missing or empty"),
    "a message that is a string": (turns("hi"), r"messages\[0\]", "needs 'role' and 'content'"),
    "a message without content": (turns({"role": "user"}), r"messages\[0\]", "needs 'role' and 'content'"),
    "unknown message field": (
        turns({"role": "user", "content": "", "weight": 2}),
        r"messages\[0\].weight",
        "unknown field",
    ),
    "misspelt role": (
        turns({"role": "asistant", "content": ""}),
        r"messages\[0\].role",
        "unknown role 'asistant'. Did you mean 'assistant'?",
    ),
    "role like no other": (turns({"role": "xx", "content": ""}), r"messages\[0\].role", "Use one of system, user"),
    "late system turn": (
        turns({"role": "user", "content": ""}, {"role": "system", "content": ""}),
        r"messages\[1\].role",
        "Move it to the front",
    ),
    "content that is no text": (turns({"role": "user", "content": None}), r"messages\[0\].content", "is not text"),
    "unknown block": (
        turns({"role": "user", "content": [{"type": "audio"}]}),
        r"messages\[0\].content",
        "block of type 'audio'",
    ),
    "block that is no object": (turns({"role": "user", "content": ["hi"]}), r"messages\[0\].content", "block of type"),
    "text block without text": (
        turns({"role": "user", "content": [{"type": "text"}]}),
        r"messages\[0\].content",
        "text",
    ),
    "text block with a number": (
        turns({"role": "user", "content": [{"type": "text", "text": 5}]}),
        r"messages\[0\].content",
        "text",
    ),
    "loss on a user turn": (turns({"role": "user", "content": "", "loss": True}), r"messages\[0\]", "on a user turn"),
    "loss that is no bool": (
        turns({"role": "assistant", "content": "", "loss": "yes"}),
        r"messages\[0\].loss",
        "not true or false",
    ),
    "negative loss_scale": (
        turns({"role": "assistant", "content": "", "loss_scale": -1}),
        r"messages\[0\].loss_scale",
        "not a weight",
    ),
    "fewer tags than images": (row("<image>", images=["a", "b"]), "images", "1 <image> tags but 2 entries"),
    "more tags than images": (row("<image><image>", images=["a"]), "images", "2 <image> tags but 1 entries"),
    "a tag without media": (row("<video>"), "videos", "1 <video> tags but 0 entries"),
    "a video that is a path": (row("<video>", videos=["a.mp4"]), "videos", "list of frames"),
    "a video without frames": (row("<video>", videos=[[]]), "videos", "list of frames"),
    "media in both places": (
        turns(
            {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "image"}]},
            images=["b"],
        ),
        "images",
        "both",
    ),
    "objects of another form": (row(objects=[1]), "objects", "not of the known form"),
    "unknown key of objects": (row(objects={"box": []}), "objects", "not of the known form"),
    "fewer box tags than boxes": (row(objects={"bbox": [[1, 2, 3, 4]]}), "objects.bbox", "0 <bbox> tags but 1 entries"),
    "fewer refs than tags": (
        row("<ref-object><ref-object>", objects={"ref": ["a"]}),
        "objects.ref",
        "2 <ref-object> tags but 1 entries",
    ),
    "three numbers": (row("<bbox>", objects={"bbox": [[1, 2, 3]]}), r"objects.bbox\[0\]", "not a point or box"),
    "one flat box": (row("<bbox>", objects={"bbox": [1, 2, 3, 4]}), r"objects.bbox\[0\]", "not a point or box"),
    "a box of words": (row("<bbox>", objects={"bbox": [["a"] * 4]}), r"objects.bbox\[0\]", "not a point or box"),
    "boxes that are no list": (row("<bbox>", objects={"bbox": 4}), "objects.bbox", "list"),
    "refs that are one string": (row("<ref-object>", objects={"ref": "cat"}), "objects.ref", "list"),
    "refs that are numbers": (row("<ref-object>", objects={"ref": [3]}), r"objects.ref\[0\]", "text"),
    "swapped corners": (row("<bbox>", objects={"bbox": [[9, 2, 3, 4]]}), r"objects.bbox\[0\]", "x1, y1, x2, y2"),
    "norm1 outside 0 to 1": (
        row("<bbox>", objects={"bbox": [[0, 0, 1, 3]], "bbox_type": "norm1"}),
        r"objects.bbox\[0\]",
        "outside 0..1",
    ),
    "unknown bbox_type": (
        row("<bbox>", objects={"bbox": [[0, 0, 1, 3]], "bbox_type": "x"}),
        "objects.bbox_type",
        "'x'",
    ),
    "image_id of another length": (
        row("<bbox>", objects={"bbox": [[0, 0, 1, 3]], "image_id": [0, 0]}),
        "objects.image_id",
        "2 ids for 1 boxes",
    ),
    "image_id out of range": (
        row("<image><bbox>", images=["a"], objects={"bbox": [[0, 0, 1, 3]], "image_id": [1]}),
        "objects.image_id",
        "1 with 1 images",
    ),
    "image_id that is a word": (
        row("<image><bbox>", images=["a"], objects={"bbox": [[0, 0, 1, 3]], "image_id": ["a"]}),
        "objects.image_id",
        "'a'",
    ),
    "image_id that is no list": (
        row("<image><bbox>", images=["a"], objects={"bbox": [[0, 0, 1, 3]], "image_id": 0}),
        "objects.image_id",
        "list",
    ),
    "unknown limit": (row(chat_template_kwargs={"maxpixels": 3}), "chat_template_kwargs.maxpixels", "unknown field"),
    "limit that is no number": (row(chat_template_kwargs={"fps": "2"}), "chat_template_kwargs.fps", "not a positive"),
    "limits that are no object": (row(chat_template_kwargs=[1]), "chat_template_kwargs", "not an object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_refused_with_its_place_field_and_a_fix(kind):
    bad, field, says = BAD[kind]
    with pytest.raises(RowError, match=f"^rows.jsonl, row 12, field [\"']{field}[\"']: .*{says}") as caught:
        parse_row(bad, ORIGIN)
    assert caught.value.fix


def test_a_row_error_survives_the_way_between_processes():
    error = RowError(ORIGIN, "images", "gone", "Find it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_objects_fill_tags_in_order_and_literal_tags_stay_without_objects():
    refs, boxes = ["cat", "dog"], ["[1]", "[2]"]
    assert fill_objects("<ref-object> at <bbox>, <ref-object> at <bbox>", refs, boxes) == "cat at [1], dog at [2]"
    assert fill_objects("what does <bbox> mean?", [], []) == "what does <bbox> mean?"
