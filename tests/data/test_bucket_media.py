"""Data files in a bucket with images beside them, and shards that are written to one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jvlm import cli
from jvlm.data import conversion, remote_media, stores
from jvlm.data.conversion import convert
from jvlm.data.engines.ray_data import RayData
from jvlm.data.errors import ExampleError
from jvlm.data.example_source import ExampleSource
from jvlm.data.images import check_within, open_image
from jvlm.data.readers import copied
from jvlm.data.stores import StoreError
from jvlm.errors import UserError
from tests import bucket as bucket_module

COUNT = 6


@pytest.fixture
def here(tmp_path, monkeypatch, bucket):
    """An empty folder of a machine; a bucket with a JSONL file and its images, which lie under ``there`` as well."""
    there, empty = tmp_path / "there", tmp_path / "here"
    (there / "img").mkdir(parents=True)
    empty.mkdir()
    rows = []
    for number in range(COUNT):
        PIL.Image.new("RGB", (28 + number, 30), (40 * number, 9, 99)).save(there / f"img/{number}.png")
        turns = [{"role": "user", "content": "<image>which?"}, {"role": "assistant", "content": str(number)}]
        rows.append(json.dumps({"messages": turns, "images": [f"img/{number}.png"]}) + "\n")
    (there / "a.jsonl").write_text("".join(rows))
    for file in there.rglob("*.*"):
        bucket.put(f"data/{file.relative_to(there)}", file.read_bytes())
    bucket.put("secret.png", (there / "img/0.png").read_bytes())
    monkeypatch.chdir(empty)
    monkeypatch.setattr(remote_media, "_SEEN", {})
    monkeypatch.setattr(copied, "_OPENED", copied._Opened())
    return bucket


def images_of(pattern, roots=()):
    source = ExampleSource([pattern])
    found = []
    for origin, record in map(source.__getitem__, range(len(source))):
        here = (str(Path(origin.file).parent), *roots)
        found.append(np.asarray(open_image(record["images"][0], origin=origin, field="images", roots=here)))
    return found


def test_images_beside_a_file_in_a_bucket_are_those_of_the_disk_and_fetched_once(here, tmp_path, monkeypatch, capsys):
    asked, one = [], bucket_module._Handler._one

    def counted(self, method, path, *rest):
        asked.append(path)
        return one(self, method, path, *rest)

    monkeypatch.setattr(bucket_module._Handler, "_one", counted)
    expected = images_of(str(tmp_path / "there/a.jsonl"))
    for _ in range(2):
        assert all(map(np.array_equal, images_of("gs://bucket/data/a.jsonl"), expected))
        about_images, asked[:] = [path for path in asked if ".png" in path], []
    assert about_images == []  # the second time
    assert capsys.readouterr().out.count("images and videos beside data files of a store are copied to") == 1


def test_an_image_that_has_changed_is_fetched_again_by_the_next_run(here, monkeypatch):
    first = images_of("gs://bucket/data/a.jsonl")
    here.put("data/img/0.png", here.objects["data/img/5.png"][1])
    monkeypatch.setattr(remote_media, "_SEEN", {})  # another process
    again = images_of("gs://bucket/data/a.jsonl")
    assert np.array_equal(again[0], first[5])
    assert all(map(np.array_equal, again[1:], first[1:]))


def test_a_folder_of_a_bucket_is_a_media_root_and_one_of_the_folders_that_are_allowed(here, tmp_path):
    (tmp_path / "here/a.jsonl").write_bytes((tmp_path / "there/a.jsonl").read_bytes())
    root = "gs://bucket/data"
    expected = images_of(str(tmp_path / "there/a.jsonl"))
    assert all(map(np.array_equal, images_of("a.jsonl", roots=(root,)), expected))
    origin, record = ExampleSource(["a.jsonl"])[0]
    where = {"origin": origin, "field": "images", "roots": (".", root)}
    check_within(record["images"][0], (root,), **where)
    with pytest.raises(ExampleError, match="is outside gs://bucket/other"):
        check_within(record["images"][0], ("gs://bucket/other",), **where)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("img/none.png", r"file not found; tried gs://bucket/data/img/none.png"),
        ("../../other/secret.png", "file not found"),
        ("../../../gs/other/secret.png", "file not found"),
        ("gs://bucket/data/img/0.png", "is a URL. Name it relative to the data file, or to data.media_root"),
        ("img", "file not found"),
        ("x" * 2000, "file not found"),
    ],
)
def test_what_is_not_in_the_bucket_is_an_error_of_its_example(here, named, message):
    with pytest.raises(ExampleError, match=message):
        open_image(named, roots=("copies/gs/bucket/data",))


def test_a_name_leads_no_further_up_than_its_bucket():
    assert stores.remote_of("copies/gs/bucket/data/../secret.png") == "gs://bucket/secret.png"
    assert stores.remote_of(Path("copies/gs/bucket/a.png").absolute()) == "gs://bucket/a.png"
    for path in ("copies/gs/bucket/../other/a.png", "copies/gs/bucket/../../s3/bucket/a.png", "copies/gs/bucket/.."):
        assert stores.remote_of(path) is None
    for path in ("a.png", "copies/a.png", "copies/gs/bucket", "copies/outlines/gs/bucket/a.png", "other/gs/bucket/a"):
        assert stores.remote_of(path) is None


def test_media_of_a_file_that_is_copied_as_it_is_read_are_beside_the_file_and_not_its_outline(here, tmp_path):
    for folder in (Path("copies/outlines/gs/bucket/data"), Path("copies/outlines/gs/bucket/data").absolute()):
        assert remote_media.root_of(str(folder)) == Path("copies/gs/bucket/data")
    for folder in (str(tmp_path), ".", "copies/gs/bucket/data", "elsewhere/copies/outlines/gs/bucket"):
        assert remote_media.root_of(folder) == Path(folder)


def test_a_store_that_does_not_answer_ends_the_run_and_is_no_fault_of_an_example(here, monkeypatch, tmp_path):
    source = ExampleSource(["gs://bucket/data/a.jsonl"])

    def lost(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(stores, "fetch_one", lost)
    origin, record = source[0]
    with pytest.raises(StoreError, match=r"gs://bucket/data/img/0.png cannot be reached \(ConnectionError: no route\)"):
        open_image(record["images"][0], origin=origin, roots=(str(Path(origin.file).parent),))
    with pytest.raises(StoreError):
        convert(["gs://bucket/data/a.jsonl"], tmp_path / "out", on_bad_example="skip")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "here")


def shards(bucket, folder):
    objects = bucket.objects.items()
    return {name.removeprefix(folder): content for name, (_, content) in objects if name.startswith(folder)}


def test_shards_are_written_to_a_bucket_as_to_a_disk_by_the_command_line(here, tmp_path, capsys):
    local = convert([str(tmp_path / "there/a.jsonl")], tmp_path / "shards", 2)
    words = [
        "data",
        "convert",
        "gs://bucket/data/a.jsonl",
        "--examples_per_shard",
        "2",
        "--output",
        "gs://bucket/shards",
    ]
    assert cli.main(words) == 0
    assert "6 examples read, 6 written, 0 left out: 3 shard(s) under gs://bucket/shards" in capsys.readouterr().out
    assert sorted(shards(here, "shards/")) == sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert local.written == len(ExampleSource(["gs://bucket/shards/*.arrayrecord"]))
    one, other = (ExampleSource([f"{place}/*.arrayrecord"]) for place in ("gs://bucket/shards", tmp_path / "shards"))
    assert [one[i][1] for i in range(COUNT)] == [other[i][1] for i in range(COUNT)]
    assert not Path("copies/written").exists() or not list(Path("copies/written").rglob("*.arrayrecord"))
    assert not Path("gs:").exists()
    assert cli.main(words) == 2
    assert "gs://bucket/shards holds shards already" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_conversion_to_a_bucket_goes_on_after_the_last_shard_that_was_sent(here, monkeypatch, at):
    convert(["gs://bucket/data/a.jsonl"], "gs://bucket/whole", 2)
    send, sent = conversion.SentShards.send, []

    def breaks(self, path):
        if len(sent) == 1:
            if at == "after":
                send(self, path)
            raise KeyboardInterrupt
        sent.append(path.name)
        send(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(conversion.SentShards, "send", breaks)
        with pytest.raises(KeyboardInterrupt):
            convert(["gs://bucket/data/a.jsonl"], "gs://bucket/broken", 2)
    with pytest.raises(UserError, match=r"examples-0000[12]-of-00003"):
        ExampleSource(["gs://bucket/broken/*.arrayrecord"])
    with pytest.raises(UserError, match="holds shards already"):
        convert(["gs://bucket/data/a.jsonl"], "gs://bucket/broken", 3)
    done = convert(["gs://bucket/data/a.jsonl"], "gs://bucket/broken", 2)
    assert (done.read, done.written, done.kept) == (COUNT, COUNT, 2)
    assert shards(here, "broken/") == shards(here, "whole/")


def test_several_processes_do_not_write_to_a_bucket(here):
    with pytest.raises(UserError, match="gs://bucket/s: one process writes to a store"):
        convert(["gs://bucket/data/a.jsonl"], "gs://bucket/s", 2, engine=RayData(None, 1.0, 0.0, None))


@pytest.mark.parametrize(
    "words",
    [
        ["view", "a.jsonl", "--model", "m", "--output", "gs://bucket/page.html"],
        ["check", "gs://bucket/data/a.jsonl", "--output", "gs://bucket/bad.jsonl"],
        ["convert", "gs://bucket/data/a.jsonl", "--output", "s", "--rejected", "gs://bucket/bad.jsonl"],
        ["dedup", "gs://bucket/data/a.jsonl", "--output", "gs://bucket/unique"],
        ["filter", "gs://bucket/data/a.jsonl", "--output", "gs://bucket/unique"],
        ["decontaminate", "gs://bucket/data/a.jsonl", "--evaluation", "b.jsonl", "--output", "gs://bucket/unique"],
    ],
)
def test_what_is_not_written_to_a_bucket_says_so_at_once(here, words, capsys):
    assert cli.main(["data", *words]) == 2
    assert "written to this machine's disk" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_none_of_the_examples_leaves_nothing_in_the_bucket(here):
    here.put("data/b.jsonl", b'{"messages": 1}\n' * 3)
    with pytest.raises(UserError, match="none of the 3 examples"):
        convert(["gs://bucket/data/b.jsonl"], "gs://bucket/empty", 2, on_bad_example="skip")
    assert shards(here, "empty/") == {}


@pytest.mark.slow
def test_a_conversion_to_a_bucket_that_is_killed_goes_on_to_the_same_shards(here, capsys):
    rows = here.objects["data/a.jsonl"][1] * 20
    here.put("data/a.jsonl", rows)
    words = ["data", "convert", "gs://bucket/data/a.jsonl", "--examples_per_shard", "1", "--output"]
    command = [sys.executable, "-c", "import sys; from jvlm.cli import main; sys.exit(main(sys.argv[1:]))", *words]
    convert(["gs://bucket/data/a.jsonl"], "gs://bucket/whole", 1)
    with subprocess.Popen([*command, "gs://bucket/broken"]) as process:
        began = time.monotonic()
        while len(shards(here, "broken/")) < 10:
            assert process.poll() is None
            assert time.monotonic() - began < 120
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert 10 <= len(shards(here, "broken/")) < 20 * COUNT
    assert cli.main([*words, "gs://bucket/broken"]) == 0  # goes on in this process
    assert "of the shards were whole already" in capsys.readouterr().out
    assert shards(here, "broken/") == shards(here, "whole/")
