"""A run that is killed at any moment goes on with the same prompts, tokens, rewards and losses, to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rl.killed import STEPS
from tests.rl.support import write_prompts
from tests.support import ROOT

KILLS = 4


def start(folder: Path) -> subprocess.Popen:
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.rl.killed", str(folder)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def write(folder: Path, *, delays: bool) -> Path:
    write_prompts(folder)
    if delays:
        plugin = folder / "letters.py"
        lines = plugin.read_text().replace("    texts =", "    time.sleep(random.random() / 5)\n    texts =")
        plugin.write_text(lines.replace("\n\ndef ", "\nimport random\nimport time\n\n\ndef ", 1))
    return folder


def groups_of(folder: Path) -> dict[int, list]:
    """Of each step its groups as far as both runs must have them: serial number, prompt, tokens, rewards."""
    steps = {}
    for path in sorted((folder / "run" / "journal").glob("*.jsonl")):
        groups = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        steps[int(path.stem)] = {
            group["serial"]: [group["example"], [(a["tokens"], a["reward"]) for a in group["answers"]]]
            for group in groups
        }
    return steps


def log_of(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "run" / "logging.jsonl").read_text().splitlines()]
    return [(line["step_number"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    whole = write(tmp_path / "whole", delays=False)
    assert start(whole).wait(600) == 0, (whole / "output.txt").read_text()[-4000:]
    broken = write(tmp_path / "broken", delays=True)
    chance, killed = random.Random(1), 0
    while killed < KILLS:
        process = start(broken)
        began, journal = time.time(), broken / "run" / "journal"
        known = sum(path.stat().st_size for path in journal.glob("*.jsonl"))
        # once it has judged a group, or trained, in this start
        while process.poll() is None and sum(path.stat().st_size for path in journal.glob("*.jsonl")) <= known:
            assert time.time() - began < 300
            time.sleep(0.05)
        time.sleep(chance.random() * 3)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    assert start(broken).wait(600) == 0, (broken / "output.txt").read_text()[-4000:]
    assert killed >= 2
    assert log_of(broken) == log_of(whole)
    expected, found = groups_of(whole), groups_of(broken)
    assert list(expected) == list(found) == list(range(STEPS))
    for step, groups in expected.items():
        common = groups.keys() & found[step].keys()
        assert len(common) >= 4, step  # those that it was trained on, at least
        for serial in common:
            assert found[step][serial] == groups[serial], (step, serial)
