"""Experts split over devices compute what they do on one: outputs, statistics, gradients."""

import json

import pytest

from tests.support import cpu_devices, run_python


@pytest.mark.slow
def test_experts_on_every_mesh_equal_those_on_one_device():
    code = "from tests.parallel.experts_on_meshes import main; main()"
    lines = run_python(code, timeout=400, **cpu_devices(8))
    found = [json.loads(line) for line in lines.splitlines()]
    assert len(found) == 6
    for line in found:
        assert line["largest"] > 0.1
        assert line["difference"] < 1e-4, line
