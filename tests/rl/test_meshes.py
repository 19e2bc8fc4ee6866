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

MESHES = ("data", "fsdp context tensor")
# what other architectures have of their own is on every mesh in parallel/test_meshes.py
KINDS = [("qwen2_5_vl", "on_policy", MESHES), ("qwen3_vl", "gspo", MESHES[1:])]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kind", "meshes"), KINDS)
def test_a_step_on_a_mesh_is_that_of_one_device(architecture, kind, meshes):
    assert set(meshes) <= set(models.MESHES)
    code = f"from tests.rl.policy_on_meshes import main; main({architecture!r}, {kind!r}, *{meshes!r})"
    said = [json.loads(line) for line in run_python(code, timeout=600, **cpu_devices(8)).splitlines()]
    assert [line["mesh"] for line in said] == ["one", *meshes]
    alone = said[0]["metrics"]
    assert abs(alone["loss"]) > 1e-3
    assert alone["rollout/difference"] > 1e-2  # the log-probabilities of the batch were drawn
    for line in said[1:]:
        for name in ("loss", "rollout/kl1", "rollout/kl3", "rollout/difference", "clip_low", "clip_high"):
            assert line["metrics"][name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), (line["mesh"], name)
        assert line["difference"] < 2e-4 * line["largest"], line


@pytest.mark.slow
def test_an_engine_on_other_devices_gives_the_answers_and_losses_of_one_on_the_same(tmp_path):
    found = {}
    for name, devices, drawing in (("same", 4, None), ("apart", 8, 4)):  # one alone draws in test_processes.py
        folder = write(tmp_path / name, delays=False)
        code = f"from tests.rl.apart import main; main({str(folder)!r}, {drawing})"
        assert "trained on [0, 1, 2, 3]" in run_python(code, timeout=600, **cpu_devices(devices))
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
