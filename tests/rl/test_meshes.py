"""Policy optimisation on meshes: loss, metrics and gradient are those of one device."""

import json

import jax
import pytest

from jvlm.errors import UserError
from jvlm.parallel.mesh import ParallelConfig
from jvlm.rl import meshes
from jvlm.rl.config import RolloutConfig
from tests.parallel import models
from tests.rl.test_kill import groups_of, log_of, write
from tests.rl.test_processes import same_groups
from tests.support import cpu_devices, run_python

# all axes but those of copies and of experts, which parallel/test_meshes.py has
MESH = "fsdp context tensor"


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kind"), [("qwen2_5_vl", "on_policy"), ("qwen3_vl", "gspo")])
def test_a_step_on_a_mesh_is_that_of_one_device(architecture, kind):
    assert MESH in models.MESHES
    code = f"from tests.rl.policy_on_meshes import main; main({architecture!r}, {kind!r}, {MESH!r})"
    said = [json.loads(line) for line in run_python(code, timeout=600, **cpu_devices(8)).splitlines()]
    alone, on_mesh = said
    alone = alone["metrics"]
    assert abs(alone["loss"]) > 1e-3
    assert alone["rollout/difference"] > 1e-2  # the log-probabilities of the batch were drawn
    for name in ("loss", "rollout/kl1", "rollout/kl3", "rollout/difference", "clip_low", "clip_high"):
        assert on_mesh["metrics"][name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), name
    assert on_mesh["difference"] < 2e-4 * on_mesh["largest"], on_mesh


@pytest.mark.slow
def test_an_engine_on_other_devices_gives_the_answers_and_losses_of_one_on_the_same(tmp_path):
    found = {}
    for name, devices, drawing in (("same", 2, None), ("apart", 4, 2)):  # one alone draws in test_processes.py
        folder = write(tmp_path / name, delays=False)
        code = f"from tests.rl.apart import main; main({str(folder)!r}, {drawing})"
        assert "trained on [0, 1]" in run_python(code, timeout=600, **cpu_devices(devices))
        found[name] = groups_of(folder), log_of(folder)
    groups, lines = found["same"]
    assert len(lines) == 2
    assert found["apart"][1] == lines
    assert all(same_groups(found["apart"][0][step], groups[step]) for step in range(2))


def test_devices_that_draw_leave_some_to_train():
    count = jax.local_device_count()
    for problem in (count, count + 1):
        with pytest.raises(UserError, match=rf"devices = {problem} of the {count} device.* none is left to train"):
            meshes.training_layout(ParallelConfig(), RolloutConfig(devices=problem))
