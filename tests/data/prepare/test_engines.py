"""Every verb of preparation gives the same files, byte for byte, whatever does the work."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from jvlm import cli
from jvlm.cli import data_prepare
from jvlm.data.engines.engine import Task
from jvlm.errors import UserError
from tests.data.prepare.conftest import chat, text, write_pages


class Elsewhere:
    """Gives each part to a copy of the task that another process would unpickle, the last part first."""

    def __init__(self):
        self.parts = 0

    def run(self, task: Task, parts: Sequence[range]) -> Iterator[tuple[int, list[Any]]]:
        packed = cloudpickle.dumps(task)
        for index in reversed(range(len(parts))):
            self.parts += 1
            yield index, cloudpickle.loads(packed)(parts[index])


@pytest.fixture(scope="module")
def folder(examples: Path, tmp_path_factory) -> Path:
    """Inputs of all verbs: 301 examples, one of them bad, an evaluation set, texts, a table, a PDF file."""
    folder = tmp_path_factory.mktemp("engines")
    rows = examples.read_text().splitlines() + [json.dumps(chat("?", text(100 + i))) for i in range(285)]
    rows.insert(150, json.dumps(chat("?", "!", ["gone.png"])))
    (examples.parent / "engines.jsonl").write_text("\n".join(rows) + "\n")
    exam = [chat("?", text(150)), chat("What is it?", "A cup.", ["coffee.jpg"])]
    (examples.parent / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in exam))
    (folder / "text.txt").write_text("\n\n".join(text(i, 20) for i in range(5)))
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["item", "price"], ["tea", "1.20"], ["bread", "3.50"]])
    write_pages(folder / "pages.pdf", 8)
    return folder


def commands(examples: Path, folder: Path) -> dict[str, list[str]]:
    data = [str(examples.parent / "engines.jsonl"), "--on_bad_example", "skip", "--examples_per_shard", "50"]
    drawn = ["--count", "16", "--examples_per_shard", "4"]
    return {
        "dedup": ["dedup", *data, "--drop", "equal", "near", "near_text"],
        "decontaminate": [
            "decontaminate",
            *data,
            "--evaluation",
            f"exam={examples.parent / 'exam.jsonl'}",
            "--drop",
            "text",
            "image",
        ],
        "filter": ["filter", *data, "--min_words", "5", "--drop"],
        "convert": ["convert", *data],
        "render text": ["render", "text", str(folder / "text.txt"), *drawn, "--task", "read_boxes"],
        "render table": ["render", "table", str(folder / "table.csv"), *drawn, "--degrade", "0.5"],
        "pdf": ["pdf", str(folder / "pages.pdf"), "--examples_per_shard", "2"],
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(examples, folder, tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """The files that a verb writes in this process."""
    output = tmp_path_factory.mktemp("whole")

    @functools.cache
    def written(verb: str) -> dict[str, bytes]:
        assert cli.main(["data", *commands(examples, folder)[verb], "--output", str(output / verb)]) == 0
        return files_of(output / verb)

    return written


SLOW = ("decontaminate", "filter", "render text", "render table", "pdf")


@pytest.mark.parametrize("verb", ["dedup", "convert", *(pytest.param(verb, marks=pytest.mark.slow) for verb in SLOW)])
def test_other_processes_and_another_order_give_the_same_files(verb, examples, folder, whole, tmp_path, monkeypatch):
    engine = Elsewhere()
    monkeypatch.setattr(data_prepare.Shards, "engine_of", lambda self: engine)
    assert cli.main(["data", *commands(examples, folder)[verb], "--output", str(tmp_path / "out")]) == 0
    assert sum(name.endswith(".arrayrecord") for name in whole(verb)) >= 4
    assert engine.parts >= 4
    assert files_of(tmp_path / "out") == whole(verb)


def test_options_of_ray_without_ray_are_refused(examples, tmp_path, capsys):
    words = ["data", "filter", str(examples), "--output", str(tmp_path), "--workers", "4"]
    assert cli.main(words) == 2
    assert "--engine ray" in capsys.readouterr().err


def test_an_error_of_a_part_comes_after_what_was_done_before(tmp_path):
    from jvlm.data.prepare.pieces import Pieces

    done = []

    def work(some: range) -> list[int]:
        if 7 in some:
            raise UserError("seven")
        done.extend(some)
        return list(some)

    pieces = Pieces(tmp_path, "numbers", "same", 12, size=2)
    with pytest.raises(UserError, match="seven"):
        list(pieces.run(work))
    assert done == [0, 1, 2, 3, 4, 5]
    again = Pieces(tmp_path, "numbers", "same", 12, size=2)
    assert [n for values in again.run(lambda some: list(some)) for n in values] == list(range(12))
    assert again.kept == 3


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["dedup", "pdf"])  # one that reads, in several passes, and one that makes examples
def test_ray_on_this_machine_gives_the_same_files(verb, examples, folder, whole, tmp_path, ray_here):
    words = [*commands(examples, folder)[verb], "--engine", "ray", "--workers", "2"]
    assert cli.main(["data", *words, "--output", str(tmp_path / "out")]) == 0
    assert files_of(tmp_path / "out") == whole(verb)


@pytest.mark.slow
def test_ray_says_what_is_wrong_with_an_example_as_one_process_does(examples, tmp_path, capsys, ray_here):
    words = ["data", "filter", str(examples.parent / "engines.jsonl"), "--output", str(tmp_path)]
    assert cli.main([*words, "--engine", "ray", "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert cli.main(words) == 2
    assert "engines.jsonl, line 151" in said
    assert said == capsys.readouterr().err


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """Ray on this machine, with two processors; it ends with the tests."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
