"""Lengths that attention is compiled for hold for every picture, or the example is refused or made to fit."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jvlm.data import packing, pipeline
from jvlm.data.boxes import Box, Sizes
from jvlm.data.encode import Encode, image_patch_limit
from jvlm.data.errors import ExampleError, Origin, Rejected
from jvlm.data.merged_images import window_order
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.data.smart_resize import largest_area, smart_resize
from jvlm.families.idefics2.image_processor import Idefics2ImageConfig, edge_resize
from jvlm.families.idefics3.image_processor import Idefics3ImageConfig
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.families.qwen2_vl.image_processor import Qwen2ImageConfig
from jvlm.families.qwen3_vl.image_processor import Qwen3ImageConfig
from jvlm.training import resolve, starting_model
from jvlm.training.supervised import supervised_loss
from tests.parallel import models
from tests.training import support

SIDES = sorted({*range(1, 70), *(int(1.13**k) for k in range(35, 66)), 1600, 3200})


@pytest.mark.parametrize("factor", [16, 28])
@pytest.mark.parametrize(
    "limits", [(16, 16), (1, 64), (64, 64), (60, 64), (7, 11), (128, 768), (4, 16384), (1, 1), (100, 230)]
)
def test_no_picture_is_larger_than_the_most_that_is_promised(factor, limits):
    """Brute force over sides; limits are in cells of factor x factor pixels."""
    least, most = (cells * factor**2 for cells in limits)
    areas = [
        np.prod(smart_resize(height, width, factor, least, most))
        for height, width in itertools.product(SIDES, SIDES)
        if max(height, width) <= 200 * min(height, width)
    ]
    promised = largest_area(factor, least, most)
    assert max(areas) <= promised
    if limits == (4, 16384):
        assert promised == most, "ordinary limits cost nothing"
    if limits == (16, 16):
        assert max(areas) > most, "the resize goes beyond its limit here, which is what the promise must know"


def test_windows_hold_no_more_patches_than_the_encoder_is_compiled_for():
    encoder = models.qwen2_5_vl().encoder
    merge = encoder.spatial_merge_size
    for window_size in (encoder.window_size, 2 * encoder.patch_size * merge, 7 * encoder.patch_size * merge):
        config = dataclasses.replace(encoder, window_size=window_size)
        side = window_size // (config.patch_size * merge)
        for grid in [(1, 1, 1), (2, 3, 7), (1, 1, 57), (3, 8, 8), (1, 9, 13)]:
            _, windows = window_order(grid, side)
            assert np.bincount(windows).max() * merge**2 <= config.window_patches


@pytest.mark.parametrize(
    "limits",
    [Idefics2ImageConfig(98, 28, split=True), Idefics2ImageConfig(70, 70), Idefics2ImageConfig(90, 33, split=False)],
)
def test_edges_and_tiles_keep_their_promise_for_odd_pictures(limits):
    model = models.idefics2()
    vision = limits.build(model)
    for size in itertools.product((1, 2, 13, 33, 70, 97, 400, 1600), repeat=2):
        height, width = edge_resize(*size, limits.shortest_edge, limits.longest_edge)
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        assert patches <= vision.max_image_patches(limits)
    tiled = TiledImageConfig().build(models.mm1_5())
    for size in ((1, 1), (400, 3), (33, 200)):
        frames = np.bincount(tiled.image(Image.new("RGB", size), TiledImageConfig()).segment_ids)
        assert frames.max() == tiled.max_image_patches(TiledImageConfig())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small experiment, its model and processor: pictures of 64 x 64 at most, 64 patches."""
    folder = tmp_path_factory.mktemp("small")
    experiment = support.experiment(folder, support.write_examples(folder, 3), "--processor.image.min_pixels", "1024")
    return experiment, *starting_model.start_model(experiment)


def _example(size, seed=0, **limits):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    messages = [{"role": "user", "content": "<image>what color is the shape?"}, {"role": "assistant", "content": "red"}]
    return {"messages": messages, "images": [Image.fromarray(pixels)], "chat_template_kwargs": limits or None}


