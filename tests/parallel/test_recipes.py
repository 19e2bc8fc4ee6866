"""Every optimizer makes the same updates on every mesh, with its state split; and NEFTune draws the same noise."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from tests.parallel import models, recipes_on_meshes
from tests.support import cpu_devices, run_python

# the second tier splits each axis that parameters have; `make meshes` has all models on every mesh
SLOW = pytest.param(
    (("fsdp", "tensor", "expert context tensor"), recipes_on_meshes.KINDS), id="several", marks=pytest.mark.slow
)
# noise and losses alone, of which the others have more
FAST = pytest.param((("fsdp context tensor",), ()), id="fsdp context tensor, no optimizer")


@pytest.fixture(scope="module")
def lines(request):
    """(meshes, kinds, (mesh, kind) -> what recipes_on_meshes says)."""
    meshes, kinds = request.param
    code = f"from tests.parallel.recipes_on_meshes import main; main({meshes!r}, {kinds!r})"
    found = [json.loads(line) for line in run_python(code, timeout=900, **cpu_devices(8)).splitlines()]
    return meshes, kinds, {(line["mesh"], line["kind"]): line for line in found}


@pytest.mark.parametrize("lines", [SLOW], indirect=True)
def test_updates_and_averages_are_those_of_one_device_and_the_state_is_split(lines):
    meshes, kinds, said = lines
    for mesh, kind in itertools.product(meshes, kinds):
        # the axes that parameters are split over; the others split activations
        shards = math.prod(size for axis, size in models.MESHES[mesh].items() if axis in ("fsdp", "tensor"))
        line, alone = said[mesh, kind], said["one", kind]
        # a moment that rounding puts beyond the middle between two codes changes a few numbers of the 8-bit steps
        bound = 2e-2 if kind == "adamw_8bit" else 2e-5
        assert max(line["difference"].values()) < bound, line
        assert line["bytes"]["all"] == alone["bytes"]["all"]
        # vectors and what does not divide are whole on each device, as are 8-bit blocks that a mesh would cut and the
        # factors of moments along axes that it does not split
        whole = 1.15 if kind in ("adamw_8bit", "adafactor") else 1.1
        assert line["bytes"]["one"] < whole / shards * line["bytes"]["all"], line


@pytest.mark.parametrize("lines", [SLOW, FAST], indirect=True)
def test_noise_is_bit_equal_and_the_loss_of_groups_of_tokens_the_same_on_every_mesh(lines):
    meshes, _, said = lines
    for mesh in meshes:
        assert said[mesh, "noise"]["equal"], mesh
        assert said[mesh, "loss"]["equal"], mesh
