"""Frames of clips that are made here: the grey of frame n is 20 + 4 n, so that a frame says which one it is."""

import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.video import decoding, seeking
from jvlm.data.video.reader import VideoReader
from jvlm.data.video.sampling import Sampling
from jvlm.errors import UserError

FRAMES = 50
WIDTH, HEIGHT = 64, 48


def grey(number: int) -> np.ndarray:
    """A frame with a white corner at its upper left."""
    frame = np.full((HEIGHT, WIDTH, 3), 20 + 4 * number, np.uint8)
    frame[:16, :16] = 255
    return frame


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames these are, by the grey of their centres."""
    _, height, width, _ = frames.shape
    centre = frames[:, height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4].mean((1, 2, 3))
    return ((centre - 20) / 4).round().astype(int).tolist()


def clip(
    path: Path,
    *,
    codec: str = "libx264",
    times: Callable[[int], int] = lambda n: n,
    rotation: int = 0,
    shift: int = 0,
    frames: int = FRAMES,
    pix_fmt: str = "yuv420p",
    encoder: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A clip whose frames have the times ``times(n)`` / 25 s; ``shift`` frames of its beginning are not shown."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 25)
        stream.codec_context.gop_size = 10
        stream.options = encoder or {}
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(grey(number), format="rgb24")
            frame.pts, frame.time_base = times(number), Fraction(1, 25)
            write(container, stream.encode(frame), shift)
        write(container, stream.encode(None), shift)
    return path


def write(container, packets: list, shift: int) -> None:
    for packet in packets:
        if shift:
            units = int(shift / 25 / packet.time_base)
            packet.pts, packet.dts = packet.pts - units, packet.dts - units
        container.mux(packet)


@pytest.fixture(scope="module")
def reader() -> Iterator[VideoReader]:
    with VideoReader() as reader:
        yield reader


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return clip(tmp_path_factory.mktemp("clips") / "plain.mp4")


def test_sampled_frames_and_their_times(reader, plain):
    got = reader.read(plain)
    assert numbers(got.frames) == [0, 16, 33, 49]
    np.testing.assert_allclose(got.times, [0, 0.64, 1.32, 1.96])
    assert (got.duration, got.fps, got.seconds_per_patch, got.share) == (2.0, 2.0, 1.0, 1.0)
    assert got.frames.shape == (4, HEIGHT, WIDTH, 3)

    part = reader.read(plain, Sampling(start=0.5, end=1.0, fps=8.0))
    assert numbers(part.frames) == [13, 17, 21, 25]
    contents = reader.read(plain.read_bytes(), Sampling(start=0.5, end=1.0, fps=8.0))
    np.testing.assert_array_equal(contents.frames, part.frames)
    relative = reader.read("plain.mp4", Sampling(num_frames=2), roots=(str(plain.parent),))
    assert numbers(relative.frames) == [0, 49]


def test_frames_are_resized_at_once(tmp_path, monkeypatch, plain):
    (tmp_path / "size_rules.py").write_text(
        "import os, time\n"
        "def half(frames, width, height): return width // 2, height // 2\n"
        "def hang(frames, width, height): time.sleep(3600)\n"
        "def crash(frames, width, height): os.abort()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import size_rules

    with VideoReader() as reader:
        small = reader.read(plain, size=size_rules.half)
        assert small.frames.shape == (4, HEIGHT // 2, WIDTH // 2, 3)
        assert numbers(small.frames) == [0, 16, 33, 49]

        # a video on which the decoder hangs or crashes costs that example alone
        reader.seconds, reader.seconds_per_second = 1.0, 0.0
        with pytest.raises(ExampleError, match="took longer than 1 s"):
            reader.read(plain, size=size_rules.hang)
        reader.seconds = 60.0
        with pytest.raises(ExampleError, match="crashed"):
            reader.read(plain, size=size_rules.crash)
        assert numbers(reader.read(plain).frames) == [0, 16, 33, 49]


def test_one_thread_decodes_and_ffmpegs_log_is_off(plain, monkeypatch):
    """Threads of a decoder can wait for each other for ever, and so can its log: vllm#53973, PyAV#1962, #751."""
    monkeypatch.setattr(av.logging, "set_level", lambda level: levels.append(level))
    levels = []
    decoding.begin()
    assert levels == [None]
    for source in (Path(plain), Path(plain).read_bytes()):
        with decoding._video(source) as (_, stream):
            assert stream.codec_context.thread_count == 1


