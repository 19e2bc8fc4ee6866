"""GGUF files of Llama models, with every option that changes what they compute, against the models they hold."""

import json
import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM

from jvlm import cli
from jvlm.models.layers import Precision
from jvlm.weights import backbones
from jvlm.weights.gguf_onnx import unpack
from jvlm.weights.table import WeightError
from tests.support import make_tokenizer

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """(tokens in the order of their ids, merges) of a small byte-level tokenizer."""
    folder = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    values = json.loads((folder / "tokenizer.json").read_text())
    added = {t["content"]: t["id"] for t in values["added_tokens"]}
    ids = {**values["model"]["vocab"], **added}
    return sorted(ids, key=ids.get), [" ".join(m) if isinstance(m, list) else m for m in values["model"]["merges"]]


def model_of(vocabulary, **changes):
    values = {**SMALL, "vocab_size": len(vocabulary[0]), **changes}
    theta = values.pop("rope_theta")
    scaling = values.pop("rope_scaling", None) or {"rope_type": "default"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**values, rope_parameters={"rope_theta": theta, **scaling})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.2)
    return model


def side_by_side(weight, heads):
    """The order of rows in which llama.cpp keeps queries and keys: rotary pairs next to each other."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return out


def llama3_factors(size, theta):
    """By how much each frequency is divided, as llama.cpp's converter computes it."""
    factors = []
    for i in range(0, size, 2):
        wave = 2 * np.pi * theta ** (i / size)
        if wave < 64 / 4:
            factors.append(1.0)
        elif wave > 64 / 1:
            factors.append(8.0)
        else:
            smooth = (64 / wave - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.asarray(factors, np.float32)


def write(path, model, vocabulary, *, quantised=None, keys=(), more=(), without=(), architecture="llama", factors=None):
    """A GGUF file of a model; ``keys`` are (method of the writer, value) beside the usual ones."""
    config = model.config
    writer = GGUFWriter(str(path), architecture)
    tokens, merges = vocabulary
    usual = {
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": config.hidden_size,
        "add_block_count": config.num_hidden_layers,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": config.num_attention_heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_layer_norm_rms_eps": config.rms_norm_eps,
        "add_rope_freq_base": config.rope_parameters["rope_theta"],
        "add_key_length": config.head_dim,
        "add_value_length": config.head_dim,
        "add_rope_dimension_count": config.head_dim,
        "add_tokenizer_model": "gpt2",
        "add_token_list": tokens,
        "add_token_merges": merges,
        "add_bos_token_id": 320,
        "add_eos_token_id": 322,
    }
    for method, value in {**usual, **dict(keys)}.items():
        if value is not None:
            getattr(writer, method)(value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in [*model.state_dict().items(), *more]:
        value = tensor.numpy()
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        name = name.replace("model.layers.", "blk.")
        if "attn_q." in name or "attn_k." in name:
            value = side_by_side(value, config.num_attention_heads if "attn_q." in name else config.num_key_value_heads)
        if name in without:
            continue
        if quantised is not None and value.ndim == 2:
            writer.add_tensor(name, quantize(value, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 105)[None]).logits.numpy()


KINDS = {
    "plain": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {"without": ("output.weight",)}),
    "heads wider than hidden_size over heads": ({"head_dim": 16}, {}),
    "heads as wide, and the file does not say": ({}, {"keys": (("add_key_length", None), ("add_value_length", None))}),
    "linear scaling": (
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"keys": (("add_rope_scaling_type", RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0))},
    ),
    "no scaling, said so": ({}, {"keys": (("add_rope_scaling_type", RopeScalingType.NONE),)}),
    "Llama 3's scaling": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "head_dim": 16},
        {"factors": llama3_factors(16, 500.0)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_computes_what_the_model_of_the_file_does(vocabulary, tmp_path, kind):
    changes, options = KINDS[kind]
    model = model_of(vocabulary, **changes)
    unpack(write(tmp_path / "m.gguf", model, vocabulary, **options), tmp_path / "new")
    found = LlamaForCausalLM.from_pretrained(str(tmp_path / "new")).eval()
    np.testing.assert_allclose(logits(found), logits(model), atol=2e-4)
    config = backbones.read_config(tmp_path / "new")
    assert (config.head_dim or 8) == model.config.head_dim
    assert (config.rope_scaling is None) == ("rope_scaling" not in changes)
    backbones.load(tmp_path / "new", config, Precision())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_quantised_tensors_are_those_that_gguf_gives(vocabulary, tmp_path, name):
    kind = GGMLQuantizationType[name]
    model = model_of(vocabulary)
    unpack(write(tmp_path / "m.gguf", model, vocabulary, quantised=kind), tmp_path / "new")
    found = LlamaForCausalLM.from_pretrained(str(tmp_path / "new")).state_dict()
    weight = model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    expected = dequantize(quantize(weight, kind), kind)
    np.testing.assert_array_equal(found["model.layers.1.mlp.up_proj.weight"].numpy(), expected)


REFUSED = {
    "values of another width": ({"keys": (("add_value_length", 4),)}, r"attention\.value_length = 4"),
    "a part of the head turned": ({"keys": (("add_rope_dimension_count", 4),)}, r"rope\.dimension_count = 4"),
    "YaRN": (
        {"keys": (("add_rope_scaling_type", RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0))},
        r"scaling\.type = 'yarn' is not supported; supported: none, linear",
    ),
    "linear without a factor": ({"keys": (("add_rope_scaling_type", RopeScalingType.LINEAR),)}, r"factor is None"),
    "factors of no known scaling": ({"factors": np.linspace(1, 3, 4, dtype=np.float32)}, "rope_freqs.weight are not"),
    "experts": ({"keys": (("add_expert_count", 8),)}, r"expert_count = 8 is not supported"),
    "a sliding window": ({"keys": (("add_sliding_window", 64),)}, r"sliding_window = 64 is not supported"),
    "another family": ({"architecture": "qwen2"}, r"'qwen2' models are not supported; supported: llama"),
    "no number of heads": ({"keys": (("add_head_count", None),)}, r"attention\.head_count is None"),
    "heads of each layer": ({"keys": (("add_head_count", [4, 2]),)}, r"attention\.head_count is \[4, 2\]"),
    "a bias": (
        {"more": (("model.layers.0.self_attn.q_proj.bias", torch.zeros(32)),)},
        r"blk\.0\.attn_q\.bias is no tensor of a Llama model",
    ),
    "a tensor too few": ({"without": ("blk.1.ffn_up.weight",)}, r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
    "no embedding": ({"without": ("token_embd.weight",)}, r"no tensor token_embd\.weight"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_refused_by_name_and_nothing_is_written(vocabulary, tmp_path, kind):
    options, says = REFUSED[kind]
    path = write(tmp_path / "m.gguf", model_of(vocabulary), vocabulary, **options)
    with pytest.raises(WeightError, match=says) as caught:
        unpack(path, tmp_path / "new")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "new").exists()


def _of_split(path, vocabulary):
    writer = GGUFWriter(str(path), "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _of_unknown_quantisation(path, vocabulary):
    write(path, model_of(vocabulary), vocabulary)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(bytes(data))


def _of_a_quantisation_without_an_inverse(path, vocabulary):
    write(path, model_of(vocabulary), vocabulary)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4
    data[at : at + 8] = struct.pack("<Q", 256)
    data[at + 16 : at + 20] = struct.pack("<I", GGMLQuantizationType.Q8_K)
    path.write_bytes(bytes(data))


def _cut(share):
    def damage(path, vocabulary):
        write(path, model_of(vocabulary), vocabulary)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


DAMAGED = {
    "empty": lambda path, _: path.write_bytes(b""),
    "another kind of file": lambda path, _: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "the beginning alone": lambda path, _: path.write_bytes(b"GGUF"),
    "an unknown version": lambda path, _: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 77, 0, 0)),
    "no keys": lambda path, _: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0)),
    "one of several": _of_split,
    "an unknown quantisation": _of_unknown_quantisation,
    "a quantisation without an inverse": _of_a_quantisation_without_an_inverse,
    **{f"cut at {share:.0%}": _cut(share) for share in (0.02, 0.1, 0.3, 0.6, 0.95)},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_error_that_names_it(vocabulary, tmp_path, kind):
    path = tmp_path / "m.gguf"
    DAMAGED[kind](path, vocabulary)
    with pytest.raises(WeightError) as caught:
        unpack(path, tmp_path / "new")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_damaged_onnx_files_and_mistaken_paths_are_one_line_of_the_command(tmp_path, capsys):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "taken").write_text("")
    calls = [["m.onnx", "new"], ["m.gguf", "new"], ["absent.gguf", "new"], ["m.gguf", "taken"]]
    for call in calls:
        assert cli.main(["convert", *(str(tmp_path / name) for name in call)]) == 2
        (line,) = "".join(capsys.readouterr()).splitlines()
        assert line.startswith("jvlm: ")
        assert call[0] in line or call[1] in line
