"""Shuffled turns and upscaled images: what they keep, how often they come, and that they follow from the seed alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jvlm.data import pipeline
from jvlm.data.augmentation import augmented, shuffle_turns, upscale
from jvlm.data.config import DataConfig
from jvlm.data.content import Image, Text
from jvlm.data.encode import Encode
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.errors import UserError
from tests.support import picture

TURNS = 5


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def example(**fields):
    """Five questions, the first with two pictures and the third with one; the second has a box on the third picture."""
    asked = ["<image>one<image>?", "two <bbox>?", "<image>three?", "four?", "five?"]
    turns = [message for n, text in enumerate(asked) for message in (user(text), assistant(f"answer {n}"))]
    return {
        "messages": [{"role": "system", "content": "be brief"}, *turns],
        "images": [picture(56, 56, n) for n in range(3)],
        "objects": {"ref": [], "bbox": [[1, 2, 30, 40]], "image_id": [2]},
        **fields,
    }


def words(conversation):
    return [message.text for message in conversation.messages]


def test_questions_keep_their_answers_and_pictures_come_first_in_their_order():
    before = parse_example(example())
    found = shuffle_turns(before, np.random.default_rng(1))
    assert words(found)[0] == "be brief"
    pairs = list(zip(words(found)[1::2], words(found)[2::2], strict=True))
    assert pairs != list(zip(words(before)[1::2], words(before)[2::2], strict=True))
    assert sorted(pairs) == sorted(zip(words(before)[1::2], words(before)[2::2], strict=True))
    assert found.messages[1].media == found.media == before.media
    assert [image.index for image in found.images] == [0, 1, 2]
    assert [box.image for box in found.boxes] == [2]
    assert [m.loss_weight for m in found.messages] == [0.0, *[0.0, 1.0] * TURNS]


def test_every_order_is_as_likely():
    conversation = parse_example(example())
    rng = np.random.default_rng(0)
    first = [int(words(shuffle_turns(conversation, rng))[2][-1]) for _ in range(2000)]
    assert stats.chisquare(np.bincount(first, minlength=TURNS)).pvalue > 0.01


def test_so_many_turns_stay_as_are_asked_for():
    found = shuffle_turns(parse_example(example()), np.random.default_rng(0), 2)
    assert len(found.messages) == 5
    assert len(found.images) == 3


KEPT = {
    "ordered": example(ordered=True),
    "a single question": {"messages": [user("a?"), assistant("b")]},
    "two answers in a row": {"messages": [user("a?"), assistant("b"), assistant("c"), user("d?")]},
    "a picture in an answer": {
        "messages": [user("a?"), assistant("<image>b"), user("c?"), assistant("d")],
        "images": [picture(56, 56)],
    },
    "a call of a tool": {
        "messages": [
            user("a?"),
            assistant("", tool_calls=[{"type": "function", "function": {"name": "zoom", "arguments": {}}}]),
            user("b?"),
            assistant("c"),
        ]
    },
}


@pytest.mark.parametrize("name", KEPT)
def test_conversations_whose_turns_depend_on_their_order_keep_it(name):
    conversation = parse_example(KEPT[name])
    for seed in range(5):
        assert shuffle_turns(conversation, np.random.default_rng(seed)) == conversation


def test_an_example_says_ordered_with_true_or_false():
    assert words(shuffle_turns(parse_example(example(ordered=False)), np.random.default_rng(1)))[1] != "one?"
    with pytest.raises(ExampleError, match=r"field 'ordered': 'maybe' is not true or false"):
        shuffle_turns(parse_example(example(ordered="maybe")), np.random.default_rng(0))


def test_so_many_images_are_upscaled_by_factors_of_a_triangular_distribution():
    config = DataConfig(upscale_probability=0.5, upscale_range=(1.5, 2.0))
    rng, conversation = np.random.default_rng(0), parse_example(example())
    factors = [image.upscale for _ in range(1000) for image in upscale(conversation, config, rng).images]
    changed = [factor for factor in factors if factor != 1.0]
    assert stats.binomtest(len(changed), len(factors), 0.5).pvalue > 0.01
    assert stats.kstest(changed, stats.triang(1.0, 1.5, 0.5).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("size", "factor", "limit", "expected"),
    [
        ((100, 50), 1.5, 980, (150, 75)),
        ((600, 300), 2.0, 980, (980, 490)),
        ((1000, 20), 2.0, 980, (1000, 20)),
        ((3, 2), 1.0, None, (3, 2)),
    ],
)
def test_an_image_grows_up_to_the_longest_edge_and_never_shrinks(size, factor, limit, expected):
    assert Image(None, 0, factor, limit).upscaled_size(size) == expected


def test_an_upscaled_image_costs_more_patches_and_boxes_stay_in_the_pixels_of_the_file(tiny):
    record = {
        "messages": [user("<image>where is it?"), assistant("<bbox>")],
        "images": [picture(56, 84)],
        "objects": {"ref": [], "bbox": [[14, 28, 42, 70]]},
    }
    conversation = parse_example(record)
    larger = conversation.map(lambda p: dataclasses.replace(p, upscale=2.0) if isinstance(p, Image) else p)
    plain, grown = (tiny.processor.encode(c) for c in (conversation, larger))
    assert grown.num_patches == 4 * plain.num_patches
    (before,), (after,) = plain.sizes, grown.sizes
    assert before.original == after.original == (56, 84)
    assert after.resized == (2 * before.resized[0], 2 * before.resized[1])
    answers = [tiny.processor.decode(e.tokens[e.loss_weights > 0]) for e in (plain, grown)]
    assert "[14, 28, 42, 70]" in answers[0]
    assert "[28, 56, 84, 140]" in answers[1]


SETTINGS = {"shuffle_turns": True, "upscale_probability": 0.5, "upscale_range": (1.5, 3.0)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(6):
        picture(56, 56, number).save(folder / f"{number}.png")
        turns = [m for t in range(3) for m in (user(f"{'' if t else '<image>'}{number} {t}?"), assistant(f"yes {t}"))]
        records.append({"messages": turns, "images": [f"{number}.png"]})
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(train=(str(path),), batch_size=1, seq_len=512, max_patches=512, pack_window=3, **SETTINGS)


def batches(tiny, config, count, *, position=None):
    """(batches, iterator after them)."""
    stream = iter(pipeline.training_data(tiny.processor, config, seed=3)[0])
    if position is not None:
        stream.set_state(position)
    return [next(stream).batch for _ in range(count)], stream


def equal(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "patches", "patch_segment_ids")
    )


def test_a_run_that_goes_on_draws_what_an_unbroken_one_does_and_each_epoch_is_another(tiny, data):
    whole, _ = batches(tiny, data, 8)
    _, stopped = batches(tiny, data, 3)
    rest, _ = batches(tiny, data, 5, position=stopped.get_state())
    assert all(equal(one, other) for one, other in zip(whole[3:], rest, strict=True))
    again, _ = batches(tiny, dataclasses.replace(data, read_threads=1), 8)
    assert all(equal(one, other) for one, other in zip(whole, again, strict=True))

    def seen(batch):
        return {batch.tokens[0, batch.segment_ids[0] == n].tobytes() for n in range(1, batch.segment_ids.max() + 1)}

    # windows of three examples: two batches or more are an epoch
    assert not seen(whole[0]) & seen(whole[-1])


def test_without_them_nothing_more_is_drawn(tiny, data):
    plain = dataclasses.replace(data, shuffle_turns=False, upscale_probability=0.0, single_turn_ratio=0.5)
    encode = Encode(tiny.processor, plain)
    record = json.loads(Path(data.train[0]).read_text().partition("\n")[0])
    used = np.random.default_rng(0)
    encode.read((Origin(data.train[0], 1), record), used)
    alone = np.random.default_rng(0)
    if alone.random() < 0.5:
        alone.choice(3, p=np.ones(3) / 3)
    assert used.random() == alone.random()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"upscale_range": (2.0, 1.5)}, r"data.upscale_range is a smaller and a larger factor, both from 1 on"),
        ({"upscale_range": (0.5, 1.5)}, r"data.upscale_range is a smaller"),
        ({"upscale_probability": 1.5}, r"data.upscale_probability must be from 0 to 1, got 1.5"),
        ({"max_turns": 3}, r"data.max_turns chooses among shuffled turns: set data.shuffle_turns true"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        DataConfig(**fields)


def test_media_come_first_whether_or_not_turns_are_shuffled():
    conversation = parse_example(example())
    config = DataConfig(media_first=True)
    found = augmented(conversation, config, np.random.default_rng(0))
    assert [message.text for message in found.messages] == words(conversation)
    assert found.messages[1].media == conversation.media == found.media
    alone = parse_example({"messages": [user("what is <image>?"), assistant("b")], "images": [picture(56, 56)]})
    for shuffled in (False, True):
        config = DataConfig(media_first=True, shuffle_turns=shuffled)
        question = augmented(alone, config, np.random.default_rng(0)).messages[0]
        assert [type(part) for part in question.content] == [Image, Text]
    assert augmented(alone, DataConfig(shuffle_turns=True), np.random.default_rng(0)) == alone


def test_so_many_questions_begin_on_a_new_line_behind_their_images():
    rng, conversation = np.random.default_rng(0), parse_example(example())
    config, begun = DataConfig(newline_probability=0.05), 0
    for _ in range(400):
        found = augmented(conversation, config, rng)
        for before, after in zip(conversation.messages, found.messages, strict=True):
            assert after.text.removeprefix("\n") == before.text
            assert (after.media, after.boxes) == (before.media, before.boxes)
            assert not (after.text != before.text and after.role != "user")
            begun += after.text != before.text
            if after.text != before.text and after.media:
                assert isinstance(after.content[0], Image)
    assert stats.binomtest(begun, 400 * TURNS, 0.05).pvalue > 0.01
