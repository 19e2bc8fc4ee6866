"""Every kind of file gives the records that its library wrote, in any order and process, or an error by name."""

from __future__ import annotations

import csv
import io
import json
import pickle
import struct
import tarfile

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from PIL import Image

from jvlm import cli
from jvlm.data.conversion import convert
from jvlm.data.embedding import embed
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.images import open_image
from jvlm.errors import UserError
from tests.support import GOLDEN


def _png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), number, np.uint8)).save(out, "PNG")
    return out.getvalue()


def _row(number: int) -> dict:
    return {
        "question": f"q{number}, is\nit?",
        "answer": f'a"{number}"',
        "image": {"bytes": _png(number), "path": "a.png"},
    }


ROWS = [_row(number) for number in range(25)]
TEXTS = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]


def _records(*patterns, **options) -> list:
    source = ExampleSource([str(pattern) for pattern in patterns], FormatOptions(**options))
    found = [source[index][1] for index in range(len(source))]
    again = pickle.loads(pickle.dumps(source))
    for index in reversed(range(len(source))):  # in another order and process
        if not isinstance(found[index], ExampleError):
            assert again[index][1] == found[index]
    return found


def _asked(record) -> tuple:
    user, assistant = record["messages"]
    return user["content"].removeprefix("<image>"), assistant["content"]


def _pixel(source) -> int:
    return int(np.asarray(open_image(source))[0, 0, 0])


def _check(records, rows=ROWS) -> None:
    assert [_asked(record) for record in records] == [(row["question"], row["answer"]) for row in rows]
    images = [record.get("image") for record in records]
    assert [_pixel(image) for image in images if image is not None] == [
        _pixel(row["image"]) for row in rows if "image" in row
    ]


def _parquet(path, rows=ROWS, group=4):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def _arrow(path, rows=ROWS, *, stream=True, batch=7):
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def _csv(path, rows=TEXTS, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _webdataset(path, rows=ROWS):
    members = []
    for number, row in enumerate(rows):
        members.append((f"s/{number:04d}.json", json.dumps({k: row[k] for k in ("question", "answer")}).encode()))
        members.append((f"s/{number:04d}.png", row["image"]["bytes"]))
    return _tar(path, members)


WRITERS = {
    "parquet": (lambda d: _parquet(d / "a.parquet"), ROWS),
    "arrow stream": (lambda d: _arrow(d / "a.arrow"), ROWS),
    "arrow file": (lambda d: _arrow(d / "a.arrow", stream=False), ROWS),
    "webdataset": (lambda d: _webdataset(d / "a.tar"), ROWS),
    "csv": (lambda d: _csv(d / "a.csv"), TEXTS),
    "tsv": (lambda d: _csv(d / "a.tsv", delimiter="\t"), TEXTS),
    "json array": (lambda d: _json(d / "a.json", indent=None), TEXTS),
    "json array over lines": (lambda d: _json(d / "a.json", indent=2), TEXTS),
}


def _json(path, indent):
    path.write_text("﻿" + json.dumps([{**row, "note": "ü\ud83d\ude00"} for row in TEXTS], indent=indent), "utf-8")
    return path


@pytest.mark.parametrize("kind", WRITERS)
def test_records_are_those_that_were_written(tmp_path, kind):
    write, rows = WRITERS[kind]
    _check(_records(write(tmp_path)), rows)


@pytest.mark.parametrize("kind", WRITERS)
def test_training_on_shards_is_training_on_what_was_converted(tmp_path, kind):
    write, rows = WRITERS[kind]
    path = write(tmp_path)
    done = convert([str(path)], tmp_path / "shards", 10)
    assert (done.read, done.written, done.shards) == (len(rows), len(rows), 3)
    found = _records(tmp_path / "shards")
    _check(found, rows)
    source = ExampleSource([str(path)])
    expected = [embed(source[i][1], source[i][0], (str(tmp_path),)) for i in range(len(source))]
    assert [msgpack.packb(record) for record in found] == [msgpack.packb(record) for record in expected]


def test_the_elements_of_a_json_array_are_read_one_by_one(tmp_path):
    (tmp_path / "a.json").write_text('[{"query": "q", "response": "a"}, [1], {"query": 1, "query": 2}, "x"]')
    records = _records(tmp_path / "a.json")
    assert _asked(records[0]) == ("q", "a")
    assert "the same key twice" in str(records[2])
    assert records[1] == [1]
    for text, problem in (
        ('[{"a": 1}, {"b"', "cut short"),
        ('[{"a": 1} {"b": 2}]', "neither a comma"),
        ("[nul]", "byte 1"),
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match=rf"b\.json: not a whole JSON array .*{problem}"):
            ExampleSource([str(tmp_path / "b.json")])
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="too deep"):
        ExampleSource([str(tmp_path / "c.json")])


