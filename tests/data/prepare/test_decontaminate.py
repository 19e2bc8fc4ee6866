"""What of an evaluation set is in training data is found, counted exactly, and left out."""

from __future__ import annotations

import json

import pytest

from jvlm import cli
from jvlm.data.example_source import ExampleSource
from jvlm.data.prepare.decontaminate import decontaminate
from tests.data.prepare.conftest import chat, page, text


@pytest.fixture(scope="module")
def evaluation(examples):
    folder = examples.parent
    page(folder / "eval_page.png", "annual sum")
    exam = [
        chat("Say it.", text(2)[:400]),  # the words of example 9 (line)
        chat("Why is the sky over the harbour of this town so green at noon today?", "Dust."),
        chat("Read it.", "x", ["a_small.png"]),  # near the images of lines 4, 6, 13 and 14
        chat("Read it.", "x", ["eval_page.png"]),  # another page of the template
    ]
    (folder / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in exam))
    (folder / "cups.jsonl").write_text(json.dumps(chat("Hot?", "No.", ["coffee.png"])) + "\n")
    return folder / "exam.jsonl", folder / "cups.jsonl"


def test_items_and_examples_are_counted_by_set_and_kind(examples, evaluation, tmp_path):
    exam, cups = map(str, evaluation)
    done = decontaminate([str(examples)], tmp_path, {"exam": [exam], "cups": [cups]})
    counts = json.loads((tmp_path / "report.json").read_text())["evaluation"]
    common = {"too_short_texts": 6, "common_ngrams": 0}
    assert counts["exam"] == {
        **common,
        "items": 4,
        "items_by_text": 1,
        "items_by_image": 1,
        "examples_by_text": 1,
        "examples_by_image": 4,
    }
    assert counts["cups"] == {
        **common,
        "too_short_texts": 2,
        "items": 1,
        "items_by_text": 0,
        "items_by_image": 1,
        "examples_by_text": 0,
        "examples_by_image": 7,
    }
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert {line["number"]: line["reason"] for line in lines} == {
        9: "text",
        **dict.fromkeys((1, 2, 3, 4, 6, 11, 13, 14, 15), "image"),
    }
    shared = next(line for line in lines if line["number"] == 9)["shares"]
    assert [(one["evaluation"], one["item"]) for one in shared] == [("exam", 1)]
    assert shared[0]["text"] == " ".join(text(2).split()[:13])
    assert done.written is None


def test_dropping_by_the_command_line(examples, evaluation, tmp_path, capsys):
    words = ["--evaluation", f"exam={evaluation[0]}", str(evaluation[1]), "--drop", "text", "image"]
    assert cli.main(["data", "decontaminate", str(examples), "--output", str(tmp_path), *words]) == 0
    assert "5 written and 10 dropped" in capsys.readouterr().out
    kept = ExampleSource([f"{tmp_path}/*.arrayrecord"])
    assert len(kept) == 5
    assert text(2) not in [kept[i][1]["messages"][1]["content"] for i in range(5)]
