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

from tests.rl.support import write_prompts
from tests.support import ROOT


def start(folder: Path, steps: int) -> subprocess.Popen:
    """Start the run of a folder; all starts share what they compile."""
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.rl.killed", str(folder), str(steps)],
            cwd=ROOT,
            env={**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"},
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


def journal_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "run" / "journal").glob("*.jsonl"))


def kill_at_random(folder: Path, steps: int, kills: int, seed: int) -> int:
    """Start the run again and again, and kill each at a random moment; return how often one was killed.

    Three starts of four live until they have judged a group, so that the run comes to its end; the others end at once,
    reading, compiling or restoring.
    """
    chance, killed = random.Random(seed), 0
    while killed < kills:
        process, began, known = start(folder, steps), time.time(), journal_size(folder)
        if killed % 4 == 3:
            time.sleep(chance.random() * 8)
        else:
            while process.poll() is None and journal_size(folder) <= known:
                assert time.time() - began < 300
                time.sleep(0.05)
            time.sleep(chance.random() * 3)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    return killed


def check_kills(whole: Path, broken: Path, steps: int, kills: int, seed: int) -> int:
    """Compare a run that is killed so often, with rewards that take any time, to the whole one; both are folders."""
    write(broken, delays=True)
    killed = kill_at_random(broken, steps, kills, seed)
    assert start(broken, steps).wait(900) == 0, (broken / "output.txt").read_text()[-4000:]
    assert log_of(broken) == log_of(whole)
    expected, found = groups_of(whole), groups_of(broken)
    assert list(expected) == list(found) == list(range(steps))
    for step, groups in expected.items():
        common = groups.keys() & found[step].keys()
        assert len(common) >= 4, step  # those that it was trained on, at least
        for serial in common:
            assert found[step][serial] == groups[serial], (step, serial)
    return killed


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(whole, tmp_path):
    assert check_kills(whole, tmp_path / "broken", steps=4, kills=2, seed=7) == 2  # a second, then half of one
