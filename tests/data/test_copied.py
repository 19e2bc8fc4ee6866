"""Files in a bucket that are copied when a record is first read: what a host copies, and in what order it reads."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvlm.data import example_source, pipeline, stores
from jvlm.data.config import DataConfig
from jvlm.data.errors import Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.mixture.config import Mixture, Phase, Source
from jvlm.data.mixture.examples import Draws, Examples
from jvlm.data.mixture.order import BlockOrder, spread_over
from jvlm.data.position import Share
from jvlm.data.readers import copied
from jvlm.data.readers.array_record import write_shard
from jvlm.errors import UserError
from tests import bucket as bucket_module

SHARDS, EACH = 32, 4


def example(number):
    return {"messages": [{"role": "user", "content": "which?"}, {"role": "assistant", "content": str(number)}]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[bytes]:
    path, contents = tmp_path_factory.mktemp("shards") / "x.arrayrecord", []
    for shard in range(SHARDS):
        write_shard(path, [example(shard * EACH + number) for number in range(EACH)])
        contents.append(path.read_bytes())
    return contents


@pytest.fixture
def here(tmp_path, monkeypatch, bucket, shards):
    """A folder of a machine of its own, where gs://bucket/data has shards."""
    for shard, content in enumerate(shards):
        bucket.put(f"data/s-{shard:05d}-of-{SHARDS:05d}.arrayrecord", content)
    monkeypatch.setattr(copied, "_OPENED", copied._Opened())
    monkeypatch.setattr(example_source, "_SAMPLE", EACH)  # examples that say what the format is: those of one file
    (tmp_path / "0").mkdir()
    monkeypatch.chdir(tmp_path / "0")
    return bucket


def answers(source):
    return [source[i][1]["messages"][1]["content"] for i in range(len(source))]


def copies():
    return {path.name for path in (stores.COPIES / "gs").rglob("*.arrayrecord")}


def test_the_number_of_examples_is_known_before_any_file_is_copied(here, capsys):
    source = ExampleSource(["gs://bucket/data/*.arrayrecord"])
    assert len(source) == SHARDS * EACH
    assert not copies()
    assert f"and {SHARDS - 1} more files" in capsys.readouterr().out
    assert source[5 * EACH + 1][1] == example(5 * EACH + 1)
    # and the first, which says what the format is
    assert copies() == {f"s-{shard:05d}-of-{SHARDS:05d}.arrayrecord" for shard in (0, 5)}
    assert answers(source) == [str(number) for number in range(SHARDS * EACH)]
    assert len(copies()) == SHARDS
    assert ExampleSource(["gs://bucket/data/"]).files == ExampleSource(["gs://bucket/data"]).files == source.files


