"""Several processes on this machine, joined by jax.distributed: one loss, shared data, and nobody waits for ever."""

from __future__ import annotations

import collections
import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from jvlm.parallel import hosts
from jvlm.training import loop, program
from jvlm.training import step as stepping
from jvlm.weights.loading import load
from tests.parallel import models
from tests.support import ROOT
from tests.training import support


def _run(job, processes, *arguments):
    """Standard output of each process. A hang is a failure after the timeout."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.one_of_many", job, address, str(processes), str(n), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, error) in zip(started, ended, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [out for out, _ in ended]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return support.write_rows(tmp_path_factory.mktemp("rows"))


def test_four_processes_two_of_them_with_text_alone_have_the_loss_of_one_and_share_an_epoch(tmp_path, rows):
    """The mesh splits rows over pairs of hosts, and each row over the two hosts of a pair."""
    said = [json.loads(out.splitlines()[-1]) for out in _run("step", 4, "2", "2", str(tmp_path), str(rows))]
    experiment = models.experiment("qwen2_5_vl")
    alone = program.plan(experiment, jax.devices()[:1])
    state, frozen = alone.begin(loop.split(loop.random_model(experiment.model, 0, alone.layout.parameter))[1])
    batch = models.batch(experiment.model, text_only=models.ROWS // 2)
    _, metrics = alone.step(state, frozen, stepping.stack([batch]))
    for one in said:
        assert one["loss"] == pytest.approx(float(metrics["loss"]), abs=1e-5)
        assert one["norm"] == pytest.approx(float(metrics["grad_norm"]), abs=1e-5)
    assert [one["patches"] for one in said] == [0, 0, 1, 1]
    assert [one["rows"] for one in said] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert said[0]["seen"] == said[1]["seen"]
    assert said[2]["seen"] == said[3]["seen"]
    counted = collections.Counter(row for one in said if one["counts"] for row in one["seen"])
    assert counted == dict.fromkeys(range(1, len(rows.read_text().splitlines()) + 1), 1)


def test_a_run_on_two_processes_is_one_run(tmp_path, rows):
    """Parameters in parts on both; one log, one checkpoint, one voice; its weights load on one device."""
    outs = _run("train", 2, str(tmp_path), str(rows), "--parallel.fsdp", "2", "--parallel.data", "1", "--steps", "3")
    assert "3 steps in" in outs[0]
    assert [line for line in outs[1].splitlines() if not line.startswith("[Gloo]")] == []
    losses = support.losses(tmp_path)
    assert list(losses) == [1, 2, 3]
    assert losses[3] < losses[1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "logging.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] > 1
    assert load(tmp_path / "run")[0].config == loop.start_model(support.experiment(tmp_path, rows))[0].config


def test_one_process_alone_communicates_with_nobody():
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.join([1, 2]) == [1, 2]
    hosts.wait("nothing")
    with pytest.raises(ValueError, match="together, or none"):
        hosts.initialise("localhost:1")