ODD = {
    "own limit, 256 patches": _example((128, 128), max_pixels=128 * 128),
    "own limit, 1024 patches": _example((256, 256), max_pixels=256 * 256),
    "thin": _example((1600, 16)),
    "thin, standing": _example((16, 3200)),
    "square": _example((64, 64)),
}


@nnx.jit
def _loss(model, batch):
    return supervised_loss(model, batch).total


@pytest.mark.parametrize("name", ODD)
def test_a_picture_gives_the_loss_it_has_without_a_bound_or_its_example_is_refused_with_both_numbers(small, name):
    experiment, model, processor = small
    config = dataclasses.replace(experiment.data, seq_len=512, max_patches=2048, on_too_long="error")
    encode, rng = Encode(processor, config), np.random.default_rng(0)
    bound = image_patch_limit(processor.image_processor, processor.image_config, config)
    assert bound is not None
    example = processor.encode(ODD[name])
    own = example.largest_image
    if own > bound:
        with pytest.raises(ExampleError, match=f"an image of {own} patches, where none may have more than {bound}"):
            encode.random_map((Origin(), ODD[name]), rng)
        with pytest.raises(ExampleError, match=f"{own} patches"):
            packing.assemble([[example]], 512, 2048, max_image_patches=bound)
        return
    (fitted,) = encode.random_map((Origin(), ODD[name]), rng)
    free = float(_loss(model, packing.assemble([[fitted]], 512, 2048)))
    promised = float(_loss(model, packing.assemble([[fitted]], 512, 2048, max_image_patches=bound)))
    assert promised == pytest.approx(free, rel=1e-5)


