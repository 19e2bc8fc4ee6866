"""The C-Abstractor against a re-statement in torch: convolutions, norms and pooling of torch's own."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F

from jvlm.errors import UserError
from jvlm.models import registry
from jvlm.models.batch import PackedBatch
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.connectors.pooled_mlp import PooledMLPConfig, adaptive_average_pool
from jvlm.models.contracts import VisionTokens
from jvlm.models.layers import Precision

D_IN, D_OUT = 20, 14


def reference(features, params, config):
    """[frames, out_grid^2, D_OUT] of frames [frames, grid^2, D_IN] without class tokens; NCHW inside."""
    p = {name: torch.from_numpy(np.asarray(value)) for name, value in params.items()}

    def norm(x, name):
        x = F.layer_norm(x.movedim(1, -1), (x.shape[1],), p[f"{name}.scale"], p[f"{name}.bias"], 1e-6)
        return x.movedim(-1, 1)

    def conv1(x, name):
        bias = p.get(f"{name}.bias")
        return F.conv2d(x, p[f"{name}.kernel"].T[:, :, None, None], bias)

    def block(x, name):
        y = F.silu(norm(conv1(x, f"{name}.conv1"), f"{name}.norm1"))
        width = y.shape[1]
        depthwise = p[f"{name}.conv2.kernel"].T.reshape(width, 1, 3, 3)
        y = F.silu(norm(F.conv2d(y, depthwise, padding=1, groups=width), f"{name}.norm2"))
        gate = conv1(F.silu(conv1(y.mean((2, 3), keepdim=True), f"{name}.squeeze")), f"{name}.excite")
        y = norm(conv1(y * gate.sigmoid(), f"{name}.conv3"), f"{name}.norm3")
        if f"{name}.shortcut.kernel" in p:
            x = norm(conv1(x, f"{name}.shortcut"), f"{name}.shortcut_norm")
        return F.silu(y + x)

    x = torch.from_numpy(features) + p.get("positions", 0)
    x = x.movedim(-1, 1).reshape(len(x), -1, config.grid, config.grid)
    for i in range(config.depth):
        x = block(x, f"stage1.{i}")
    x = F.adaptive_avg_pool2d(x, (config.out_grid, config.out_grid))
    for i in range(config.depth):
        x = block(x, f"stage2.{i}")
    x = x.flatten(2).movedim(1, -1)
    for i in range(config.projector_depth):
        x = F.linear(F.silu(x) if i else x, p[f"projector.maps.{i}.kernel"].T, p[f"projector.maps.{i}.bias"])
    return x.numpy()


def build(config, seed=0):
    """A connector with every parameter, norms and biases included, drawn at random; and path -> value."""
    sizes = {"d_in": D_IN, "d_out": D_OUT, "precision": Precision(compute_dtype="float32")}
    module = nnx.eval_shape(lambda: registry.build(config, **sizes, rngs=nnx.Rngs(0)))
    rng, values, flat = np.random.default_rng(seed), {}, []
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        shape = variable.get_value().shape
        scale = 1.0 if len(shape) == 1 else shape[0] ** -0.5
        value = rng.normal(size=shape, scale=scale).astype(np.float32)
        values[".".join(map(str, path))] = value
        flat.append((path, variable.replace(jnp.asarray(value))))
    nnx.update(module, nnx.from_flat_state(flat))
    return module, values


def batch_of(patches):
    """A batch of one sequence with so many patches; connectors of equal images read nothing else of it."""
    none = np.zeros((1, 0), np.int32)
    ids = np.ones((1, patches), np.int32)
    return PackedBatch(
        none, none, np.zeros((1, 0, 3), np.int32), none.astype(np.float32), np.zeros((1, patches, 1), np.uint8),
        ids, ids, np.zeros((1, patches, 2), np.int32), none,
    )  # fmt: skip


@nnx.jit
def run(module, features):
    batch = batch_of(features.shape[1])
    return module(VisionTokens(features, batch.patch_segment_ids), batch).tokens


# As MM1.5's at 378 pixels: 27 places do not divide by 12; 48, at 672 pixels, do.
UNEVEN = CAbstractorConfig(grid=27, class_token=True, out_grid=12, hidden_size=24, depth=2)


@pytest.mark.parametrize(
    "config",
    [
        UNEVEN,
        CAbstractorConfig(grid=8, class_token=False, out_grid=3, hidden_size=D_IN, depth=1, positions=False),
        CAbstractorConfig(grid=6, class_token=False, out_grid=4, hidden_size=24, depth=0, projector_depth=3),
    ],
    ids=["27 to 12", "no shortcut map, no positions", "pooling alone"],
)
def test_it_equals_the_restatement_in_torch(config):
    module, params = build(config)
    frames, class_token = 3, int(config.class_token)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(1, frames, config.patches_per_image, D_IN)).astype(np.float32)
    # a row may end in places that make no whole frame
    row = np.concatenate([features.reshape(1, -1, D_IN), np.full((1, 5, D_IN), 7, np.float32)], 1)
    found = run(module, jnp.asarray(row))
    with torch.no_grad():
        expected = reference(features[0, :, class_token:].copy(), params, config)
    assert found.shape == (1, frames * config.out_grid**2, D_OUT)
    np.testing.assert_allclose(found[0], expected.reshape(-1, D_OUT), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "target"), [(27, 12), (48, 12), (27, 9), (5, 5), (7, 1)])
def test_adaptive_pooling_equals_torch(size, target):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    expected = F.adaptive_avg_pool2d(torch.from_numpy(x).movedim(-1, 1), (target, target)).movedim(1, -1)
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), target), expected, atol=1e-6)


def test_the_plain_connector_is_pooling_and_linear_maps():
    config = PooledMLPConfig(grid=6, class_token=True, out_grid=3, depth=2)
    module, p = build(config)
    x = np.random.default_rng(2).normal(size=(1, 2 * 37, D_IN)).astype(np.float32)
    pooled = x.reshape(2, 37, D_IN)[:, 1:].reshape(2, 3, 2, 3, 2, D_IN).mean((2, 4)).reshape(-1, D_IN)
    hidden = pooled @ p["projector.maps.0.kernel"] + p["projector.maps.0.bias"]
    expected = F.gelu(torch.from_numpy(hidden)).numpy() @ p["projector.maps.1.kernel"] + p["projector.maps.1.bias"]
    np.testing.assert_allclose(run(module, jnp.asarray(x))[0], expected, atol=1e-5)


def test_frames_do_not_touch_one_another():
    module, _ = build(UNEVEN)
    n, out = UNEVEN.patches_per_image, UNEVEN.out_grid**2
    x = np.random.default_rng(3).normal(size=(1, 3 * n + 5, D_IN)).astype(np.float32)
    other = x.copy()
    other[:, n : 2 * n] = np.nan
    found, expected = (np.asarray(run(module, jnp.asarray(rows)))[0].reshape(3, out, -1) for rows in (other, x))
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    assert np.isnan(found[1]).all()


def test_more_features_than_places_are_refused():
    with pytest.raises(UserError, match="out_grid 12 must be between 1 and grid 8"):
        CAbstractorConfig(grid=8)
