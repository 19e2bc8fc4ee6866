"""Preference training on meshes: the loss, its metrics and its gradient are those of one device."""

import json

import pytest

from tests.parallel import models
from tests.support import cpu_devices, run_python

# all axes but those of copies and of experts, which parallel/test_meshes.py has, as other architectures
MESH = "fsdp context tensor"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "idefics2"])
def test_a_step_on_a_mesh_is_that_of_one_device(architecture):
    assert MESH in models.MESHES
    code = f"from tests.preference.pairs_on_meshes import main; main({architecture!r}, {MESH!r})"
    said = [json.loads(line) for line in run_python(code, timeout=600, **cpu_devices(8)).splitlines()]
    alone, on_mesh = said
    alone = alone["metrics"]
    assert alone["logps/chosen"] < -1
    assert alone["rewards/margins"] == pytest.approx(0, abs=1e-5)  # the first step's reference is the model
    for name in ("loss", "nll_loss", "logps/chosen", "logps/rejected", "rewards/margins"):
        assert on_mesh["metrics"][name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), name
    assert on_mesh["difference"] < 2e-4 * max(on_mesh["largest"], 0.1), on_mesh
