"""Image splitting: the published rule's vectors, and an exhaustive search in plain floats."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jvlm.errors import UserError
from jvlm.families.mm1_5 import tiles

PUBLISHED = {
    (500, 500): (2, 2),
    (480, 640): (2, 3),
    (1080, 1920): (2, 4),
    (1920, 1080): (4, 2),
    (3508, 2480): (3, 3),
    (300, 3000): (1, 9),
    (5000, 500): (9, 1),
    (4000, 6000): (2, 3),
    (2532, 1170): (4, 2),
    (672, 6048): (1, 9),
}


@pytest.mark.parametrize(("limits", "count"), [((4, 9), 18), ((4, 16), 45), ((1, 9), 23)])
def test_the_number_of_candidates_is_the_published_one(limits, count):
    grids = tiles.candidate_grids(*limits)
    assert len(set(grids)) == len(grids) == count
    assert all(limits[0] <= r * c <= limits[1] for r, c in grids)


@pytest.mark.parametrize("size", PUBLISHED)
def test_grids_are_the_published_ones(size):
    grids = tiles.candidate_grids(4, 9)
    assert tiles.choose_grid(size, 672, grids) == PUBLISHED[size]


def test_a_picture_of_exactly_the_size_of_a_grid_is_not_resized_and_an_upscale_cap_saves_tiles():
    assert tiles.scale_to((672, 6048), (1, 9), 672) == 1
    grids = tiles.candidate_grids(4, 16)
    assert tiles.choose_grid((480, 640), 672, grids) == (3, 4)
    assert tiles.choose_grid((480, 640), 672, grids, max_upscale=2.0) == (2, 2)
    assert tiles.fitted_size((480, 640), (2, 2), 672, max_upscale=2.0) == (960, 1280)


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([(4, 9), (4, 16), (1, 9)]))
def test_the_rule_agrees_with_a_search_over_the_definition(height, width, limits):
    """Least padding among the grids that cover, else least shrinking: checked in floats with room for their errors."""
    side, grids = 672, tiles.candidate_grids(*limits)

    def scale(grid):
        return min(grid[0] * side / height, grid[1] * side / width)

    def padding(grid):
        return grid[0] * grid[1] * side**2 - (height * scale(grid)) * (width * scale(grid))

    chosen = tiles.choose_grid((height, width), side, grids)
    covering = [g for g in grids if scale(g) >= 1 - 1e-12]
    if covering:
        assert scale(chosen) >= 1 - 1e-12
        assert padding(chosen) <= min(map(padding, covering)) + 1
    else:
        assert scale(chosen) >= max(map(scale, grids)) * (1 - 1e-12)


@pytest.mark.parametrize(("placement", "at"), [("corner", (0, 0)), ("centre", (0, 8))])
def test_tiles_put_together_are_the_resized_picture_and_its_padding(placement, at):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert tiles.fitted_size((20, 30), (3, 3), 32) == (64, 96)
    found = tiles.split(image, (3, 3), 32, placement=placement, colour=(9, 8, 7))
    assert [t.size for t in found] == [(32, 32)] * 9
    whole = np.concatenate([np.concatenate([np.asarray(t) for t in found[r : r + 3]], 1) for r in (0, 3, 6)])
    y = at[1] * 2
    assert np.array_equal(whole[y : y + 64], np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC)))
    rest = np.concatenate([whole[:y], whole[y + 64 :]])
    assert (rest == [9, 8, 7]).all()


def test_impossible_limits_are_refused():
    with pytest.raises(UserError, match="min_tiles 5 and max_tiles 4"):
        tiles.candidate_grids(5, 4)
