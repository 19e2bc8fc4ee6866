"""A run of adapters that is killed at a random moment, and started again, ends as the run that nothing broke."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import jvlm
from jvlm.models import vlm
from jvlm.training import runs, starting_model
from jvlm.training.config import CheckpointConfig
from tests.adapters import test_training
from tests.support import ROOT
from tests.training import support

STEPS = 20
CONFIG = """
from pathlib import Path
from tests.adapters.test_killed import experiment
def get_config():
    return experiment(Path({folder!r}), Path({base!r}), Path({examples!r}))
"""


def experiment(folder, base, examples):
    options = {"gradient_accumulation_steps": 2, "checkpoint": CheckpointConfig(save_interval_steps=3)}
    return test_training.experiment(folder, base, examples, steps=STEPS, **options)


def start(folder, base, examples):
    folder.mkdir(exist_ok=True)
    config = folder / "config.py"
    config.write_text(CONFIG.format(folder=str(folder), base=str(base), examples=str(examples)))
    command = [sys.executable, "-m", "jvlm.cli", "train", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def steps_logged(folder):
    path = folder / "run" / "logging.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill(process, folder, after, seconds):
    deadline = time.monotonic() + 300
    while steps_logged(folder) < after:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.mark.slow
def test_kill_9_at_a_random_moment_leaves_the_bits_of_the_run_that_nothing_broke(tmp_path):
    """Weights, optimizer state, losses and position in the data; with DoRA, dropout and whole modules."""
    examples = support.write_examples(tmp_path / "data", 24)
    model = starting_model.start_model(support.experiment(tmp_path, examples, *test_training.OPTIONS))
    jvlm.save(*model, tmp_path / "base")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.train(experiment(whole, tmp_path / "base", examples))
    seed = random.SystemRandom().randrange(10**6)
    print(f"moment of seed {seed}")  # shown where the test fails
    draw = random.Random(seed)
    process = start(broken, tmp_path / "base", examples)
    kill(process, broken, after=1 + draw.randrange(8), seconds=draw.uniform(0, 0.1))
    killed_at = steps_logged(broken)
    assert 0 < killed_at < STEPS
    runs.train(experiment(broken, tmp_path / "base", examples))  # goes on in this process
    assert support.losses(broken) == support.losses(whole)
    assert list(support.losses(broken)) == list(range(1, STEPS + 1))
    states = [json.loads((f / "run/checkpoints" / str(STEPS) / "data/metadata").read_text()) for f in (whole, broken)]
    assert states[0]["fingerprints"] == states[1]["fingerprints"]
    assert any(".adapter.magnitude" in path for path in states[0]["fingerprints"])
    ends = [vlm.variables(jvlm.load(folder / "run")[0]) for folder in (whole, broken)]
    for path, variable in ends[0].items():
        np.testing.assert_array_equal(variable.get_value(), ends[1][path].get_value(), err_msg=path)
