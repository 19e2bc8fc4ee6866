"""What is an id, what a folder, what neither."""

import pytest

from jvlm.errors import UserError
from jvlm.hub import ids
from jvlm.hub.ids import DatasetId, HubId, parse_dataset, parse_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", HubId("Qwen/Qwen2.5-VL-3B-Instruct")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("hf://org/name@main", HubId("org/name", "main")),
        ("modelscope://org/name", HubId("org/name", source="modelscope")),
    ],
)
def test_ids(text, expected):
    assert parse_id(text) == expected
    assert parse_id(str(expected)) == expected == parse_id(expected.address)


@pytest.mark.parametrize(
    "text", ["name", "a/b/c", "/a/b", "./a/b", "gs://bucket/name", "a/..", "a--b/c", "a/b.git", "a/"]
)
def test_what_is_no_id(text):
    assert parse_id(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/set", DatasetId(HubId("org/set"))),
        ("org/set:docs#200", DatasetId(HubId("org/set"), "docs", None, 200)),
        ("org/set@v2:docs:validation", DatasetId(HubId("org/set", "v2"), "docs", "validation")),
        ("hf://org/set#5", DatasetId(HubId("org/set"), count=5)),
    ],
)
def test_datasets(text, expected):
    assert parse_dataset(text) == expected == parse_dataset(str(expected))


@pytest.mark.parametrize(
    "text", ["rows/train.jsonl", "rows.jsonl", "rows/*.jsonl", "gs://bucket/a.jsonl", "a/b/c.arrayrecord"]
)
def test_what_is_no_dataset(text):
    assert parse_dataset(text) is None


def test_a_folder_that_exists_is_taken_before_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert not ids.is_hub_id("org/name")
    assert ids.is_hub_id("hf://org/name")
    assert ids.is_hub_id("org/other")


def test_a_folder_of_the_cache_has_an_id():
    commit = "0123456789" * 4
    place = f"/home/me/.cache/huggingface/hub/models--org--name/snapshots/{commit}"
    assert ids.of_cache(place) == HubId("org/name", commit)
    assert ids.of_cache("/home/me/models/name") is None


def test_a_revision_is_given_once():
    assert ids.require_id("org/name", "v1") == HubId("org/name", "v1")
    with pytest.raises(UserError, match="v1 and v2"):
        ids.require_id("org/name@v1", "v2")
