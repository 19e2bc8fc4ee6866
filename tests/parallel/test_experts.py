"""Experts split over devices compute what they do on one: outputs, statistics, gradients."""

import json

from tests.support import run_python


def test_experts_on_every_mesh_equal_those_on_one_device():
    code = "from tests.parallel.experts_on_meshes import main; main()"
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    lines = run_python(code, timeout=400, **devices)
    found = [json.loads(line) for line in lines.splitlines()]
    assert len(found) == 6
    for line in found:
        assert line["largest"] > 0.1
        assert line["difference"] < 1e-4, line
