"""Language models loaded alone give transformers' logits, also after a prompt and in packed sequences."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jvlm.models import registry
from jvlm.models.contracts import DecoderInputs
from jvlm.models.layers import Precision
from jvlm.weights import backbones
from jvlm.weights.table import WeightError

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "llama 3": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
    "mistral": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=5)),
    "mistral without a window": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None, head_dim=16)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=12)),
}
PRECISION = Precision(compute_dtype="float32")


def random_folder(name, folder):
    make, config = FAMILIES[name]
    torch.manual_seed(0)
    model = make(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    return folder, random_folder(request.param, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_folder("llama", folder)
    return folder


def load(folder, **changed):
    config = dataclasses.replace(backbones.read_config(folder), **changed)
    module = nnx.eval_shape(lambda: registry.build(config, precision=PRECISION, rngs=nnx.Rngs(0)))
    values = backbones.load(folder, config, PRECISION)
    nnx.update(module, nnx.from_flat_state([(tuple(path.split(".")[1:]), v) for path, v in values.items()]))
    return module


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graph, state, tokens, positions, segments):
    decoder = nnx.merge(graph, state)
    return decoder.logits(decoder(DecoderInputs(decoder.embed(tokens), positions, segments)).hidden)


def test_logits_equal_transformers_in_packed_sequences(family):
    folder, model = family
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 96, n) for n in (9, 14)]
    with torch.no_grad():
        expected = [model(torch.from_numpy(t)[None]).logits[0].numpy() for t in texts]
    tokens = np.concatenate([*texts, np.zeros(2, int)])[None].astype(np.int32)
    positions = np.concatenate([np.arange(9), np.arange(14), np.zeros(2)])[None, :, None].repeat(3, -1).astype(np.int32)
    segments = np.repeat([1, 2, 0], [9, 14, 2])[None].astype(np.int32)
    found = logits_of(*nnx.split(load(folder)), tokens, positions, segments)
    np.testing.assert_allclose(found[0, :23], np.concatenate(expected), atol=1e-4)


def test_new_words_begin_as_the_mean_and_leave_the_others_alone(llama):
    plain, grown = load(llama), load(llama, vocab_size=99)
    table = np.asarray(plain.embedding[...])
    np.testing.assert_array_equal(grown.embedding[...][:96], table)
    np.testing.assert_allclose(grown.embedding[...][96:], np.repeat(table.mean(0)[None], 3, 0), atol=1e-6)


def test_layers_that_predict_several_tokens_are_left_out(llama, tmp_path):
    """MiMo-7B: Qwen2's form, and tensors of a layer for several tokens at once."""
    qwen = tmp_path / "qwen"
    random_folder("qwen2", qwen)
    values = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps({**values, "model_type": "mimo", "num_nextn_predict_layers": 1}))
    tensors = load_file(qwen / "model.safetensors")
    more = {"model.mtp_layers.0.input_proj.weight": np.ones((32, 64), np.float32)}
    save_file({**tensors, **more}, qwen / "model.safetensors")
    config = backbones.read_config(qwen)
    assert config.qkv_bias
    names = backbones.load(qwen, config, PRECISION)
    assert not any("mtp" in name for name in names)
    kernel = np.asarray(names["decoder.blocks.layer.attention.q.kernel"].get_value())
    np.testing.assert_array_equal(kernel[1].T, tensors["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
    ],
)
def test_options_that_the_decoder_lacks_are_refused(llama, tmp_path, changed, says):
    values = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changed}))
    with pytest.raises(WeightError, match=says):
        backbones.read_config(tmp_path)


def test_a_missing_tensor_and_one_too_many_are_both_named(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.7.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"missing: model\.norm\.weight[\s\S]*unexpected: model\.layers\.7\.extra"):
        load(tmp_path)
