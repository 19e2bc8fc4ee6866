"""MM1.5's pictures: how many frames and tokens, in which order, what stands between them, and the pixels of each."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jvlm.errors import UserError
from jvlm.families.mm1_5 import tiles
from jvlm.families.mm1_5.image_processor import TiledImageConfig, TiledImageProcessor
from jvlm.families.mm1_5.presets import GRID_378, GRID_672, PRESETS, at_grid
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.vlm import VLMConfig
from tests.support import picture

SMALL = VLMConfig(
    family="mm1_5",
    encoder=ViTConfig(depth=1, hidden_size=8, num_heads=1, intermediate_size=8, patch_size=4, grid=4, class_token=True),
    connector=CAbstractorConfig(grid=4, out_grid=2),
    decoder=TransformerConfig(),
    image_token_id=1,
)
SIDE, N, F = 16, 17, 4  # pixels, patches with the class token, features of a frame


def pixels_of(medium):
    """[frames, side, side, 3] put together again from the patches, and the class tokens' patches."""
    cells = medium.patches.reshape(-1, N, 3, 4, 4)
    picture = cells[:, 1:].reshape(-1, 4, 4, 3, 4, 4).transpose(0, 1, 4, 2, 5, 3).reshape(-1, SIDE, SIDE, 3)
    return picture, cells[:, 0]


def test_frames_are_the_tiles_in_rows_and_the_overview_after_them():
    image = picture(40, 20)
    medium = TiledImageProcessor(SMALL).image(image, TiledImageConfig(), index=1, count=2)
    grid = tiles.choose_grid((20, 40), SIDE, tiles.candidate_grids(4, 9))
    assert grid == (2, 4)
    frames, class_patches = pixels_of(medium)
    whole = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    expected = [np.asarray(t) for t in tiles.split(image, grid, SIDE)]
    np.testing.assert_array_equal(frames, np.stack([*expected, whole]))
    assert not class_patches.any()
    np.testing.assert_array_equal(medium.positions[:N], [(-1, -1), *np.ndindex(4, 4)])
    np.testing.assert_array_equal(medium.positions, np.tile(medium.positions[:N], (9, 1)))
    np.testing.assert_array_equal(medium.segment_ids, np.repeat(np.arange(1, 10), N))
    np.testing.assert_array_equal(medium.token_segment_ids, np.repeat(np.arange(1, 10), F))
    indices = [f"(1,{row},{column})" for row in (1, 2) for column in (1, 2, 3, 4)] + ["(1,0,0)"]
    assert medium.token_pattern == tuple(part for index in indices for part in (index, F))
    assert (medium.original, medium.resized) == ((40, 20), (64, 32))


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"indicator": "separator"}, (F, ",", F, "\n", F, ",", F, ":", F)),
        ({"indicator": "none"}, (F, F, F, F, F)),
        ({"indicator": "none", "overview": "none"}, (F, F, F, F)),
        ({"overview": "first"}, ("(0,0,0)", F, "(0,1,1)", F, "(0,1,2)", F, "(0,2,1)", F, "(0,2,2)", F)),
        ({"index": "{row}{column} ", "overview": "none"}, ("11 ", F, "12 ", F, "21 ", F, "22 ", F)),
        ({"splitting": "none"}, (F,)),
        ({"min_tiles": 1, "max_tiles": 1}, (F,)),
    ],
)  # fmt: skip
def test_what_stands_between_tiles_is_an_option(changes, layout):
    media = dataclasses.replace(TiledImageConfig(splitting="dynamic", max_tiles=4), **changes)
    medium = TiledImageProcessor(SMALL).image(picture(30, 30), media)
    assert medium.token_pattern == layout
    assert medium.vision_index.tolist() == list(range(sum(part for part in layout if isinstance(part, int))))


@pytest.mark.parametrize(("count", "frames"), [(1, 5), (2, 5), (3, 1), (8, 1)])
def test_from_three_pictures_on_none_is_split(count, frames):
    vision, media = TiledImageProcessor(SMALL), TiledImageConfig(splitting="static")
    assert vision.image(picture(50, 20), media, index=0, count=count).segment_ids[-1] == frames


@pytest.mark.parametrize(
    ("size", "tokens"), [((500, 500), 720), ((480, 640), 1008), ((1080, 1920), 1296), ((3508, 2480), 1440)]
)
def test_the_number_of_tokens_is_the_published_one(size, tokens):
    model = PRESETS["mm1_5_3b"]
    rows, columns = TiledImageConfig().grid_of(size, GRID_672 * model.encoder.patch_size, 1)
    assert (rows * columns + 1) * TiledImageProcessor(model).features == tokens


def test_a_video_is_24_whole_frames_of_144_tokens():
    vision = TiledImageProcessor(at_grid(PRESETS["mm1_5_3b"], GRID_378))
    frames = [Image.new("RGB", (64, 48), (i, 0, 0)) for i in range(93)]
    medium = vision.video(frames, TiledImageConfig())
    assert medium.token_pattern == (24 * 144,)
    assert medium.patches.shape == (24 * (27**2 + 1), 3 * 14 * 14)
    red = medium.patches.reshape(24, 27**2 + 1, -1)[:, 1, 0]
    assert red.tolist() == [round(i * 92 / 23) for i in range(24)]
    assert vision.video(frames[:5], TiledImageConfig()).token_pattern == (5 * 144,)


def test_a_padded_whole_picture_keeps_its_aspect():
    media = TiledImageConfig(splitting="none", whole_fit="pad", placement="centre", colour=(1, 2, 3))
    frames, _ = pixels_of(TiledImageProcessor(SMALL).image(Image.new("RGB", (32, 16), (200, 200, 200)), media))
    assert (frames[0, 4:12] == 200).all()
    assert (frames[0, [*range(4), *range(12, 16)]] == [1, 2, 3]).all()


def test_towers_that_disagree_about_a_frame_are_refused():
    wrong = dataclasses.replace(SMALL, connector=CAbstractorConfig(grid=5, out_grid=2))
    with pytest.raises(UserError, match=r"connector.grid is 5, encoder.grid 4"):
        TiledImageProcessor(wrong)