def test_rows_of_csv_have_lists_as_json_and_errors_of_their_own(tmp_path):
    turns = json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "conversations"], ["1", turns], ["2", "[not json"], ["3"], ["", turns]])
    records = _records(tmp_path / "a.csv")
    assert _asked(records[0]) == _asked(records[3]) == ("q", "a")
    assert "id" not in records[3]
    assert "'[not json' is not a list" in str(records[1]) or isinstance(records[1], ExampleError)
    assert "1 cells for 2 columns" in str(records[2])
    (tmp_path / "b.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="its header has 'a' twice"):
        ExampleSource([str(tmp_path / "b.csv")])
    (tmp_path / "c.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(UserError, match=r"c\.csv: row 2 cannot be read as CSV"):
        ExampleSource([str(tmp_path / "c.csv")])


def test_tables_as_pandas_writes_them_are_read(tmp_path):
    """With its index in a column without a name, and lists as Python writes them."""
    images, turns = ["a.png", "b.png"], [{"from": "human", "value": 'it\'s "q"'}, {"from": "gpt", "value": None}]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        rows = [["", "conversations", "images "], [0, repr(turns), repr(images)], [1, "[1, 2, ..., 9]", ""]]
        csv.writer(file).writerows(rows)
    (reader,) = ExampleSource([str(tmp_path / "a.csv")])._readers
    assert reader.read(0, Origin()) == {"Unnamed: 0": "0", "conversations": turns, "images": images}
    assert "cut short with ..." in str(reader.read(1, Origin()))
    (tmp_path / "b.csv").write_text('question,images\n"q","[{""path"": 1, ""path"": 2}]"\n')
    (reader,) = ExampleSource([str(tmp_path / "b.csv")])._readers
    assert "the same key twice" in str(reader.read(0, Origin()))
    (tmp_path / "c.csv").write_text("question;answer\n1;2\n")
    with pytest.raises(UserError, match=r"one column, 'question;answer', whose name holds ';'. Write it with commas"):
        ExampleSource([str(tmp_path / "c.csv")])


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_objects_over_several_lines_are_named_as_such(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text("".join(json.dumps(row, indent=2) + "\n" for row in TEXTS))
    with pytest.raises(UserError, match=r"JSON objects over several lines each. Write one a line: jq -c"):
        ExampleSource([str(path)])


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "a.jsonl"), ("cp1252", "a.csv"), ("utf-16", "a.tsv")])
def test_text_in_another_encoding_is_named(tmp_path, encoding, name):
    text = (
        json.dumps({"question": "où?", "answer": "là"}, ensure_ascii=False) if name == "a.jsonl" else "question\noù?\n"
    )
    (tmp_path / name).write_text(text + "\n", encoding)
    with pytest.raises((UserError, ExampleError), match=r"Write (it|the file) in UTF-8"):
        raise _records(tmp_path / name)[0]


def test_parquet_keeps_three_row_groups_and_no_more(tmp_path):
    source = ExampleSource([str(_parquet(tmp_path / "a.parquet"))])
    for index in (0, 5, 9, 13, 17, 24, 0):
        assert _asked(source[index][1])[1] == f'a"{index}"'
    (reader,) = source._readers
    assert list(reader._kept) == [4, 6, 0]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file", "webdataset"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "other"])
def test_a_damaged_file_is_named(tmp_path, kind, damage):
    path = WRITERS[kind][0](tmp_path)
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) * 2 // 3], "zeros": bytes(len(data)), "other": b"hello" * 200}[damage])
    with pytest.raises(UserError, match=rf"{path.name}: "):
        _records(path)


def test_a_large_row_group_is_told_of(tmp_path, monkeypatch):
    from jvlm.data.readers import parquet

    path = str(_parquet(tmp_path / "a.parquet"))
    assert len(ExampleSource([path]).formats()) == 1
    monkeypatch.setattr(parquet, "_LARGE_BYTES", 100)
    assert "a row group of" in ExampleSource([path]).formats()[1]


