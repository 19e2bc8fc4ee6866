"""A turn on its own has what its messages hold, whatever their roles: against examples taken apart by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvlm.data.boxes import Point
from jvlm.data.content import Conversation, Image, Message, ObjectBox, ObjectName, Text, Video
from jvlm.data.examples import parse_example, tagged
from jvlm.data.turns import next_turn, single_turns, without_answer
from jvlm.evaluation.clients import Reply
from jvlm.evaluation.questions import questions_of
from jvlm.evaluation.score import ask
from tests.support import picture


def taken_apart(example: Conversation):
    """(role, weight, [words and items in their order]) of each message.

    An item is (tag, name); a box also has the name of the picture that it is on.
    """
    images = {image.index: image.source for image in example.images}
    atoms = {
        Text: lambda part: part.text,
        Image: lambda part: ("<image>", part.source),
        Video: lambda part: ("<video>", *part.frames),
        ObjectName: lambda part: ("<ref-object>", part.name),
        ObjectBox: lambda part: ("<bbox>", part.region.x, images.get(part.image)),
    }
    return [(m.role, m.loss_weight, [atoms[type(part)](part) for part in m.content]) for m in example.messages]


def prompt_of(messages, answer):
    """Backwards from an answer: the messages of its prompt, or None where it answers nothing."""
    first = answer - 1
    while first >= 0 and messages[first][0] == "assistant":
        first -= 1
    if first < 0 or messages[first][0] == "system":
        return None
    last = first
    while first > 0 and messages[first - 1][0] != "system":
        if messages[first][0] == "user" and messages[first - 1][0] == "assistant":
            break
        first -= 1
    return range(first, last + 1)


def is_medium(atom):
    return isinstance(atom, tuple) and atom[0] in ("<image>", "<video>")


def without_pictures(atoms):
    """The atoms, boxes without the picture that they are on."""
    return [atom[:2] if isinstance(atom, tuple) else atom for atom in atoms]


def alone_by_hand(messages):
    result = []
    for answer, (role, weight, _) in enumerate(messages):
        prompt = prompt_of(messages, answer) if role == "assistant" else None
        if prompt is None:
            continue
        chosen = [i for i in range(answer + 1) if messages[i][0] == "system" or i in prompt or i == answer]
        needed = {a[2] for i in chosen for a in messages[i][2] if isinstance(a, tuple) and a[0] == "<bbox>"}
        carried = [
            atom
            for i, (other, _, atoms) in enumerate(messages)
            for atom in atoms
            if i not in chosen and is_medium(atom) and ((other == "user" and i < answer) or atom[1] in needed)
        ]
        roles = [messages[i][0] for i in prompt]
        at = prompt[roles.index("user") if "user" in roles else roles.index("tool")]
        result.append(
            [(messages[i][0], weight if i == answer else 0.0, carried * (i == at) + messages[i][2]) for i in chosen]
        )
    return result


@st.composite
def conversations(draw):
    roles = draw(st.lists(st.sampled_from(("user", "assistant", "tool", "assistant", "user")), min_size=1, max_size=9))
    roles = ["system"] * draw(st.booleans()) + roles
    kinds = [draw(st.lists(st.sampled_from((Image, Video, ObjectName, ObjectBox)), max_size=3)) for _ in roles]
    images = sum(kind is Image for of_message in kinds for kind in of_message)
    messages, counts = [], Counter()
    for index, (role, of_message) in enumerate(zip(roles, kinds, strict=True)):
        parts = [Text(f"words {index} ")]
        for kind in of_message:
            number, name = counts[kind], f"{kind.__name__} {counts[kind]} of {index}"
            counts[kind] += 1
            if kind is Image:
                parts.append(Image(name, number))
            elif kind is Video:
                parts.append(Video((name,), number))
            elif kind is ObjectName:
                parts.append(ObjectName(name))
            elif images:
                parts.append(ObjectBox(Point(number, 0, "original"), draw(st.integers(0, images - 1))))
        weight = draw(st.sampled_from((0.0, 0.5, 1.0))) if role == "assistant" else 0.0
        parts.append(Text(draw(st.sampled_from(("", " end", "<image>")))))
        messages.append(Message(role, tuple(parts), weight))
    return Conversation(tuple(messages))


@settings(max_examples=150, deadline=None)
@given(conversations())
def test_every_item_goes_to_the_turn_in_whose_message_its_tag_stands(example):
    assert [taken_apart(turn) for turn in single_turns(example)] == alone_by_hand(taken_apart(example))


@settings(max_examples=120, deadline=None)
@given(conversations())
def test_a_chain_is_the_example_with_the_models_words_in_place_of_its_answers(example):
    whole, said = taken_apart(example), []
    asked = [i for i, (role, *_) in enumerate(whole) if role == "assistant" and prompt_of(whole, i) is not None]
    for end in asked:
        turn = taken_apart(next_turn(example, said))
        assert len(turn) == end + 1
        for index, (message, found) in enumerate(zip(whole, turn, strict=False)):
            words = [f"said {index} <image>"] if index in asked and index < end else message[2]
            # pictures of an answer that later boxes are on come before the question
            extra = len(found[2]) - len(words)
            assert all(is_medium(atom) for atom in found[2][:extra])
            assert without_pictures(found[2][extra:]) == without_pictures(words)
        named = {(a[1], a[2]) for _, _, atoms in whole for a in atoms if isinstance(a, tuple) and a[0] == "<bbox>"}
        later = {m[1] for _, _, atoms in whole[end + 1 :] for m in atoms if is_medium(m)}
        for _, _, atoms in turn:
            for atom in atoms:
                if isinstance(atom, tuple) and atom[0] == "<bbox>":
                    assert (atom[1], atom[2]) in named or atom[2] is None
                    assert atom[2] not in later
        said.append(f"said {end} <image>")
    assert next_turn(example, said) is None


@settings(max_examples=100, deadline=None)
@given(conversations())
def test_a_prompt_leaves_out_the_final_answer_and_what_belongs_to_it(example):
    whole = taken_apart(example)
    prompt = taken_apart(without_answer(example))
    kept = whole[:-1] if whole[-1][0] == "assistant" else whole
    assert [without_pictures(atoms) for *_, atoms in prompt] == [without_pictures(atoms) for *_, atoms in kept]


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def _sources(example):
    return tuple(image.source for image in example.images)


def _names(example):
    return [part.name for m in example.messages for part in m.content if isinstance(part, ObjectName)]


def test_a_picture_of_a_tool_belongs_to_the_turn_that_follows_it():
    example = parse_example(
        {
            "messages": [
                message("user", "<image>what?"),
                message("assistant", "zoom"),
                message("tool", "<image>"),
                message("assistant", "green"),
                message("user", "<image>and this?"),
                message("assistant", "blue"),
            ],
            "images": ["red.png", "green.png", "blue.png"],
        }
    )
    zoom, green, blue = single_turns(example)
    assert _sources(zoom) == ("red.png",)
    assert _sources(green) == ("red.png", "green.png")
    assert [tagged(m.content) for m in green.messages] == ["<image>what?", "zoom", "<image>", "green"]
    assert [m.loss_weight for m in green.messages] == [0, 0, 0, 1]
    assert _sources(blue) == ("red.png", "blue.png")
    assert [tagged(m.content) for m in blue.messages] == ["<image><image>and this?", "blue"]


def test_names_and_boxes_of_the_system_turn_stay_there():
    example = parse_example(
        {
            "messages": [
                message("system", "you look for <ref-object> at <bbox> in <image>"),
                message("user", "<image>is it <ref-object>?"),
                message("assistant", "<ref-object>"),
            ],
            "images": ["legend.png", "photo.png"],
            "objects": {"ref": ["cats", "a dog", "a cow"], "bbox": [[1, 2]], "image_id": [0]},
        }
    )
    (question,) = questions_of(example)
    assert _sources(question.conversation) == ("legend.png", "photo.png")
    assert _names(question.conversation) == ["cats", "a dog"]
    assert question.expected == "a cow"
    assert len(question.conversation.boxes) == 1


def test_a_greeting_is_no_question_and_stays_in_a_chain():
    example = parse_example(
        {
            "messages": [
                message("assistant", "hello, I look at <ref-object>"),
                message("user", "what is it?"),
                message("assistant", "<ref-object>"),
                message("user", "sure?"),
                message("assistant", "yes"),
            ],
            "objects": {"ref": ["pictures", "a cat"]},
        }
    )
    assert [q.expected for q in questions_of(example)] == ["a cat", "yes"]
    chained = next_turn(example, ["a dog"])
    assert [tagged(m.content) for m in chained.messages] == [
        "hello, I look at <ref-object>",
        "what is it?",
        "a dog",
        "sure?",
        "yes",
    ]
    assert _names(chained) == ["pictures"]


@pytest.mark.parametrize("how", ["independent", "multi_turn"])
def test_the_model_is_shown_the_pictures_of_the_turn(tiny, monkeypatch, how):
    shown = []

    class Remember:
        def __init__(self, model, processor, **settings):
            self.processor = processor

        def replies(self, prompts, decoding):
            for prompt in prompts:
                example = self.processor.encode(prompt.example, generation_prompt=True)
                shown.append([sizes.original for sizes in example.sizes])
                yield Reply(prompt.id, "green")

    monkeypatch.setattr("jvlm.evaluation.score.LocalClient", Remember)
    record = parse_example(
        {
            "messages": [
                message("system", "<image>legend"),
                message("user", "<image>what?"),
                message("assistant", "zoom"),
                message("tool", "<image>"),
                message("assistant", "green"),
                message("user", "<image>and this?"),
                message("assistant", "blue"),
            ],
            "images": [np.asarray(picture(56 + 28 * i, 56)) for i in range(4)],
        }
    )
    legend, red, green, blue = [(56 + 28 * i, 56) for i in range(4)]
    answers = ask(tiny.model, tiny.processor, [record], ask=how)
    assert [a.score for a in answers] == [0, 1, 0]
    last = [legend, red, blue] if how == "independent" else [legend, red, green, blue]
    assert shown == [[legend, red], [legend, red, green], last]


def test_calls_of_tools_are_learnt_but_not_asked_and_stay_in_a_chain():
    call = {"function": {"name": "zoom", "arguments": {}}}
    example = parse_example(
        {
            "messages": [
                message("user", "what?"),
                message("assistant", "let me see"),
                message("user", "well?"),
                message("assistant", "", tool_calls=[call]),
                message("tool", "a cat", name="zoom"),
                message("assistant", "a cat"),
            ]
        }
    )
    assert [tagged(turn.messages[-1].content) for turn in single_turns(example)] == ["let me see", "", "a cat"]
    assert [m.fields for m in single_turns(example)[-1].messages] == [m.fields for m in example.messages[2:]]
    assert [q.expected for q in questions_of(example)] == ["let me see", "a cat"]
    chained = next_turn(example, ["I see nothing"])
    assert [tagged(m.content) for m in chained.messages] == ["what?", "I see nothing", "well?", "", "a cat", "a cat"]
    assert [m.fields for m in chained.messages] == [m.fields for m in example.messages]


@pytest.mark.parametrize("answer", ["<image>", "<bbox> and <ref-object>", "<video>", "an <image> of <|im_end|>"])
def test_an_answer_of_the_model_that_spells_tags_is_asked_after_as_the_text_that_it_is(tiny, answer):
    objects = {"ref": ["the cat"], "bbox": [[1, 2, 3, 4]]}
    record = parse_example(
        {
            "messages": [
                message("user", "<image>where?"),
                message("assistant", "<ref-object> at <bbox>"),
                message("user", "sure?"),
                message("assistant", "yes"),
            ],
            "images": [picture(56, 56)],
            "objects": objects,
        }
    )
    prompt = without_answer(next_turn(record, [answer]))
    assert prompt.messages[1].content == (Text(answer),)
    example = tiny.processor.encode(prompt, generation_prompt=True)
    assert len(example.sizes) == 1
    assert answer in tiny.processor.tokenizer.decode(example.tokens)
