"""Examples of the ms-swift format: what is wrong is said with example, field and fix, before any picture is opened."""

import contextlib
import pickle

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvlm.data.boxes import Box, Point
from jvlm.data.columns import UnknownColumns
from jvlm.data.content import Image, Message, ObjectBox, ObjectName, Text, Video
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example, tagged

ORIGIN = Origin("examples.jsonl", 12)


def example(user="hi", answer="yes", **fields):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **fields}


def turns(*messages, **fields):
    return {"messages": list(messages), **fields}


def test_a_whole_example_is_read():
    conversation = parse_example(
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
    assert conversation.media == (Image("a.png"), Video(("1.png", "2.png")))
    names = [part for message in conversation.messages for part in message.content if isinstance(part, ObjectName)]
    assert (names, conversation.boxes) == ([ObjectName("the cat")], (ObjectBox(Box(1, 2, 3, 4, "original"), 0),))
    assert dict(conversation.image_settings) == {"max_pixels": 50176, "fps": 1.0}
    assert dict(conversation.extra) == {"id": "seven"}
    assert parse_example(conversation) is conversation


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
    found = parse_example(blocks)
    expected = parse_example(
        example("<image>or<image><video>", images=["a.png", {"url": "b.png"}], videos=[["1.png", "2.png"]])
    )
    assert found == expected


def test_one_image_may_be_given_alone():
    assert parse_example(example("<image>", image="a.png")).images == (Image("a.png"),)


BAD = {
    "no object": (["a"], "example", "a list, not an object"),
    "a misspelt field that tags need": (
        example("<image>", image_s=["a.png"]),
        "images",
        "1 <image> tags but 0 entries. Is 'image_s' meant to be 'images'?",
    ),
    "misspelt objects": (
        example("<bbox>", object={"bbox": [[1, 2]]}),
        "objects.bbox",
        "1 <bbox> tags but 0 entries. Is 'object' meant to be 'objects'?",
    ),
    "sound": (example("<audio>", audios=["a.wav"]), "audios", "do not hear"),
    "misspelt messages": ({"mesages": []}, "messages", "missing or empty. Is 'mesages' meant to be 'messages'?"),
    "messages that are a number": ({"messages": 5}, "messages", "5 is not a list"),
    "messages that are columns": ({"messages": {"role": ["user"]}}, "messages", "is not a list"),
    "image and images": (example("<image>", images=["a"], image="a"), "image", "together with 'images'"),
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
    "loss that is 2": (turns({"role": "assistant", "content": "", "loss": 2}), r"messages\[0\].loss", "2 is not true"),
    "loss that is half": (turns({"role": "assistant", "content": "", "loss": 0.5}), r"messages\[0\].loss", "not true"),
    "loss that is a list": (turns({"role": "assistant", "content": "", "loss": []}), r"messages\[0\].loss", "not true"),
    "loss of 1 on a user turn": (turns({"role": "user", "content": "", "loss": 1}), r"messages\[0\]", "on a user turn"),
    "loss_scale that is true": (
        turns({"role": "assistant", "content": "", "loss_scale": True}),
        r"messages\[0\].loss_scale",
        "True is not a weight",
    ),
    "loss_scale of 400 digits": (
        turns({"role": "assistant", "content": "", "loss_scale": 10**400}),
        r"messages\[0\].loss_scale",
        "bits> is not a weight",
    ),
    "loss_scale beyond float32": (
        turns({"role": "assistant", "content": "", "loss_scale": 1e39}),
        r"messages\[0\].loss_scale",
        "1e.39 is not a weight",
    ),
    "a role that is a list": (turns({"role": ["user"], "content": ""}), r"messages\[0\].role", "Use one of system"),
    "half an emoji": (
        turns({"role": "user", "content": "ab\ud83d"}),
        r"messages\[0\].content",
        "half a character.*at position 2",
    ),
    "half an emoji in a block": (
        turns({"role": "user", "content": [{"type": "text", "text": "\ude00"}]}),
        r"messages\[0\].content",
        "half a character",
    ),
    "half an emoji in a name": (
        example("<ref-object>", objects={"ref": ["cat \ud83d"]}),
        r"objects.ref\[0\]",
        "half a character",
    ),
    "a picture in a text block": (
        turns({"role": "user", "content": [{"type": "text", "text": "a", "image": "a.png"}]}),
        r"messages\[0\].content",
        "'text', 'image'",
    ),
    "two sources in a block": (
        turns({"role": "user", "content": [{"type": "image", "image": "a.png", "url": "b.png"}]}),
        r"messages\[0\].content",
        "'image', 'url'",
    ),
    "limits of a block": (
        turns({"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 784}]}),
        r"messages\[0\].content",
        "'max_pixels' of a single image.*chat_template_kwargs",
    ),
    "negative loss_scale": (
        turns({"role": "assistant", "content": "", "loss_scale": -1}),
        r"messages\[0\].loss_scale",
        "not a weight",
    ),
    "fewer tags than images": (example("<image>", images=["a", "b"]), "images", "1 <image> tags but 2 entries"),
    "more tags than images": (example("<image><image>", images=["a"]), "images", "2 <image> tags but 1 entries"),
    "a tag without media": (example("<video>"), "videos", "1 <video> tags but 0 entries"),
    "a video that is a number": (example("<video>", videos=[3]), "videos", "list of frames"),
    "a video without a file": (example("<video>", videos=[""]), "videos", "list of frames"),
    "a setting of a video that is not known": (
        example("<video>", videos=[{"video": "a.mp4", "frames": 3}]),
        r"videos\[0\]",
        "'frames' is not read",
    ),
    "a setting of a video that is not a number": (
        example("<video>", videos=[{"video": "a.mp4", "fps": "2"}]),
        r"videos\[0\]",
        "fps is '2'",
    ),
    "frames that are to be sampled": (
        example("<video>", videos=[{"video": ["1.png"], "start": 1.0}]),
        r"videos\[0\]",
        "frames with start",
    ),
    "a video without frames": (example("<video>", videos=[[]]), "videos", "list of frames"),
    "media in both places": (
        turns(
            {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "image"}]},
            images=["b"],
        ),
        "images",
        "both",
    ),
    "objects of another form": (example(objects=[1]), "objects", "not of the known form"),
    "unknown key of objects": (example(objects={"box": []}), "objects", "not of the known form"),
    "fewer box tags than boxes": (
        example(objects={"bbox": [[1, 2, 3, 4]]}),
        "objects.bbox",
        "0 <bbox> tags but 1 entries",
    ),
    "fewer refs than tags": (
        example("<ref-object><ref-object>", objects={"ref": ["a"]}),
        "objects.ref",
        "2 <ref-object> tags but 1 entries",
    ),
    "three numbers": (example("<bbox>", objects={"bbox": [[1, 2, 3]]}), r"objects.bbox\[0\]", "not a point or box"),
    "one flat box": (example("<bbox>", objects={"bbox": [1, 2, 3, 4]}), r"objects.bbox\[0\]", "not a point or box"),
    "a box of words": (example("<bbox>", objects={"bbox": [["a"] * 4]}), r"objects.bbox\[0\]", "not a point or box"),
    "a box with NaN": (
        example("<bbox>", objects={"bbox": [[0, float("nan"), 9, 9]]}),
        r"objects.bbox\[0\]",
        "not a point or box",
    ),
    "a box with infinity": (
        example("<bbox>", objects={"bbox": [[0, float("inf"), 9, 9]]}),
        r"objects.bbox\[0\]",
        "not a point or box",
    ),
    "a box with 400 digits": (
        example("<bbox>", objects={"bbox": [[0, 10**400, 9, 9]]}),
        r"objects.bbox\[0\]",
        "not a point or box",
    ),
    "a box with true": (
        example("<bbox>", objects={"bbox": [[0, True, 9, 9]]}),
        r"objects.bbox\[0\]",
        "not a point or box",
    ),
    "a box with null": (
        example("<bbox>", objects={"bbox": [[0, None, 9, 9]]}),
        r"objects.bbox\[0\]",
        "not a point or box",
    ),
    "a box with text": (
        example("<bbox>", objects={"bbox": [[0, "1", 9, 9]]}),
        r"objects.bbox\[0\]",
        "not a point or box",
    ),
    "boxes that are no list": (example("<bbox>", objects={"bbox": 4}), "objects.bbox", "list"),
    "refs that are one string": (example("<ref-object>", objects={"ref": "cat"}), "objects.ref", "list"),
    "refs that are numbers": (example("<ref-object>", objects={"ref": [3]}), r"objects.ref\[0\]", "text"),
    "swapped corners": (example("<bbox>", objects={"bbox": [[9, 2, 3, 4]]}), r"objects.bbox\[0\]", "x1, y1, x2, y2"),
    "norm1 outside 0 to 1": (
        example("<bbox>", objects={"bbox": [[0, 0, 1, 3]], "bbox_type": "norm1"}),
        r"objects.bbox\[0\]",
        "outside 0..1",
    ),
    "unknown bbox_type": (
        example("<bbox>", objects={"bbox": [[0, 0, 1, 3]], "bbox_type": "x"}),
        "objects.bbox_type",
        "'x'",
    ),
    "image_id of another length": (
        example("<bbox>", objects={"bbox": [[0, 0, 1, 3]], "image_id": [0, 0]}),
        "objects.image_id",
        "2 ids for 1 boxes",
    ),
    "image_id out of range": (
        example("<image><bbox>", images=["a"], objects={"bbox": [[0, 0, 1, 3]], "image_id": [1]}),
        "objects.image_id",
        "1 with 1 images",
    ),
    "image_id that is a word": (
        example("<image><bbox>", images=["a"], objects={"bbox": [[0, 0, 1, 3]], "image_id": ["a"]}),
        "objects.image_id",
        "'a'",
    ),
    "image_id that is no list": (
        example("<image><bbox>", images=["a"], objects={"bbox": [[0, 0, 1, 3]], "image_id": 0}),
        "objects.image_id",
        "list",
    ),
    "image_id that is true": (
        example("<image><image><bbox>", images=["a", "b"], objects={"bbox": [[0, 0, 1, 3]], "image_id": [True]}),
        "objects.image_id",
        "True with 2 images",
    ),
    "limits that are no object": (example(chat_template_kwargs=[1]), "chat_template_kwargs", "not an object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_example_is_refused_with_its_place_field_and_a_fix(kind):
    bad, field, says = BAD[kind]
    with pytest.raises(ExampleError, match=f"^examples.jsonl, line 12, field [\"']{field}[\"']: .*{says}") as caught:
        parse_example(bad, ORIGIN)
    assert caught.value.fix


def test_an_example_error_survives_the_way_between_processes():
    error = ExampleError(ORIGIN, "images", "gone", "Find it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_each_tag_is_the_next_part_of_its_kind_and_without_objects_their_tags_are_words():
    objects = {"ref": ["cat", "dog"], "bbox": [[1, 2], [3, 4]], "image_id": [1, 0]}
    asked = "<image><ref-object> at <bbox>, <image><ref-object> at <bbox>"
    (message, _) = parse_example(example(asked, images=["a.png", "b.png"], objects=objects)).messages
    assert message.content == (
        Image("a.png", 0),
        ObjectName("cat"),
        Text(" at "),
        ObjectBox(Point(1, 2, "original"), 1),
        Text(", "),
        Image("b.png", 1),
        ObjectName("dog"),
        Text(" at "),
        ObjectBox(Point(3, 4, "original"), 0),
    )
    assert tagged(message.content) == asked
    (message, _) = parse_example(example("what do <bbox> and <ref-object> mean?")).messages
    assert message.content == (Text("what do <bbox> and <ref-object> mean?"),)


def test_neighbouring_texts_are_one_and_a_text_is_never_read_as_a_tag():
    parts = (Text("<ima"), Text(""), Text("ge>"), Image("a.png"), Text(""))
    assert Message("user", parts).content == (Text("<image>"), Image("a.png"))
    assert Message("user", "<image>").content == (Text("<image>"),)
    assert Message("user", "").content == ()


def test_nulls_inside_objects_and_limits_are_absent_beside_what_is_there():
    conversation = parse_example(
        example(
            "<image><bbox>",
            images=["a.png"],
            objects={"ref": None, "bbox": [[1, 2, 3, 4]], "bbox_type": None, "image_id": None, "width": None},
            chat_template_kwargs={"max_pixels": 50176.0, "fps": None, "maxpixels": None},
        )
    )
    assert conversation.boxes == (ObjectBox(Box(1, 2, 3, 4, "original"), 0),)
    assert conversation.image_settings == (("max_pixels", 50176),)


def test_tools_and_their_calls_are_the_same_after_the_way_through_arrow():
    def tool(name, **parameters):
        return {
            "type": "function",
            "function": {"name": name, "parameters": {"properties": parameters, "required": []}},
        }

    def call(name, **arguments):
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
        }

    user, answer = {"role": "user", "content": "look"}, {"role": "tool", "content": "5", "name": "zoom"}
    examples = [
        turns(user, call("zoom", x=1, sure=False), answer, tools=[tool("zoom", x={"type": "number", "enum": [1, 2]})]),
        turns(user, call("find", words=["a"]), tools=[tool("find", words={"type": "array"}), tool("zoom")]),
        turns(user, {"role": "assistant", "content": "no"}),
    ]
    through = pyarrow.array(examples).to_pylist()
    assert through[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "x": None,
        "sure": None,
        "words": ["a"],
    }
    for expected, found in zip(map(parse_example, examples), map(parse_example, through), strict=True):
        assert found.messages == expected.messages
    assert parse_example(through[0]).tools == parse_example(examples[0]).tools
    assert parse_example(through[1]).tools[0] == parse_example(examples[1]).tools[0]


def test_a_null_in_arguments_that_are_json_is_meant():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": null}'}}]}
    (message,) = parse_example(turns(call)).messages
    assert dict(message.fields)["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": None}}}]