def test_very_many_lines_are_told_of(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    source = ExampleSource([str(tmp_path / "a.jsonl")])
    assert len(source.formats()) == 1
    monkeypatch.setattr("jvlm.data.readers.json_lines._MANY", 24)
    assert "a.jsonl: where its 25 lines begin takes 0 MiB of each process" in source.formats()[1]


def test_a_row_group_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    from jvlm.data.readers import parquet

    monkeypatch.setattr(parquet, "_MOST_BYTES", 10_000)
    with pytest.raises(UserError, match=r"a\.parquet: a row group of .* Write the file again with smaller row groups"):
        ExampleSource([str(_parquet(tmp_path / "a.parquet", [{"text": "x" * 50_000}]))])


_UNSAFE = {
    "a name above": lambda tar: tar.addfile(tarfile.TarInfo("../../etc/passwd.txt")),
    "an absolute name": lambda tar: tar.addfile(tarfile.TarInfo("/etc/passwd.txt")),
    "a link": lambda tar: tar.addfile(_link("0.png", tarfile.SYMTYPE)),
    "a hard link": lambda tar: tar.addfile(_link("0.png", tarfile.LNKTYPE)),
    "a device": lambda tar: tar.addfile(_link("0.png", tarfile.CHRTYPE)),
    "a size beyond the file": lambda tar: tar.fileobj.write(_huge().tobuf()),
}


def _link(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def _huge():
    info = tarfile.TarInfo("0.txt")
    info.size = 2**40
    return info


@pytest.mark.parametrize("case", _UNSAFE)
def test_members_that_lead_out_of_a_tar_or_fill_the_memory_are_refused(tmp_path, case):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("1.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
        _UNSAFE[case](tar)
    with pytest.raises(UserError, match=r"a\.tar: (its member|not a whole tar)"):
        ExampleSource([str(tmp_path / "a.tar")])


@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize("secret", ["secret.png", "../secret.png", "ABSOLUTE"])
def test_a_tar_names_no_image_outside_itself(tmp_path, secret, rename):
    (tmp_path / "secret.png").write_bytes(_png(7))
    (tmp_path / "data").mkdir()
    name = str(tmp_path / "secret.png") if secret == "ABSOLUTE" else secret
    record = {"question": "q", "answer": "a", ("my_image" if rename else "image"): name}
    path = _tar(tmp_path / "data" / "a.tar", [("0.json", json.dumps(record).encode())])
    (error,) = _records(path, columns=("my_image=image",) if rename else ())
    assert "is not in the tar" in str(error)
    blocks = [
        {"role": "user", "content": [{"type": "image", "image": {"path": name}}]},
        {"role": "assistant", "content": "a"},
    ]
    path = _tar(tmp_path / "data" / "b.tar", [("0.json", json.dumps({"messages": blocks}).encode())])
    assert "is not in the tar" in str(_records(path)[0])


def test_members_of_a_tar_are_found_by_name_and_extension(tmp_path):
    record = {"conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "a"}]}
    members = [
        ("x/0.json", json.dumps({**record, "images": ["second.png", "x/0.first.png"]}).encode()),
        ("x/0.first.png", _png(1)),
        ("x/0.second.png", _png(2)),
        ("y/0.1.png", _png(3)),
        ("y/0.2.png", _png(4)),
        ("y/0.json", json.dumps(record).encode()),
    ]
    found = _records(_tar(tmp_path / "a.tar", members))
    assert [[_pixel(image) for image in record["images"]] for record in found] == [[2, 1], [3, 4]]
    (error,) = _records(_tar(tmp_path / "b.tar", [("0.json", b"[1]"), ("0.png", _png(0))]))
    assert "is not an object" in str(error)


def test_what_img2dataset_wrote_is_captions(tmp_path):
    """Its JSON has the URL and the path that an image came from, which are no members."""
    about = {"caption": "a cat", "url": "https://example.com/a.jpg", "key": "000", "status": "success", "path": "x/y"}
    members = [("000.jpg", _png(3)), ("000.txt", b"a cat"), ("000.json", json.dumps(about).encode())]
    (record,) = _records(_tar(tmp_path / "00000.tar", members))
    image, text = record["document"]
    assert (text["text"], _pixel(image["image"])) == ("a cat", 3)
    assert record["url"] == "https://example.com/a.jpg"


def test_captions_beside_images_are_documents(tmp_path):
    members = [(f"{n}.{kind}", content) for n in range(3) for kind, content in (("jpg", _png(n)), ("txt", b"A cat."))]
    found = _records(_tar(tmp_path / "a.tar", members))
    assert [record["document"][1]["text"] for record in found] == ["A cat."] * 3
    assert [_pixel(record["document"][0]["image"]) for record in found] == [0, 1, 2]


def test_energons_description_names_splits_and_fields(tmp_path):
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / "split.yaml").write_text("split_parts:\n  train: ['s_{0..1}.tar']\n  val: [s_2.tar]\n")
    (tmp_path / ".nv-meta" / "dataset.yaml").write_text(
        "__class__: VQASample\nfield_map:\n  image: png\n  context: json[ask][0]\n  answers: json[say]\n"
    )
    for n in range(3):
        text = json.dumps({"ask": [f"q{n}"], "say": f"a{n}"}).encode()
        _tar(tmp_path / f"s_{n}.tar", [("0.png", _png(n)), ("0.json", text)])
    assert [_asked(record) for record in _records(tmp_path)] == [("q0", "a0"), ("q1", "a1")]
    assert [_pixel(record["image"]) for record in _records(f"{tmp_path}:val")] == [2]
    with pytest.raises(UserError, match="has no split 'test'; it has train, val"):
        _records(f"{tmp_path}:test")
    (tmp_path / ".nv-meta" / "split.yaml").write_text("split_parts:\n  train: [../x.tar]\n")
    with pytest.raises(UserError, match="outside the folder"):
        _records(tmp_path)


def test_what_datasets_saved_is_read_in_its_order_and_by_split(tmp_path):
    """As `Dataset.save_to_disk` of datasets 4 lays it out."""
    for split, rows in (("train", ROWS), ("test", ROWS[:3])):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        half = len(rows) // 2
        _arrow(folder / "b.arrow", rows[:half])
        _arrow(folder / "a.arrow", rows[half:])
        state = {"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}], "_split": split}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    _check(_records(tmp_path / "saved"))
    _check(_records(f"{tmp_path}/saved:test"), ROWS[:3])
    (tmp_path / "saved" / "test" / "a.arrow").unlink()
    with pytest.raises(UserError, match=r"a\.arrow: missing"):
        _records(f"{tmp_path}/saved:test")


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [("saved", [5, 3, 1, 0, 2, 4]), ("saved:test", [3, 4]), ("rows.parquet", [0, 1, 2, 3, 4, 5])],
)
def test_files_that_datasets_itself_wrote_are_read(pattern, numbers):
    """tests/golden/datasets: `save_to_disk` and `to_parquet` of datasets 5.2, with its Image and List features."""
    records = _records(GOLDEN / "datasets" / pattern)
    turns = [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in records]
    assert [(user[1]["text"], answer[0]["text"]) for user, answer in turns] == [(f"q{n}", f"a{n}") for n in numbers]
    assert [_pixel(user[0]["image"]) for user, _ in turns] == numbers


def test_a_cache_of_datasets_is_read_by_split(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    for number, rows in enumerate((ROWS[:10], ROWS[10:])):
        _arrow(tmp_path / f"my_set-train-{number:05d}-of-00002.arrow", rows)
    _arrow(tmp_path / "my_set-test.arrow", ROWS[:2])
    _check(_records(tmp_path))
    _check(_records(f"{tmp_path}:test"), ROWS[:2])


CARD = """---
configs:
- config_name: docs
  data_files: [{split: train, path: "docs/*.parquet"}, {split: test, path: docs/held/a.parquet}]
- config_name: charts
  data_files: charts/*.csv
---
"""


def test_a_snapshot_is_read_as_its_card_says(tmp_path):
    for name in ("docs/held", "charts"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "README.md").write_text(CARD)
    _parquet(tmp_path / "docs" / "1.parquet", ROWS[:4])
    _parquet(tmp_path / "docs" / "held" / "a.parquet", ROWS[4:5])
    _csv(tmp_path / "charts" / "x.csv")
    _check(_records(f"{tmp_path}:docs"), ROWS[:4])
    _check(_records(f"{tmp_path}:docs:test"), ROWS[4:5])
    _check(_records(f"{tmp_path}:charts"), TEXTS)
    assert len(_records(f"{tmp_path}:charts#5")) == 5
    with pytest.raises(UserError, match="has several subsets; choose one: docs, charts"):
        _records(tmp_path)


def test_images_with_metadata_are_read_in_their_folder_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(_png(5))
    rows = [{"file_name": "train/0.png", "text": "A receipt."}, {"file_name": "../secret.png", "text": "x"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for pattern in (tmp_path, tmp_path / "metadata.jsonl"):
        good, bad = _records(pattern)
        assert good["document"] == [{"type": "image", "image": "train/0.png"}, {"type": "text", "text": "A receipt."}]
        assert "outside the folder" in str(bad)
    done = convert([str(tmp_path)], tmp_path / "s", on_bad_example="skip")
    assert (done.written, len(done.rejected)) == (1, 1)
    assert _pixel(_records(tmp_path / "s")[0]["document"][0]["image"]) == 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset of TFDS: records as its own features serialize them."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder, f = tmp_path_factory.mktemp("tfds"), tfds.features
    features = f.FeaturesDict(
        {
            "image": f.Image(encoding_format="png"),
            "n": np.int64,
            "texts": f.Sequence({"user": f.Text(), "assistant": f.Text()}),
        }
    )
    features.save_config(str(folder))
    records = []
    for number in range(5):
        turn = {"user": f"q{number} ü", "assistant": f"a{number}"}
        example = {"image": io.BytesIO(_png(number)), "n": number, "texts": [turn]}
        records.append(features.serialize_example(features.encode_example(example)))
    return folder, records


def test_a_dataset_of_tfds_is_read_without_tensorflow(prepared, tmp_path):
    folder, records = prepared
    for number, part in enumerate((records[:3], records[3:])):
        name = folder / f"my-train.array_record-{number:05d}-of-00002"
        writer = array_record_module.ArrayRecordWriter(str(name), "group_size:1")
        for record in part:
            writer.write(record)
        writer.close()
    found = _records(folder)
    assert [record["messages"][0]["content"][1]["text"] for record in found] == [f"q{n} ü" for n in range(5)]
    images = [record["messages"][0]["content"][0]["image"] for record in found]
    assert [_pixel(image) for image in images] == [0, 1, 2, 3, 4]
    assert [record["n"] for record in found] == [0, 1, 2, 3, 4]
    assert convert([str(folder)], tmp_path / "s").written == 5
    name.unlink()
    with pytest.raises(UserError, match="1 of the 00002 files of split train are missing"):
        _records(folder)


def test_a_dataset_of_tfds_in_parquet_gives_what_its_own_library_reads(prepared, tmp_path):
    folder, records = prepared
    for number, part in enumerate((records[:3], records[3:])):
        table = pa.table({"data": pa.array(part, pa.binary())})
        pq.write_table(table, tmp_path / f"my-train.parquet-{number:05d}-of-00002")
    (tmp_path / "features.json").write_bytes((folder / "features.json").read_bytes())
    found = _records(tmp_path)
    assert [record["messages"][0]["content"][1]["text"] for record in found] == [f"q{n} ü" for n in range(5)]
    assert [_pixel(record["messages"][0]["content"][0]["image"]) for record in found] == [0, 1, 2, 3, 4]
    source = ExampleSource([str(tmp_path)])
    again = pickle.loads(pickle.dumps(source))
    assert repr(again[4]) == repr(source[4])
    pq.write_table(
        pa.table({"data": pa.array([b"no record"], pa.binary())}), tmp_path / "my-test.parquet-00000-of-00001"
    )
    assert isinstance(ExampleSource([f"{tmp_path}:test"])[0][1], ExampleError)


def _tf_record(path, records):
    with open(path, "wb") as file:
        for record in records:
            file.write(struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4))
    return path


def test_tfrecord_is_converted_and_not_trained_on(prepared, tmp_path, capsys):
    from tensorflow_datasets.proto import tf_example_generated_pb2 as pb

    folder, records = prepared
    with_features = _tf_record(folder / "my-val.tfrecord-00000-of-00001", records)
    example = pb.Example()
    for name, value in (("image/encoded", _png(9)), ("question", b"q"), ("answer", b"a")):
        example.features.feature[name].bytes_list.value.append(value)
    example.features.feature["n"].int64_list.value.append(3)
    alone = _tf_record(tmp_path / "b.tfrecord", [example.SerializeToString()] * 3)
    with pytest.raises(UserError, match="Convert it first: jvlm data convert"):
        ExampleSource([str(alone)])
    words = ["data", "convert", str(alone), "--output", str(tmp_path / "s"), "--columns", "image/encoded=image"]
    assert cli.main(words) == 0
    record = _records(tmp_path / "s")[2]
    assert (_asked(record), _pixel(record["image"]), record["n"]) == (("q", "a"), 9, 3)
    assert convert([str(with_features)], tmp_path / "t").written == 5
    alone.write_bytes(alone.read_bytes()[:-9])
    assert cli.main([*words[:4], str(tmp_path / "u")]) == 2
    assert "cut short: its record at byte" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.npy", "a.pickle"])
def test_no_kind_of_file_is_unpickled(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"messages": []}))
    with pytest.raises(UserError, match="examples are read from"):
        ExampleSource([str(tmp_path / name)])
