"""Video files in examples: their frames, and the ids that follow from their times."""

import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jvlm import cli
from jvlm.data import embedding
from jvlm.data.check import check
from jvlm.data.config import DataConfig
from jvlm.data.conversion import convert
from jvlm.data.encode import Encode, Known
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.pipeline import first_sequences, training_data
from jvlm.data.shrink import shrink
from jvlm.data.video import reader
from jvlm.data.video.config import VideoConfig
from jvlm.data.video.reader import VideoReader, shared_reader
from jvlm.data.video.sampling import Sampling
from jvlm.data.video.stored_frames import FrameOptions
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig

WIDTH, HEIGHT = 84, 56
LIMITS = {"video_min_pixels": 784, "video_max_pixels": 8 * 784}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a clip of 2 s, 25 frames a second."""
    folder = tmp_path_factory.mktemp("videos")
    with av.open(str(folder / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(50):
            image = np.full((HEIGHT, WIDTH, 3), 20 + 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


def example(*videos, **settings):
    messages = [{"role": "user", "content": "<video>" * len(videos) + "?"}, {"role": "assistant", "content": "a cat"}]
    return {"messages": messages, "videos": list(videos), "chat_template_kwargs": {**LIMITS, **settings}}


def encode(tiny, folder, *videos, **settings):
    return tiny.processor.encode(parse_example(example(*videos, **settings), Origin(str(folder / "a.jsonl"), 1)))


def steps(encoded) -> list[int]:
    """How far M-RoPE's time goes from one temporal patch to the next."""
    return np.diff(np.unique(encoded.positions[encoded.vision_index >= 0, 0])).tolist()


def test_a_file_is_the_same_as_its_frames(tiny, folder):
    with VideoReader() as decoder:
        read = decoder.read(folder / "a.mp4", Sampling(fps=2.0))
    assert (len(read.frames), read.fps) == (4, 2.0)
    frames = [Image.fromarray(frame) for frame in read.frames]
    by_file, by_frames = (encode(tiny, folder, video) for video in ("a.mp4", frames))
    for name in ("tokens", "positions", "patches", "vision_index"):
        np.testing.assert_array_equal(getattr(by_file, name), getattr(by_frames, name))
    contents = encode(tiny, folder, (folder / "a.mp4").read_bytes())
    np.testing.assert_array_equal(contents.patches, by_file.patches)


def test_times_as_text_make_an_image_of_each_pair_of_frames(tiny):
    """A temporal patch of one frame twice is what an image is."""
    first, second = (Image.fromarray(np.full((HEIGHT, WIDTH, 3), grey, np.uint8)) for grey in (60, 180))
    limits = {"min_pixels": 784, "max_pixels": 8 * 784, "video_min_pixels": 784, "video_max_pixels": 8 * 784}
    processor = tiny.processor.replace(
        image_config=dataclasses.replace(tiny.processor.image_config, video_times=True, **limits)
    )
    asked = {"role": "assistant", "content": "a cat"}
    video = {"video": [first, first, second, second], "fps": 4.0}
    by_video = processor.encode(
        parse_example({"messages": [{"role": "user", "content": "look <video>?"}, asked], "videos": [video]})
    )
    words = "look <0.1 seconds><image><0.6 seconds><image>?"
    by_images = processor.encode(
        parse_example({"messages": [{"role": "user", "content": words}, asked], "images": [first, second]})
    )
    ids = {tiny.processor.video_token_id: tiny.processor.model.image_token_id}
    assert [ids.get(int(one), int(one)) for one in by_video.tokens] == by_images.tokens.tolist()
    for name in ("positions", "patches", "vision_index", "loss_weights", "patch_segment_ids", "patch_window_ids"):
        np.testing.assert_array_equal(getattr(by_video, name), getattr(by_images, name))


def test_each_video_has_the_times_of_its_own(tiny, folder):
    # two tokens a second: a patch of two frames at 1 a second is two seconds
    assert steps(encode(tiny, folder, "a.mp4")) == [2]
    assert steps(encode(tiny, folder, "a.mp4", fps=4.0)) == [1, 1, 1]
    assert steps(encode(tiny, folder, {"video": "a.mp4", "fps": 4})) == [1, 1, 1]
    assert steps(encode(tiny, folder, {"video": "a.mp4", "num_frames": 4, "end": 1.0})) == [1]
    frames = [Image.new("RGB", (WIDTH, HEIGHT))] * 6
    assert steps(encode(tiny, folder, {"video": frames, "fps": 0.5})) == [8, 8]
    assert steps(encode(tiny, folder, frames)) == [2, 2]
    both = encode(tiny, folder, {"video": frames, "fps": 0.5}, {"video": "a.mp4", "fps": 4})
    times = both.positions[:, 0][both.vision_index >= 0]
    assert np.diff(np.unique(times)).tolist()[:2] == [8, 8]
    assert np.diff(np.unique(times)).tolist()[-3:] == [1, 1, 1]


