"""A verb that is killed with -9, wherever it is, goes on with the same command and leaves the same files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jvlm import cli
from jvlm.data.prepare.keeping import WORK
from tests.data.prepare.conftest import chat, text, write_pages
from tests.data.prepare.test_engines import files_of
from tests.support import ROOT

KILLS = 2


def commands(examples: Path, folder: Path) -> dict[str, list[str]]:
    data = [str(examples.parent / "many.jsonl"), "--examples_per_shard", "300", "--threads", "1"]
    exam = str(examples.parent / "many_exam.jsonl")
    return {
        "dedup": ["dedup", *data, "--drop", "equal", "near", "near_text"],
        "decontaminate": ["decontaminate", *data, "--evaluation", exam, "--drop", "text", "image"],
        "filter": ["filter", *data, "--min_words", "5", "--language", "--drop"],
        "convert": ["convert", *data[:3]],
        "render": ["render", "text", str(folder / "text.txt"), "--count", "200", "--examples_per_shard", "10"],
        "pdf": ["pdf", str(folder / "pages.pdf"), "--examples_per_shard", "4"],
    }


@pytest.fixture(scope="module")
def folder(examples: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    rows = examples.read_text().splitlines() + [json.dumps(chat("?", text(100 + i))) for i in range(3000)]
    (examples.parent / "many.jsonl").write_text("\n".join(rows) + "\n")
    exam = [chat("?", text(150)), chat("What is it?", "A cup.", ["coffee.jpg"])]
    (examples.parent / "many_exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in exam))
    (folder / "text.txt").write_text("\n\n".join(text(i, 40) for i in range(7)))
    write_pages(folder / "pages.pdf", 40)
    return folder


def _finished(output: Path) -> int:
    """Pieces and shards that are whole."""
    return len(list(output.glob(f"{WORK}/*.msgpack"))) + len(list(output.glob(".unfinished/*.json")))


def _kill_when_further(command: list[str], output: Path) -> bool:
    """Start a command and kill it when it has finished one more piece or shard; False where it ended before."""
    before = _finished(output)
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and _finished(output) <= before:
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    children = process.children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "processes stay behind after a kill"
    return True


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["dedup", "decontaminate", "filter", "convert", "render", "pdf"])
def test_a_killed_command_goes_on_and_gives_the_same_files(verb, examples, folder, tmp_path):
    words = ["data", *commands(examples, folder)[verb], "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main([*words, str(whole)]) == 0
    command = [sys.executable, "-m", "jvlm.cli", *words, str(killed)]
    kills = sum(_kill_when_further(command, killed) for _ in range(KILLS))
    assert kills
    if not list(killed.glob("*.arrayrecord")):
        assert cli.main([*words, str(killed)]) == 0  # goes on in this process
    assert len(list(whole.glob("*.arrayrecord"))) > 3
    assert files_of(killed) == files_of(whole)