def test_examples_are_the_same_after_the_way_through_arrow():
    text, image = {"type": "text", "text": "which <ref-object>?"}, {"type": "image_url", "image_url": {"url": "b.png"}}
    examples = [
        turns({"role": "user", "content": [text]}, {"role": "assistant", "content": [text], "loss": False}),
        turns({"role": "user", "content": [{"type": "image", "image": "a.png"}]}),
        turns({"role": "user", "content": [image, text]}, objects={"ref": ["cat"]}, chat_template_kwargs={"fps": 1.5}),
        turns({"role": "user", "content": [{"type": "video", "video": ["1.png", "2.png"]}]}, source="web"),
        turns(
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<bbox>?"}]},
            {"role": "assistant", "content": [text], "loss_scale": 0.5},
            images=["c.png"],
            objects={"bbox": [[1, 2, 3, 4]], "bbox_type": "real", "image_id": [0]},
            chat_template_kwargs={"max_pixels": 784},
        ),
    ]
    through = pyarrow.array(examples).to_pylist()
    assert through[0]["objects"] is None
    assert through[0]["messages"][0]["content"][0]["image"] is None
    assert [parse_example(example) for example in through] == [parse_example(example) for example in examples]


def test_numbers_of_numpy_are_numbers():
    objects = {"bbox": [np.array([1, 2, 3, 4]), [np.float32(1), np.int64(2)]], "image_id": np.array([0, 1])}
    conversation = parse_example(example("<image><image><bbox><bbox>", images=["a", "b"], objects=objects))
    box, point = Box(1, 2, 3, 4, "original"), Point(1, 2, "original")
    assert conversation.boxes == (ObjectBox(box, 0), ObjectBox(point, 1))


