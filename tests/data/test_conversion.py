"""Shards carry every image with them, and appear whole or not at all."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvlm import cli
from jvlm.data import conversion
from jvlm.data.check import check
from jvlm.data.content import media_sources
from jvlm.data.conversion import convert
from jvlm.data.errors import ExampleError
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.images import open_image
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from tests.training import support

NAMES = ("a.png", "sub/b c.png", "c%20d.jpg")


def _pictures(folder: Path) -> dict[str, np.ndarray]:
    """Three images under a folder, and what PIL reads from each."""
    found = {}
    for seed, name in enumerate(NAMES):
        pixels = np.random.default_rng(seed).integers(0, 255, (40 + 8 * seed, 56, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        with Image.open(folder / name) as image:
            found[name] = np.asarray(image.convert("RGB"))
    return found


def _asked(content, **fields) -> dict:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}], **fields}


def _blocks(*blocks) -> dict:
    return _asked([*blocks, {"type": "text", "text": "what?"}])


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


# every form in which an example names images -> (example of a folder, the images in order)
FORMS = {
    "paths": lambda d: (_asked("<image><image>", images=["a.png", "sub/b c.png"]), NAMES[:2]),
    "an absolute path": lambda d: (_asked("<image>", images=[str(d / "a.png")]), NAMES[:1]),
    "one path": lambda d: (_asked("<image>", image="a.png"), NAMES[:1]),
    "an object with a path": lambda d: (_asked("<image>", images=[{"path": "a.png"}]), NAMES[:1]),
    "Arrow's null beside a path": lambda d: (_asked("<image>", images=[{"bytes": None, "path": "a.png"}]), NAMES[:1]),
    "an object with a URL": lambda d: (_asked("<image>", images=[{"url": f"file://{d}/a.png"}]), NAMES[:1]),
    "an object with a URL that is a path": lambda d: (_asked("<image>", images=[{"url": "sub/b c.png"}]), NAMES[1:2]),
    "a file URL": lambda d: (_asked("<image>", images=[f"file://{d}/a.png"]), NAMES[:1]),
    "an escaped file URL": lambda d: (_asked("<image>", images=[f"file://{d}/sub/b%20c.png"]), NAMES[1:2]),
    "a name that looks escaped": lambda d: (_asked("<image>", images=["c%20d.jpg"]), NAMES[2:]),
    "a data URI": lambda d: (
        _asked("<image>", images=["data:image/png;base64," + _base64(d / "a.png")]),
        NAMES[:1],
    ),
    "base64 alone": lambda d: (_asked("<image>", images=[_base64(d / "a.png")]), NAMES[:1]),
    "base64 as bytes": lambda d: (_asked("<image>", images=[{"bytes": _base64(d / "a.png")}]), NAMES[:1]),
    "OpenAI's block": lambda d: (_blocks({"type": "image_url", "image_url": {"url": "a.png"}}), NAMES[:1]),
    "OpenAI's block with detail": lambda d: (
        _blocks({"type": "image_url", "image_url": {"url": f"file://{d}/a.png", "detail": "low"}}),
        NAMES[:1],
    ),
    "OpenAI's block with a string": lambda d: (_blocks({"type": "image_url", "image_url": "a.png"}), NAMES[:1]),
    "OpenAI's block with a data URI": lambda d: (
        _blocks({"type": "image_url", "image_url": {"url": "data:image/png;base64," + _base64(d / "a.png")}}),
        NAMES[:1],
    ),
    "an image block": lambda d: (_blocks({"type": "image", "image": "a.png"}), NAMES[:1]),
    "an image block with an object": lambda d: (_blocks({"type": "image", "image": {"path": "a.png"}}), NAMES[:1]),
    "an image block with a URL": lambda d: (_blocks({"type": "image", "url": "a.png"}), NAMES[:1]),
    "an image block with a path": lambda d: (_blocks({"type": "image", "path": "a.png"}), NAMES[:1]),
    "an image block with base64": lambda d: (_blocks({"type": "image", "base64": _base64(d / "a.png")}), NAMES[:1]),
    "Arrow's nulls in a block": lambda d: (
        _blocks({"type": "image", "image": None, "url": "a.png", "text": None, "video": None}),
        NAMES[:1],
    ),
    "blocks of two turns": lambda d: (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "url": "a.png"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "sub/b c.png"}}]},
                {"role": "assistant", "content": "blue"},
            ]
        },
        NAMES[:2],
    ),
    "a video's frames": lambda d: (_asked("<video>", videos=[["a.png", {"path": "a.png"}]]), (NAMES[0],) * 2),
    "one video": lambda d: (_asked("<video>", video=[["a.png", f"file://{d}/a.png"]]), (NAMES[0],) * 2),
    "a video block": lambda d: (_blocks({"type": "video", "video": ["a.png", {"url": "a.png"}]}), (NAMES[0],) * 2),
}


def _opened(path: str) -> list[list[np.ndarray]]:
    """The images and frames of each example, in order."""
    source, found = ExampleSource([path]), []
    for origin, example in map(source.__getitem__, range(len(source))):
        conversation = parse_example(example, origin)
        media = [source for part in conversation.media for source in media_sources(part)]
        found.append([np.asarray(open_image(image, origin=origin)) for image in media])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_of_every_form_travels_in_the_shard(tmp_path, monkeypatch, form):
    here = tmp_path / "here"
    expected = _pictures(here)
    example, names = FORMS[form](here)
    (here / "examples.jsonl").write_text(json.dumps({**example, "note": "unknown to jvlm"}) + "\n")
    convert([str(here / "examples.jsonl")], here / "shards", 10)
    shutil.move(here / "shards", tmp_path / "elsewhere")
    shutil.rmtree(here)
    monkeypatch.chdir(tmp_path)
    pattern = str(tmp_path / "elsewhere" / "*.arrayrecord")
    (found,) = _opened(pattern)
    assert len(found) == len(names)
    for pixels, name in zip(found, names, strict=True):
        np.testing.assert_array_equal(pixels, expected[name])
    assert ExampleSource([pattern])[0][1]["note"] == "unknown to jvlm"
    assert cli.main(["data", "check", pattern]) == 0


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("processor")
    experiment = support.experiment(folder, support.write_examples(folder, 1))
    tokenizer = AutoTokenizer.from_pretrained(str(experiment.tokenizer), local_files_only=True)
    return Processor(tokenizer, experiment.model, experiment.processor)


def test_tokens_and_patches_are_equal_before_and_after_the_move(tmp_path, processor):
    here = tmp_path / "here"
    _pictures(here)
    records = [make(here)[0] for make in FORMS.values()]
    (here / "examples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def examples(pattern):
        source = ExampleSource([str(pattern)])
        return [processor.encode(parse_example(source[i][1], source[i][0])) for i in range(len(source))]

    before = examples(here / "examples.jsonl")
    convert([str(here / "examples.jsonl")], here / "shards", 7)
    shutil.move(here / "shards", tmp_path / "elsewhere")
    shutil.rmtree(here)
    after = examples(tmp_path / "elsewhere" / "*.arrayrecord")
    assert len(before) == len(after) == len(records)
    for a, b in zip(before, after, strict=True):
        for name in ("tokens", "loss_weights", "vision_index", "patches", "positions", "patch_segment_ids"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_pictures_are_looked_up_in_the_media_root_too(tmp_path, capsys):
    _pictures(tmp_path / "media")
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps(_blocks({"type": "image", "url": "sub/b c.png"})) + "\n")
    arguments = ["data", "convert", str(examples), "--output", str(tmp_path / "s")]
    assert cli.main(arguments) == 2
    assert "file not found" in capsys.readouterr().err
    assert cli.main([*arguments, "--media_root", str(tmp_path / "media")]) == 0
    shutil.rmtree(tmp_path / "media")
    assert cli.main(["data", "check", str(tmp_path / "s" / "*")]) == 0


_REFUSED = {
    "a URL": (_asked("<image>", images=["https://example.org/a.png"]), "https://example.org/a.png is a URL"),
    "OpenAI's block with a URL": (
        _blocks({"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}),
        "is a URL",
    ),
    "a missing file": (_blocks({"type": "image", "path": "gone.png"}), "file not found"),
    "an empty file": (_asked("<image>", images=["empty.png"]), "empty.png is empty, 0 bytes"),
    "a missing frame": (_asked("<video>", videos=[["a.png", "gone.png"]]), r"videos\[0\]\[1\].*file not found"),
    "a missing image of another answer": (
        _asked("<image>", images=["a.png"], rejected_images=["gone.png"]),
        "rejected_images.*file not found",
    ),
    "a number no shard can hold": (_asked("hello", id=2**70), "field 'example': cannot be written as msgpack"),
    "an example that cannot be used": ({"messages": []}, "messages"),
    "the shards' own column": (_asked("hello", jvlm_shard=1), "jvlm_shard"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_an_example_that_cannot_be_carried_is_named_and_no_shard_appears(tmp_path, case):
    _pictures(tmp_path)
    (tmp_path / "empty.png").touch()
    example, message = _REFUSED[case]
    examples = [_asked("hi"), _asked("hi"), example]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    with pytest.raises(ExampleError, match=rf"examples\.jsonl, line 3, .*{message}"):
        convert([str(tmp_path / "examples.jsonl")], tmp_path / "s", 1)
    assert [path.name for path in (tmp_path / "s").iterdir()] == [".unfinished"]


@pytest.fixture
def ten(tmp_path):
    examples = [_asked("x" * n) for n in range(1, 11)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(tmp_path / "examples.jsonl"), examples


def _contents(pattern: Path) -> list:
    source = ExampleSource([str(pattern)])
    return [source[i][1] for i in range(len(source))]


def test_shards_are_the_examples_in_order_the_same_each_time_and_again_when_sharded_again(tmp_path, ten):
    path, examples = ten
    for name in ("a", "b"):
        convert([path], tmp_path / name, 4)
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [
        f"examples-0000{n}-of-00003.arrayrecord" for n in range(3)
    ]
    assert all(p.read_bytes() == (tmp_path / "b" / p.name).read_bytes() for p in (tmp_path / "a").iterdir())
    assert _contents(tmp_path / "a" / "*") == examples
    convert([str(tmp_path / "a" / "*")], tmp_path / "c", 3)
    assert _contents(tmp_path / "c" / "*") == examples


def test_existing_shards_are_neither_overwritten_nor_mixed(tmp_path, ten):
    path, examples = ten
    convert([path], tmp_path / "s", 5)
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    for count in (5, 3):
        with pytest.raises(UserError, match="holds shards already"):
            convert([path], tmp_path / "s", count)
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before
    convert([path], tmp_path / "t", 3)
    shutil.copy(tmp_path / "t" / "examples-00001-of-00004.arrayrecord", tmp_path / "s")
    with pytest.raises(UserError, match="different sets"):
        _contents(tmp_path / "s" / "*.arrayrecord")
    # of as many files, but of other examples
    Path(path).write_text("".join(json.dumps(example) + "\n" for example in examples[1:]))
    convert([path], tmp_path / "u", 5)
    os.remove(tmp_path / "s" / "examples-00001-of-00004.arrayrecord")
    shutil.copy(tmp_path / "u" / "examples-00001-of-00002.arrayrecord", tmp_path / "s")
    with pytest.raises(UserError, match=r"examples-00001-of-00002.arrayrecord: of another set"):
        _contents(tmp_path / "s" / "*.arrayrecord")


def _interrupted(monkeypatch, path, output, size):
    """A conversion that ends at its eighth example; returns the examples that it, and those after it, embed."""
    embed, seen = conversion.embed, []

    def count(example, *arguments):
        seen.append(example)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return embed(example, *arguments)

    monkeypatch.setattr(conversion, "embed", count)
    with pytest.raises(KeyboardInterrupt):
        convert([path], output, size)
    return seen


def test_an_interrupted_conversion_goes_on_after_its_last_whole_shard(tmp_path, ten, monkeypatch):
    path, examples = ten
    seen = _interrupted(monkeypatch, path, tmp_path / "s", 3)
    with pytest.raises(UserError, match="no data file matches"):
        _contents(tmp_path / "s" / "*")
    done = convert([path], tmp_path / "s", 3)
    assert (done.read, done.written, done.shards, done.kept) == (10, 10, 4, 2)
    assert seen[8:] == examples[6:]  # those of the third shard and after
    monkeypatch.undo()
    convert([path], tmp_path / "whole", 3)
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("change", ["another size", "other examples", "other columns"])
def test_what_another_conversion_left_is_not_gone_on_with(tmp_path, ten, monkeypatch, change):
    path, examples = ten
    _interrupted(monkeypatch, path, tmp_path / "s", 5)
    # a part of a file, as by a process that was killed
    (tmp_path / "s" / ".unfinished" / "examples-00001-of-00002.arrayrecord.77.partial").touch()
    if change == "other examples":
        examples = examples[::-1]
        Path(path).write_text("".join(json.dumps(example) + "\n" for example in examples))
    columns = ("messages=messages",) if change == "other columns" else ()
    size = 3 if change == "another size" else 5
    done = convert([path], tmp_path / "s", size, options=FormatOptions(columns=columns))
    assert done.kept == 0
    assert _contents(tmp_path / "s" / "*") == examples
    assert len(list((tmp_path / "s").iterdir())) == done.shards


def test_examples_that_cannot_be_carried_are_left_out_counted_and_listed(tmp_path, capsys):
    _pictures(tmp_path)
    records = [_asked("<image>", images=["a.png"]), _asked("<image>", images=["gone.png"]), {"messages": []}] * 4
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["data", "convert", str(tmp_path / "e.jsonl"), "--output", str(tmp_path / "s"), "--on_bad_example", "skip"]
    words += ["--examples_per_shard", "6", "--rejected", str(tmp_path / "rejected.jsonl")]
    assert cli.main(words) == 0
    assert "12 examples read, 4 written, 8 left out: 2 shard(s)" in capsys.readouterr().out
    assert len(_contents(tmp_path / "s" / "*")) == 4
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [example["number"] for example in rejected] == [2, 3, 5, 6, 8, 9, 11, 12]
    words[words.index(str(tmp_path / "s"))] = str(tmp_path / "t")
    words[words.index("6")] = "1"
    assert cli.main(words) == 0  # shards whose one example is bad are empty
    assert "12 examples read, 4 written, 8 left out: 12 shard(s)" in capsys.readouterr().out
    assert _contents(tmp_path / "t" / "*") == _contents(tmp_path / "s" / "*")
    with pytest.raises(UserError, match="no examples at all"):
        ExampleSource([str(tmp_path / "t" / "examples-00001-of-00012.arrayrecord")])
    (tmp_path / "e.jsonl").write_text('{"messages": []}\n' * 3)
    words[words.index(str(tmp_path / "t"))] = str(tmp_path / "u")
    assert cli.main(words) == 2
    assert "none of the 3 examples can be used" in capsys.readouterr().err
    assert not any((tmp_path / "u").iterdir())


def test_two_conversions_into_one_folder_and_wrong_arguments_are_refused(tmp_path, ten):
    path, _ = ten
    (tmp_path / "s" / ".unfinished").mkdir(parents=True)
    with open(tmp_path / "s" / ".unfinished" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing shards there"):
            convert([path], tmp_path / "s", 5)
    with pytest.raises(UserError, match="examples_per_shard is 0; it must be at least 1"):
        convert([path], tmp_path / "s", 0)
    with pytest.raises(UserError, match=r"examples\.jsonl: no folder can be made there"):
        convert([path], path, 5)


@pytest.mark.parametrize(
    ("damage", "status", "said"),
    [
        (lambda s: os.truncate(s[1], s[1].stat().st_size - 1000), 2, "00001-of-00002.arrayrecord: .*cut short"),
        (lambda s: os.truncate(s[1], 0), 2, "00001-of-00002.arrayrecord: empty"),
        (lambda s: s[1].write_bytes(bytes(s[1].stat().st_size)), 2, "00001-of-00002.arrayrecord: .*zero bytes"),
        (lambda s: s[1].unlink(), 2, "00001-of-00002.arrayrecord: missing"),
        (lambda s: s[0].unlink(), 2, "00000-of-00002.arrayrecord: missing"),
        (
            lambda s: s[1].write_bytes(_flip(s[1].read_bytes(), 200)),
            1,
            "00001-of-00002.arrayrecord, example 1.*damaged",
        ),
    ],
)
def test_check_names_the_damaged_shard(tmp_path, ten, capsys, damage, status, said):
    import re

    convert([ten[0]], tmp_path / "s", 5)
    damage(sorted((tmp_path / "s").iterdir()))
    assert cli.main(["data", "check", str(tmp_path / "s" / "*.arrayrecord")]) == status
    output = "".join(capsys.readouterr())
    assert re.search(said, output)
    assert "Traceback" not in output
    if status == 1:
        report = check([str(tmp_path / "s" / "*.arrayrecord")], None)
        assert (report.examples, len(report.rejected)) == (10, 5)  # short examples are damaged together


def _flip(data: bytes, byte: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :]
