"""The published sizes: counts of the specification's table, and names and shapes of transformers' own classes."""

import math

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from jvlm import families
from jvlm.models import vlm
from jvlm.weights import table
from tests.support import new_layout

# total, visual with merger, merger, LLM without head; tensors visual, LLM, all
PUBLISHED = {
    "qwen2_5_vl_3b": (3_754_622_976, 668_684_288, 36_708_608, 3_085_938_688, 390, 434, 824),
    "qwen2_5_vl_7b": (8_292_166_656, 676_550_144, 44_574_464, 7_070_619_136, 390, 338, 729),
    "qwen2_5_vl_32b": (33_452_718_336, 688_841_984, 52_440_320, 31_985_308_672, 390, 770, 1161),
    "qwen2_5_vl_72b": (73_410_777_344, 704_573_696, 68_172_032, 71_460_495_360, 390, 962, 1353),
    "mimo_vl_7b": (8_306_217_216, 683_598_080, 47_196_416, 7_001_337_856, 390, 434, 825),
}


def shapes_of(name):
    """Tensor name -> shape of a preset, in the released layout."""
    config = families.preset(name)
    shapes = vlm.parameter_shapes(config)
    return {e.name: e.shape for e in table.entries(config, shapes)}


def test_every_preset_of_the_architecture_is_in_the_table():
    assert {name for name, config in families.presets().items() if config.family == "qwen2_5_vl"} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_and_tensor_counts_equal_the_published_ones(name):
    total, visual, merger, llm, visual_tensors, llm_tensors, tensors = PUBLISHED[name]
    counts = vlm.parameter_counts(vlm.abstract(families.preset(name)))
    assert sum(counts.values()) == total
    assert counts["encoder"] + counts["connector"] == visual
    assert counts["connector"] == merger
    shapes = shapes_of(name)
    sizes = {n: math.prod(shape) for n, shape in shapes.items()}
    assert sum(sizes.values()) == total
    assert sum(size for n, size in sizes.items() if n.startswith("model.")) == llm
    assert len(shapes) == tensors
    assert sum(n.startswith("visual.") for n in shapes) == visual_tensors
    assert sum(n.startswith("model.") for n in shapes) == llm_tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_equal_those_of_transformers(name):
    config = families.preset(name)
    values = families.get(config.family).hf.write_config(config)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**values))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {new_layout(n): shape for n, shape in shapes_of(name).items()} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configuration_survives_config_json(name):
    form = families.for_model_type("qwen2_5_vl").hf
    assert form.read_config(form.write_config(families.preset(name))) == families.preset(name)
