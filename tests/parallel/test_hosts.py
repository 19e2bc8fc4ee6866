"""Several processes on this machine, joined by jax.distributed: one loss, shared data, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import jvlm
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.parallel import hosts
from jvlm.training import compiled_step, starting_model, train_step, trainer
from tests import compilation
from tests.parallel import models
from tests.support import ROOT
from tests.training import support, test_held_out

STEPS = 4
SHARDED = "--checkpoint.save_interval_steps 2 --data.pack_window 2 --parallel.data 2 --parallel.fsdp 2".split()
SHARDED += ["--steps", str(STEPS)]


def _run(job, processes, *arguments, devices=1, last=0):
    """Standard output of each process, of so many devices. A hang is a failure after the timeout.

    Where the ``last`` process is to end with another exit status, the others are killed then: by themselves they end
    only when they miss its heartbeat, which takes a minute.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment["XLA_FLAGS"] = f"{compilation.FAST} --xla_force_host_platform_device_count={devices}"
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
        if last:
            started[-1].wait(timeout=600)
            for process in started[:-1]:
                process.kill()
        ended = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, error) in zip(started, ended, strict=True):
        assert process.returncode == 0 or last, error[-3000:]
    assert started[-1].returncode == last, ended[-1][1][-3000:]
    return [out for out, _ in ended]


