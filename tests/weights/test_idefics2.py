"""Idefics2 checkpoints both ways: published counts, byte-identical round trips, exports that transformers loads."""

import json
import math

import pytest
import torch
from transformers import AutoModelForImageTextToText, Idefics2Config, Idefics2ForConditionalGeneration

import jvlm
from jvlm import families
from jvlm.models import vlm
from jvlm.weights import table
from jvlm.weights.convert import convert
from jvlm.weights.table import WeightError
from tests import support
from tests.idefics2 import CASES, create, hf_inputs, hf_processor

HF = families.get("idefics2").hf
# The released config.json: specification, B1. All else is transformers' defaults.
RELEASED = {
    "architectures": ["Idefics2ForConditionalGeneration"],
    "image_token_id": 32001,
    "model_type": "idefics2",
    "perceiver_config": {"model_type": "idefics2"},
    "text_config": {
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32003,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "idefics2",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return create(tmp_path_factory.mktemp("idefics2"), split=True)


def released_shapes():
    config = families.preset("idefics2_8b")
    shapes = vlm.parameter_shapes(config)
    return {e.name: e.shape for e in table.entries(config, shapes)}


def test_the_preset_has_the_published_parameters_and_tensors():
    shapes = released_shapes()
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert len(shapes) == 763
    assert sum(sizes.values()) == 8_402_768_112

    def part(name):
        return sum(size for n, size in sizes.items() if n.startswith(name))

    assert part("model.vision_model.") == 417_792_240
    assert part("model.connector.modality_projection.") == 91_750_400
    assert part("model.connector.perceiver_resampler.") == 651_468_800
    assert part("model.text_model.") == 7_110_672_384
    assert part("lm_head.") == 131_084_288


def test_the_preset_is_the_released_configuration():
    assert HF.read_config(RELEASED) == families.preset("idefics2_8b")
    assert HF.read_config(HF.write_config(families.preset("idefics2_8b"))) == families.preset("idefics2_8b")


@pytest.mark.parametrize("values", [RELEASED, HF.write_config(families.preset("idefics2_8b"))], ids=["read", "written"])
def test_names_and_shapes_equal_those_of_transformers(values):
    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(Idefics2Config(**values))
    assert released_shapes() == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_a_round_trip_is_byte_identical_and_the_export_loads_in_transformers(tiny, tmp_path):
    jvlm.save(tiny.model, tiny.processor, tmp_path / "saved", format="hf")
    convert(tiny.folder, tmp_path / "converted")
    assert (
        support.raw_tensors(tmp_path / "saved")
        == support.raw_tensors(tmp_path / "converted")
        == support.raw_tensors(tiny.folder)
    )
    example = CASES["adjacent pictures"]
    with torch.no_grad():
        expected = tiny.torch_model(**hf_inputs(tiny, example)).logits
        theirs = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32).eval()
        assert torch.equal(theirs(**hf_inputs(tiny, example)).logits, expected)
    processor = hf_processor(tmp_path / "saved")
    assert processor.image_processor.do_image_splitting is True
    assert processor.image_processor.size == {"longest_edge": 112, "shortest_edge": 42}
    assert json.loads((tmp_path / "saved" / "processor_config.json").read_text())["image_seq_len"] == 4
    model, again = jvlm.load(tmp_path / "saved")
    assert again.config == tiny.processor.config
    assert model.config == tiny.model.config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_config": {"model_type": "gemma"}}, "model_type 'gemma' is not supported"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported"),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn"}}}, "rope type 'yarn' is not supported"),
        ({"text_config": {"hidden_size": 2048}}, "4096 must equal text_config's 2048"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, says):
    with pytest.raises(WeightError, match=says):
        HF.read_config({**RELEASED, **change})
