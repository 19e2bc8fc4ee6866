"""Vision towers loaded alone give transformers' features, several pictures packed into one example."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from jvlm.models import registry
from jvlm.models.batch import PackedBatch
from jvlm.models.encoders.vit import CLASS_POSITION
from jvlm.models.layers import Precision
from jvlm.weights import backbones
from jvlm.weights.table import WeightError

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 20,
    "patch_size": 5,
    "attn_implementation": "eager",
}
FAMILIES = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**COMMON)),
    "clip": (CLIPVisionModel, CLIPVisionConfig(**COMMON)),
    "clip with another activation": (CLIPVisionModel, CLIPVisionConfig(**COMMON, hidden_act="gelu")),
    "dinov2": (Dinov2Model, Dinov2Config(**COMMON, mlp_ratio=2)),
}
PRECISION = Precision(compute_dtype="float32")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(folder, torch model) with random weights everywhere, so that nothing is zero or one by default."""
    make, config = FAMILIES[request.param]
    torch.manual_seed(0)
    model = make(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("tower")
    model.save_pretrained(folder)
    return folder, model


def load(folder):
    config = backbones.read_config(folder)
    module = nnx.eval_shape(lambda: registry.build(config, precision=PRECISION, rngs=nnx.Rngs(0)))
    values = backbones.load(folder, config, PRECISION)
    nnx.update(module, nnx.from_flat_state([(tuple(path.split(".")[1:]), v) for path, v in values.items()]))
    return module


def packed(config, pixels):
    """One example of the pictures [n, 3, side, side], and padding at its end."""
    p, n = config.patch_size, config.grid
    cells = pixels.reshape(len(pixels), 3, n, p, n, p).transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), n * n, -1)
    places = np.stack(np.divmod(np.arange(n * n), n), -1)
    if config.class_token:
        cells = np.concatenate([np.zeros_like(cells[:, :1]), cells], 1)
        places = np.concatenate([[CLASS_POSITION], places])
    frames = np.repeat(np.arange(1, len(pixels) + 1), cells.shape[1])
    patches = cells.reshape(-1, cells.shape[-1])
    pad = 7
    none = np.zeros((1, 1), np.int32)
    return PackedBatch(
        tokens=none,
        segment_ids=none,
        positions=np.zeros((1, 1, 3), np.int32),
        loss_weights=np.zeros((1, 1), np.float32),
        patches=np.pad(patches, ((0, pad), (0, 0)))[None].astype(np.float32),
        patch_segment_ids=np.pad(frames, (0, pad))[None].astype(np.int32),
        patch_window_ids=np.pad(frames, (0, pad))[None].astype(np.int32),
        patch_positions=np.pad(np.tile(places, (len(pixels), 1)), ((0, pad), (0, 0)))[None].astype(np.int32),
        vision_index=none - 1,
    )


def test_features_equal_transformers(family):
    folder, model = family
    module = load(folder)
    pixels = np.random.default_rng(0).normal(size=(3, 3, 20, 20)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    features = nnx.jit(lambda m, batch: m(batch).tokens)(module, packed(module.config, pixels))
    found = features[0, : expected.shape[0] * expected.shape[1]]
    np.testing.assert_allclose(found, expected.reshape(-1, expected.shape[-1]), atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_parameter(family):
    module = load(family[0])
    batch = packed(module.config, np.random.default_rng(1).normal(size=(1, 3, 20, 20)))
    gradients = nnx.jit(nnx.grad(lambda m: jnp.square(m(batch).tokens[0, :16]).sum()))(module)
    for path, leaf in nnx.to_flat_state(gradients):
        if path[-2:] != ("k", "bias"):
            assert jnp.abs(leaf[...]).max() > 0, path


def test_another_size_is_refused_by_field(family):
    folder, _ = family
    config = dataclasses.replace(backbones.read_config(folder), depth=3)
    with pytest.raises(WeightError, match="depth: 2 in the folder, 3 here"):
        backbones.load(folder, config, PRECISION)


def test_an_unknown_family_names_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(WeightError, match=r"'resnet' is not supported as a tower; supported: .*dinov2.*siglip"):
        backbones.read_config(tmp_path)
