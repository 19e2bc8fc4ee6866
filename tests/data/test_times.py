"""Moments and spans of videos: as text in each form, back from answers, and in examples of files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jvlm.data.content import ObjectTime
from jvlm.data.errors import ExampleError
from jvlm.data.examples import parse_conversation
from jvlm.data.processor import Processor
from jvlm.data.time_formats import parse, render
from jvlm.evaluation.questions import questions_of
from jvlm.evaluation.score import score

WRITTEN = [
    ((12.4, 31.0), "[00:12, 00:31]", "[12.4s, 31.0s]", "[<12.4 seconds>, <31.0 seconds>]"),
    ((59.9, 61.5), "[00:59, 01:02]", "[59.9s, 61.5s]", "[<59.9 seconds>, <61.5 seconds>]"),
    ((3599.0, 3723.2), "[59:59, 1:02:03]", "[3599.0s, 3723.2s]", "[<3599.0 seconds>, <3723.2 seconds>]"),
    ((7.96,), "00:07", "8.0s", "<8.0 seconds>"),
]


@pytest.mark.parametrize(("seconds", "clock", "plain", "frames"), WRITTEN)
def test_each_form_writes_a_time(seconds, clock, plain, frames):
    assert [render(seconds, form) for form in ("clock", "seconds", "frames")] == [clock, plain, frames]


@given(
    st.lists(st.floats(0, 90_000), min_size=1, max_size=2).map(sorted), st.sampled_from(("clock", "seconds", "frames"))
)
def test_what_is_written_is_read_back(seconds, form):
    (found,) = parse(f"From then on: {render(seconds, form)}.")
    assert len(found) == len(seconds)
    assert np.allclose(found, seconds, atol=1.0 if form == "clock" else 0.051)
    if form == "clock":  # a span begins no later than it did
        assert found[0] <= seconds[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>[00:01, 00:02]</think>It is [00:03, 00:05].", [(3.0, 5.0)]),
        ("at 00:07 and at 1:00:00", [(7.0,), (3600.0,)]),
        ("[1.5s, 2 seconds] or 3 sec", [(1.5, 2.0), (3.0,)]),
        ("[00:09, 00:03]", []),
        ("3 cats, 5 dogs, [3, 5], 12:345", []),
        ("", []),
    ],
)
def test_times_are_found_in_answers(text, found):
    assert parse(text) == found


@pytest.mark.parametrize("seconds", [(), (1.0, 2.0, 3.0), (-1.0,), (float("nan"),), (2.0, 1.0)])
def test_what_is_no_time_is_not_written(seconds):
    with pytest.raises(ValueError, match=r"no time|before it begins"):
        render(seconds, "clock")


def _example(answer="It opens at <time>.", times=((12.4, 31.0),), videos=(("a.png",),), question="<video>When?"):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "videos": [list(frames) for frames in videos], "objects": {"time": list(times)}}


def test_an_example_holds_its_times_in_order_beside_names_and_boxes():
    example = _example("<time>, then <time>: <ref-object>", [[12.4, 31], np.float32(5)])
    example["objects"]["ref"] = ["the door"]
    parts = parse_conversation(example).messages[-1].content
    assert [part for part in parts if isinstance(part, ObjectTime)] == [ObjectTime((12.4, 31.0)), ObjectTime((5.0,))]


def test_without_times_the_tag_is_words():
    example = _example(times=())
    assert parse_conversation(example).messages[-1].text == "It opens at <time>."


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"times": [[3, 2]]}, r"objects.time\[0\].*ends before it begins"),
        ({"times": [[1, 2, 3]]}, r"objects.time\[0\].*no time"),
        ({"times": ["00:12"]}, r"objects.time\[0\].*no time"),
        ({"times": [True]}, r"objects.time\[0\].*no time"),
        ({"times": [-1]}, r"objects.time\[0\].*no time"),
        ({"times": [1, 2]}, r"1 <time> tags but 2 entries"),
        ({"videos": (), "question": "When?"}, "without a video"),
    ],
)
def test_bad_times_are_named(changed, message):
    with pytest.raises(ExampleError, match=message):
        parse_conversation(_example(**changed))


@pytest.mark.parametrize(("form", "text"), [("clock", "[00:12, 00:31]"), ("seconds", "[12.4s, 31.0s]")])
def test_the_tokens_are_those_of_the_written_times(tiny, form, text):
    processor = Processor(
        tiny.processor.tokenizer, tiny.processor.model, dataclasses.replace(tiny.processor.config, time_format=form)
    )
    frame = np.zeros((56, 56, 3), np.uint8)
    tagged = processor.encode(_example(videos=[[frame, frame]]))
    plain = _example(f"It opens at {text}.", times=(), videos=[[frame, frame]])
    assert tagged.tokens.tolist() == processor.encode(plain).tokens.tolist()
    assert tagged.loss_weights.tolist() == processor.encode(plain).loss_weights.tolist()


@pytest.mark.parametrize(
    ("times", "answer", "right"),
    [
        ([[12, 30]], "From [00:14, 00:30].", 1.0),
        ([[12, 30]], "From [00:25, 00:50].", 0.0),
        ([[12, 30]], "From [00:14, 00:30] and [01:00, 01:10].", 0.0),
        ([[12, 30]], "at 00:14", 0.0),
        ([[12, 30]], "I cannot tell.", 0.0),
        ([7.6], "00:07", 1.0),
        ([7.6], "00:09", 0.0),
    ],
)
def test_answers_with_times_are_right_where_they_overlap(tiny, times, answer, right):
    (question,) = questions_of(parse_conversation(_example(times=times)))
    assert question.expected == "It opens at <time>."
    assert score(question, answer, tiny.processor).score == right
