"""The same numbers on every shape of mesh, and exactly the collectives that are written down."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jvlm.parallel import collectives
from tests.parallel import models
from tests.support import cpu_devices, run_python

LISTINGS = Path(__file__).parent / "collectives"
# Every axis, and every architecture. `make meshes` runs every axis alone as well.
CASES = {
    "qwen2_5_vl": ("fsdp context tensor",),
    "idefics2": ("data context", "data context, ring"),
    "idefics3": ("data fsdp tensor",),
    "mm1_5": ("expert context tensor",),
    "qwen2_vl": ("fsdp context tensor",),
    "qwen3_vl": ("expert context tensor",),
}


# the second tier has what costs minutes; `make meshes` runs every shape of mesh
TIERS = ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "qwen2_5_vl")]


@pytest.fixture(scope="module", params=TIERS)
def found(request):
    """(architecture, mesh -> what many_devices says)."""
    code = f"from tests.parallel.many_devices import main; main({request.param!r}, 'one', *{CASES[request.param]!r})"
    lines = [json.loads(line) for line in run_python(code, timeout=900, **cpu_devices(8)).splitlines()]
    return request.param, {line["mesh"]: line for line in lines}


def test_loss_and_gradients_equal_those_of_one_device(found):
    architecture, lines = found
    assert set(lines) == {"one", *CASES[architecture]}
    for line in lines.values():
        assert np.isfinite(line["loss"]), line
        assert line["loss_difference"] < 1e-5, line
        assert line["gradient_difference"] < 1e-5, line
        assert line["largest_gradient"] > 1e-3, line


def test_the_compiled_step_has_the_collectives_written_down_and_no_others(found):
    architecture, lines = found
    text = "".join(f"{mesh}\n" + "".join(f"  {sent}\n" for sent in lines[mesh]["collectives"]) for mesh in lines)
    path = LISTINGS / f"{architecture}.txt"
    written = path.read_text() if path.is_file() else ""
    difference = "".join(difflib.unified_diff(written.splitlines(True), text.splitlines(True), str(path), "compiled"))
    assert not difference, f"\n{difference}\nIf this is meant, write it to {path}."


def test_no_collective_on_one_device_and_every_axis_in_the_listing_belongs_to_its_mesh(found):
    _, lines = found
    assert lines["one"]["collectives"] == []
    for mesh, line in lines.items():
        axes = {axis for axis, size in models.MESHES[mesh].items() if size is not True and size > 1}
        named = {axis for sent in line["collectives"] for axis in sent.partition(" over ")[2].partition(":")[0].split()}
        assert named == axes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "%a = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add",
            "tensor",
        ),
        ("%a = f32[8]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add", "tensor"),
        ("%a = f32[8]{0} all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", "data context"),
        ("%a = f32[8]{0} all-reduce(%x), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "tensor"),
        (
            "%a = f32[] all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%x",
            "context tensor",
        ),
        (
            "%a = f32[] all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2], "
            "device_ids=([4,2]T(1,0)) {'axis_1'}, to_apply=%x",
            "data",
        ),
        ("%a = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add", "data context tensor"),
        ("%a = f32[8]{0} collective-permute(%x), source_target_pairs={{0,2},{1,3},{4,6},{5,7}}", "context"),
        ("%a = (f32[8]{0}, f32[2]{0}) all-to-all(%x, %y), replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data"),
    ],
)
def test_groups_of_devices_are_named_by_mesh_axes(line, said):
    mesh = AbstractMesh((2, 1, 1, 2, 2), ("data", "fsdp", "expert", "context", "tensor"))
    (listed,) = collectives.listing(f"ENTRY %main {{\n  {line}\n}}", mesh)
    assert listed.partition(" over ")[2] == f"{said}: 1"


def test_devices_that_are_alone_are_joined_by_nothing():
    alone = collectives.groups("replica_groups=[4]<=[4], x")
    assert alone.tolist() == [[0], [1], [2], [3]]
    assert collectives.axes(alone, AbstractMesh((4,), ("data",)), whole=True) == "none"


def test_devices_may_be_joined_by_a_part_of_an_axis():
    halves = collectives.groups("replica_groups={{0,1,2,3},{4,5,6,7}}, x")
    mesh = AbstractMesh((1, 8), ("data", "tensor"))
    assert collectives.axes(halves, mesh, whole=True) == "part of tensor"
    assert collectives.axes(halves, mesh, whole=False) == "tensor"


def test_a_way_of_writing_groups_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="cannot read which devices"):
        collectives.listing("%a = f32[] all-reduce(%x), replica_groups=all", AbstractMesh((2,), ("data",)))


def test_devices_that_no_axes_join_are_an_error():
    mesh = AbstractMesh((2, 2), ("data", "tensor"))
    with pytest.raises(ValueError, match=r"no axes of .* join these devices"):
        collectives.listing("%a = f32[] all-reduce(%x), replica_groups={{0,3},{1,2}}, to_apply=%add", mesh)