def _seen(outs):
    """Step -> examples that were learnt from, of all processes."""
    lines = [json.loads(line) for out in outs for line in out.splitlines() if line.startswith('{"step"')]
    return {
        step: sorted(r for line in lines if line["step"] == step for r in line["seen"]) for step in range(1, STEPS + 1)
    }


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run on two processes of two devices, one of them killed when it was to save step 4: only step 2 is whole.

    One step takes the whole of four windows, and the four steps an epoch. All examples say the same, so that the losses
    do not depend on which process reads which.
    """
    folder = tmp_path_factory.mktemp("killed")
    examples = support.write_examples(folder, 32, alike=True)
    seen = _seen(
        _run("train_and_die", 2, str(folder), str(examples), str(STEPS), *SHARDED, devices=2, last=-signal.SIGKILL)
    )
    return folder, examples, seen, support.losses(folder)


def _copy(killed, folder):
    """The killed run once more, and the examples it reads."""
    shutil.copytree(killed[0], folder, dirs_exist_ok=True)
    return str(folder), str(killed[1])


@pytest.mark.slow
def test_four_processes_two_of_them_with_text_alone_have_the_loss_of_one_and_go_on_with_a_run_of_two(tmp_path, killed):
    """The mesh splits sequences over pairs of hosts, and each sequence over the two hosts of a pair."""
    outs = _run("step", 4, "2", "2", *_copy(killed, tmp_path), *SHARDED, "--export.enabled", "False")
    said = [json.loads(next(line for line in out.splitlines() if line.startswith('{"sequences"'))) for out in outs]
    experiment = models.experiment("qwen2_5_vl")
    alone = compiled_step.compile_step(experiment, jax.devices()[:1])
    state = alone.init_state(trainer.split(starting_model.random_model(experiment.model, 0, alone.layout.parameter))[1])
    batch = models.batch(experiment.model, text_only=models.SEQUENCES // 2)
    _, metrics = alone.step(state, train_step.stack([batch]))
    for one in said:
        assert one["loss"] == pytest.approx(float(metrics["loss"]), abs=1e-5)
        assert one["norm"] == pytest.approx(float(metrics["grad_norm"]), abs=1e-5)
    assert [one["patches"] for one in said] == [0, 0, 1, 1]
    assert [(one["index"], one["primary"]) for one in said] == [(0, True), (0, False), (1, True), (1, False)]
    assert [one["sequences"] for one in said] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    _went_on(killed, outs, tmp_path)


@pytest.mark.slow
def test_one_process_goes_on_with_a_run_of_two(tmp_path, killed):
    outs = _run("train", 1, *_copy(killed, tmp_path), *SHARDED, "--export.enabled", "False", devices=4)
    _went_on(killed, outs, tmp_path)


def _went_on(killed, outs, folder):
    """Losses of an unbroken run, and each example once."""
    _, examples, before, losses = killed
    after = _seen(outs)
    assert support.losses(folder) == pytest.approx(losses, abs=1e-5)
    assert [support.losses(folder)[step] for step in (1, 2)] == [losses[step] for step in (1, 2)]
    assert after[1] == after[2] == []
    read = [example for seen in (before[1], before[2], after[3], after[4]) for example in seen]
    assert sorted(read) == list(range(1, len(examples.read_text().splitlines()) + 1))


@pytest.mark.slow
def test_a_run_on_two_processes_goes_on_to_the_bit_and_ends_as_one_run(tmp_path, killed):
    """Parameters in parts on both; one log, one checkpoint, one voice; scored and exported as it was saved."""
    score = ("--evaluation.data", str(killed[1]), "--evaluation.max_examples", "2", "--evaluation.max_new_tokens", "4")
    outs = _run("train", 2, *_copy(killed, tmp_path), *SHARDED, *score, devices=2)
    assert support.losses(tmp_path) == killed[3]
    assert list(killed[3]) == [1, 2, 3, 4]
    assert killed[3][4] < killed[3][1]
    assert {step: examples for step, examples in _seen(outs).items() if examples} == {
        step: killed[2][step] for step in (3, 4)
    }
    assert "4 steps in" in outs[0]
    assert [line for line in outs[1].splitlines() if not line.startswith('{"step"')] == []
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == 1
    assert json.loads((run / "scores.json").read_text())["questions"] == 4
    assert (run / "report.html").is_file()
    saved, exported = (jvlm.load(folder)[0] for folder in (run, run / "hf"))
    exported = vlm.parameters(exported)
    for path, variable in vlm.parameters(saved).items():
        assert np.array_equal(variable.get_value(), exported[path].get_value()), path


@pytest.mark.slow
def test_two_processes_validate_each_held_out_example_once(tmp_path):
    """Seven different examples, which two processes cannot share evenly; what is trained on is all alike."""
    examples = support.write_examples(tmp_path / "train", 8, alike=True)
    held_out = support.write_examples(tmp_path / "held_out", 7)
    options = ("--validation.data", str(held_out), "--validation.interval_steps", "2", "--steps", "2")
    mesh = ("--parallel.data", "2", "--export.enabled", "False", "--data.pack_window", "2")
    _run("train", 2, str(tmp_path), str(examples), *mesh, *options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "logging.jsonl").read_text().splitlines()]
    model, processor = jvlm.load(tmp_path / "run")
    total, weight, right = test_held_out.one_by_one(model, processor, held_out)
    assert lines[-1]["eval_loss"] == pytest.approx(total / weight, rel=1e-5)
    assert lines[-1]["eval_token_acc"] == pytest.approx(right / weight)


@pytest.mark.slow
def test_processes_agree_on_what_is_damaged_even_if_only_one_can_see_it(tmp_path):
    """A part of one process cut short, a bit of another turned; then a process that is not let at the files.

    In the end one leaves without the other, at once.
    """
    outs = _run("damaged", 2, str(tmp_path), last=3)
    for process, out in enumerate(outs):
        found, refused, mistaken = map(json.loads, out.splitlines()[-3:])
        assert found == {"step": 2, "data": {"position": 2}, "equal": True, "again": True}
        assert refused[:2] == [["PeerFailed", False], ["OSError", None]][process]
        assert "PERMISSION_DENIED" in refused[2]
        assert mistaken[:2] == [["PeerFailed", True], ["UserError", None]][process]
        assert "no such thing" in mistaken[2]
    assert "step 4: process 1 says: it cannot be read" in outs[0]
    assert "DAMAGED" not in outs[1]
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["3", "3.txt", "4", "4.txt"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_one_process_alone_communicates_with_nobody():
    assert hosts.all_gather_object({"a": 1}) == [{"a": 1}]
    assert hosts.all_gather_concat([1, 2]) == [1, 2]
    hosts.barrier("nothing")
    with pytest.raises(UserError, match="together, or none"):
        hosts.initialise("localhost:1")
