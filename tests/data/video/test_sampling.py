"""Frames, rates and sizes against qwen-vl-utils 0.0.14 on seven real videos, read by each of its two decoders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jvlm.data.smart_resize import smart_resize
from jvlm.data.video.sampling import (
    PATCH_AREA,
    FramePixels,
    Sampling,
    by_number,
    by_times,
    is_uneven,
    sample,
)
from jvlm.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "video"
# width, height as in the files
SIZES = {
    "Megamind.avi": (720, 528),
    "bigbuckbunny.mp4": (1280, 720),
    "bikes.mp4": (640, 272),
    "carphone_distorted.mp4": (176, 144),
    "carphone_pristine.mp4": (176, 144),
    "tree.avi": (320, 240),
    "vtest.avi": (768, 576),
}
NAMES = {"nframes": "num_frames", "video_start": "start", "video_end": "end"}
PIXELS = ("min_pixels", "max_pixels", "total_pixels")


def golden(decoder: str) -> list[dict]:
    return json.loads((GOLDEN / f"{decoder}.json").read_text())


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_frames_and_sizes_are_those_of_qwen_vl_utils(decoder):
    cases = golden(decoder)
    totals = {case["video"]: case["total"] for case in cases if not case["args"]}
    assert totals.keys() == SIZES.keys()
    for case in cases:
        settings = {NAMES.get(name, name): value for name, value in case["args"].items() if name not in PIXELS}
        got = by_number(totals[case["video"]], case["video_fps"], Sampling(**settings))
        assert list(got.indices) == case["indices"], case
        assert got.fps == pytest.approx(case["sample_fps"], rel=1e-14)
        assert got.seconds_per_patch == pytest.approx(2 / case["sample_fps"], rel=1e-14)

        pixels = FramePixels(**{name: case["args"][name] for name in PIXELS if name in case["args"]})
        width, height = SIZES[case["video"]]
        height, width = smart_resize(height, width, 28, *pixels.limits(len(got.indices)))
        assert (height, width) == (case["height"], case["width"]), case
        assert height * width // PATCH_AREA * len(got.indices) // 2 == case["tokens"]


def test_indices_are_those_of_torch_in_float32():
    random = np.random.default_rng(0)
    for _ in range(3000):
        total = int(random.integers(4, 20_000))
        count = min(2 * int(random.integers(1, 385)), total // 2 * 2)
        got = by_number(total, 1.0, Sampling(num_frames=count)).indices
        assert list(got) == torch.linspace(0, total - 1, count).round().long().tolist(), (total, count)
    for _ in range(1000):
        first = int(random.integers(0, 5000))
        last = first + int(random.integers(10, 5000))
        got = by_number(20_000, 1.0, Sampling(num_frames=10, start=first, end=last)).indices
        assert list(got) == torch.linspace(first, last, 10).round().long().tolist(), (first, last)


def test_the_number_of_frames_has_limits():
    def frames(**settings):
        return len(by_number(1000, 25.0, Sampling(**settings)).indices)

    assert frames() == 80  # 40 s at 2 a second
    assert frames(min_frames=99) == 100
    assert frames(max_frames=33) == 32
    assert frames(num_frames=7) == 8  # 3.5 pairs; halves go to the even number, as Python rounds
    assert frames(fps=100.0) == 768
    assert len(by_number(101, 25.0, Sampling(fps=25.0)).indices) == 100


@pytest.mark.parametrize(
    ("total", "settings"),
    [(1, {}), (10, {"num_frames": 12}), (100, {"start": 3.0, "end": 2.0}), (100, {"start": 9.0})],
)
def test_what_cannot_be_sampled_is_refused(total, settings):
    with pytest.raises(UserError, match="frames"):
        by_number(total, 25.0, Sampling(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"fps": 0.0},
        {"fps": float("nan")},
        {"num_frames": 0},
        {"min_frames": 9, "max_frames": 8},
        {"start": -1.0},
        {"rule": "other"},
    ],
)
def test_settings_are_checked(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)


def test_by_times_takes_the_frame_that_is_shown():
    # a second of 10 frames, a picture that stands for three seconds, a second of 10 frames
    times = [i / 10 for i in range(10)] + [1.0] + [4 + i / 10 for i in range(10)]
    duration = 5.0
    assert is_uneven(times)
    got = sample(times, duration, Sampling())
    assert got.fps == 2.0
    assert got.indices == (0, 5, 10, 10, 10, 10, 10, 10, 11, 16)
    assert [times[i] for i in got.indices] == [0, 0.5, 1, 1, 1, 1, 1, 1, 4, 4.5]

    part = by_times(times, duration, Sampling(start=0.95, end=4.35))
    assert part.indices == (9, 10, 10, 10, 10, 10)  # 0.95, 1.45, ... 3.45 s
    assert part.fps == 2.0


def test_by_times_spreads_a_limited_number_over_the_whole():
    times = [i / 10 for i in range(100)]
    got = by_times(times, 10.0, Sampling(max_frames=4))
    assert got.indices == (0, 25, 50, 75)
    assert got.fps == pytest.approx(0.4)
    assert by_times(times, 10.0, Sampling(num_frames=5, fps=99.0)).indices == (0, 25, 50, 75)
    assert by_times([0.0, 0.5], 1.0, Sampling()).indices == (0, 0, 1, 1)


def test_by_times_is_not_moved_by_the_rounding_of_times():
    times = [k / 30000 * 1001 for k in range(900)]
    got = by_times(times, 900 / 30000 * 1001, Sampling(fps=30000 / 1001))
    assert len(got.indices) == 768
    assert all(abs(times[i] - 900 * 1001 / 30000 * k / 768) < 1001 / 30000 for k, i in enumerate(got.indices))
    assert by_times([k / 3 for k in range(30)], 10.0, Sampling(fps=3.0)).indices == tuple(range(30))


def test_even_videos_go_by_number():
    times = [k / 25 for k in range(250)]
    assert not is_uneven(times)
    assert sample(times, 10.0, Sampling()) == by_number(250, 25.0, Sampling())
    assert sample(times, 10.0, Sampling(rule="times")).indices[:3] == (0, 12, 25)


def test_a_video_of_nothing_is_refused():
    with pytest.raises(UserError, match="0 frames"):
        sample([], 1.0, Sampling())
    with pytest.raises(UserError, match="no two frames"):
        by_times([0.0, 1.0], 2.0, Sampling(start=5.0))


def test_a_hard_limit_holds_where_that_of_qwen_does_not():
    total = 16_384 * PATCH_AREA
    for width, height, of_qwen in ((640, 480, 16_640), (320, 240, 17_920)):
        tokens = {}
        for is_hard in (False, True):
            low, high = FramePixels(total_pixels=total, is_hard=is_hard).limits(256)
            h, w = smart_resize(height, width, 28, low, high)
            tokens[is_hard] = h * w // PATCH_AREA * 128
        assert tokens[False] == of_qwen
        assert tokens[True] <= 16_384


def test_a_hard_limit_holds_for_every_shape():
    random = np.random.default_rng(0)
    for _ in range(3000):
        width = int(random.integers(8, 4000))
        height = int(min(max(width * 200 ** random.uniform(-1, 1), 1 + width // 200, 8), width * 200))
        pairs, budget = int(random.integers(1, 385)), int(random.integers(1, 20_000))
        if budget < 200 * pairs:  # a frame of aspect 200 cannot have fewer tokens than that
            continue
        low, high = FramePixels(total_pixels=budget * PATCH_AREA, is_hard=True).limits(2 * pairs)
        h, w = smart_resize(height, width, 28, low, high)
        assert h * w // PATCH_AREA * pairs <= budget, (width, height, pairs, budget)
