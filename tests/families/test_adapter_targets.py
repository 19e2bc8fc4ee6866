"""The paths that a family offers to adapters are paths of linear layers that its models have."""

import dataclasses
import re

import pytest
from flax import nnx

from jvlm import families
from jvlm.models import layers, vlm
from jvlm.models.connectors.pooled_mlp import PooledMLPConfig
from tests.parallel import models

MODELS = {
    "qwen2_5_vl": (models.qwen2_5_vl(),),
    "qwen2_vl": (models.qwen2_vl(),),
    "qwen3_vl": (dataclasses.replace(models.qwen3_vl(), decoder=models.qwen2_5_vl().decoder),),
    "idefics2": (models.idefics2(), models.cross_attention()),
    "idefics3": (models.idefics3(),),
    "smolvlm": (models.idefics3(),),
    "mm1_5": (models.mm1_5(),),
    "composed": (
        models.idefics2(),
        dataclasses.replace(models.mm1_5(), connector=PooledMLPConfig(grid=4, class_token=True, out_grid=2)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_target_of_a_family_matches_linear_layers_of_its_models(name):
    targets = families.get(name).adapter_targets
    paths = {
        ".".join(map(str, path))
        for config in MODELS[name]
        for path, module in nnx.iter_modules(vlm.abstract(config))
        if isinstance(module, layers.Linear)
    }
    for pattern in (*targets.encoder, *targets.connector, *targets.decoder):
        assert any(re.fullmatch(pattern, path) for path in paths), pattern
    assert {path.partition(".")[0] for path in paths if targets.matches(path)} == set(vlm.TOWERS)
