"""GGUF files against those that llama.cpp answered from (tests/golden/adapters/README.md), and the gguf package."""

import dataclasses
import json
import shutil

import gguf
import numpy as np
import pytest
from gguf import GGUFReader

import jvlm
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.weights import AdapterWeights
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.weights import gguf_files
from jvlm.weights.gguf_export import export, export_folder, files, write_lora, write_text, write_vision
from tests.adapters import golden

FOLDER = golden.ROOT / "gguf"
# of the format and of this jvlm, not of the model
_NOT_COMPARED = ("GGUF.tensor_count", "GGUF.kv_count", "general.quantization_version", "general.name")


def contents(path):
    reader = GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    return keys, tensors


def compare(path, expected, *, atol=0.0):
    (keys, tensors), (wanted_keys, wanted) = contents(path), contents(expected)
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(tensors[name], value, rtol=0, atol=atol, err_msg=name)
    for key in wanted_keys.keys() - set(_NOT_COMPARED):
        assert keys[key] == wanted_keys[key], key
    return keys.keys() - wanted_keys.keys()


def with_windows(model, size=112):
    """The golden picture is smaller than a window, so that llama.cpp's own size gave the same."""
    encoder = dataclasses.replace(model.config.encoder, window_size=size, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return vlm.bind(vlm.abstract(dataclasses.replace(model.config, encoder=encoder)), _values(model))


def _values(model):
    return {path: variable.get_value() for path, variable in vlm.parameters(model).items()}


def test_the_language_model_is_that_of_llama_cpp(tmp_path):
    write_text(golden.base("qwen2_5_vl"), tmp_path / "a.gguf", format="f32")
    more = compare(tmp_path / "a.gguf", FOLDER / "text.gguf")
    assert more == {"general.type", "general.quantization_version"}


def test_the_vision_tower_is_that_of_llama_cpp(tmp_path):
    write_vision(with_windows(golden.base("qwen2_5_vl")), tmp_path / "a.gguf", format="f32")
    assert compare(tmp_path / "a.gguf", FOLDER / "mmproj.gguf") == {"general.quantization_version"}


@pytest.mark.parametrize(("case", "file"), [("lora", "lora"), ("rslora", "rslora_scale_folded")])
def test_adapters_are_those_of_llama_cpp(tmp_path, case, file, capsys):
    weights = golden.weights("qwen2_5_vl", case)
    write_lora(weights, golden.base("qwen2_5_vl").config, tmp_path / "a.gguf", text_only=True)
    compare(tmp_path / "a.gguf", FOLDER / f"{file}.gguf", atol=1e-7)
    outside = [target for target in weights.low_rank if not target.path.startswith("decoder.")]
    assert f"left out: {len(outside)} adapters of connector and encoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("lora", "not of the language model"),
        ("dora", "DoRA's magnitude"),
        ("conv_embed", "an embedding table"),
        ("bias_and_saved", "trained whole"),
    ],
)
def test_what_llama_cpp_cannot_load_of_an_adapter_is_listed(tmp_path, case, problem):
    base = golden.base("qwen2_5_vl").config
    with pytest.raises(UserError, match=f"(?s)llama.cpp cannot load this adapter.*{problem}"):
        write_lora(golden.weights("qwen2_5_vl", case), base, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_nothing_is_refused(tmp_path):
    weights = AdapterWeights(AdapterConfig(), {})
    with pytest.raises(UserError, match="no matrix of the language model"):
        write_lora(weights, golden.base("qwen2_5_vl").config, tmp_path / "a.gguf")


# the relative error of these formats on a Gaussian, and a margin (llama.cpp's own quantisers give the same)
ERRORS = {"f16": 4e-4, "bf16": 3e-3, "q8_0": 0.0065, "q5_1": 0.045, "q5_0": 0.05, "q4_1": 0.09, "q4_0": 0.1}


@pytest.mark.parametrize("format", ERRORS)
def test_matrices_are_within_the_error_of_their_format_and_vectors_exact(tmp_path, format):
    model = golden.base("qwen2_5_vl")
    written = write_text(model, tmp_path / "a.gguf", format=format)
    keys, tensors = contents(tmp_path / "a.gguf")
    _, exact = contents(FOLDER / "text.gguf")
    assert keys["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{format.upper()}"]
    for name, value in exact.items():
        if value.ndim == 1:
            np.testing.assert_array_equal(tensors[name], value)
        else:
            error = np.linalg.norm(tensors[name] - value) / np.linalg.norm(value)
            assert error < ERRORS[format], (name, error)
    # rows of 48 have no whole number of blocks of 32
    short = sum(name.endswith("ffn_down.weight") for name in exact)
    fine = 2 if format.startswith(("q4", "q5")) else 0
    matrices = sum(value.ndim == 2 for value in exact.values())
    assert written.formats[format] == matrices - fine - (short if format.startswith("q") else 0)


def test_a_llama_is_read_back_with_the_same_parameters(tmp_path, monkeypatch):
    """By jvlm's own reader, which is tested on files that others made, and knows llama.cpp's order of rotary pairs."""
    model = golden.base("idefics2")
    write_text(model, tmp_path / "a.gguf", format="f32")
    monkeypatch.setattr(gguf_files, "_tokenizer", lambda source: None)
    config, tensors, _ = gguf_files.read(tmp_path / "a.gguf")
    decoder = model.config.decoder
    assert config["hidden_size"] == decoder.hidden_size
    assert config["rope_theta"] == decoder.rope_theta
    assert config["head_dim"] == decoder.head_size
    read = files.values_of(model)
    stored = {e.name.replace("model.text_model.", "model."): e for e in files.entries(model) if "decoder" in e.path}
    assert tensors.keys() == stored.keys()
    for name, entry in stored.items():
        np.testing.assert_array_equal(tensors[name], entry.to_checkpoint(read(entry.path, entry.layer)), err_msg=name)


def test_a_lora_of_a_llama_adds_the_same_to_the_permuted_matrices(tmp_path):
    weights, config = golden.weights("idefics2", "lora"), golden.base("idefics2").config
    write_lora(weights, config, tmp_path / "a.gguf", text_only=True)
    keys, tensors = contents(tmp_path / "a.gguf")
    queries = "decoder.blocks.layer.attention.q.kernel"
    target, low = next((target, low) for target, low in weights.low_rank.items() if target.path == queries)
    name = f"blk.{target.index[0]}.attn_q.weight"
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    added = keys["adapter.lora.alpha"] / low.rank * b @ a
    np.testing.assert_allclose(
        gguf_files._halves(added, config.decoder.num_heads), (low.scale * low.a @ low.b).T, atol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"window_size": 64}, "windows of 64 pixels"),
        ({"fullatt_block_indexes": (0,)}, "evenly spaced"),
    ],
)
def test_a_vision_tower_that_llama_cpp_computes_otherwise_is_refused(tmp_path, changes, problem):
    model = with_windows(golden.base("qwen2_5_vl"))
    encoder = dataclasses.replace(model.config.encoder, **changes)
    model = vlm.bind(vlm.abstract(dataclasses.replace(model.config, encoder=encoder)), _values(model))
    with pytest.raises(UserError, match=problem):
        write_vision(model, tmp_path / "a.gguf")