def test_frames_are_as_large_as_qwen_vl_utils_makes_them(tiny):
    config = QwenImageConfig()
    size = tiny.processor.image_processor.frame_size(config)
    # tests/golden/video: vtest.avi at 2 and 4 a second, bikes.mp4, tree.avi
    assert size(158, 768, 576) == size(318, 768, 576) == (756, 588)
    assert size(20, 640, 272) == (644, 280)
    assert size(58, 320, 240) == (392, 280)
    # 0.9 x 128,000 tokens for 384 pairs are 300 each
    assert size(768, 1920, 1080) == (644, 336)
    assert config.for_video(768, 2.0, is_resized=False).video_max_pixels == 300 * 784


def test_frames_are_resized_once(tiny, folder):
    """Also where what the rule gives is not a fixed point of it: a thin frame is enlarged beyond the limit."""
    limits = {"video_min_pixels": 9 * 784, "video_max_pixels": 9 * 784}
    encoded = encode(tiny, folder, "a.mp4", **limits)
    size = tiny.processor.image_processor.frame_size(QwenImageConfig(**limits))
    assert encoded.sizes[0].resized == size(4, WIDTH, HEIGHT)


def test_a_video_is_made_smaller_until_it_fits(tiny, folder):
    parsed = parse_example(example("a.mp4"), Origin(str(folder / "a.jsonl"), 1))
    whole = tiny.processor.encode(parsed)
    small = shrink(tiny.processor, parsed, lambda one: one.num_patches < whole.num_patches)
    assert small.num_patches < whole.num_patches
    assert steps(small) == steps(whole)


def test_a_shard_has_the_file(tiny, folder):
    given = example("a.mp4", {"video": "a.mp4", "fps": 4})
    embedded = embedding.embed(given, Origin("elsewhere.jsonl", 1), (str(folder),))
    encoded = tiny.processor.encode(embedded)
    np.testing.assert_array_equal(encoded.patches, encode(tiny, folder, *given["videos"]).patches)


def test_a_bad_file_is_an_error_of_its_example(tiny, folder):
    (folder / "bad.mp4").write_bytes(b"no video")
    Image.new("RGB", (60, 60)).save(folder / "still.png")
    for video, problem in (
        ("bad.mp4", "Invalid data"),
        ("none.mp4", "file not found"),
        ("still.png", "still image"),
        ({"video": "a.mp4", "start": 7.0}, "no two frames"),
    ):
        with pytest.raises(ExampleError, match=rf"a\.jsonl, line 1, field 'videos\[1\]': .*{problem}"):
            encode(tiny, folder, "a.mp4", video)


def test_a_check_without_a_model_decodes_files(folder):
    (folder / "bad.avi").write_bytes(b"no video")
    lines = (json.dumps(example(name)) for name in ("a.mp4", "bad.avi"))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    report = check([str(folder / "data.jsonl")], None)
    assert report.examples == 2
    assert "bad.avi cannot be used" in str(report)


