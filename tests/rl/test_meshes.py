"""Policy optimisation on meshes: loss, metrics and gradient are those of one device."""

import json

import pytest

from tests.parallel import models
from tests.support import cpu_devices, run_python

MESHES = ("data", "fsdp context tensor")


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kind"), [("qwen2_5_vl", "on_policy"), ("qwen3_vl", "gspo")])
def test_a_step_on_a_mesh_is_that_of_one_device(architecture, kind):
    assert set(MESHES) <= set(models.MESHES)
    code = f"from tests.rl.policy_on_meshes import main; main({architecture!r}, {kind!r}, *{MESHES!r})"
    said = [json.loads(line) for line in run_python(code, timeout=600, **cpu_devices(8)).splitlines()]
    alone = said[0]["metrics"]
    assert abs(alone["loss"]) > 1e-3
    assert alone["rollout/difference"] > 1e-2  # the log-probabilities of the batch were drawn
    for line in said[1:]:
        for name in ("loss", "rollout/kl1", "rollout/kl3", "rollout/difference", "clip_low", "clip_high"):
            assert line["metrics"][name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), (line["mesh"], name)
        assert line["difference"] < 2e-4 * line["largest"], line
