"""Resize rule, window order, pixels and M-RoPE ids: golden values, and transformers on random cases."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from jvlm import families
from jvlm.data.images import open_image
from jvlm.data.merged_images import window_order
from jvlm.data.mrope import MediaSpan, mrope_positions
from jvlm.data.smart_resize import smart_resize
from jvlm.errors import UserError
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig, QwenImageProcessor
from jvlm.models import layers
from tests import support

VISION = QwenImageProcessor(families.preset("qwen2_5_vl_7b"))
RESIZES = json.loads((support.GOLDEN / "smart_resize.json").read_text())
LARGE, EVALUATION = 16384 * 784, 4096 * 784


@pytest.mark.parametrize("case", RESIZES, ids=lambda c: "-".join(map(str, list(c.values())[:-1])))
def test_smart_resize_gives_the_golden_sizes(case):
    arguments = {k: v for k, v in case.items() if k != "result"}
    if case["result"] == "error: ValueError":
        with pytest.raises(UserError, match="exceeds 200"):
            smart_resize(**arguments)
    else:
        assert list(smart_resize(**arguments)) == case["result"]


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((599, 540), LARGE, (588, 532)),
        ((480, 640), LARGE, (476, 644)),
        ((1080, 1920), LARGE, (1092, 1932)),
        ((434, 368), LARGE, (448, 364)),
        ((14, 14), LARGE, (56, 56)),
        ((42, 70), LARGE, (56, 56)),
        ((2160, 3840), LARGE, (2156, 3836)),
        ((2160, 3840), EVALUATION, (1344, 2380)),
        ((1800, 4000), EVALUATION, (1176, 2660)),
        ((1800, 4000), 1280 * 784, (644, 1484)),
    ],
)
def test_smart_resize_gives_the_sizes_that_users_met(size, most, expected):
    assert smart_resize(*size, 28, 4 * 784, most) == expected


@pytest.mark.parametrize("size", [(28, 28 * 201), (28 * 201, 28), (1, 201)])
def test_smart_resize_refuses_an_aspect_ratio_above_200(size):
    with pytest.raises(UserError, match="exceeds 200"):
        smart_resize(*size, 28, 4 * 784, LARGE)


def test_smart_resize_refuses_limits_that_contradict_each_other():
    with pytest.raises(UserError, match="min_pixels 5000 exceeds max_pixels 4000"):
        smart_resize(100, 100, 28, 5000, 4000)


# grids (t, h, w) in patches, window_index, cumulative patches of the windows
WINDOWS = [
    ([(1, 4, 4)], "0 1 2 3", [0, 16]),
    ([(1, 8, 8)], " ".join(map(str, range(16))), [0, 64]),
    (
        [(1, 10, 14)],
        "0 1 2 3 7 8 9 10 14 15 16 17 21 22 23 24 4 5 6 11 12 13 18 19 20 25 26 27 28 29 30 31 32 33 34",
        [0, 64, 112, 128, 140],
    ),
    (
        [(2, 6, 10)],
        "0 1 2 3 5 6 7 8 10 11 12 13 4 9 14 15 16 17 18 20 21 22 23 25 26 27 28 19 24 29",
        [0, 48, 60, 108, 120],
    ),
    ([(1, 16, 8)], " ".join(map(str, range(32))), [0, 64, 128]),
    ([(1, 4, 4), (1, 10, 4)], " ".join(map(str, range(14))), [0, 16, 48, 56]),
]


def joined_windows(grids):
    """Window order and cumulative lengths in patches of several media, as transformers counts them."""
    orders, lengths, cells = [], [], 0
    for t, h, w in grids:
        order, windows = window_order((t, h // 2, w // 2), 4)
        orders.append(order + cells)
        cells += t * h * w // 4
        assert (np.diff(windows) >= 0).all(), "windows must be contiguous"
        lengths.extend(4 * np.bincount(windows)[1:])
    return np.concatenate(orders), np.cumsum([0, *lengths])


@pytest.mark.parametrize(("grids", "order", "cumulative"), WINDOWS)
def test_window_order_gives_the_golden_values(grids, order, cumulative):
    found, lengths = joined_windows(grids)
    assert found.tolist() == [int(i) for i in order.split()]
    assert lengths.tolist() == cumulative


@pytest.mark.parametrize("seed", range(20))
def test_window_order_equals_transformers_on_random_grids(seed):
    from transformers.vision_utils import get_vision_window_index

    rng = np.random.default_rng(seed)
    grids = [(int(t), 2 * int(h), 2 * int(w)) for t, h, w in rng.integers(1, (4, 14, 14), (rng.integers(1, 4), 3))]
    order, cumulative = get_vision_window_index(
        torch.tensor(grids), spatial_merge_size=2, window_size=112, patch_size=14, kwargs={}
    )
    found, lengths = joined_windows(grids)
    np.testing.assert_array_equal(found, order.numpy())
    np.testing.assert_array_equal(lengths, cumulative.numpy())


def raster_pixels(media):
    """Normalised float64 pixels of our patches, brought back from window order to transformers' order."""
    cells = media.patches.reshape(len(media.vision_index), 4, 3, -1)[media.vision_index] / 255
    return ((cells - support.CLIP_MEAN[:, None]) / support.CLIP_STD[:, None]).reshape(media.patches.shape)


