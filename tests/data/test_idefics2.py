"""Idefics2's host side: tokens and pixels as transformers' processor gives them, and the specification's figures."""

import dataclasses

import numpy as np
import pytest

from jvlm import families
from jvlm.data import packing
from jvlm.data.errors import ExampleError
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.errors import UserError
from jvlm.families.idefics2.image_processor import (
    Idefics2ImageConfig,
    Idefics2ImageProcessor,
    edge_resize,
    table_positions,
)
from jvlm.weights import hf
from tests.idefics2 import CASES, FAKE, IMAGE, hf_inputs, turn, write_folder, write_tokenizer
from tests.support import Tiny, picture


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics2")
    values = write_folder(folder, split=request.param)
    config = hf.read_config(folder)
    return Tiny(folder, values, None, None, hf.load_processor(folder, config))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prompt", [False, True])
def test_tokens_and_pixels_equal_those_of_transformers(tiny, name, prompt):
    record = CASES[name]
    if prompt:
        record = {**record, "messages": record["messages"][:-1]}
    example, inputs = (
        tiny.processor.encode(record, generation_prompt=prompt),
        hf_inputs(tiny, record, generation_prompt=prompt),
    )
    np.testing.assert_array_equal(example.tokens, inputs["input_ids"][0])
    np.testing.assert_array_equal(example.vision_index >= 0, inputs["input_ids"][0] == tiny.config["image_token_id"])
    np.testing.assert_array_equal(example.positions, np.repeat(np.arange(example.length)[:, None], 3, 1))
    if "pixel_values" not in inputs:
        assert example.num_patches == 0
        return
    pixels, masks = inputs["pixel_values"][0].numpy(), inputs["pixel_attention_mask"][0].numpy()
    assert example.patch_segment_ids[-1] == len(pixels)
    for frame, (values, mask) in enumerate(zip(pixels, masks, strict=True), 1):
        h, w = int(mask[:, 0].sum()) // 14, int(mask[0].sum()) // 14
        cells = values[:, : h * 14, : w * 14].reshape(3, h, 14, w, 14).transpose(1, 3, 0, 2, 4).reshape(h * w, -1)
        ours = example.patches[example.patch_segment_ids == frame].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(ours, cells, atol=1e-5)


def test_the_loss_covers_the_answers_and_the_token_that_ends_them(tiny):
    example = tiny.processor.encode(CASES["several turns"])
    learnt = tiny.processor.tokenizer.decode(example.tokens[example.loss_weights > 0])
    assert learnt == " a dog<end_of_utterance> a cat<end_of_utterance>"


def test_a_tokenizer_without_a_template_gets_the_same_one(tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(write_tokenizer(tmp_path, template=False)))
    assert tokenizer.chat_template is None
    other = Processor(tokenizer, tiny.processor.model, tiny.processor.config)
    for name in CASES:
        np.testing.assert_array_equal(other.encode(CASES[name]).tokens, tiny.processor.encode(CASES[name]).tokens)


def test_a_video_is_a_list_of_images_that_are_not_split(tiny):
    frames = [picture(112, 84, i) for i in range(3)]
    as_video = tiny.processor.encode(turn("<video>what is it?", videos=[frames]))
    whole = Processor(tiny.processor.tokenizer, tiny.processor.model, with_split(tiny, False))
    as_images = whole.encode(turn("<image><image><image>what is it?", images=frames))
    np.testing.assert_array_equal(as_video.tokens, as_images.tokens)
    np.testing.assert_array_equal(as_video.patches, as_images.patches)


def with_split(tiny, split):
    return dataclasses.replace(
        tiny.processor.config, image=dataclasses.replace(tiny.processor.image_config, split=split)
    )


def test_truncation_takes_the_frames_of_the_turns_that_go(tiny):
    record = CASES["several turns"]
    example = tiny.processor.encode(record)
    first = tiny.processor.encode({"messages": record["messages"][:2], "images": record["images"][:1]})
    last_learnt = int(np.flatnonzero(example.loss_weights)[-1])
    cut = packing.truncate(example, last_learnt)
    assert len(cut.sizes) == 1
    np.testing.assert_array_equal(cut.patches, first.patches)
    np.testing.assert_array_equal(cut.vision_segment_ids, first.vision_segment_ids)