def test_two_hosts_copy_a_half_each_and_read_what_one_reads(here, tmp_path, monkeypatch, tiny):
    config = DataConfig(
        train=("gs://bucket/data/*.arrayrecord",), batch_size=2, seq_len=64, max_patches=0, pack_window=8, curves="off"
    )
    found, files = {}, {}
    for count in (1, 2):
        for index in range(count):
            folder = tmp_path / f"{count}-{index}"
            folder.mkdir()
            monkeypatch.chdir(folder)
            monkeypatch.setattr(copied, "_OPENED", copied._Opened())
            share = Share(index, count)
            batches, _ = pipeline.training_data(tiny.processor, config, seed=3, epochs=1, share=share)
            origins = [sequence for packed in batches for sequence in packed.origins if sequence]
            found[count, index] = sorted([(Path(o.file).name, o.number) for o in one] for one in origins)
            files[count, index] = copies()
    assert found[1, 0] == sorted(found[2, 0] + found[2, 1])
    assert sum(map(len, found[1, 0])) == SHARDS * EACH
    # a window of blocks is 16 files, a half of all is one of these, and the first file says what the format is
    assert all(SHARDS // 2 <= len(files[2, index]) <= SHARDS // 2 + 1 for index in range(2))


class Files:
    """So many examples in files that are copied as they are read, in blocks."""

    def __init__(self, files, blocks, each):
        self.files = [f"f{number}" for number in range(files)]
        self.starts = np.arange(0, files * blocks * each + 1, each)
        self.of_file = self.starts[::blocks]

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, index):
        return Origin(self.files[int(np.searchsorted(self.of_file, index, "right")) - 1], index), None

    def block_starts(self):
        return self.starts

    def file_starts(self):
        return self.of_file


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("processes", [2, 4])
def test_a_host_touches_its_share_of_the_files_and_a_fifth_more_at_most(processes, blocks):
    window = 16
    draws = Draws(
        Examples({"train": Files(1600, blocks, 4 // blocks)}, is_mixture=False), DataConfig(pack_window=window), seed=1
    )
    size = len(draws.examples)
    run = draws.windows_in_a_row(window, processes)
    passes = []
    for epoch in range(2):
        touched = []
        for index in range(processes):
            share = Share(index, processes, run)
            turn = range(epoch * run, (epoch + 1) * run)
            numbers = [
                draw for done in turn for draw in range(window * share.window(done), window * (share.window(done) + 1))
            ]
            touched.append({draws[draw].origin.file for draw in numbers})
        assert all(len(files) <= 1.2 / processes * 1600 for files in touched)
        assert len(set().union(*touched)) == 1600
        passes.append(touched)
    assert passes[0][0] != passes[1][0]  # other files each pass
    one = {draws[draw].origin.number for draw in range(size)}
    assert one == set(range(size))


def test_a_schedule_has_its_draws_in_their_order():
    members = {"a": Source(("a",)), "b": Source(("b",))}
    config = DataConfig(mixture=Mixture(members=members, schedule=(Phase(0.5, {"a": 3.0}),)), run_examples=10_000)
    examples = Examples({name: Files(100, 1, 100) for name in members}, is_mixture=True)
    assert Draws(examples, config, seed=1).windows_in_a_row(64, 4) == 1
    plain = dataclasses.replace(config, mixture=Mixture(members=members))
    assert Draws(examples, plain, seed=1).windows_in_a_row(64, 4) == 20_000 // 256


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=30), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_each_pass_is_a_permutation_that_finishes_some_files_before_it_begins_others(files, together):
    lengths = [length for file in files for length in file]
    starts = np.cumsum([0, *lengths])
    of_file = starts[np.cumsum([0, *map(len, files)])]
    total = int(starts[-1])
    if not total:
        return
    order = BlockOrder(starts, 3, together, of_file)
    for epoch in range(2):
        drawn = np.asarray([order[epoch * total + i] for i in range(total)])
        assert sorted(drawn.tolist()) == list(range(total))
        of = np.searchsorted(of_file, drawn, "right") - 1
        ends = [(positions[0], positions[-1]) for positions in map(np.flatnonzero, of == np.unique(of)[:, None])]
        open_files = [sum(first < at <= last for first, last in ends) for at in range(total)]
        assert max(open_files) <= 2 * together


def test_a_sample_is_taken_from_a_few_of_the_files():
    source = Files(1000, 1, 50)
    chosen = spread_over(source, 256)
    assert len(chosen) == 256
    assert len({source[int(i)][0].file for i in chosen}) <= 8
    assert {source[int(i)][0].file for i in chosen} >= {"f0", "f999"}
    assert len(spread_over(Files(5, 1, 10), 256)) == 50


def test_copies_that_were_read_longest_ago_make_room(here, monkeypatch):
    size = len(here.objects[f"data/s-00000-of-{SHARDS:05d}.arrayrecord"][1])
    source = ExampleSource(["gs://bucket/data/*.arrayrecord"])
    monkeypatch.setattr(copied, "_OPEN", 1)
    monkeypatch.setattr(copied, "_FREE", size)

    def usage(_):
        total = 10 * size
        return shutil._ntuple_diskusage(total, total, total - size * len(copies()))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert answers(source) == [str(number) for number in range(SHARDS * EACH)]
    assert copies() == {f"s-{shard:05d}-of-{SHARDS:05d}.arrayrecord" for shard in range(SHARDS - 9, SHARDS)}
    # what is read again is copied again
    assert source[0][1] == example(0)


def test_a_file_that_no_disk_has_room_for_is_refused(here, monkeypatch):
    source = ExampleSource(["gs://bucket/data/*.arrayrecord"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 10))
    with pytest.raises(UserError, match=r"gs://bucket/data/s-00003.* is 0.00 GiB, but .* no copies to remove"):
        source[3 * EACH]


def test_a_file_that_changes_after_the_start_is_refused(here, tmp_path):
    source = ExampleSource(["gs://bucket/data/*.arrayrecord"])
    write_shard(tmp_path / "x.arrayrecord", [example(0)] * EACH)
    here.put(f"data/s-00003-of-{SHARDS:05d}.arrayrecord", (tmp_path / "x.arrayrecord").read_bytes())
    with pytest.raises(UserError, match=r"gs://bucket/data/s-00003.* has changed since this run began"):
        source[3 * EACH]


def test_parquet_is_copied_as_it_is_read_and_other_kinds_at_the_start(here, tmp_path, capsys):
    table = pyarrow.table({"instruction": [f"question {i}" for i in range(9)], "output": [str(i) for i in range(9)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    here.put("tables/a.parquet", (tmp_path / "a.parquet").read_bytes())
    here.put("lines/a.jsonl", json.dumps(example(7)).encode() + b"\n")
    source = ExampleSource(["gs://bucket/tables/*.parquet"])
    assert len(source) == 9
    assert source.block_starts().tolist() == [0, 2, 4, 6, 8, 9]
    assert not list((stores.COPIES / "gs").rglob("*.parquet"))
    assert answers(source) == [str(i) for i in range(9)]
    capsys.readouterr()
    assert answers(ExampleSource(["gs://bucket/lines/a.jsonl"])) == ["7"]
    assert "copying 1 files" in (said := capsys.readouterr().out)
    assert "only the whole of such a file says how many examples it has" in said


def test_of_a_large_file_no_more_than_its_ends_are_fetched_at_the_start(here, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).bytes(2**20)
    record = {**example(0), "images": [{"bytes": noise}]}
    write_shard(tmp_path / "x.arrayrecord", [record] * 12)
    here.put("large/x.arrayrecord", (tmp_path / "x.arrayrecord").read_bytes())
    sent, answer = [], bucket_module._Handler._answer

    def counted(self, status, body=b"", **headers):
        sent.append(len(body))
        answer(self, status, body, **headers)

    monkeypatch.setattr(bucket_module._Handler, "_answer", counted)
    assert len(ExampleSource(["gs://bucket/large/x.arrayrecord"])) == 12
    assert 2**20 < sum(sent) < 1.5 * 2**20


def test_files_are_open_only_while_they_are_read(here, tmp_path):
    """A process may open some thousand files, and a set can have more shards."""
    for number in range(30):
        write_shard(tmp_path / f"{number:02}.arrayrecord", [example(number)])
    sources = [ExampleSource([pattern]) for pattern in (f"{tmp_path}/??.arrayrecord", "gs://bucket/data/*.arrayrecord")]
    assert list(map(len, sources)) == [30, SHARDS * EACH]
    assert not [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))]


def test_a_shard_that_is_cut_is_named_before_it_is_read(here):
    name = f"data/s-00003-of-{SHARDS:05d}.arrayrecord"
    content = here.objects[name][1]
    here.put(name, content[: len(content) // 2])
    with pytest.raises(UserError, match=r"bucket/data/s-00003.* cut short or damaged"):
        ExampleSource(["gs://bucket/data/*.arrayrecord"])