def test_every_key_of_a_picture_block_is_read():
    for key in ("image", "image_url", "url", "path", "base64"):
        block = {"type": "image", key: "a.png"}
        assert parse_example(turns({"role": "user", "content": [block]})).images == (Image("a.png"),)


def test_unknown_columns_are_carried_and_listed_once_with_a_hint():
    columns = UnknownColumns()
    for _ in range(3):
        conversation = parse_example(example(source="web", imagess=["a.png"], id=4, label=True))
        assert dict(conversation.extra) == {"source": "web", "imagess": ["a.png"], "id": 4, "label": True}
        columns.add(conversation)
    columns.add(parse_example(example(source="book")))
    columns.add(parse_example(example()))
    assert columns.lines() == [
        "column 'source' is not used, in 4 examples",
        "column 'imagess' is not used, in 3 examples. Is it meant to be 'images'?",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | st.just("<image>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WHOLE = turns(
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<ref-object>?"}]},
    {"role": "assistant", "content": "<bbox>", "loss": True, "loss_scale": 0.5},
    {"role": "assistant", "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}]},
    {"role": "tool", "content": "5", "tool_call_id": "1", "name": "f"},
    tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    videos=[],
    objects={"ref": ["the cat"], "bbox": [[1, 2, 3, 4]], "bbox_type": "real", "image_id": [0]},
    chat_template_kwargs={"max_pixels": 50176, "fps": 1.0},
)


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(list(places(WHOLE))), JSON)
def test_anything_anywhere_in_an_example_is_an_example_or_an_example_error(path, value):
    example = replaced(WHOLE, path, value)
    with contextlib.suppress(ExampleError):
        conversation = parse_example(example, ORIGIN)
        assert parse_example(conversation) is conversation
        return
    with pytest.raises(ExampleError, match=r"^examples.jsonl, line 12, field .*: ") as caught:
        parse_example(example, ORIGIN)
    str(caught.value).encode()


def test_deep_values_are_no_harm():
    deep = []
    for _ in range(50_000):
        deep = [deep]
    for path in places(WHOLE):
        if path:
            with contextlib.suppress(ExampleError):
                parse_example(replaced(WHOLE, path, deep), ORIGIN)