def moving(path: Path, codec: str, frames: int, options: dict[str, str], gop: int = 12) -> Path:
    """A clip of noise that moves, in which a frame made of the wrong one before shows."""
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.options = options
        for number in range(frames):
            picture = np.roll(noise, (number, 2 * number), (0, 1)) // 2 + number % 100
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return path


CODECS = {
    "closed groups": ("libx264", "mp4", {"bf": "3"}, True),
    "open groups": ("libx264", "mkv", {"bf": "3", "x264-params": "open-gop=1"}, True),
    "intra refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1"}, False),
    "one keyframe": ("libx264", "mp4", {"x264-params": "keyint=1000:scenecut=0"}, False),
    "hevc": ("libx265", "mp4", {"x265-params": "open-gop=1:keyint=12:log-level=none"}, True),
    "mpeg4": ("mpeg4", "mkv", {"bf": "2"}, True),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8"}, True),
    "lossless": ("ffv1", "mkv", {}, True),
}


@pytest.mark.parametrize("kind", CODECS)
def test_frames_far_apart_are_those_of_decoding_everything(tmp_path, monkeypatch, kind):
    codec, container, options, seeks = CODECS[kind]
    path = moving(tmp_path / f"clip.{container}", codec, 150, options)
    timeline = decoding.timeline(path)
    used = []
    monkeypatch.setattr(seeking, "frames", lambda *a, f=seeking.frames: used.append(f(*a)) or used[-1])
    for indices in ((0, 50, 100, 149), (30, 31, 77, 77, 140), (11, 12, 13, 36, 148), (149,)):
        found = decoding.decode(path, timeline, indices, None)
        through = decoding.decode(path, dataclasses.replace(timeline, keyframes=()), indices, None)
        np.testing.assert_array_equal(found.frames, through.frames)
        assert len(found.frames) == len(indices)
        assert found.timeline is None
    assert any(one is not None for one in used) == seeks


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(reader, tmp_path, rotation):
    path = clip(tmp_path / "rotated.mp4", rotation=rotation, frames=20)
    frame = reader.read(path, Sampling(num_frames=2)).frames[0]
    corners = {name: frame[y, x].mean() > 200 for name, (y, x) in CORNERS.items()}
    # counterclockwise, as FFmpeg's display matrix has it
    white = {90: "lower left", 180: "lower right", -90: "upper right"}[rotation]
    assert [name for name, is_white in corners.items() if is_white] == [white]
    assert frame.shape == ((HEIGHT, WIDTH, 3) if rotation == 180 else (WIDTH, HEIGHT, 3))


CORNERS = {"upper left": (4, 4), "upper right": (4, -4), "lower left": (-4, 4), "lower right": (-4, -4)}


def test_an_uneven_video_goes_by_its_times(reader, tmp_path):
    path = clip(tmp_path / "gap.mkv", times=lambda n: n if n < 25 else n + 50)  # frame 24 is shown for 2.04 s
    got = reader.read(path)
    assert numbers(got.frames) == [0, 12, 24, 24, 24, 24, 25, 37]
    np.testing.assert_allclose(got.times, [0, 0.48, 0.96, 0.96, 0.96, 0.96, 3.0, 3.48], atol=1e-3)
    assert got.fps == 2.0
    assert got.duration == pytest.approx(4.0, abs=2e-3)


def test_frames_before_an_edit_list_are_left_out(reader, tmp_path):
    path = clip(tmp_path / "edit.mp4", shift=15, options={"avoid_negative_ts": "disabled"})
    got = reader.read(path, Sampling(num_frames=4))
    assert got.times[0] == 0.0
    assert got.duration == pytest.approx(35 / 25)
    assert numbers(got.frames) == [15, 26, 38, 49]


@pytest.mark.parametrize(("kind", "options"), [("mp4", {"movflags": "+faststart"}), ("avi", {})])
def test_a_cut_video_is_refused(reader, tmp_path, kind, options):
    contents = clip(tmp_path / f"first.{kind}", codec="mpeg4", options=options).read_bytes()
    with pytest.raises(
        ExampleError, match=r"[01]\.\d\d of [12]\.\d\d s can be read, then: the file ends within a frame"
    ):
        reader.read(contents[: int(len(contents) * 0.8)])


