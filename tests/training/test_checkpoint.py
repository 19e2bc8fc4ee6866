"""Checkpoints under fire: killed while they are written, damaged on disk, no room, another layout."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvlm.errors import UserError
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import compiled_step, resolve, starting_model, trainer
from jvlm.training.checkpoint import Checkpoints
from jvlm.training.config import CheckpointConfig
from jvlm.training.state import TrainState
from jvlm.weights.fingerprints import fingerprints
from tests.support import ROOT, cpu_devices
from tests.training import support

# Restores the last checkpoint, checks that it is that step's, then saves step after step until it is killed.
WRITER = """
import sys
from pathlib import Path
from tests.training import test_checkpoint as t
with t.Checkpoints(Path(sys.argv[1]), t.CheckpointConfig(save_interval_steps=1, max_to_keep=1)) as checkpoints:
    found = checkpoints.restore_latest(t.state_of(0))
    start = 0
    if found is not None:
        start, state, data = found
        t.check(start, state, data)
    print("restored", start, flush=True)
    for step in range(start + 1, 10**6):
        checkpoints.save(step, t.state_of(step), {"position": step})
        checkpoints.wait()
        print("saved", step, flush=True)
"""


def state_of(step: int):
    """A state with values that tell the step; 4 MiB, so that writing takes a while."""
    params = {
        "decoder.a": jnp.arange(2**19, dtype=jnp.float32) + step,
        "decoder.b": jnp.full((3, 5), step, jnp.bfloat16),
    }
    moments = {path: value * 2 for path, value in params.items()}
    opt_state = {"count": jnp.asarray(step, jnp.int32), "mu": moments}
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, {"encoder.c": jnp.full((7,), step, jnp.float32)})


def check(step, state, data, frozen=0):
    """Compare with what was saved at a step; frozen parameters, unless saved too, are those of ``frozen``."""
    expected = dataclasses.replace(state_of(step), frozen=state_of(frozen).frozen)
    pairs = zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((expected.params, expected.opt_state)),
        strict=True,
    )
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    assert int(state.step) == step
    assert data == {"position": step}


def _written(folder: Path, steps, **config) -> None:
    with Checkpoints(folder, CheckpointConfig(save_interval_steps=1, max_to_keep=5, **config)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"position": step})


@pytest.mark.slow
def test_kill_9_while_saving_never_loses_the_last_checkpoint_even_if_one_is_kept(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    saved, draw = 0, random.Random(0)
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
        line = process.stdout.readline().split()
        while line[0] == "removing":
            line = process.stdout.readline().split()
        assert line[0] == "restored"
        assert int(line[1]) >= saved, "a checkpoint that was whole is gone"
        saved = int(process.stdout.readline().split()[1])
        time.sleep(draw.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split("\n")
        whole = [int(text.split()[1]) for text in rest[:-1] if text.startswith("saved")]
        saved = max([saved, *whole])
    with Checkpoints(tmp_path, CheckpointConfig(save_interval_steps=1, max_to_keep=1)) as checkpoints:
        step, *found = checkpoints.restore_latest(state_of(0))
    assert step >= saved >= 3
    check(step, *found)


def _largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(folder):
    path = _largest(folder)
    os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    path = _largest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _lose(folder):
    _largest(folder / "params").unlink()


def _move(folder):
    (path,) = [p for p in (folder / "data").iterdir() if p.name == "metadata"]
    path.write_text(path.read_text().replace('"position": 3', '"position": 2'))


@pytest.mark.parametrize("damage", [cut, flip, _lose, _move])
def test_a_damaged_step_is_named_put_aside_and_passed_over(tmp_path, capsys, damage):
    _written(tmp_path, (1, 2, 3))
    damage(tmp_path / "checkpoints" / "3")
    with Checkpoints(tmp_path, CheckpointConfig(save_interval_steps=1, max_to_keep=5)) as checkpoints:
        step, *found = checkpoints.restore_latest(state_of(0))
        assert step == 2
        check(2, *found)
        assert "CHECKPOINT DAMAGED" in capsys.readouterr().out
        assert (tmp_path / "damaged" / "3.txt").read_text().strip()
        assert {p.name for p in (tmp_path / "damaged" / "3").iterdir()} >= {"params", "optimizer", "data"}
        assert checkpoints.save(3, state_of(3), {"position": 3})
    with Checkpoints(tmp_path, CheckpointConfig(save_interval_steps=1, max_to_keep=5)) as checkpoints:
        check(*checkpoints.restore_latest(state_of(0)))


def test_checkpoints_of_an_earlier_version_are_gone_on_from_and_their_damage_is_noticed(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("jvlm.training.checkpoint.fingerprints", functools.partial(fingerprints, version=1))
        _written(tmp_path, (1, 2))
    with Checkpoints(tmp_path, CheckpointConfig(save_interval_steps=1)) as checkpoints:
        check(*checkpoints.restore_latest(state_of(0)))
    path = tmp_path / "checkpoints" / "2" / "data" / "metadata"
    text = path.read_text()
    (number,) = re.findall(r"decoder\.a'\]\W+(\d+)", text)[:1]
    assert int(number) < 2**32
    path.write_text(text.replace(number, str(int(number) ^ 1)))
    with Checkpoints(tmp_path, CheckpointConfig(save_interval_steps=1)) as checkpoints:
        assert checkpoints.restore_latest(state_of(0))[0] == 1


def test_if_every_step_is_damaged_the_run_does_not_start_over_by_itself(tmp_path):
    _written(tmp_path, (1, 2))
    for step in (1, 2):
        cut(tmp_path / "checkpoints" / str(step))
    with (
        Checkpoints(tmp_path, CheckpointConfig(save_interval_steps=1)) as checkpoints,
        pytest.raises(UserError, match=r"every(.|\n)*step 2(.|\n)*step 1"),
    ):
        checkpoints.restore_latest(state_of(0))


def test_no_room_for_the_checkpoints_is_said_before_training(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(save_interval_steps=1, max_to_keep=2)) as checkpoints:
        checkpoints.check_space(state_of(0), range(1, 10**6))
    with (
        Checkpoints(tmp_path, CheckpointConfig(save_interval_steps=1, max_to_keep=10**6)) as checkpoints,
        pytest.raises(UserError, match=r"GiB free, but 500000 more checkpoints of 0.00 GiB"),
    ):
        checkpoints.check_space(state_of(0), range(1, 500_001))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "float64", "int64"])
def test_a_fingerprint_changes_with_any_bit_and_with_the_order_and_not_with_the_layout(dtype):
    with jax.enable_x64(dtype.endswith("64")):
        _check_fingerprint(dtype)


def test_complex_arrays_are_refused_by_name():
    with pytest.raises(TypeError, match=r"\['x'\] is complex64"):
        fingerprints({"x": jnp.ones(3, jnp.complex64)})


def _check_fingerprint(dtype):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(0, 2, (4, 6, 8)) if dtype == "bool" else rng.normal(size=(4, 6, 8)) * 50).astype(
        dtype
    )
    (first,) = fingerprints({"x": values}).values()
    raw = np.asarray(values).view(np.uint8).copy()
    for _ in range(20):
        changed = raw.copy()
        place = int(rng.integers(raw.size))
        changed.reshape(-1)[place] ^= 1 if dtype == "bool" else 1 << int(rng.integers(8))
        assert fingerprints({"x": jnp.asarray(changed.view(values.dtype).reshape(values.shape))}) != {"['x']": first}
    assert fingerprints({"x": values[::-1]}) != {"['x']": first}


MESHES = """
import sys
from pathlib import Path
from tests.training import test_checkpoint
test_checkpoint.across_meshes(Path(sys.argv[1]))
"""


def across_meshes(folder: Path) -> None:
    """Saves on one device, goes on upon eight, and comes back to one. Runs with eight CPU devices."""
    experiment = support.experiment(folder, support.write_examples(folder, 4), "--data.batch_size", "4")
    model, processor = starting_model.start_model(experiment)
    experiment = resolve.resolve(experiment, model, processor)
    _, values = trainer.split(model)

    def program(**axes: int) -> compiled_step.CompiledStep:
        devices = jax.devices()[: math.prod(axes.values())]
        return compiled_step.compile_step(dataclasses.replace(experiment, parallel=ParallelConfig(**axes)), devices)

    def drawn(x):
        key = jax.random.key(x.size)
        return jax.random.normal(key, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x + 7

    state = program(data=1).init_state(values)
    state = dataclasses.replace(state, opt_state=jax.tree.map(drawn, state.opt_state))
    saved = [np.asarray(x).tobytes() for x in jax.tree.leaves((state.trainable, state.opt_state))]
    assert len(jax.devices()) == 8
    assert len(set(saved)) > 15
    with Checkpoints(folder, CheckpointConfig(save_interval_steps=1)) as checkpoints:
        checkpoints.save(1, state, {"position": 1})
    meshes = ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1})
    for step, axes in enumerate(meshes, 1):
        here = program(**axes)
        with Checkpoints(folder, CheckpointConfig(save_interval_steps=1)) as checkpoints:
            found, state, data = checkpoints.restore_latest(here.init_state(jax.tree.map(jnp.zeros_like, values)))
            assert (found, int(state.step), data) == (step, step, {"position": step})
            assert saved == [np.asarray(x).tobytes() for x in jax.tree.leaves((state.trainable, state.opt_state))]
            for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(here.state), strict=True):
                assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
            checkpoints.save(step + 1, state, {"position": step + 1})


@pytest.mark.slow
def test_a_checkpoint_of_one_device_is_restored_on_a_mesh_of_eight_and_back_to_the_bit(tmp_path):
    env = {**os.environ, **cpu_devices(8), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MESHES, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DAMAGED" not in done.stdout
