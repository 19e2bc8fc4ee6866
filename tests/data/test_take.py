"""FILE#N: a part of a file, or more than all of it."""

import json
from collections import Counter

import pytest

from jvlm.data.example_source import ExampleSource
from jvlm.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("take")
    paths = []
    for name, count in (("a", 5), ("b", 3), ("odd#7", 2)):
        path = folder / f"{name}.jsonl" if "#" not in name else folder / "odd.jsonl#7"
        path.write_text("".join(json.dumps({"id": f"{name}{i}"}) + "\n" for i in range(count)))
        paths.append(str(path))
    return paths


def ids(*patterns):
    source = ExampleSource(patterns)
    return [source[index][1]["id"] for index in range(len(source))]


def test_fewer_are_a_part_without_repetition_and_the_same_each_time(files):
    found = ids(f"{files[0]}#3")
    assert len(set(found)) == 3
    assert set(found) < {f"a{i}" for i in range(5)}
    assert found == ids(f"{files[0]}#3")


def test_more_repeat_every_example_as_often_as_it_goes(files):
    counts = Counter(ids(f"{files[0]}#12"))
    assert sum(counts.values()) == 12
    assert sorted(counts.values()) == [2, 2, 2, 3, 3]


def test_each_file_has_its_own_number(files):
    source = ExampleSource([f"{files[0]}#7", files[1]])
    assert source.counts() == {files[0]: 7, files[1]: 3}
    assert ids(f"{files[0]}#7", files[1])[7:] == ["b0", "b1", "b2"]
    distinct = [source[index][1]["id"] for index in source.distinct()]
    assert sorted(distinct) == [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(3)]


def test_a_part_has_a_name_of_its_own_in_checkpoints(files):
    assert repr(ExampleSource([f"{files[0]}#3"])) != repr(ExampleSource([files[0]]))


def test_none_is_refused(files):
    with pytest.raises(UserError, match="0 examples"):
        ids(f"{files[0]}#0")


def test_a_pattern_without_a_file_names_it_without_the_number(files, tmp_path):
    with pytest.raises(UserError, match=r"no data file matches .*x.jsonl"):
        ids(f"{tmp_path}/x.jsonl#3")
