"""Qwen2-VL computes what transformers computes, on random small checkpoints in float32."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import jvlm
from jvlm import families
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_write import write_peft
from jvlm.data.boxes import Box, Sizes
from jvlm.data.mrope import MediaSpan, mrope_positions
from jvlm.models import vlm
from jvlm.weights import table
from tests import support
from tests.families import oracle
from tests.families.oracle import several_turns, user
from tests.families.qwen2_vl import create
from tests.support import hf_positions, new_layout, picture

SHAPE = {"seq_len": 256, "max_patches": 384}
VIDEO = {"video_min_pixels": 784, "video_max_pixels": 64 * 784}


def frames(count, width=112, height=84, seed=7):
    return [picture(width, height, seed + i) for i in range(count)]


CASES = {
    "text alone": user("what is the answer?"),
    "an image that is resized": user("<image>what is it?", images=[picture(333, 187)]),
    "images of different sizes": user(
        "<image>is the <image>cat in both?<image>", images=[picture(84, 112), picture(140, 56, 1), picture(112, 112, 2)]
    ),
    "several turns and a system prompt": several_turns(picture(112, 84), picture(84, 140, 3)),
    "a video": user("<video>describe this video", videos=[frames(4)], chat_template_kwargs=VIDEO),
    "a video with an incomplete pair, then an image": user(
        "<video>and <image> is?",
        videos=[frames(5)],
        images=[picture(140, 84)],
        chat_template_kwargs={**VIDEO, "fps": 0.5},
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer_folder):
    return create(tmp_path_factory.mktemp("qwen2_vl"), tokenizer_folder)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logits_equal_transformers(tiny, name):
    oracle.check_tokens_and_logits(tiny, CASES[name], SHAPE, support.hf_inputs)


def test_text_after_a_long_video_stands_behind_its_last_frame(tiny):
    """As transformers 4.49 had it, docs/mrope.md: later versions begin again above the rows and columns."""
    example = user("<video>describe it", videos=[frames(8, 56, 56)], chat_template_kwargs=VIDEO)
    batch, inputs = tiny.processor.pack([example], **SHAPE), support.hf_inputs(tiny, example)
    n = int((batch.segment_ids > 0).sum())
    start = int(np.flatnonzero(batch.vision_index[0] >= 0)[0])
    expected = mrope_positions(n, [MediaSpan(start, (4, 2, 2), 1.0)])
    np.testing.assert_array_equal(batch.positions[0, :n], expected)
    assert expected[start : start + 16 : 4, 0].tolist() == [start, start + 1, start + 2, start + 3]
    assert expected[start + 16, 0] == start + 4
    inputs["position_ids"] = hf_positions(batch.positions[0, :n])
    with torch.no_grad():
        logits = tiny.torch_model(**inputs).logits.numpy()[0]
    np.testing.assert_allclose(np.asarray(tiny.model(batch))[0, :n], logits, atol=2e-4)


def test_pixels_features_and_vision_tokens_equal_transformers(tiny):
    example = CASES["images of different sizes"]
    batch, inputs = tiny.processor.pack([example], **SHAPE), support.hf_inputs(tiny, example)
    encoder = tiny.model.config.encoder
    count = len(inputs["pixel_values"])
    mean, std = (np.repeat(x, encoder.patch_values // 3) for x in (encoder.image_mean, encoder.image_std))
    pixels = (batch.patches[0, :count] / 255 - mean) / std
    np.testing.assert_allclose(pixels, inputs["pixel_values"].numpy(), atol=1e-6)
    with torch.no_grad():
        theirs = tiny.torch_model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    features = nnx.jit(lambda encoder, b: encoder(b).tokens)(tiny.model.encoder, batch)
    np.testing.assert_allclose(np.asarray(features)[0, :count], theirs.last_hidden_state.numpy(), atol=1e-4)
    merged = np.asarray(jax.jit(lambda b: tiny.model.encode(b).tokens)(batch))[0, : count // 4]
    np.testing.assert_allclose(merged, theirs.pooler_output.numpy(), atol=1e-4)


def test_packed_examples_have_the_logits_that_each_has_alone(tiny):
    names = ("images of different sizes", "text alone", "a video")
    oracle.check_packed_equals_alone(tiny, [CASES[name] for name in names], SHAPE)


@pytest.mark.slow
def test_gradients_of_every_tensor_equal_torch(tiny):
    names = ("text alone", "images of different sizes", "a video")
    oracle.check_gradients(tiny, [CASES[name] for name in names], SHAPE, support.hf_inputs, new_layout)


@pytest.mark.slow
def test_greedy_answers_equal_transformers(tiny):
    oracle.check_greedy_answers(tiny, list(CASES.values()), support.hf_inputs)


def test_a_round_trip_is_byte_identical_and_read_by_transformers(tiny, tmp_path):
    jvlm.save(tiny.model, tiny.processor, tmp_path)
    assert support.raw_tensors(tmp_path) == support.raw_tensors(tiny.folder)
    again, report = Qwen2VLForConditionalGeneration.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for (name, value), (_, expected) in zip(again.named_parameters(), tiny.torch_model.named_parameters(), strict=True):
        assert torch.equal(value, expected), name
    form = families.get("qwen2_vl").hf
    assert form.read_config(json.loads((tmp_path / "config.json").read_text())) == form.read_config(tiny.config)
    before, after = (
        json.loads((folder / "preprocessor_config.json").read_text()) for folder in (tiny.folder, tmp_path)
    )
    assert {**after, **before} == after


# Parameters and tensors. Public tables of models have those of all three, and the index file of the 2B has its own.
PUBLISHED = {
    "qwen2_vl_2b": (2_208_985_600, 729),
    "qwen2_vl_7b": (8_291_375_616, 730),
    "qwen2_vl_72b": (73_405_560_320, 1354),
}


@pytest.mark.parametrize("name", families.get("qwen2_vl").presets)
def test_names_shapes_and_counts_of_presets_are_the_published_ones(name):
    config, form = families.preset(name), families.get("qwen2_vl").hf
    values = form.write_config(config)
    assert form.read_config(values) == config
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**values))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    model = vlm.abstract(config)
    shapes = {path: tuple(v.get_value().shape) for path, v in vlm.parameters(model).items()}
    found = {new_layout(entry.name): tuple(entry.shape) for entry in table.entries(config, shapes)}
    assert found == expected
    assert (sum(vlm.parameter_counts(model).values()), len(found)) == PUBLISHED[name]


def test_boxes_are_thousandths_between_tokens(tiny):
    sizes = Sizes((640, 480), (644, 476))
    text = tiny.processor.write_region(Box(64, 0, 640, 360, "original"), sizes)
    assert text == "<|box_start|>(100,0),(999,750)<|box_end|>"
    (found,) = tiny.processor.read_regions(f"<|object_ref_start|>a cat<|object_ref_end|>{text}")
    assert (found.label, found.region.values) == ("a cat", (100, 0, 999, 750))


def test_adapters_on_every_tower_have_the_names_of_peft(tiny, tmp_path):
    model = attach(tiny.model, AdapterConfig(rank=2, targets=("encoder", "connector", "decoder")))
    write_peft(extract(model), model.config, tmp_path, base_name="org/base")
    modules = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in support.raw_tensors(tmp_path)
        if name.endswith("lora_A.weight")
    }
    linear = {n for n, module in tiny.torch_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert modules == linear - {"lm_head"}
