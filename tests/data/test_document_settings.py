"""Rules that leave documents out, documents joined, and image settings drawn by example."""

from __future__ import annotations

import dataclasses
import json
import typing

import numpy as np
import pytest
from scipy import stats

from jvlm import configs
from jvlm.data import image_choice, pipeline
from jvlm.data.config import DataConfig, ImageChoice
from jvlm.data.cutting import Limits
from jvlm.data.document_config import DocumentConfig
from jvlm.data.encode import Encode, image_patch_limit
from jvlm.data.errors import Origin, Rejected
from jvlm.data.joining import joined
from jvlm.errors import UserError
from jvlm.weights import hf
from tests import idefics2
from tests.data.document_blocks import image, page, words
from tests.support import Tiny, picture


def encoded(tiny, record, rng=None, **fields):
    encode = Encode(tiny.processor, DataConfig(**{"seq_len": 512, "max_patches": 512, **fields}))
    return encode.random_map((Origin("pages.jsonl", 7), record), rng or np.random.default_rng(0))


RULES = {
    "max_images_in_a_row": (
        2,
        page(words("a"), image(), words(" \n"), image(), image(), words("b")),
        "3 images in a row",
    ),
    "max_images_at_end": (1, page(words("a"), image(), image()), "2 images at its end"),
    "min_image_side": (50, page(image(0, (56, 42)), words("a")), "an image of 56 x 42 pixels"),
    "max_image_aspect": (4.0, page(image(0, (252, 56)), words("a")), "an image of 252 x 56 pixels"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_leaves_a_document_out_counted_and_named_and_one_step_less_does_not(tiny, rule):
    limit, record, said = RULES[rule]
    (left,) = encoded(tiny, record, documents=DocumentConfig(**{rule: limit}), on_bad_example="error")
    assert isinstance(left, Rejected)
    assert (left.kind, left.reason, left.number) == ("skipped", said, 7)
    assert left.fix == f"Left out by data.documents.{rule} {limit:g}"
    allowed = {"min_image_side": 42, "max_image_aspect": 4.5}.get(rule, limit + 1)
    (kept,) = encoded(tiny, record, documents=DocumentConfig(**{rule: allowed}))
    assert kept.records == 1


@pytest.fixture(scope="module")
def fake_tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics2")
    values = idefics2.write_folder(folder, split=True)
    return Tiny(folder, values, None, None, hf.load_processor(folder, hf.read_config(folder)))


@pytest.mark.parametrize("family", ["tiny", "fake_tokens"])
def test_joined_documents_are_one_segment_with_their_tokens_in_a_row(request, family):
    processor = request.getfixturevalue(family).processor
    records = [page(image(n), words(f"circle {n}")) for n in range(5)] + [page(words("text"))]
    alone = [processor.encode(record) for record in records]
    found = joined(alone, 4, Limits(10**6, 10**6))
    assert [one.records for one in found] == [4, 2]
    for one, group in zip(found, (alone[:4], alone[4:]), strict=True):
        for name in ("tokens", "loss_weights", "patches", "patch_positions"):
            np.testing.assert_array_equal(getattr(one, name), np.concatenate([getattr(e, name) for e in group]))
        at = 0
        for number, example in enumerate(group):
            part = slice(at, at + example.length)
            positions = one.positions[part] - one.positions[at]
            np.testing.assert_array_equal(positions, example.positions)
            before = one.positions[:at].max(initial=-1)
            assert one.positions[at].tolist() == [before + 1] * 3
            seen = one.vision_index[part]
            features = len(example.vision_segment_ids)
            np.testing.assert_array_equal(np.where(seen >= 0, seen - number * features, -1), example.vision_index)
            at += example.length
        ids = one.patch_segment_ids
        assert set(np.diff(ids)) <= {0, 1}
        assert set(np.diff(one.patch_window_ids)) <= {0, 1}
        assert len(one.vision_segment_ids) == sum(len(e.vision_segment_ids) for e in group)
        assert one.vision_segment_ids.max() == ids.max()


def test_documents_are_joined_while_they_fit_and_only_with_those_of_their_source(tiny):
    one = tiny.processor.encode(page(words("a red circle.")))
    chat = dataclasses.replace(one, is_document=False)
    other = dataclasses.replace(one, source=1)
    limits = Limits(2 * one.length, 10)
    found = joined([one, other, one, chat, one, other], 9, limits)
    assert [(e.records, e.source, e.is_document) for e in found] == [
        (2, -1, True),
        (2, 1, True),
        (1, -1, False),
        (1, -1, True),
    ]
    assert joined([one, one], 1, limits) == [one, one]


def test_a_run_of_joined_captions_uses_each_once_and_goes_on_as_if_unbroken(tiny, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps({"text": f"circle {n}"}) + "\n" for n in range(20)))
    fields = {"batch_size": 1, "seq_len": 64, "max_patches": 0, "pack_window": 8}
    config = DataConfig(train=(str(path),), documents=DocumentConfig(join=3), **fields)

    def stream():
        return iter(pipeline.training_data(tiny.processor, config, seed=0, epochs=1)[0])

    whole = list(stream())
    assert sum(one.conversations for one in whole) == 20
    assert sum(one.batch.segment_ids.max() for one in whole) < 12
    first = stream()
    begin = [next(first)]
    rest = stream()
    rest.set_state(first.get_state())
    for one, other in zip(whole, begin + list(rest), strict=True):
        np.testing.assert_array_equal(one.batch.tokens, other.batch.tokens)


SPLIT = (ImageChoice(("split=true",)), ImageChoice(("split=false", "longest_edge=84"), 3.0))


def test_each_example_gets_one_of_the_choices_by_their_weights(fake_tokens):
    processor = fake_tokens.processor
    chat = {"messages": [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "a"}]}
    record = {**chat, "images": [picture(112, 84), picture(84, 112, 1)]}
    whole = dataclasses.replace(processor.image_config, split=False, longest_edge=84)
    expected = [processor.encode(record), processor.replace(image_config=whole).encode(record)]
    rng, counts = np.random.default_rng(0), [0, 0]
    for _ in range(200):
        (found,) = encoded(fake_tokens, record, rng, image_choices=SPLIT, seq_len=4096, max_patches=4096)
        equal = [np.array_equal(found.tokens, one.tokens) for one in expected]
        counts[equal.index(True)] += 1
        np.testing.assert_array_equal(found.patches, expected[equal.index(True)].patches)
    assert stats.chisquare(counts, [50, 150]).pvalue > 0.01


