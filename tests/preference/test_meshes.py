"""Preference training on meshes: the loss, its metrics and its gradient are those of one device."""

import json

import pytest

from tests.parallel import models
from tests.support import cpu_devices, run_python

MESHES = ("data", "fsdp context tensor")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl", "idefics2"])
def test_a_step_on_a_mesh_is_that_of_one_device(architecture):
    assert set(MESHES) <= set(models.MESHES)
    code = f"from tests.preference.pairs_on_meshes import main; main({architecture!r}, *{MESHES!r})"
    said = [json.loads(line) for line in run_python(code, timeout=600, **cpu_devices(8)).splitlines()]
    alone = said[0]["metrics"]
    assert alone["logps/chosen"] < -1
    assert alone["rewards/margins"] == pytest.approx(0, abs=1e-5)  # the first step's reference is the model
    for line in said[1:]:
        for name in ("loss", "nll_loss", "logps/chosen", "logps/rejected", "rewards/margins"):
            assert line["metrics"][name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), (line["mesh"], name)
        assert line["difference"] < 2e-4 * max(line["largest"], 0.1), line
