"""Meshes, rules and layouts: what is split over what, and what is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jvlm.adapters.attach import attach
from jvlm.adapters.config import AdapterConfig
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.parallel import mesh as meshes
from jvlm.parallel import rules
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import compiled_step
from tests.parallel import models


def _layout(table="standard", override=(), max_replicated_mib=4.0, **sizes):
    shape = tuple(sizes.get(axis, 1) for axis in rules.AXES)
    mesh = AbstractMesh(shape, rules.AXES, axis_types=(AxisType.Auto,) * len(shape))
    return MeshLayout(mesh, rules.table(table, override), max_replicated_mib)


@pytest.fixture(scope="module")
def variables():
    return vlm.parameters(vlm.abstract(models.qwen2_5_vl()))


def test_parameters_are_split_by_their_axes_and_stacks_of_layers_are_not(variables):
    layout = _layout(fsdp=4, tensor=2, data=2)
    found = {path: sharding.spec for path, sharding in layout.parameters(variables).items()}
    assert found["decoder.embedding"] == P("tensor", "fsdp")
    assert found["decoder.blocks.layer.attention.q.kernel"] == P(None, "fsdp", "tensor")
    assert found["decoder.blocks.layer.mlp.down.kernel"] == P(None, "tensor", "fsdp")
    assert found["decoder.blocks.layer.attention.q.bias"] == P(None, "tensor")
    assert found["decoder.blocks.layer.norm1.scale"] == P(None, None)
    assert found["encoder.patch_embed.kernel"] == P(None, "fsdp")


def test_the_matrices_of_an_adapter_are_split_as_the_axes_of_the_base_that_they_touch():
    config = AdapterConfig(use_dora=True, targets=("all-linear",))
    model = attach(vlm.abstract(models.qwen2_5_vl()), config)
    layout = _layout(fsdp=2, context=2, tensor=2)
    specs = {path: sharding.spec for path, sharding in layout.parameters(vlm.variables(model)).items()}
    adapted = [path for path in specs if path.endswith(".kernel") and path.replace("kernel", "adapter.a") in specs]
    assert {path.partition(".")[0] for path in adapted} >= {"encoder", "decoder"}
    split = set()
    for path in adapted:
        *stack, into, out = specs[path]
        at = path.removesuffix("kernel") + "adapter"
        assert specs[f"{at}.a"] == P(*stack, into, None), path
        assert specs[f"{at}.b"] == P(*stack, None, out), path
        assert specs[f"{at}.magnitude"] == P(*stack, out), path
        split |= {into, out}
    assert split >= {"fsdp", "tensor"}


def test_a_table_and_lines_that_override_it_change_what_is_split(variables):
    stored = _layout("store_over_context", fsdp=2, context=2).parameters(variables)
    assert stored["decoder.embedding"].spec == P(None, ("fsdp", "context"))
    assert all(s.is_fully_replicated for s in _layout("replicated", fsdp=8).parameters(variables).values())
    override = _layout(override=("vocab=", "mlp=fsdp+tensor"), tensor=2, fsdp=2).parameters(variables)
    assert override["decoder.embedding"].spec == P(None, "fsdp")
    assert override["decoder.blocks.layer.mlp.down.kernel"].spec == P(None, ("fsdp", "tensor"), None)


def test_a_serving_table_splits_embed_only_where_the_other_side_does_not_divide(variables):
    found = {p: s.spec for p, s in _layout("serving", fsdp=2, tensor=4).parameters(variables).items()}
    assert found["decoder.blocks.layer.attention.q.kernel"] == P(None, None, "tensor")
    assert found["decoder.blocks.layer.mlp.down.kernel"] == P(None, "tensor", None)
    assert found["decoder.embedding"] == P("tensor", None)
    assert found["encoder.patch_embed.kernel"] == P(None, "tensor")
    odd = _layout("serving", tensor=64).parameters(variables)  # 160 words, an MLP of 96
    assert odd["decoder.embedding"].spec == P(None, "tensor")
    assert odd["decoder.blocks.layer.mlp.down.kernel"].spec == P(None, None, "tensor")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("standart",), "no table 'standart'; there are standard"),
        (("standard", ("head=tensor",)), "no axis 'head'; did you mean 'heads'"),
        (("standard", ("heads=model",)), "'heads=model' should read axis=mesh axes"),
        (("standard", ("heads",)), "'heads' should read"),
    ],
)
def test_tables_and_lines_that_cannot_be_read_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        rules.table(*arguments)


def test_a_large_parameter_left_whole_by_accident_is_an_error_that_names_it(variables):
    layout = _layout(fsdp=3, max_replicated_mib=0.01)
    with pytest.raises(UserError, match=r"connector.hidden.kernel \(256, 256\) of 0.2 MiB would be replicated"):
        layout.parameters(variables)
    dataclasses.replace(layout, max_replicated_mib=4.0).parameters(variables)
    _layout(data=3, max_replicated_mib=0.01).parameters(variables)  # nothing is split: this is what was asked for


def test_an_axis_without_a_rule_is_an_error_that_names_the_parameter_and_the_axis(variables):
    variable = variables["decoder.embedding"].replace(variables["decoder.embedding"].get_value())
    variable.set_metadata(axes=("words", "embed"))
    with pytest.raises(UserError, match=r"decoder.embedding .*no rule for the axis 'words'"):
        _layout(fsdp=2).parameter("decoder.embedding", variable)


@pytest.mark.parametrize(
    "make", [optax.adamw, optax.adafactor, lambda rate: optax.chain(optax.trace(0.9), optax.scale(rate))]
)
def test_optimizer_states_live_where_their_parameter_does_factored_ones_too(variables, make):
    layout = _layout(fsdp=4, tensor=2)
    # large enough that Adafactor factors it
    value = jax.ShapeDtypeStruct((3, 256, 512), jnp.float32)
    kernel = variables["decoder.blocks.layer.mlp.gate.kernel"].replace(value)
    state = jax.eval_shape(make(1e-3).init, {"kernel": value})
    specs = {}
    for sharding, leaf in zip(
        jax.tree.leaves(layout.optimizer(state, {"kernel": kernel})), jax.tree.leaves(state), strict=True
    ):
        specs[leaf.shape] = sharding.spec
    expected = {(): P(), (1,): P(None), (3, 256, 512): P(None, "fsdp", "tensor")}
    expected |= {(3, 256): P(None, "fsdp"), (3, 512): P(None, "tensor"), (256, 512): P("fsdp", "tensor")}
    assert any(len(shape) > 1 for shape in specs)
    assert (3, 256) in specs or make is not optax.adafactor
    assert specs == {shape: expected[shape] for shape in specs}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 3}, "batch.tokens has 8 batch, which data = 3 does not divide"),
        ({"context": 3}, "batch.tokens has 128 sequence, which context = 3"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused_with_both_numbers(sizes, said):
    batches = compiled_step.abstract_batches(models.experiment("qwen2_5_vl"))
    with pytest.raises(UserError, match=said):
        _layout(**sizes).batch(batches)


def test_rows_tokens_and_patches_of_a_batch_are_split():
    batches = compiled_step.abstract_batches(models.experiment("qwen2_5_vl"))
    placed = _layout(data=2, fsdp=2, context=2).batch(batches)
    assert placed.tokens.spec == P(None, ("data", "fsdp"), ("context",))
    assert placed.patches.spec == P(None, ("data", "fsdp"), ("context",))


def test_one_axis_takes_the_devices_left_and_sizes_that_do_not_fit_are_refused():
    assert ParallelConfig(tensor=2).sizes(8) == {"data": 4, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    with pytest.raises(UserError, match="does not fit 8 devices"):
        ParallelConfig(tensor=3).sizes(8)
    with pytest.raises(UserError, match="only one axis can be -1"):
        ParallelConfig(fsdp=-1)
    with pytest.raises(UserError, match=r"parallel.tensor must be positive"):
        ParallelConfig(tensor=0)


def _slices(count, each, platform="made up"):
    return [
        SimpleNamespace(id=i, platform=platform, device_kind="made up", slice_index=i // each, process_index=i // 4)
        for i in range(count * each)
    ]


def test_data_crosses_the_slow_network_between_slices_and_fsdp_if_asked():
    devices = _slices(2, 8)
    grid = meshes.arrange(ParallelConfig(fsdp=4, tensor=2), devices)
    slices = np.vectorize(lambda d: d.slice_index)(grid)
    # axes: data fsdp expert context tensor
    assert slices.shape == (2, 4, 1, 1, 2)
    assert (slices[0] == 0).all()
    assert (slices[1] == 1).all()
    grid = meshes.arrange(ParallelConfig(data=1, fsdp=8, tensor=2, data_slices=1, fsdp_slices=2), devices)
    slices = np.vectorize(lambda d: d.slice_index)(grid)[0, :, 0, 0]
    assert (slices[:4] == 0).all()
    assert (slices[4:] == 1).all()


def test_machines_of_gpus_are_crossed_by_the_first_axes_without_being_asked():
    grid = meshes.arrange(ParallelConfig(data=1, fsdp=-1, context=4), _slices(2, 8, platform="gpu"))  # one a machine
    machines = np.vectorize(lambda d: d.slice_index)(grid)
    # axes: data fsdp expert context tensor
    assert machines.shape == (1, 4, 1, 4, 1)
    assert machines[0, :, 0, :, 0].tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


def test_slices_that_the_axes_cannot_cross_are_refused():
    with pytest.raises(UserError, match=r"parallel.data = 1 is no multiple of the 2 slices"):
        meshes.arrange(ParallelConfig(data=1, fsdp=16), _slices(2, 8))
    with pytest.raises(UserError, match=r"are not the 2 slice"):
        meshes.arrange(ParallelConfig(data_slices=4), _slices(2, 8))