def test_what_an_example_sets_itself_comes_after_the_choice(fake_tokens):
    record = page(image(0, (112, 84)), words("a"), chat_template_kwargs={"longest_edge": 56})
    choice = (ImageChoice(("longest_edge=98",)),)
    (found,) = encoded(fake_tokens, record, image_choices=choice, seq_len=4096, max_patches=4096)
    assert found.sizes[0].resized == (56, 42)


def test_settings_are_looked_into_once_and_not_for_each_example(fake_tokens, monkeypatch):
    config = fake_tokens.processor.image_config
    image_choice.changed(config, {"split": False})

    def look(kind):
        raise AssertionError("the types of the settings were read again")

    monkeypatch.setattr(typing, "get_type_hints", look)
    assert image_choice.changed(config, {}) is config
    assert not image_choice.changed(config, {"split": False}).split


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("splitt=true", r"data.image_choices: 'splitt' is not a setting of this model's images; known: delimiter"),
        ("split=3", r"data.image_choices.split: 3 is not of type <class 'bool'>"),
        ("split", r"'split' is not of the form NAME=VALUE, like split=false"),
        ("longest_edge=1", r"shortest_edge 42 must be between 1 and longest_edge 1"),
    ],
)
def test_a_choice_that_the_model_does_not_know_is_refused_before_any_example(fake_tokens, setting, said):
    with pytest.raises(UserError, match=said):
        Encode(fake_tokens.processor, DataConfig(image_choices=(ImageChoice((setting,)),)))


def test_the_promise_made_to_attention_is_that_of_the_largest_choice(fake_tokens):
    processor = fake_tokens.processor
    config = DataConfig(
        max_patches=10**6, image_choices=(ImageChoice(("longest_edge=56",)), ImageChoice(("longest_edge=98",)))
    )
    assert image_patch_limit(processor.image_processor, processor.image_config, config) == 49


def test_the_papers_configs_read_documents_as_the_papers_say():
    """Figures of MM1 (arXiv 2403.09611), and of Idefics2's paper and training code."""
    assert configs.load("mm1_5/pretrain").data.documents == DocumentConfig(max_images=16)
    for name in ("idefics2/pretrain", "idefics2/stage1_lora", "idefics2/stage2_lora"):
        documents = configs.load(name).data.documents
        assert (documents.cut, documents.window_bonus) == ("sample_window", 2.0)
        # three in a row, and two at the end, are left out
        assert (documents.max_images_in_a_row, documents.max_images_at_end) == (2, 1)
        assert documents.join > 1
    tuned = configs.load("idefics2/sft_dora").data
    assert (tuned.shuffle_turns, tuned.max_turns, tuned.media_first, tuned.newline_probability) == (True, 7, True, 0.05)
    assert [(choice.settings, choice.weight) for choice in tuned.image_choices] == [
        (("split=true",), 1.0),
        (("split=false",), 1.0),
    ]


@pytest.mark.parametrize("stage", ["mimo_vl/stage1", "mimo_vl/stage2"])
def test_mimos_first_stages_take_captions_pages_and_text(tiny, stage):
    data = dataclasses.replace(configs.load(stage).data, seq_len=64, max_patches=192, max_image_patches=None)
    encode = Encode(tiny.processor, data)
    records = [page(image(), words("a cat")), page(words("the cat. " * 40), image(), words("end")), {"text": "alone"}]
    found = [encode.random_map((Origin("a.jsonl", 1), record), np.random.default_rng(0)) for record in records]
    assert [len(parts) > 1 for parts in found] == [False, True, False]
    assert all(part.loss_weights.any() for parts in found for part in parts)
