"""Generation on a mesh gives what one device gives, and a mesh that cannot generate is refused."""

from __future__ import annotations

import json

import pytest
from jax.sharding import AbstractMesh, AxisType

import jvlm
from jvlm import families
from jvlm.errors import UserError
from jvlm.inference import sharding
from jvlm.parallel import rules
from jvlm.parallel.layout import MeshLayout
from tests.inference.support import prompt
from tests.parallel import models
from tests.support import cpu_devices, run_python

# 8 query heads and 2 key heads: over 4 or 8 devices key heads are repeated.
CASES = {
    "qwen2_5_vl": {"data tensor": {"data": 2, "tensor": 4, "kinds": ["sampled"]}},
    "idefics2": {"tensor": {"tensor": 8, "kinds": ["greedy"]}},
    "mm1_5": {"expert tensor": {"expert": 2, "tensor": 4, "kinds": ["greedy"]}},
    "gated": {"data tensor": {"data": 4, "tensor": 2, "kinds": ["greedy"]}},
}


@pytest.fixture(scope="module")
def found():
    """What many_devices says of each case."""
    code = f"from tests.inference.many_devices import main; main({json.dumps(CASES)!r})"
    lines = run_python(code, timeout=500, **cpu_devices(8))
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.slow
def test_tokens_and_their_probabilities_on_every_mesh_equal_those_of_one_device(found):
    expected = [(architecture, mesh) for architecture, meshes in CASES.items() for mesh in meshes]
    assert [(line["architecture"], line["mesh"]) for line in found] == expected
    for line in found:
        assert line["difference"] < 1e-4, line
        assert all(line["same"].values()), line
        assert line["different_tokens"] > 5, line


@pytest.mark.slow
def test_the_state_stays_in_its_place_from_step_to_step(found):
    """One that moved would be compiled for again."""
    for line in found:
        assert line["compilations"]["decode"] == 1, line


def _layout(table=sharding.RULES, **sizes):
    shape = tuple(sizes.get(axis, 1) for axis in rules.AXES)
    mesh = AbstractMesh(shape, rules.AXES, axis_types=(AxisType.Auto,) * len(shape))
    return MeshLayout(mesh, rules.table(table))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (_layout("standard", context=2), r"parallel.context = 2: a decoding step has one token of each sequence"),
        (_layout(context=4), r"parallel.context = 4: .* give these devices to data or tensor"),
        (_layout("replicated", tensor=2), r"parallel.tensor = 2"),
        (_layout(tensor=3), r"model.encoder.num_heads = 8 and tensor = 3 do not divide"),
        (_layout(tensor=16), r"model.encoder.num_heads = 8 and tensor = 16 do not divide"),
    ],
)
def test_a_mesh_that_cannot_generate_is_refused_with_what_to_change(layout, said):
    with pytest.raises(UserError, match=said):
        sharding.check_layout(layout, models.qwen2_5_vl())


@pytest.mark.parametrize(
    ("name", "devices", "tensor"), [("mimo_vl_7b", 8, 8), ("qwen2_5_vl_3b", 8, 2), ("idefics2_8b", 8, 4)]
)
def test_the_mesh_that_nobody_asked_for_gives_each_device_key_heads_of_its_own(name, devices, tensor):
    found = sharding.default_mesh(families.preset(name), devices)
    assert found.sizes(devices) == {"data": devices // tensor, "fsdp": 1, "expert": 1, "context": 1, "tensor": tensor}
    assert sharding.default_mesh(families.preset(name), 1).sizes(1)["tensor"] == 1
    assert sharding.default_mesh(families.preset(name), 3).sizes(3) == {**found.sizes(devices), "data": 3, "tensor": 1}


@pytest.mark.slow
def test_the_command_line_generates_on_all_devices_and_on_those_asked_for(tiny):
    """The checkpoint has 2 key heads: two devices split them."""
    arguments = ["generate", "--model", str(tiny.folder), "--prompt", "what is the answer?", "--max_new_tokens", "6"]
    (expected,) = jvlm.generate(tiny.model, tiny.processor, [prompt("what is the answer?")], max_new_tokens=6)
    mesh = ["--parallel.data", "1", "--parallel.tensor", "2"]
    code = f"""
from jvlm import cli
from jvlm.parallel import sharded_ops
made, init = [], sharded_ops.ShardedOps.__init__
sharded_ops.ShardedOps.__init__ = lambda self, layout: (made.append(dict(layout.mesh.shape)), init(self, layout))[1]
assert cli.main({arguments!r}) == 0 and cli.main({arguments + mesh!r}) == 0
print(*dict.fromkeys(f"{{shape['data']}}x{{shape['tensor']}}" for shape in made))
"""
    found = run_python(code, timeout=300, **cpu_devices(2))
    assert found == f"{expected}\n{expected}\n1x2\n"