def test_the_vision_tower_of_idefics2_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no GGUF form in llama.cpp"):
        write_vision(golden.base("idefics2"), tmp_path / "a.gguf")


def test_a_format_that_numpy_has_not_is_refused_with_the_tool_that_has(tmp_path):
    with pytest.raises(UserError, match=r"unknown GGUF format 'q4_k_m'.*llama-quantize"):
        write_text(golden.base("qwen2_5_vl"), tmp_path / "a.gguf", format="q4_k_m")


def test_a_folder_of_both_files_holds_the_tokenizer_that_transformers_reads(tiny, tmp_path):
    model, processor = jvlm.load(tiny.folder)
    model = with_windows(model)
    text, vision = export(model, processor, tmp_path / "tiny", format="q8_0")
    assert text.path.name == "tiny-q8_0.gguf"
    assert vision.path.name == "mmproj-tiny-f16.gguf"
    keys, _ = contents(text.path)
    whole = json.loads((tiny.folder / "tokenizer.json").read_text())
    rows = model.config.decoder.vocab_size
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == rows
    assert {word: tokens[index] for word, index in whole["model"]["vocab"].items()} == {
        word: word for word in whole["model"]["vocab"]
    }
    for token in whole["added_tokens"]:
        assert tokens[token["id"]] == token["content"]
        assert kinds[token["id"]] == (3 if token["special"] else 4)
    assert keys["tokenizer.ggml.pre"] == "qwen2"
    assert keys["tokenizer.ggml.merges"] == [" ".join(merge) for merge in whole["model"]["merges"]]
    assert keys["tokenizer.ggml.eos_token_id"] == processor.tokenizer.eos_token_id
    assert keys["tokenizer.chat_template"] == processor.tokenizer.chat_template
    with pytest.raises(UserError, match="is there already"):
        export(model, processor, tmp_path / "tiny", format="q8_0")


def test_folder_to_folder_gives_the_files_of_the_loaded_model(tiny, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(tiny.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["window_size"] = 112
    (folder / "config.json").write_text(json.dumps(config))
    loaded = export(*jvlm.load(folder), tmp_path / "a", format="q8_0", name="x")
    read = export_folder(folder, tmp_path / "b", format="q8_0", name="x")
    for one, other in zip(loaded, read, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
