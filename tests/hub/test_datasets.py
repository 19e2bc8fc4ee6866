"""Which files of a dataset's repository are read, and what they hold."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jvlm.data.example_source import ExampleSource
from jvlm.errors import UserError
from jvlm.hub import datasets
from jvlm.hub.downloads import RepoFile
from jvlm.hub.ids import portable

CARD = """---
configs:
- config_name: docs
  data_files:
  - split: train
    path: docs/*.jsonl
  - split: test
    path: [docs/held/a.jsonl]
- config_name: charts
  default: true
  data_dir: charts
  data_files: "**.jsonl"
---
# data
"""


def example(text):
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]}


def lines(*texts):
    return "".join(json.dumps(example(text)) + "\n" for text in texts).encode()


def answers(pattern):
    source = ExampleSource([pattern])
    return [source[index][1]["messages"][1]["content"] for index in range(len(source))]


FILES = {
    "README.md": CARD.encode(),
    "docs/1.jsonl": lines("d1"),
    "docs/2.jsonl": lines("d2"),
    "docs/held/a.jsonl": lines("held"),
    "charts/x/c.jsonl": lines("c"),
}


@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("org/set:docs", ["d1", "d2"]),
        ("org/set:docs:test", ["held"]),
        ("org/set", ["c"]),
        ("hf://org/set@main:charts:train", ["c"]),
    ],
)
def test_subsets_and_splits_of_a_card(hub, id, expected):
    hub.add("org/set", FILES, "datasets")
    assert answers(id) == expected


@pytest.mark.parametrize(
    ("id", "problem"),
    [
        ("org/set:doc", "has no subset 'doc'; it has: docs, charts"),
        ("org/set:docs:dev", "has no split 'dev' in subset docs; it has train, test"),
        ("org/sett", "did you mean org/set"),
    ],
)
def test_a_part_that_is_not_there_has_the_others_named(hub, id, problem):
    hub.add("org/set", FILES, "datasets")
    with pytest.raises(UserError, match=problem):
        datasets.fetch(id)


@pytest.mark.parametrize(
    ("paths", "subset", "expected"),
    [
        (["data.jsonl"], None, {"train": ["data.jsonl"]}),
        (
            ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
            None,
            {
                "train": ["data/train-00000-of-00001.parquet"],
                "validation": ["data/validation-00000-of-00001.parquet"],
            },
        ),
        (["ai2d/train-0.parquet", "docvqa/train-0.parquet"], "docvqa", {"train": ["docvqa/train-0.parquet"]}),
        (["train.jsonl", "dev.jsonl"], None, {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}),
        (["training_constraints.jsonl"], None, {"train": ["training_constraints.jsonl"]}),
    ],
)
def test_without_a_card_names_of_folders_and_files_say_it(paths, subset, expected):
    wanted = datasets.DatasetId(datasets.HubId("org/set"), subset)
    for split, files in expected.items():
        chosen = datasets.choose(
            datasets.dataclasses.replace(wanted, split=split), [RepoFile(p, 1, "") for p in paths], ""
        )
        assert [file.path for file in chosen] == files


def test_kinds_that_are_not_read_are_refused_by_name(hub):
    hub.add("org/set", {"train-0.zip": b"x"}, "datasets")
    with pytest.raises(UserError, match=r"train-0.zip \(zip\) is not read"):
        datasets.fetch("org/set")


def test_pictures_beside_json_lines_come_along(hub):
    hub.add("org/set", {"train.jsonl": lines("a"), "images/1.png": b"\x89PNG", "notes.pdf": b"x"}, "datasets")
    (file,) = datasets.fetch("org/set")
    assert (file.parent / "images/1.png").read_bytes() == b"\x89PNG"
    assert not (file.parent / "notes.pdf").exists()


def test_examples_of_parquet_are_those_that_pyarrow_wrote(hub, capsys):
    asked = {"role": "user", "content": "<image>hi"}
    rows = [
        {
            "messages": [asked, example(f"a{n}")["messages"][1]],
            "images": [{"bytes": bytes([n]) * 9, "path": None}],
        }
        for n in range(150)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=40)
    repo = hub.add("org/set", {"data/train-0.parquet": buffer.getvalue()}, "datasets")
    source = ExampleSource(["org/set"])
    assert [source[index][1] for index in range(len(source))] == rows
    (file,) = datasets.fetch("org/set")
    assert capsys.readouterr().out.count("writing") == 1
    assert portable(str(file)) == f"hf://datasets/org/set@{repo.refs['main']}/data_train-0.arrayrecord"


def test_a_number_takes_so_many_examples_of_a_subset(hub):
    hub.add("org/set", FILES, "datasets")
    assert len(answers("org/set:docs#1")) == 1
    assert sorted(answers("org/set:docs#4")) == ["d1", "d1", "d2", "d2"]
