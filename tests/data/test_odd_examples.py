"""Whatever is wrong with one example is its own error: training goes on, and the check names the same ones."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvlm.data.check import check
from jvlm.data.config import DataConfig
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.pipeline import training_data
from jvlm.errors import UserError
from tests.data.test_examples import JSON, places, replaced
from tests.support import picture


def line(user="hi", answer="yes", **fields):
    return json.dumps(example(user, answer, **fields))


def example(user="hi", answer="yes", **fields):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **fields}


def boxed(box):
    whole = line("<image>where?", "<bbox>", images=["a.png"], objects={"bbox": [["HERE", 1, 90, 90]]})
    return whole.replace('"HERE"', box)


LIMITED = {"images": ["a.png"], "user": "<image>?"}
# line of the file -> field of the error, None for an example that can be used
LINES = {
    "good": (line(), None),
    "a picture": (line("<image>?", images=["a.png"]), None),
    "blank": ("", None),
    "half an emoji": (line(answer="ok \ud83d"), "messages[1].content"),
    "a whole emoji in two escapes": (line(answer="ok \ud83d\ude00"), None),
    "NaN in a box": (boxed("NaN"), "objects.bbox[0]"),
    "infinity in a box": (boxed("-Infinity"), "objects.bbox[0]"),
    "400 digits in a box": (boxed("1" * 400), "objects.bbox[0]"),
    "5000 digits in a box": (boxed("1" * 5000), "example"),
    "true in a box": (boxed("true"), "objects.bbox[0]"),
    "a box": (boxed("0"), None),
    "a box far outside": (boxed("-1e300"), "objects.bbox[0]"),
    "limits that contradict": (
        line(**LIMITED, chat_template_kwargs={"min_pixels": 90000, "max_pixels": 10000}),
        "chat_template_kwargs.min_pixels",
    ),
    "limits that contradict the model's": (
        line(**LIMITED, chat_template_kwargs={"min_pixels": 10**6}),
        "images[0]",
    ),
    "limits of another family": (
        line(**LIMITED, chat_template_kwargs={"max_tiles": 4}),
        "chat_template_kwargs.max_tiles",
    ),
    "NaN as a limit": (line(chat_template_kwargs={"fps": float("nan")}), "chat_template_kwargs.fps"),
    "one pixel": (line("<image>?", images=["dot.png"]), None),
    "one pixel high": (line("<image>?", images=["line.png"]), None),
    "a thread": (line("<image>?", images=["thread.png"]), "images[0]"),
    "a cut picture": (line("<image>?", images=["cut.png"]), "images[0]"),
    "no picture at all": (line("<image>?", images=["text.png"]), "images[0]"),
    "a picture that is missing": (line("<image>?", images=["missing.png"]), "images[0]"),
    "a picture with half an emoji": (line("<image>?", images=["\ud83d.png"]), "images[0]"),
    "a picture that is a number": (line("<image>?", images=[5]), "images[0]"),
    "a picture that is null": (line("<image>?", images=[None]), "images[0]"),
    "a frame that is missing": (line("<video>?", videos=[["a.png", "missing.png"]]), "videos[0]"),
    "deep": ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "example"),
    "a key twice": ('{"messages": [], "messages": []}', "messages"),
    "a list": ("[1, 2]", "example"),
    "null": ("null", "example"),
    "a word": ('"hi"', "example"),
    "cut": ('{"messages": [{"role"', "example"),
    "only a prompt": (json.dumps({"messages": [{"role": "user", "content": "hi"}]}), "messages"),
    "only an answer": (json.dumps({"messages": [{"role": "assistant", "content": "hi"}]}), None),
    "nothing learnt": (json.dumps({"messages": [{"role": "assistant", "content": "hi", "loss": 0}]}), "messages"),
    "private use marks in a question": (line("what is \ue0000\ue001 or \ue0001\ue001?"), None),
    "private use marks in an answer": (line(answer="\ue0000\ue001 \ue0007\ue001"), None),
    "a token of the family": (line("what is <|image_pad|>?"), "messages"),
    "a token of the family in a name": (line("is it <ref-object>?", objects={"ref": ["<|image_pad|>"]}), "messages"),
    "a picture of the system": (
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": "<image>legend"},
                    *example("<image>?")["messages"],
                ],
                "images": ["a.png", "dot.png"],
            }
        ),
        None,
    ),
    "half an emoji in a tool": (line(tools=[{"type": "function", "function": {"name": "\ud83d"}}]), "messages"),
    "deep arguments": (
        json.dumps({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "DEEP"}]}]}).replace(
            '"DEEP"', '{"a":' * 3000 + "1" + "}" * 3000
        ),
        "example",
    ),
    "unknown columns": (line(source="web", imagess=[]), None),
    "good again": (line(), None),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    picture(100, 100).save(folder / "a.png")
    for name, size in {"dot": (1, 1), "line": (100, 1), "thread": (1, 300)}.items():
        picture(100, 100).resize(size).save(folder / f"{name}.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "text.png").write_text("not a picture")
    path = folder / "examples.jsonl"
    path.write_text("\n".join(text for text, _ in LINES.values()))
    return path


EXPECTED = {number: field for number, (_, field) in enumerate(LINES.values(), 1) if field is not None}
USABLE = len(LINES) - len(EXPECTED) - 1  # one line is blank


@pytest.mark.parametrize("single_turn_ratio", [0.0, 1.0])
def test_training_on_skip_survives_every_odd_example_and_names_it(tiny, data, single_turn_ratio):
    config = DataConfig(
        train=(str(data),), on_bad_example="skip", seq_len=512, max_patches=1024, single_turn_ratio=single_turn_ratio
    )
    batches = list(training_data(tiny.processor, config, seed=0, epochs=1)[0])
    rejected = {r.number: r.field for batch in batches for r in batch.rejected}
    assert rejected == EXPECTED
    assert sum(batch.conversations for batch in batches) == USABLE


def test_the_check_names_the_same_examples(tiny, data):
    report = check([str(data)], tiny.processor)
    found = {error.origin.number: error.field for error in report.rejected}
    assert found == EXPECTED
    assert report.text().count("imagess") == report.text().count("'source'") == 1


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "hi"}],
        [{"role": "system", "content": "be brief"}],
        [{"role": "system", "content": "be brief"}, {"role": "assistant", "content": "hi"}],
    ],
)
def test_an_example_in_which_nothing_is_asked_is_named_in_generation(tiny, messages):
    with pytest.raises(ExampleError, match=r"examples.jsonl, line 3, field 'messages': nothing to answer"):
        tiny.processor.encode(
            parse_example({"messages": messages}, Origin("examples.jsonl", 3)), generation_prompt=True
        )


def test_a_final_answer_takes_its_pictures_along_when_it_is_dropped(tiny):
    images = [picture(56, 56), picture(84, 84)]
    asked = example("<image>draw <ref-object>", "<image> of <ref-object> at <bbox>", images=images)
    objects = {"ref": ["a cat", "it"], "bbox": [[1, 2, 3, 4]], "image_id": [1]}
    prompt = tiny.processor.encode({**asked, "objects": objects}, generation_prompt=True)
    plain = tiny.processor.encode(example("<image>draw a cat", images=images[:1]), generation_prompt=True)
    np.testing.assert_array_equal(prompt.tokens, plain.tokens)
    np.testing.assert_array_equal(prompt.patches, plain.patches)


@pytest.mark.parametrize("raised", [KeyError("frames"), IndexError("3"), ValueError("2 and 3"), StopIteration("end")])
def test_a_fault_of_the_program_is_a_crash_and_not_the_error_of_an_example(tiny, data, monkeypatch, raised):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(type(tiny.processor.template), "tokenize", fail)
    config = DataConfig(train=(str(data),), on_bad_example="skip", seq_len=512, max_patches=1024)
    with pytest.raises(RuntimeError if isinstance(raised, StopIteration) else type(raised)):
        list(training_data(tiny.processor, config, seed=0, epochs=1)[0])


def test_what_the_libraries_of_data_refuse_is_the_error_of_the_example(tiny, monkeypatch):
    def fail(*_, **__):
        raise UserError("no such token")

    monkeypatch.setattr(type(tiny.processor.template), "tokenize", fail)
    with pytest.raises(ExampleError, match=r"examples.jsonl, line 3, field 'messages': no such token"):
        tiny.processor.encode(parse_example(example(), Origin("examples.jsonl", 3)))


ENCODED = example(
    [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<ref-object>?"}],
    "<bbox>",
    objects={"ref": ["the cat"], "bbox": [[1, 2, 3, 4]], "bbox_type": "real", "image_id": [0]},
)


def test_anything_anywhere_is_encoded_or_is_the_error_of_the_example(tiny, data):
    processor = tiny.processor.replace(media_roots=(str(data.parent),))
    assert processor.encode(ENCODED).num_patches

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(list(places(ENCODED))), JSON)
    def encode(path, value):
        with contextlib.suppress(ExampleError):
            processor.encode(replaced(ENCODED, path, value))

    encode()