def packets_of(contents: bytes) -> list[slice]:
    """Where each packet lies in a file."""
    with av.open(io.BytesIO(contents)) as container:
        return [slice(p.pos, p.pos + p.size) for p in container.demux(video=0) if p.size]


def test_damage(reader, tmp_path):
    contents = bytearray(clip(tmp_path / "a.mp4", encoder={"bf": "0"}).read_bytes())
    places = packets_of(contents)
    assert len(places) == FRAMES
    for place in places[47:]:
        contents[place] = b"\xff" * (place.stop - place.start)
    with pytest.raises(ExampleError, match=r"1\.88 of 2\.00 s can be read, then: .*Invalid data"):
        reader.read(bytes(contents))
    with VideoReader(on_damaged="keep") as keeping:
        got = keeping.read(bytes(contents))
        assert numbers(got.frames) == [0, 15, 31, 46]
        assert got.share == pytest.approx(0.94)
        assert got.duration == pytest.approx(1.88)
        contents[places[20]] = b"\xff" * (places[20].stop - places[20].start)
        with pytest.raises(ExampleError, match=r"0\.80 of 2\.00 s can be read.*at least 90%"):
            keeping.read(bytes(contents))


def test_packets_that_give_no_frame(reader, tmp_path):
    """Nine packets follow a keyframe that is not there: the frames that come have times of their own."""
    whole, path = clip(tmp_path / "whole.mp4", encoder={"bf": "0"}), tmp_path / "without.mkv"
    with av.open(str(whole)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in [packet for packet in given.demux(video=0) if packet.size][1:]:
            packet.stream = stream
            container.mux(packet)
    got = reader.read(path)
    assert numbers(got.frames) == [10, 23, 36, 49]
    np.testing.assert_allclose(got.times, [0, 0.52, 1.04, 1.56])
    assert got.duration == pytest.approx(1.6)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations(reader, kind):
    frames = [Image.fromarray(grey(n)) for n in range(6)]
    file = io.BytesIO()
    durations = [500, 500, 500, 500, 1000, 500]
    settings = {} if kind == "GIF" else {"lossless": True} if kind == "WEBP" else {"default_image": False}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=durations, **settings)
    got = reader.read(file.getvalue())
    assert got.duration == 3.5
    assert numbers(got.frames) == [0, 1, 2, 3, 4, 4]
    assert got.times == (0.0, 0.5, 1.0, 1.5, 2.0, 2.0)


def test_what_is_no_video(reader, tmp_path, plain):
    image = io.BytesIO()
    Image.fromarray(grey(0)).save(image, "PNG")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:2,\n{plain}\n#EXT-X-ENDLIST\n".encode()
    for contents, problem in (
        (image.getvalue(), "still image"),
        (b"hello", "Invalid data"),
        (b"", "it is empty, 0 bytes"),
        (playlist, "Invalid data"),
        (b"GIF89a", "cannot be used"),
    ):
        with pytest.raises(ExampleError, match=problem) as raised:
            reader.read(contents, origin=Origin("a.jsonl", 7))
        assert str(raised.value).startswith("a.jsonl, line 7, field 'videos': ")
        assert raised.value.__cause__ is not None
        assert "Errno" not in str(raised.value)
        assert "<none>" not in str(raised.value)
    with pytest.raises(ExampleError, match="not found"):
        reader.read("nothing.mp4")
    with pytest.raises(ExampleError, match="no two frames"):
        reader.read(plain, Sampling(start=5.0))


@pytest.mark.parametrize("name", ["av", "pebble"])
def test_the_extra_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"videos need {name}: pip install 'jvlm\[video\]'"):
        VideoReader()


def test_on_damaged_is_checked():
    with pytest.raises(UserError, match="on_damaged 'skip'"):
        VideoReader(on_damaged="skip")


def test_a_script_without_a_guard_is_told_so(tmp_path, plain):
    script = tmp_path / "script.py"
    script.write_text(
        "from jvlm.data.video.reader import VideoReader\n"
        f"with VideoReader() as reader:\n    reader.read({str(plain)!r})\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "VideoSupportError: the processes that decode videos do not start." in ended.stderr
