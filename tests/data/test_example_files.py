"""Data files that are damaged, of another kind, or not all there: said by name, never left out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path

import msgpack
import pytest
from array_record.python import array_record_module

from jvlm.data.errors import ExampleError
from jvlm.data.example_source import ExampleSource
from jvlm.data.readers.array_record import write_shard
from jvlm.data.readers.shard_set import MARK
from jvlm.errors import UserError

BLOCK = 64 * 1024


def _examples(count: int, size: int = 20) -> list[dict]:
    noise = random.Random(count * size)
    return [{"messages": [{"role": "user", "content": noise.randbytes(size).hex()}], "n": n} for n in range(count)]


def _shard(path: Path, examples: list[dict] | None = None) -> Path:
    write_shard(path, examples or _examples(10))
    return path


def _jsonl(path: Path, examples: list[dict] | None = None) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples or _examples(3)))
    return path


def _read(*patterns) -> list:
    source = ExampleSource([str(p) for p in patterns])
    return [source[i][1] for i in range(len(source))]


# byte of the file -> how far the damage goes; a file of ten short examples is two blocks: examples and
# index, then the position of the index
_FLIPPED = {
    **dict.fromkeys((0, 9, 40, 63), "file"),
    **dict.fromkeys((64, 90, 104, 300), "examples"),
    **dict.fromkeys((BLOCK - 5, BLOCK, BLOCK + 30, BLOCK + 70, BLOCK + 107, BLOCK + 200, 2 * BLOCK - 1), "file"),
}


@pytest.mark.parametrize("byte", _FLIPPED)
def test_a_flipped_bit_anywhere_is_an_error_that_names_the_file(tmp_path, byte):
    path = _shard(tmp_path / "a.arrayrecord")
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << byte % 8
    path.write_bytes(data)
    if _FLIPPED[byte] == "file":
        with pytest.raises(UserError, match=r"a\.arrayrecord: .*(damaged|not an ArrayRecord file)"):
            ExampleSource([str(path)])
        return
    found = _read(path)
    bad = [example for example in found if isinstance(example, ExampleError)]
    assert bad
    assert all(str(path) in str(error) and "example" in str(error) and "hash mismatch" in str(error) for error in bad)
    assert [example for example in found if example not in bad] == [
        example for example in _examples(10) if example in found
    ]
    assert len(found) == 10


@pytest.mark.parametrize(("count", "size"), [(10, 20), (60, 2000), (3, 100_000)])
def test_no_flipped_bit_changes_an_example_or_goes_unnoticed(tmp_path, count, size):
    path, noise = tmp_path / "a.arrayrecord", random.Random(size)
    whole = _shard(path, _examples(count, size)).read_bytes()
    for byte in noise.sample(range(len(whole)), 60):
        data = bytearray(whole)
        data[byte] ^= 1 << noise.randrange(8)
        path.write_bytes(data)
        try:
            found = _read(path)
        except UserError as error:
            problem = str(error)
        else:
            bad = [example for example in found if isinstance(example, ExampleError)]
            problem = ", ".join(map(str, bad))
            assert all(
                example in bad or example == expected
                for example, expected in zip(found, _examples(count, size), strict=True)
            )
        assert str(path) in problem, f"byte {byte} of {len(whole)}"


@pytest.mark.parametrize("options", ["", "group_size:1,uncompressed", "pad_to_block_boundary:true", "transpose:true"])
@pytest.mark.parametrize("count", [1, 5, 4000])
def test_whole_files_of_other_writers_are_read(tmp_path, options, count):
    examples = _examples(count)
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), options)
    for example in examples:
        writer.write(msgpack.packb(example))
    writer.close()
    source = ExampleSource([str(tmp_path / "a.arrayrecord")])
    assert len(source) == count
    assert [source[i][1] for i in (0, count // 2, count - 1)] == [examples[0], examples[count // 2], examples[-1]]


def _no_records(path: Path) -> None:
    array_record_module.ArrayRecordWriter(str(path), "").close()


_DAMAGED = {
    "cut short by 1,000 bytes": (lambda p: os.truncate(p, p.stat().st_size - 1000), "cut short or damaged"),
    "cut short by a byte": (lambda p: os.truncate(p, p.stat().st_size - 1), "cut short or damaged"),
    "without its last block": (lambda p: os.truncate(p, BLOCK), "cut short or damaged"),
    "cut in the header": (lambda p: os.truncate(p, 30), "header of 64 bytes is damaged or cut"),
    "empty": (lambda p: os.truncate(p, 0), "empty, 0 bytes"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "zero bytes"),
    "zeros after the first block": (
        lambda p: p.write_bytes(p.read_bytes()[:BLOCK] + bytes(BLOCK)),
        "cut short or damaged",
    ),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "cut short or damaged"),
    "of another kind": (lambda p: p.write_bytes(b'{"messages": []}\n' * 9000), "not an ArrayRecord file"),
    "compressed": (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "compressed by gzip.*gunzip"),
    "without records": (_no_records, "holds no examples"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "a folder"),
}


@pytest.mark.parametrize("damage", _DAMAGED)
def test_a_shard_damaged_as_a_whole_is_named_though_others_are_good(tmp_path, damage):
    good, bad = _shard(tmp_path / "a.arrayrecord"), _shard(tmp_path / "b.arrayrecord")
    change, message = _DAMAGED[damage]
    change(bad)
    for patterns in ([good, bad], [tmp_path / "*.arrayrecord"]):
        with pytest.raises(UserError, match=rf"b\.arrayrecord: .*{message}"):
            _read(*patterns)


def test_a_record_that_is_not_msgpack_is_that_examples_error(tmp_path):
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    good = msgpack.packb(_examples(1)[0])
    for record in (good, good[:-3], good + b"x", b"\xc1", b"", good):
        writer.write(record)
    writer.close()
    found = _read(tmp_path / "a.arrayrecord")
    assert [isinstance(example, ExampleError) for example in found] == [False, True, True, True, True, False]
    assert "a.arrayrecord, example 3" in str(found[2])


_ONE = json.dumps(_examples(1)[0])
_NOT_JSONL = {
    "empty": (b"", "empty, 0 bytes"),
    "blank lines": (b"\n \n\n", "holds no examples"),
    "zeros": (bytes(500), "zero bytes"),
    "gzip": (gzip.compress(_ONE.encode()), "compressed by gzip"),
    "bzip2": (bz2.compress(_ONE.encode()), "compressed by bzip2"),
    "xz": (lzma.compress(_ONE.encode()), "compressed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(60), "compressed by zstd"),
    "zip": (b"PK\x03\x04" + bytes(60), "compressed by zip"),
    "Parquet": (b"PAR1" + b"x" * 60, "Parquet, not JSON lines"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "UTF-16": (_ONE.encode("utf-16"), "UTF-16 text"),
    "one JSON array": (f"[{_ONE}, {_ONE}]".encode(), "one JSON array, not JSON lines. Name it"),
    "one JSON array over lines": (f"[\n  {_ONE}\n]\n".encode(), "one JSON array, not JSON lines. Name it"),
}


@pytest.mark.parametrize("kind", _NOT_JSONL)
def test_a_file_that_is_not_json_lines_is_named_though_others_are_good(tmp_path, kind):
    content, message = _NOT_JSONL[kind]
    (tmp_path / "b.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"b\.jsonl: .*{message}"):
        _read(_jsonl(tmp_path / "a.jsonl"), tmp_path / "b.jsonl")


def test_a_shard_named_as_jsonl_a_packed_file_a_folder_and_a_dead_link_are_named(tmp_path):
    for name, message in (
        ("x.jsonl", "Name it .*arrayrecord"),
        ("x.jsonl.gz", "gzip"),
        ("x.txt", "examples are read from"),
    ):
        content = _shard(tmp_path / "s.arrayrecord").read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(UserError, match=rf"{name}: .*{message}"):
            _read(tmp_path / name)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dead.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"dead\.jsonl: cannot be read \(No such file(.|\n)*folder\.jsonl: a folder"):
        _read(tmp_path / "*d*.jsonl")


def test_a_last_line_cut_short_is_that_examples_error_and_says_so(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl")
    os.truncate(path, path.stat().st_size - 5)
    *good, bad = _read(path)
    assert good == _examples(3)[:2]
    assert isinstance(bad, ExampleError)
    assert "a.jsonl, line 3" in str(bad)
    assert "ends without a newline" in str(bad)


def test_a_byte_order_mark_and_a_missing_last_newline_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{_ONE}\n{_ONE}".encode())
    assert _read(tmp_path / "a.jsonl") == [json.loads(_ONE)] * 2


# files there, what is asked for -> what is wrong; None where nothing is
_SETS = {
    "whole": (("r-00000-of-00002", "r-00001-of-00002"), "*", None),
    "whole, by name": (("r-00000-of-00002", "r-00001-of-00002"), "r-00001-of-00002", None),
    "part, chosen": (("r-00000-of-00003", "r-00001-of-00003", "r-00002-of-00003"), "r-0000[12]*", None),
    "counted from 1": (("r-1-of-2", "r-2-of-2"), "*", None),
    "two sets of two names": (("r-00000-of-00001", "s-00000-of-00002", "s-00001-of-00002"), "*", None),
    "no set": (("a", "b-of-2", "c-1-of-2-x"), "*", None),
    "last missing": (("r-00000-of-00002",), "*", "r-00001-of-00002.jsonl: missing; 1 of the 2"),
    "first missing": (("r-00001-of-00003",), "*", "r-00000-of-00003.jsonl: missing; 2 of the 3"),
    "missing, by name": (("r-00000-of-00002",), "r-00000-of-00002", "r-00001-of-00002.jsonl: missing"),
    "other count": (("r-00000-of-00001", "r-00000-of-00002", "r-00001-of-00002"), "*", "different sets"),
    "past the end": (("r-00000-of-00002", "r-00001-of-00002", "r-00007-of-00002"), "*", "numbered 0 to 1"),
    "same number": (("r-00000-of-00001", "r-0-of-1"), "*", "the same number"),
    "a browser's copy": (("r-00000-of-00001", "r-00000-of-00001 (1)"), "*", r"\(1\).jsonl: a second copy"),
    "a desktop's copy": (("r-00000-of-00001", "r-00000-of-00001 - Copy"), "*", "Copy.jsonl: a second copy"),
}


@pytest.mark.parametrize("case", _SETS)
def test_names_tell_a_set_that_is_incomplete_or_mixed(tmp_path, case):
    there, asked, message = _SETS[case]
    for name in there:
        _jsonl(tmp_path / f"{name}.jsonl", _examples(2))
    if message is None:
        assert len(_read(tmp_path / f"{asked}.jsonl")) == 2 * len(list(tmp_path.glob(f"{asked}.jsonl")))
        return
    with pytest.raises(UserError, match=message):
        _read(tmp_path / f"{asked}.jsonl")


def _marked(path: Path, identity: str, number: int, count: int, records: int = 4) -> None:
    mark = {"set": identity, "number": number, "count": count, "records": records}
    *others, last = _examples(4)
    write_shard(path, [*others, {**last, MARK: mark}])


_MARKS = {
    "whole": ({"r-0-of-2": ("a", 0, 2), "r-1-of-2": ("a", 1, 2)}, None),
    "of another set": ({"r-0-of-2": ("a", 0, 2), "r-1-of-2": ("b", 1, 2)}, "r-1-of-2.*of another set than .*r-0-of-2"),
    "copied to another's name": ({"r-0-of-2": ("a", 0, 2), "r-1-of-2": ("a", 0, 2)}, "r-1-of-2.*a copy of .*r-0-of-2"),
    "copied to a new name": ({"r-0-of-1": ("a", 0, 1), "z": ("a", 0, 1)}, "z.arrayrecord: a copy of .*r-0-of-1"),
    "names exchanged": ({"r-0-of-2": ("a", 1, 2), "r-1-of-2": ("a", 0, 2)}, "written as number 1 of 2"),
    "fewer records than written": ({"r-0-of-1": ("a", 0, 1, 5)}, "4 records, but it was written with 5"),
    "renamed": ({"one": ("a", 0, 2), "two": ("b", 1, 2)}, None),
}


@pytest.mark.parametrize("case", _MARKS)
def test_marks_inside_shards_tell_sets_that_names_cannot(tmp_path, case):
    files, message = _MARKS[case]
    for name, mark in files.items():
        _marked(tmp_path / f"{name}.arrayrecord", *mark)
    if message is None:
        assert _read(tmp_path / "*.arrayrecord") == _examples(4) * len(files)  # without the mark
        return
    with pytest.raises(UserError, match=message):
        _read(tmp_path / "*.arrayrecord")


def test_a_file_given_twice_is_refused_and_every_bad_file_is_named(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl: given twice"):
        _read(path, tmp_path / "*.jsonl")
    for name in "bc":
        (tmp_path / f"{name}.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.jsonl: empty(.|\n)*c\.jsonl: empty"):
        _read(tmp_path / "*.jsonl")


def test_globs_reach_into_folders_and_names_may_hold_their_characters(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("a.jsonl", "x/b.jsonl", "x/y/c.jsonl"):
        _jsonl(tmp_path / name)
    assert len(ExampleSource([str(tmp_path / "**" / "*.jsonl")]).files) == 3
    odd = _jsonl(tmp_path / "d[1].jsonl")
    assert ExampleSource([str(odd)]).files == [str(odd)]


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.arrayrecord"

    def examples():
        yield from _examples(150)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, examples())
    assert list(tmp_path.iterdir()) == []
    whole = _shard(path).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, examples())
    assert [p.name for p in tmp_path.iterdir()] == ["a.arrayrecord"]
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match=r"gone/a\.arrayrecord: cannot be written \(.*No such file"):
        write_shard(tmp_path / "gone" / "a.arrayrecord", _examples(1))
