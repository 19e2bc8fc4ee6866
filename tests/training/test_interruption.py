"""A preemption notice that one of several processes gets."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROCESS = """
import sys, time
import jax
index = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=index)
from jvlm.training.interruption import StopRequests
requests = StopRequests()
requests.on_train_start(None)
for step in range(1, 2000):
    time.sleep(0.01 + 0.01 * index)
    if step == 5:
        print("running", flush=True)
    asked = requests.after(step)
    if asked:
        print("stopped", step, asked, flush=True)
        break
requests.on_stop(None, None)
"""


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step_when_one_gets_a_signal():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        heard = ""
        while "running" not in heard:
            line = processes[1].stdout.readline()
            assert line, heard
            heard += line
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    said[1] = heard + said[1]
    steps = [re.search(r"stopped (\d+) a preemption notice", text) for text in said]
    assert all(steps), said
    assert steps[0][1] == steps[1][1]
    assert int(steps[0][1]) > 5
