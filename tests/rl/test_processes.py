"""Two processes on one machine, each with an engine, that train one policy: whoever draws, the answers are the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.rl.test_kill import groups_of, log_of, write
from tests.support import ROOT, cpu_devices


def run(folder: Path, steps: int, *, drawing: int | None = None) -> None:
    """Train in two processes, and print what they printed where they fail.

    Each has one device that trains, which also draws the answers, or ``drawing`` others that do.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
    environment |= cpu_devices(1 + (drawing or 0))
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rl.killed", str(folder), str(steps), address, "2", str(n)]
            + ([] if drawing is None else [str(drawing)]),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text[-4000:]


def check_two(one: Path, tmp_path: Path, steps: int, names: Sequence[str]) -> None:
    """Compare runs in two processes, of which "late" has rewards that take any time, and "apart" engines on devices
    that do not train, with that of one process in the folder ``one``."""
    folders = {"one": one}
    for name in names:
        folders[name] = write(tmp_path / name, delays=name == "late")
        run(folders[name], steps, drawing=1 if name == "apart" else None)
    groups = {name: groups_of(folder) for name, folder in folders.items()}
    lines = {name: log_of(folder) for name, folder in folders.items()}
    first, *others = names
    for other in others:  # which process draws what depends on time, and changes nothing
        assert lines[other] == lines[first]
        assert all(same_groups(groups[other][step], groups[first][step]) for step in range(steps))
    # the first rollout is that of one process; then gradients are summed in another order
    assert same_groups(groups["one"][0], groups[first][0])
    assert lines[first][0] == pytest.approx(lines["one"][0], rel=1e-4, abs=1e-5)
    stored = [json.loads(line) for line in (folders[first] / "run" / "logging.jsonl").read_text().splitlines()]
    assert max(line["rollout/difference"] for line in stored) < 2e-6


def same_groups(one: dict[int, list], other: dict[int, list]) -> bool:
    common = one.keys() & other.keys()
    return len(common) >= 4 and all(one[serial] == other[serial] for serial in common)


@pytest.mark.slow
def test_two_processes_train_on_the_groups_of_one_wherever_their_engines_are(whole, tmp_path):
    check_two(whole, tmp_path, 2, ["late", "apart"])