def test_without_a_decoder_the_run_ends_instead_of_leaving_videos_out(tiny, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(reader, "_reader_of", reader._reader_of.__wrapped__)
    with pytest.raises(reader.VideoSupportError, match=r"videos need av: pip install 'jvlm\[video\]'"):
        encode(tiny, folder, "a.mp4")


def test_a_worker_process_says_that_it_cannot_decode(tiny, folder, monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    monkeypatch.setattr(reader, "_reader_of", reader._reader_of.__wrapped__)
    with pytest.raises(reader.VideoSupportError, match=r"Set data\.worker_processes 0"):
        encode(tiny, folder, "a.mp4")


def test_training_packs_videos_read_by_several_threads(tiny, folder):
    lines = [json.dumps(example({"video": "a.mp4", "fps": 2 + 2 * (n % 2)})) for n in range(6)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    data = DataConfig(
        train=(str(folder / "train.jsonl"),), batch_size=1, seq_len=128, max_patches=512, max_image_patches=128
    )
    batches = list(training_data(tiny.processor, data, seed=0, epochs=1)[0])
    whole = [encode(tiny, folder, *json.loads(line)["videos"]) for line in lines]
    patches = sum(int((batch.batch.patch_segment_ids > 0).sum()) for batch in batches)
    assert patches == sum(one.num_patches for one in whole) > 0


def test_a_look_at_how_a_run_begins_decodes_each_video_once(tiny, folder, monkeypatch):
    """A window is many passes over few examples."""
    decoded, read = [], VideoReader.read
    monkeypatch.setattr(VideoReader, "read", lambda self, *some, **more: decoded.append(1) or read(self, *some, **more))
    (folder / "data.jsonl").write_text((json.dumps(example("a.mp4")) + "\n") * 2)
    sizes = {"seq_len": 4096, "max_patches": 4096, "pack_window": 32, "read_threads": 1}
    config = DataConfig(train=(str(folder / "data.jsonl"),), **sizes, curves="off")
    known = Known()
    first, _ = first_sequences(tiny.processor, config, seed=0, known=known)
    assert sum(map(len, first)) == 32
    assert len(decoded) == 2
    plain = Encode(tiny.processor, config, decode=False)
    element = ExampleSource.of(config)[0]
    ((_, expected),) = plain.read(element, np.random.default_rng(0))
    ((_, kept),) = Encode(tiny.processor, config, decode=False, known=known).read(element, np.random.default_rng(0))
    assert (kept.num_patches, kept.sizes) == (expected.num_patches, expected.sizes)
    assert np.array_equal(kept.tokens, expected.tokens)


@pytest.mark.slow
def test_worker_processes_decode_videos_as_threads_do(tiny, folder):
    (folder / "workers.jsonl").write_text("".join(json.dumps(example("a.mp4")) + "\n" for _ in range(4)))
    sizes = {"batch_size": 1, "seq_len": 128, "max_patches": 512, "max_image_patches": 128}
    data = DataConfig(train=(str(folder / "workers.jsonl"),), **sizes)
    both = (data, dataclasses.replace(data, worker_processes=2))
    runs = []
    for config in both:
        batches = iter(training_data(tiny.processor, config, seed=0, epochs=1)[0])
        runs.append([one.batch for one in batches])
        batches.close()  # ends the processes, and those in which they decode
    assert len(runs[0]) == len(runs[1]) > 0
    for here, there in zip(*runs, strict=True):
        assert np.array_equal(here.patches, there.patches)
        assert np.array_equal(here.tokens, there.tokens)


def test_frames_are_stored_in_the_place_of_videos_and_train_alike(tiny, folder, tmp_path):
    settings = {"video": "a.mp4", "fps": 4.0, "start": 0.5}
    blocks = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": "a cat"}
    records = [
        example("a.mp4", settings),
        {"messages": [{"role": "user", "content": blocks}, answer], "chat_template_kwargs": LIMITS},
    ]
    path = folder / "stored.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cli.main(["data", "convert", str(path), "--output", str(tmp_path / "s"), "--frames", "2"]) == 0
    stored = ExampleSource([str(tmp_path / "s" / "*")])
    for index, record in enumerate(records):
        origin, found = stored[index]
        expected = tiny.processor.encode(parse_example(record, Origin(str(folder / "a.jsonl"), 1)))
        ours = tiny.processor.encode(parse_example(found, origin))
        assert np.array_equal(ours.tokens, expected.tokens)
        assert np.array_equal(ours.positions, expected.positions)
        assert np.abs(ours.patches.astype(int) - expected.patches).mean() < 3
    assert isinstance(stored[0][1]["videos"][1]["video"], list)


def test_a_video_of_which_no_frames_can_be_stored_is_named(folder, tmp_path):
    (folder / "bad.mp4").write_bytes(b"no video")
    for video in ("bad.mp4", {"video": "bad.mp4", "fps": 2.0}):
        (folder / "a.jsonl").write_text(json.dumps(example(video)) + "\n")
        with pytest.raises(ExampleError, match=r"1, field 'videos\[0\]': the video bad.mp4 cannot be used: Invalid"):
            convert([str(folder / "a.jsonl")], tmp_path / "s", frames=FrameOptions(2.0))


def test_a_video_keeps_to_its_tokens_however_long_it_is(tiny, folder):
    parsed = parse_example(example("a.mp4", fps=25.0), Origin(str(folder / "a.jsonl"), 1))
    limited = dataclasses.replace(tiny.processor.image_config, video_max_tokens=30)
    few = tiny.processor.replace(image_config=limited).encode(parsed)
    assert 0 < int((few.vision_index >= 0).sum()) <= 30
    assert int((tiny.processor.encode(parsed).vision_index >= 0).sum()) > 30
    short = encode(tiny, folder, "a.mp4", fps=25.0, video_max_frames=6)
    assert len(np.unique(short.patch_segment_ids)) == 3


def test_the_settings_of_the_data_decide_how_videos_are_decoded(tiny):
    config = VideoConfig(processes=1, seconds=7.0, seconds_per_second=0.5, on_damaged="keep")
    processor = Encode(tiny.processor, DataConfig(video=config)).processor
    with shared_reader(processor.video) as shared:
        assert (shared.seconds, shared.seconds_per_second, shared.on_damaged) == (7.0, 0.5, "keep")
        assert shared_reader(config) is shared is not shared_reader()
