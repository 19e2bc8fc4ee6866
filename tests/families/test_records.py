"""The records of jvlm's families, and that nothing outside of their folder knows one of them."""

import ast
import dataclasses
import pickle
import re

import pytest

from jvlm import families
from jvlm.models import vlm
from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.connectors.pooled_mlp import PooledMLPConfig
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.models.vlm import VLMConfig
from tests.parallel import models
from tests.support import ROOT

NAMES = re.compile(r"qwen|idefics|smol|mimo|mm1", re.IGNORECASE)
# Building blocks that families share, called after the model that they come from; they do not import families.
BLOCKS = ("jvlm/models/", "jvlm/weights/backbones/", "jvlm/data/box_formats.py")
# what other programs call things, whichever model is meant: an environment variable that ms-swift reads
NOT_OURS = {"QWENVL_BBOX_FORMAT"}
# the tasks of the papers, with the suites and the published scores that bear their models' names
PAPERS = "jvlm/evaluation/tasks/"
SOURCES = sorted(path for path in (ROOT / "jvlm").rglob("*.py") if "families" not in path.parts)


def _docstrings(tree):
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr):
            yield node.body[0].value


def _named(path):
    """What code names: identifiers, modules and texts, docstrings left out."""
    tree = ast.parse(path.read_text())
    left_out = set(map(id, _docstrings(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value


def test_no_module_outside_imports_or_names_a_family():
    """One test for all modules: 600 would take as long to begin and end as to read them."""
    inside = re.compile(rf"jvlm\.families\.({'|'.join(families.names())})\b")
    wrong = []
    for path in SOURCES:
        names, at = list(_named(path)), str(path.relative_to(ROOT))
        wrong += [(at, name) for name in names if inside.match(name)]
        if not at.startswith((*BLOCKS, PAPERS)):
            wrong += [(at, name) for name in names if NAMES.search(name) and name not in NOT_OURS]
    assert wrong == []


def test_a_model_has_no_token_ids_of_any_family_by_default():
    defaults = {f.name: f.default for f in dataclasses.fields(VLMConfig) if f.name.endswith("_token_id")}
    assert defaults.pop("image_token_id") is dataclasses.MISSING
    assert set(defaults.values()) == {None}


@pytest.mark.parametrize("name", families.names())
def test_a_record_is_whole_and_sent_to_another_process_by_name(name):
    family = families.get(name)
    assert family.name == name
    assert pickle.loads(pickle.dumps(family)) is family
    assert all(config.family == name for config in family.presets.values())
    assert all(families.preset(preset) == config for preset, config in family.presets.items())


def _small(name):
    """Small models of a family, which together have every kind of part that it may have."""
    if name in models.ARCHITECTURES:
        yield models.ARCHITECTURES[name]()
    if name == "qwen3_vl":
        yield dataclasses.replace(models.qwen3_vl(), decoder=models.qwen2_5_vl().decoder)
    if name == "smolvlm":
        yield models.idefics3()
    if name == "idefics2":
        model = models.idefics2()
        decoder = CrossAttentionTransformerConfig.of(model.decoder, cross_attention_every=2)
        connector = dataclasses.replace(model.connector, min_image_patches=4)
        yield dataclasses.replace(model, decoder=decoder, connector=connector)
    if name == "composed":
        base = models.idefics2()
        for connector in (
            PooledMLPConfig(grid=8, class_token=False, out_grid=2),
            PerceiverConfig(projection_size=48, latents=4, depth=1, num_heads=2, num_kv_heads=1, head_dim=8),
        ):
            yield families.get("composed").new_config(
                encoder=base.encoder, connector=connector, decoder=base.decoder, image_token_id=1
            )


@pytest.mark.parametrize("name", families.names())
def test_every_adapter_target_is_a_linear_layer_and_all_attention_is_one(name):
    targets = families.get(name).adapter_targets
    kernels = {}
    for model in _small(name):
        for path, variable in vlm.parameters(vlm.abstract(model)).items():
            if path.endswith(".kernel"):
                kernels[path.removesuffix(".kernel")] = variable.get_metadata()["axes"]
    for tower in vlm.TOWERS:
        for pattern in getattr(targets, tower):
            matched = [path for path in kernels if re.fullmatch(pattern, path)]
            assert matched, f"{pattern} matches no linear layer of {sorted(kernels)}"
            assert all(targets.matches(path) and len(kernels[path]) == 2 for path in matched)
    missed = {path for path in kernels if ".attention." in path and not targets.matches(path)}
    assert missed == set()
    assert not targets.matches("decoder.head")
    assert not targets.matches("decoder.blocks.layer.norm1")
