"""A step that trains adapters is the same on every mesh, dropout included, and its optimizer state is split."""

import json

import pytest

from tests.parallel import adapters_on_meshes, models
from tests.support import cpu_devices, run_python

CASES = [(name, tuple(mesh for mesh in models.MESHES if mesh != "one")) for name in adapters_on_meshes.CASES]


# minutes each; the fast tier has the layout of adapters in test_layout.py and their arithmetic in tests/adapters
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "meshes"), CASES)
def test_loss_and_gradients_are_those_of_one_device(architecture, meshes):
    code = f"from tests.parallel.adapters_on_meshes import main; main({architecture!r}, *{meshes!r})"
    lines = [json.loads(line) for line in run_python(code, timeout=3600, **cpu_devices(8)).splitlines()]
    assert [line["mesh"] for line in lines] == ["one", *meshes]
    for line in lines:
        assert line["loss_difference"] < 1e-5, line
        assert line["gradient_difference"] < 2e-5 * max(1, line["largest_gradient"]), line
        if {"fsdp", "tensor"} & set(line["mesh"].split()):
            assert line["bytes"]["one"] < 0.8 * line["bytes"]["all"], line