PHOTOS = {"chelsea": 16 * 784, "coffee": 24 * 784, "page": 20 * 784}


@pytest.mark.parametrize("name", PHOTOS)
def test_pixels_of_photos_equal_the_golden_ones(name, tiny):
    golden = np.load(support.GOLDEN / "qwen2vl_pixels.npz")
    photo = open_image(support.GOLDEN / "photos" / f"skimage_{name}.png")
    media = VISION.image(photo, QwenImageConfig(max_pixels=PHOTOS[name]))
    t, h, w = golden[f"{name}.grid_thw"][0]
    assert media.grid == (t, h // 2, w // 2)
    np.testing.assert_allclose(raster_pixels(media), golden[f"{name}.pixel_values"], atol=1e-6)
    # what the device computes from the bytes, in float32
    encoder = tiny.model.config.encoder
    device = np.asarray(layers.normalise_pixels(media.patches, encoder.image_mean, encoder.image_std))
    device = device.reshape(-1, 4, 1176)[media.vision_index].reshape(-1, 1176)
    np.testing.assert_allclose(device, golden[f"{name}.pixel_values"], atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("seed", range(3))
def test_pixels_of_random_pictures_equal_transformers(tiny, mode, seed):
    rng = np.random.default_rng([seed, *map(ord, mode)])
    width, height = (int(n) for n in rng.integers(20, 400, 2))
    picture = support.picture(width, height, seed)
    if mode in ("RGBA", "LA"):
        picture.putalpha(support.picture(width, height, seed + 1).convert("L"))
    picture = picture.convert(mode)
    theirs = support.image_processor(tiny.folder)([picture], return_tensors="np")
    media = VISION.image(open_image(picture), QwenImageConfig(4 * 784, 64 * 784))
    t, h, w = theirs["image_grid_thw"][0]
    assert media.grid == (t, h // 2, w // 2)
    assert media.original == (width, height)
    assert media.resized == (14 * w, 14 * h)
    np.testing.assert_allclose(raster_pixels(media), theirs["pixel_values"], atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_pixels_of_frames_follow_the_description_of_the_released_processor(count):
    frames = [support.picture(150, 90, i) for i in range(count)]
    media = VISION.video(frames, QwenImageConfig(video_min_pixels=784, video_max_pixels=12 * 784))
    width, height = media.resized
    expected, (t, h, w) = support.reference_patches(frames, height, width)
    assert media.grid == (t, h // 2, w // 2) == (-(-count // 2), height // 28, width // 28)
    np.testing.assert_allclose(raster_pixels(media), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(112, 112), (140, 84), (252, 196)])
def test_positions_and_frames_of_patches_are_those_of_transformers(size):
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    frames = [support.picture(*size, i) for i in range(4)]
    media = VISION.video(frames, QwenImageConfig(video_min_pixels=784, video_max_pixels=LARGE))
    grid = torch.tensor([[media.grid[0], 2 * media.grid[1], 2 * media.grid[2]]])
    order, _ = get_vision_window_index(grid, spatial_merge_size=2, window_size=112, patch_size=14, kwargs={})
    positions = get_vision_position_ids(grid, 2, kwargs={}).numpy().reshape(-1, 4, 2)[order].reshape(-1, 2)
    np.testing.assert_array_equal(media.positions, positions)
    np.testing.assert_array_equal(media.segment_ids, np.repeat([1, 2], media.grid[1] * media.grid[2] * 4))
    np.testing.assert_array_equal(np.argsort(order.numpy()), media.vision_index)


def ids(parts):
    """Ids of "3 text, image 1 4 4, ..." given as ints (text tokens) and (t, h, w, seconds) in patches."""
    spans, at = [], 0
    for part in parts:
        if isinstance(part, int):
            at += part
        else:
            t, h, w, seconds = part
            spans.append(MediaSpan(at, (t, h // 2, w // 2), 2 * seconds))
            at += t * h * w // 4
    return mrope_positions(at, spans)


# parts, expected t, h and w ids (None: not listed by the source), delta; from transformers 4.49
MROPE = {
    "A": (
        [6, (1, 4, 4, 0), 4],
        "0 1 2 3 4 5 6 6 6 6 8 9 10 11",
        "0 1 2 3 4 5 6 6 7 7 8 9 10 11",
        "0 1 2 3 4 5 6 7 6 7 8 9 10 11",
        -2,
    ),
    "B": (
        [3, (1, 4, 8, 0), 3],
        "0 1 2 3 3 3 3 3 3 3 3 7 8 9",
        "0 1 2 3 3 3 3 4 4 4 4 7 8 9",
        "0 1 2 3 4 5 6 3 4 5 6 7 8 9",
        -4,
    ),
    "C": (
        [3, (3, 4, 4, 1.0), 4],
        "0 1 2 3 3 3 3 5 5 5 5 7 7 7 7 8 9 10 11",
        "0 1 2 3 3 4 4 3 3 4 4 3 3 4 4 8 9 10 11",
        "0 1 2 3 4 3 4 3 4 3 4 3 4 3 4 8 9 10 11",
        -7,
    ),
    "D": ([3, (4, 4, 4, 0.5), 4], "0 1 2 3 3 3 3 4 4 4 4 5 5 5 5 6 6 6 6 7 8 9 10", None, None, -12),
    "E": (
        [2, (3, 4, 8, 0.5), 3, (1, 4, 4, 0), 3],
        "0 1 " + "2 " * 8 + "3 " * 8 + "4 " * 8 + "6 7 8 9 9 9 9 11 12 13",
        None,
        None,
        -22,
    ),
    "F row 0": ([3, (1, 4, 4, 0), 3], "0 1 2 3 3 3 3 5 6 7", None, None, -2),
    "F row 1": ([2, (1, 4, 8, 0), 4], "0 1 " + "2 " * 8 + "6 7 8 9", None, None, -4),
    "G": ([2, (1, 4, 4, 0), 2, (1, 4, 4, 0), 2], "0 1 2 2 2 2 4 5 6 6 6 6 8 9", None, None, None),
}


@pytest.mark.parametrize("name", MROPE)
def test_mrope_ids_equal_the_golden_ones(name):
    parts, *expected, delta = MROPE[name]
    found = ids(parts)
    for axis, wanted in enumerate(expected):
        if wanted is not None:
            assert found[:, axis].tolist() == [int(i) for i in wanted.split()], "thw"[axis]
    if delta is not None:
        assert found.max() + 1 - len(found) == delta


# version table of the specification: 2 text, start, 4 frame pairs of 4 x 4, end, 2 text
@pytest.mark.parametrize(
    ("seconds", "frames", "after"),
    [(1.0, [3, 5, 7, 9], [10, 11, 12]), (0.5, [3, 4, 5, 6], [7, 8, 9]), (1.5, [3, 6, 9, 12], [13, 14, 15])],
)
def test_mrope_ids_of_videos_are_those_of_4_49(seconds, frames, after):
    found = ids([3, (4, 4, 4, seconds), 3])[:, 0]
    assert found[3:-3:4].tolist() == frames
    assert found[-3:].tolist() == after


@pytest.mark.parametrize("seed", range(10))
def test_mrope_ids_of_pictures_equal_the_installed_transformers(tiny, seed):
    rng = np.random.default_rng(seed)
    parts, kinds, grids = [], [], []
    for _ in range(rng.integers(1, 5)):
        text, (h, w) = int(rng.integers(1, 6)), 2 * rng.integers(1, 8, 2)
        parts += [text, (1, int(h), int(w), 0)]
        kinds += [0] * text + [1] * int(h * w // 4)
        grids.append([1, int(h), int(w)])
    parts.append(3)
    kinds += [0] * 3
    theirs, delta = tiny.torch_model.model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.long),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor(grids),
    )
    found = ids(parts)
    np.testing.assert_array_equal(found, theirs[:, 0].numpy().T)
    assert found.max() + 1 - len(found) == int(delta[0, 0])


@pytest.mark.parametrize("seed", range(10))
def test_mrope_ids_up_to_the_end_of_a_video_equal_the_installed_transformers(tiny, seed):
    rng = np.random.default_rng(seed)
    t, h, w = (int(n) for n in rng.integers(1, 8, 3))
    fps = float(rng.choice([0.5, 1.0, 2.0, 3.0, 29.97]))
    length = 4 + t * h * w
    theirs, _ = tiny.torch_model.model.get_rope_index(
        torch.zeros(1, length, dtype=torch.long),
        mm_token_type_ids=torch.tensor([[0] * 4 + [2] * (t * h * w)]),
        video_grid_thw=torch.tensor([[t, 2 * h, 2 * w]]),
        second_per_grid_ts=torch.tensor([2 / fps]),
    )
    np.testing.assert_array_equal(ids([4, (t, 2 * h, 2 * w, 2 / fps)]), theirs[:, 0].numpy().T)


def test_a_palette_picture_with_transparency_is_laid_on_white():
    picture = Image.new("P", (56, 56), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.info["transparency"] = 0
    assert open_image(picture).getpixel((3, 3)) == (255, 255, 255)
