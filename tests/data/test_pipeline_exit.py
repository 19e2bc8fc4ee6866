"""A process that reads with worker processes ends at once, whatever ends it, and leaves none behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.training import support

SCRIPT = """
import dataclasses, sys
from jvlm.data import pipeline
from jvlm.training import processors
from tests.training import support
from pathlib import Path

def main(folder, how):
    experiment = support.experiment(folder, folder / "examples.jsonl")
    data = dataclasses.replace(experiment.data, worker_processes=1)  # several are killed in test_soak.py
    dataset, _ = pipeline.training_data(processors.new(experiment), data, seed=0, epochs=1 if how == "end" else None)
    iterator = iter(dataset)
    next(iterator)
    print("begun", flush=True)
    if how == "end":
        assert len(list(iterator)) > 1
    if how == "raise":
        raise RuntimeError("a fault")
    while how in ("SIGTERM", "SIGKILL"):
        next(iterator)

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("end", 0), ("raise", 1), ("leave", 0), ("SIGTERM", -15), ("SIGKILL", -9)])
def test_a_run_with_worker_processes_ends_within_seconds(tmp_path, how, status):
    support.write_examples(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), how], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    if how.startswith("SIG"):
        process.send_signal(signal.Signals[how])
    begin = time.monotonic()
    assert process.wait(60) == status
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert time.monotonic() - begin < 20  # seconds of an idle machine are several of a busy one
