"""Files in a bucket: copied once, again when they change, and not where they do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jvlm.data import stores
from jvlm.data.example_source import ExampleSource
from jvlm.data.readers.array_record import write_shard
from jvlm.errors import UserError
from jvlm.weights.io import load


@pytest.fixture
def here(tmp_path, monkeypatch, bucket):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return bucket


def test_examples_of_a_glob_in_a_bucket_are_read_from_copies_as_new_as_they_are(here, tmp_path, capsys):
    for name, words in (("b", ["3"]), ("a", ["1", "2"])):
        write_shard(tmp_path / "x.arrayrecord", [{"messages": [{"role": "user", "content": word}]} for word in words])
        here.put(f"data/{name}.arrayrecord", (tmp_path / "x.arrayrecord").read_bytes())
    here.put("data/c.txt", b"no examples")

    def read():
        source = ExampleSource(["gs://bucket/data/*.arrayrecord"])
        return [source[i][1]["messages"][0]["content"] for i in range(len(source))]

    assert read() == ["1", "2", "3"]
    assert "and 1 more files" in capsys.readouterr().out
    assert read() == ["1", "2", "3"]
    assert capsys.readouterr().out == ""
    # another content of the same size
    content = here.objects["data/b.arrayrecord"][1]
    write_shard(tmp_path / "x.arrayrecord", [{"messages": [{"role": "user", "content": "4"}]}])
    assert len((tmp_path / "x.arrayrecord").read_bytes()) == len(content)
    stores.at("gs://bucket/data/b.arrayrecord").write_bytes((tmp_path / "x.arrayrecord").read_bytes())
    assert read() == ["1", "2", "4"]
    assert "gs://bucket/data/b.arrayrecord and 0 more" in capsys.readouterr().out
    with pytest.raises(UserError, match="no data file matches 'gs://bucket/data/z"):
        ExampleSource(["gs://bucket/data/z*.arrayrecord"])


def test_a_model_in_a_bucket_loads_like_the_folder_it_was(here, tiny):
    for path in tiny.folder.iterdir():
        here.put(f"models/tiny/{path.name}", path.read_bytes())
    here.put("models/tiny/pytorch_model.bin", b"x" * 1000)
    here.put("models/tiny/original/consolidated.pth", b"x" * 1000)
    model, processor = load("gs://bucket/models/tiny")
    assert model.config == tiny.model.config
    assert processor.tokenizer.get_vocab() == tiny.processor.tokenizer.get_vocab()
    copied = {p.name for p in Path("copies/gs/bucket/models/tiny").iterdir()}
    assert copied == {p.name for p in tiny.folder.iterdir()}
    with pytest.raises(UserError, match="gs://bucket/models/none is not a folder"):
        load("gs://bucket/models/none")


def test_what_does_not_fit_the_disk_is_refused_with_both_numbers(here, monkeypatch):
    here.put("big/a.jsonl", b"{}" * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    with pytest.raises(UserError, match=r"gs://bucket/big/a.jsonl and 0 more files .* 0.00 GiB, but .* 0.00 GiB free"):
        ExampleSource(["gs://bucket/big/a.jsonl"])


def test_without_the_package_for_a_store_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gs://b/x: gs:// is reached through gcsfs: pip install 'jvlm\[gcs\]'"):
        stores.at("gs://b/x")