def test_shrinking_keeps_each_picture_as_large_as_fits_and_boxes_follow(small):
    experiment, _, processor = small
    config = dataclasses.replace(experiment.data, seq_len=256, max_patches=256, max_image_patches=100)
    example = _example((256, 128), max_pixels=256 * 128)
    example["messages"][1]["content"] = "<bbox>"
    example["objects"] = {"bbox": [[64, 32, 192, 96]]}
    (dropped,) = Encode(processor, config).random_map((Origin("examples.jsonl", 4), example), np.random.default_rng(0))
    assert isinstance(dropped, Rejected)
    assert (dropped.file, dropped.number, dropped.kind) == ("examples.jsonl", 4, "too_long")
    assert "512 patches do not fit 256" in dropped.reason
    (shrunk,) = Encode(processor, dataclasses.replace(config, on_too_long="shrink")).random_map(
        (Origin("examples.jsonl", 4), example), np.random.default_rng(0)
    )
    assert 60 <= shrunk.largest_image <= 100
    (sizes,) = shrunk.sizes
    assert sizes.original == (256, 128)
    assert sizes.resized[0] * sizes.resized[1] == 64 * shrunk.num_patches
    expected = processor.write_region(Box(64, 32, 192, 96, "original"), Sizes((256, 128), sizes.resized))
    text = processor.tokenizer.decode(shrunk.tokens)
    assert expected.split("bbox")[-1] in text
    # as the same picture under a limit of its own that gives this size, and nearly the largest that fits
    by_limit = {most: smart_resize(128, 256, 16, 256, most) for most in range(1024, 8192, 16)}
    largest = max(h * w // 64 for h, w in by_limit.values() if h * w // 64 <= 100)
    assert shrunk.num_patches >= 0.8 * largest
    most = next(most for most, (h, w) in by_limit.items() if (w, h) == sizes.resized)
    same = processor.encode({**example, "chat_template_kwargs": {"max_pixels": most, "min_pixels": 256}})
    np.testing.assert_array_equal(same.patches, shrunk.patches)


def test_text_that_is_too_long_is_left_out_whatever_its_pictures_do(small):
    experiment, _, processor = small
    example = _example((64, 64))
    example["messages"][0]["content"] += "is there a red shape? " * 60
    config = dataclasses.replace(experiment.data, seq_len=128, on_too_long="shrink")
    (left,) = Encode(processor, config).random_map((Origin(), example), np.random.default_rng(0))
    assert isinstance(left, Rejected)
    assert left.kind == "too_long"


@pytest.mark.parametrize(
    ("architecture", "limits", "size"),
    [
        ("idefics2", Idefics2ImageConfig(980, 28, split=True), (900, 600)),
        ("idefics2", Idefics2ImageConfig(980, 28, split=False), (900, 600)),
        ("idefics3", Idefics3ImageConfig(), (900, 600)),
        ("mm1_5", TiledImageConfig(), (900, 600)),
        ("qwen2_5_vl", QwenImageConfig(), (900, 600)),
        ("qwen2_vl", Qwen2ImageConfig(), (900, 600)),
        ("qwen3_vl", Qwen3ImageConfig(), (900, 600)),
    ],
)
def test_every_family_can_make_its_pictures_smaller_and_never_larger_on_the_way(architecture, limits, size):
    model = models.ARCHITECTURES[architecture]()
    vision = limits.build(model)
    begin = vision.layout(size, limits, index=0, count=1)
    ways = [way for way in vision.reductions(limits) if way]
    assert ways
    for way in ways:
        made = [vision.layout(size, dataclasses.replace(limits, **change), index=0, count=1) for change in way]
        patches = [len(m.patches) for m in made]
        assert patches == sorted(patches, reverse=True)
        assert len(begin.patches) > patches[-1]


def test_truncating_looks_at_patches_as_well_as_tokens(small):
    _, _, processor = small
    record = _example((64, 64))
    record["messages"] += [{"role": "user", "content": "<image>and?"}, {"role": "assistant", "content": "blue"}]
    record["images"] = record["images"] * 2
    example = processor.encode(record)
    cut = packing.truncate(example, example.length, example.num_patches - 1)
    assert cut.num_patches == example.num_patches // 2
    assert len(cut.sizes) == 1
    assert packing.truncate(example, example.length, 10) is None


def test_conversations_longer_than_promised_are_never_laid_out(small):
    _, _, processor = small
    example = processor.encode(_example((64, 64)))
    with pytest.raises(ExampleError, match=f"{example.length} tokens do not fit {example.length - 1}"):
        packing.assemble([[example]], 512, 512, max_segment_length=example.length - 1)
    packing.assemble([[example]], 512, 512, max_segment_length=example.length, max_image_patches=64)


def test_the_bound_is_raised_to_the_largest_picture_of_a_sample(small, tmp_path):
    experiment, model, processor = small
    Image.new("RGB", (128, 128)).save(tmp_path / "p.png")
    example = {**_example((8, 8)), "images": ["p.png"], "chat_template_kwargs": {"max_pixels": 128 * 128}}
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(example) + "\n")
    data = dataclasses.replace(experiment.data, train=(str(path),), seq_len=512, max_patches=1024)
    resolved = resolve.resolve(dataclasses.replace(experiment, data=data), model, processor).data
    assert resolved.max_image_patches == 256
    batch = next(iter(pipeline.training_data(processor, resolved, seed=0)[0])).batch
    assert batch.max_image_patches == 256
    assert np.bincount(batch.patch_segment_ids[0])[1:].max() == 256
    # a promise made by the user stands
    fixed = dataclasses.replace(data, max_image_patches=300)
    assert resolve.resolve(dataclasses.replace(experiment, data=fixed), model, processor).data.max_image_patches == 300


def test_processors_of_other_limits_promise_what_theirs_allow(small):
    experiment, model, processor = small
    wide = Processor(
        processor.tokenizer, model.config, ProcessorConfig(image=QwenImageConfig(784, 784 * 100, 784, 784))
    )
    data = dataclasses.replace(experiment.data, max_patches=10**6)
    assert image_patch_limit(wide.image_processor, wide.image_config, data) >= 784 * 100 // 64
