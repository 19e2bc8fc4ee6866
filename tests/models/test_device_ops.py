"""The operations of one device and of a mesh are one contract, and a compiled program never outlives its own."""

from __future__ import annotations

import inspect
from collections import Counter

import jax
import numpy as np
import pytest

from jvlm.models import device_ops, vlm
from jvlm.models.device_ops import DeviceOps, LocalOps
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.parallel.sharded_ops import ShardedOps
from jvlm.training.supervised import supervised_loss
from tests import quick
from tests.parallel import models

METHODS = [name for name in vars(DeviceOps) if not name.startswith("_")]


def _mesh_ops(**fields) -> ShardedOps:
    return ShardedOps(MeshLayout.of(ParallelConfig(data=1, **fields), jax.devices()[:1]))


@pytest.fixture
def calls(monkeypatch):
    """How often each implementation's attention has been traced."""
    counts = Counter()
    for kind in (LocalOps, ShardedOps):

        def attention(self, *arguments, original=kind.attention, **options):
            counts[type(self).__name__] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(kind, "attention", attention)
    return counts


@pytest.fixture(scope="module")
def model():
    return quick.random_model(models.qwen2_5_vl())


def test_a_model_called_on_one_device_and_then_on_a_mesh_is_traced_anew_under_the_mesh_and_back(model, calls):
    batch = models.batch(model.config)
    expected = np.asarray(model(batch))
    local = calls["LocalOps"]
    assert local > 0
    assert calls["ShardedOps"] == 0
    with device_ops.use(_mesh_ops()):
        meshed = np.asarray(model(batch))
    assert calls == {"LocalOps": local, "ShardedOps": local}
    np.testing.assert_allclose(meshed, expected, atol=1e-5)
    with device_ops.use(_mesh_ops()):  # an equal layout, built again
        model(batch)
    np.testing.assert_array_equal(np.asarray(model(batch)), expected)
    with device_ops.use(LocalOps()):  # what None means
        model(batch)
    assert calls == {"LocalOps": local, "ShardedOps": local}
    with device_ops.use(_mesh_ops(override=("heads=",))):  # the same mesh, but other rules
        model(batch)
    assert calls == {"LocalOps": local, "ShardedOps": 2 * local}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_compiled_function_of_the_callers_own_is_traced_anew_under_a_mesh(calls, remat):
    """JAX also caches the bodies of scans and checkpoints, apart from the compiled function around them."""
    config = models.with_precision(models.qwen2_5_vl(), remat=remat)
    model = vlm.abstract(config)
    values = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}

    @jax.jit
    def gradient(values, batch):
        return jax.grad(lambda values: supervised_loss(vlm.bind(model, values), batch).total)(values)

    batch = models.batch(config)
    gradient.lower(values, batch)
    local = calls["LocalOps"]
    with device_ops.use(_mesh_ops()):
        gradient.lower(values, batch)
    gradient.lower(values, batch)
    assert local > 0
    assert calls == {"LocalOps": local, "ShardedOps": local}


@pytest.mark.parametrize("implementation", [LocalOps, ShardedOps])
def test_an_implementation_has_every_operation_of_the_contract_itself(implementation):
    assert implementation.__bases__ == (object,)
    for name in METHODS:
        declared, own = (inspect.signature(vars(kind)[name]).parameters for kind in (DeviceOps, implementation))
        described = [[(p.name, p.kind, p.default) for p in parameters.values()] for parameters in (own, declared)]
        assert described[0] == described[1], name


def test_ops_are_equal_where_they_split_arrays_in_the_same_way():
    assert LocalOps() == LocalOps()
    assert hash(LocalOps()) == hash(LocalOps())
    assert _mesh_ops() == _mesh_ops()
    assert hash(_mesh_ops()) == hash(_mesh_ops())
    assert len({_mesh_ops(), _mesh_ops(rules="serving"), _mesh_ops(override=("mlp=",)), LocalOps()}) == 4