def test_an_example_may_change_its_edges_and_nothing_of_other_models(tiny):
    example = CASES["a large picture, brought down"]
    small = tiny.processor.encode({**example, "chat_template_kwargs": {"longest_edge": 56}})
    assert small.sizes[0].resized == (56, 42)
    with pytest.raises(ExampleError, match=r"max_pixels.*not a setting of this model's images.*longest_edge"):
        tiny.processor.encode({**example, "chat_template_kwargs": {"max_pixels": 5000}})


def test_the_published_token_counts():
    """66 tokens an image, 326 a split one, 131 two adjacent ones: specification, B5."""
    config = families.preset("idefics2_8b")
    vision = Idefics2ImageProcessor(config, Idefics2ImageConfig())
    one, five = (vision.image(picture(500, 400), Idefics2ImageConfig(split=s)) for s in (False, True))
    assert one.token_pattern == (FAKE, 64, FAKE)
    assert five.token_pattern == one.token_pattern * 5

    def tokens(*media):
        text = "".join(IMAGE * part if isinstance(part, int) else part for m in media for part in m.token_pattern)
        return text.replace(FAKE * 2, FAKE).count("<")

    assert (tokens(one), tokens(five), tokens(one, one)) == (66, 326, 131)
    assert vision.merged_delimiter == FAKE


# (height, width) -> (height, width), patches: specification, B4.
RESIZES = {
    (480, 640): (480, 640, 34, 45),
    (1080, 1920): (551, 980, 39, 70),
    (3508, 2480): (980, 692, 70, 49),
    (2000, 2000): (980, 980, 70, 70),
    (100, 3000): (378, 980, 27, 70),
    (300, 300): (378, 378, 27, 27),
    (981, 980): (980, 979, 70, 69),
}


@pytest.mark.parametrize("size", RESIZES)
def test_the_published_resizes(size):
    height, width, rows, columns = RESIZES[size]
    assert edge_resize(*size, 378, 980) == (height, width)
    if max(size) < 1000:
        image = Idefics2ImageProcessor(families.preset("idefics2_8b"), Idefics2ImageConfig()).image(
            picture(*size[::-1]), Idefics2ImageConfig(split=False)
        )
        assert len(image.patches) == rows * columns
        assert image.resized == (width, height)


def test_places_are_the_exact_floor_and_the_released_rule_differs_where_the_specification_says():
    from fractions import Fraction

    for patches in range(1, 71):
        exact = [int(Fraction(k, patches) * 70) for k in range(patches)]
        np.testing.assert_array_equal(table_positions(patches, 70), exact)
    different = {
        n: np.flatnonzero(table_positions(n, 70, "released") != table_positions(n, 70)).tolist() for n in range(1, 71)
    }
    assert {n: d for n, d in different.items() if d} == {
        25: [5, 10, 15, 20],
        49: [7, 14, 35, 42],
        50: [5, 10, 15, 20, 30, 40],
        55: [11, 22, 33, 44],
        58: [29],
    }
    with pytest.raises(UserError, match="known for tables of 70, not 27"):
        table_positions(5, 27, "released")


def test_settings_survive_their_files(tiny, tmp_path):
    processor = tiny.processor
    hf.write_sidecars(tmp_path, processor.model, processor, "float32")
    assert hf.load_processor(tmp_path, processor.model).config == processor.config
    (tmp_path / "jvlm_processor.json").unlink()
    assert hf.load_processor(tmp_path, processor.model).config == ProcessorConfig(processor.image_config, "json")


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1)])
def test_a_side_of_one_pixel_is_read_whole_and_refused_where_it_would_be_split(tiny, size):
    example = turn("<image>?", images=[np.full((*size, 3), 80, np.uint8)])
    if tiny.processor.image_config.split:
        with pytest.raises(ExampleError, match=rf"'images\[0\]': {size[1]} x {size[0]} pixels cannot be split"):
            tiny.processor.encode(example)
    else:
        assert (tiny.processor.encode(example).patches == 80).all()


def test_a_picture_smaller_than_a_patch_is_refused(tiny):
    example = turn("<image>?", images=[picture(40, 20)], chat_template_kwargs={"shortest_edge": 1, "longest_edge": 13})
    with pytest.raises(ExampleError, match=r"'images\[0\]': .* pixels hold no patch of 14 x 14"):
        tiny.processor.encode(example)
