"""A step that trains adapters is the same on every mesh, dropout included, and its optimizer state is split."""

import json

import pytest

from tests.parallel import adapters_on_meshes
from tests.support import cpu_devices, run_python

# every axis, and what each family alone has: all pairs are compared by `make meshes`
MESHES = {
    "qwen2_5_vl": ("tensor", "data context, ring", "fsdp context tensor"),
    "idefics2": ("data fsdp tensor",),
    "mm1_5": ("expert context tensor",),
}
CASES = [(name, MESHES[name]) for name in adapters_on_meshes.CASES]


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


@pytest.mark.slow
def test_adapters_of_one_mesh_load_on_another_to_the_bit_and_their_run_goes_on_there(tmp_path):
    """From data x fsdp x tensor to fsdp x context and to data; by run, PEFT folder and ``adapters_from``."""
    code = f"from tests.parallel.adapter_runs_on_meshes import main; main({str(tmp_path)!r})"
    out = run_python(code, timeout=3600, **cpu_devices(8))
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"mesh"')]
    assert [line["mesh"] for line in lines] == ["fsdp context", "data"]
    for line in lines:
        assert line["equal"] == {"run": True, "peft": True, "adapters_from": True}, line
        for share in line["share"].values():
            # inputs of width are split over fsdp, outputs and vocabulary over tensor alone
            assert share == 1 if line["mesh"] == "data" else share < 0.9, line
        # the first two steps were on the first mesh
        assert line["losses"][:2] == [0, 0], line
        assert len(line["losses"]) == 4
        assert max(line["losses"]) < 1e-5, line
