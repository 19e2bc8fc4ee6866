"""Losses on answers, on the last one, or on all text; what an example says itself; the same when packed."""

from __future__ import annotations

import numpy as np
import pytest

from jvlm.data import packing
from jvlm.data.config import DataConfig
from jvlm.data.encode import Encode
from jvlm.data.errors import Origin
from tests.support import picture

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "<image>first?"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "second?"},
    {"role": "assistant", "content": "the dog"},
    {"role": "user", "content": "third?"},
    {"role": "assistant", "content": "the tree"},
]
END = "<|im_end|>"


def encoded(tiny, choice, *, given=None, **settings):
    """The example; ``given`` changes messages by their index."""
    messages = [{**message, **(given or {}).get(index, {})} for index, message in enumerate(CHAT)]
    encode = Encode(tiny.processor, DataConfig(loss=choice, seq_len=512, max_patches=512, **settings))
    record = {"messages": messages, "images": [picture(56, 84)]}
    (found,) = encode.random_map((Origin("memory", 1), record), np.random.default_rng(0))
    return found


def texts(tiny, example, weight=1.0):
    """The runs of tokens with a weight, as text."""
    inside = example.loss_weights == weight
    cuts = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(int))).reshape(-1, 2)
    return [tiny.processor.tokenizer.decode(example.tokens[a:b]) for a, b in cuts]


def test_answers_have_a_loss_with_the_token_that_ends_them(tiny):
    found = texts(tiny, encoded(tiny, "answers"))
    assert found == [f"the cat{END}", f"the dog{END}", f"the tree{END}"]


def test_the_last_answer_alone_has_a_loss(tiny):
    assert texts(tiny, encoded(tiny, "last_answer")) == [f"the tree{END}"]


def test_all_text_has_a_loss_and_tokens_of_media_have_none(tiny):
    example = encoded(tiny, "all")
    whole = tiny.processor.tokenizer.decode(example.tokens[example.media == 0])
    assert "".join(texts(tiny, example)) == whole
    assert (example.media > 0).sum() > 4
    assert not example.loss_weights[example.media > 0].any()
    assert not example.loss_weights[example.vision_index >= 0].any()


@pytest.mark.parametrize(
    ("choice", "given", "ones", "others"),
    [
        ("answers", {2: {"loss": False}, 4: {"loss_scale": 0.25}}, [f"the tree{END}"], {0.25: [f"the dog{END}"]}),
        ("last_answer", {2: {"loss": True}}, [f"the cat{END}", f"the tree{END}"], {}),
        ("last_answer", {4: {"loss_scale": 0.5}, 6: {"loss": False}}, [], {0.5: [f"the dog{END}"]}),
    ],
)
def test_what_a_turn_says_itself_comes_first(tiny, choice, given, ones, others):
    example = encoded(tiny, choice, given=given)
    assert texts(tiny, example) == ones
    for weight, expected in others.items():
        assert texts(tiny, example, weight) == expected
    assert set(np.unique(example.loss_weights)) == {0.0, *others} | ({1.0} if ones else set())


def test_with_a_loss_on_all_a_turn_can_still_say_that_it_has_none(tiny):
    example = encoded(tiny, "all", given={4: {"loss": False}})
    assert "the dog" not in "".join(texts(tiny, example))
    assert "second?" in "".join(texts(tiny, example))


def test_a_single_turn_of_the_last_answer_is_the_last(tiny):
    assert texts(tiny, encoded(tiny, "last_answer", single_turn_ratio=1.0)) == [f"the tree{END}"]


@pytest.mark.parametrize("choice", ["answers", "last_answer", "all"])
def test_packed_examples_keep_their_weights(tiny, choice):
    examples = [encoded(tiny, choice), encoded(tiny, choice, given={6: {"loss_scale": 0.5}})]
    batch = packing.assemble([examples], 512, 512)
    for number, example in enumerate(examples, 1):
        np.testing.assert_array_equal(batch.loss_weights[batch.segment_ids == number], example.loss_weights)
