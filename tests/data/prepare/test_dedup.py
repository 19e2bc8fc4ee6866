"""Duplicates are found as they were made; counts add up; a second look tells pages apart."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jvlm import cli
from jvlm.data.example_source import ExampleSource
from jvlm.data.prepare import dedup as dedup_module
from jvlm.data.prepare.dedup import Table, dedup
from jvlm.data.prepare.facts import Examples, Facts
from jvlm.data.prepare.ngrams import words
from jvlm.errors import UserError
from tests.data.prepare.conftest import chat, text

# line -> (kind, line of the first that it is like), from 1
EXPECTED = {
    2: ("near", 1),
    3: ("near_images", 1),
    6: ("near", 4),
    8: ("near_text", 7),
    10: ("equal", 7),
    11: ("equal", 1),
    14: ("near", 13),
}


def found(output: Path) -> dict[int, tuple[str, int]]:
    lines = map(json.loads, (output / "found.jsonl").read_text().splitlines())
    return {line["number"]: (line["reason"], line.get("of_number")) for line in lines}


def test_looking_lists_each_duplicate_with_the_first_that_it_is_like_and_writes_nothing(examples, tmp_path):
    done = dedup([str(examples)], tmp_path)
    assert found(tmp_path) == EXPECTED
    assert done.written is None
    assert done.found == {"near": 3, "equal": 2, "near_images": 1, "near_text": 1}
    assert not list(tmp_path.glob("*.arrayrecord"))


def test_dropping_writes_the_others_whole_and_counts_add_up(examples, tmp_path, monkeypatch):
    dedup([str(examples)], tmp_path)
    # what was looked at is not measured again
    monkeypatch.setattr(Examples, "facts", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(dedup_module, "compared", lambda *_: pytest.fail("compared again"))
    done = dedup([str(examples)], tmp_path, drop=("equal", "near"), examples_per_shard=4)
    # the folder is data as it is: what lies beside the shards is about them
    assert len(ExampleSource([str(tmp_path)])) == done.written
    assert (done.read, done.written, done.dropped, done.shards) == (15, 10, 5, 3)
    shards = ExampleSource([f"{tmp_path}/*.arrayrecord"])
    kept = [i for i in range(15) if EXPECTED.get(i + 1, ("",))[0] not in ("equal", "near")]
    source = ExampleSource([str(examples)])
    for index, original in enumerate(kept):
        expected = source[original][1]
        record = shards[index][1]
        assert record["messages"] == expected["messages"]
        names = [image["path"] for image in record.get("images", [])]
        assert names == expected.get("images", [])
        assert [image["bytes"] for image in record.get("images", [])] == [
            (examples.parent / name).read_bytes() for name in names
        ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["read"] == report["written"] + report["dropped"] == 15
    dropped = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert sum(line["dropped"] for line in dropped) == 5


def test_what_another_set_holds_is_found_and_the_other_set_is_not_written(examples, tmp_path):
    other = examples.parent / "other.jsonl"
    other.write_text(
        json.dumps(chat("What is it?", "A cup.", ["coffee.jpg"]))
        + "\n"
        + json.dumps(chat("?", "quite new words here"))
        + "\n"
    )
    done = dedup([str(other)], tmp_path, against=[str(examples)], drop=("equal", "near"))
    assert (done.read, done.written, done.dropped) == (2, 1, 1)
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(line["reason"], Path(line["of_file"]).name) for line in lines] == [("equal", "examples.jsonl")]
    assert ExampleSource([f"{tmp_path}/*.arrayrecord"])[0][1]["messages"][1]["content"] == "quite new words here"


def test_near_texts_are_those_that_comparing_all_with_all_finds(tmp_path):
    import random

    rng = random.Random(0)
    texts = [text(seed, 80) for seed in range(60)]
    for seed in range(120):
        copy = texts[seed % 60].split()
        for _ in range(seed % 9):
            copy[rng.randrange(80)] = f"changed{rng.random()}"
        texts.append(" ".join(copy))
    rng.shuffle(texts)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    dedup([str(path)], tmp_path / "out")

    def runs(one: str) -> set[tuple[str, ...]]:
        return set(zip(*(words(one)[k:] for k in range(5)), strict=False))

    sets = [runs(one) for one in texts]
    expected = {}
    for j, a in enumerate(texts):
        for i, b in enumerate(texts[:j]):
            if a == b or len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8:
                expected.setdefault(j + 1, i + 1)
                if a == b:
                    expected[j + 1] = i + 1
                    break
    assert 20 < len(expected) < 150
    assert set(found(tmp_path / "out")) == set(expected)


def test_a_bad_example_is_an_error_or_is_listed_and_left_out(examples, tmp_path):
    bad = examples.parent / "bad.jsonl"
    bad.write_text(json.dumps(chat("?", "fine words")) + "\n" + json.dumps(chat("?", "!", ["gone.png"])) + "\n")
    with pytest.raises(UserError, match=r"gone\.png"):
        dedup([str(bad)], tmp_path)
    done = dedup([str(bad)], tmp_path, drop=("equal",), on_bad_example="skip")
    assert (done.read, done.written, done.dropped, done.found) == (2, 1, 1, {"bad": 1})


def test_more_candidates_than_are_compared_are_counted(tmp_path):
    rows = [{"text": " ".join(["the", "same"] * 20 + [f"end{i}"])} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "dedup", str(path), "--output", str(tmp_path / "a"), "--most_compared", "5"]) == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["not_compared"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop", "nothing"], "equal or near or near_text or near_images"),
        (["--least_jaccard", "1.5"], "above 0 and at most 1"),
        (["--max_distance", "200"], "from 0 to 64"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_wrong_options_are_named(words, message, examples, tmp_path, capsys):
    assert cli.main(["data", "dedup", str(examples), "--output", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_facts_takes_some_hundred_bytes_of_an_example():
    """Half of them texts, half images; of which every tenth is a copy."""
    count, rng = 200_000, np.random.default_rng(0)

    def facts(index: int) -> Facts:
        made = rng.bytes(320) if index % 10 else facts.last
        facts.last = made
        if index % 2:
            return Facts(made[:16], made[16:32], (), made[32:288])
        return Facts(made[:16], made[16:32], (made[288:],), b"")

    facts.last = rng.bytes(320)
    tracemalloc.start()
    table = Table.of((facts(index) for index in range(count)), 256)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (table.equal_of != np.arange(count)).sum() == count // 10 - 1
    assert (table.equal_of[10::10] == np.arange(9, count - 1, 10)).all()
    assert kept / count < 250
    assert peak / count < 600
