"""Checkpoints that bitsandbytes and compressed-tensors wrote (tests/quantization/data), and what cannot be read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.quantization import packing
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.kernels import quantized_kernels
from jvlm.quantization.model import dequantized
from jvlm.weights import hf
from jvlm.weights.table import WeightError

DATA = Path(__file__).parent / "data"
KEPT = {"nf4x2": QuantizationConfig("nf4"), "ct_fp8": QuantizationConfig("fp8"), "ct_int4": None}
PATHS = {"self_attn.k_proj": "attention.k", "mlp.down_proj": "mlp.down"}


def _load(folder: Path, quantize=None, dtype="float32"):
    return hf.load_weights(folder, hf.read_config(folder, Precision(dtype, "float32")), quantize=quantize)


def _matrices(model):
    values = vlm.parameters(model)
    return {
        f"model.language_model.layers.0.{name}.weight": np.asarray(
            values[f"decoder.blocks.layer.{path}.kernel"].get_value()
        )[0].T
        for name, path in PATHS.items()
    }


@pytest.mark.parametrize("kind", KEPT)
def test_values_are_those_that_the_library_computes(kind, capsys):
    expected = load_file(DATA / f"{kind}.safetensors")
    found = _matrices(_load(DATA / kind))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)
    assert "0 kept as they are" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nf4x2", "ct_fp8"])
def test_codes_are_kept_where_the_model_holds_that_format(kind, capsys):
    model = _load(DATA / kind, KEPT[kind], "bfloat16")
    assert len(list(quantized_kernels(model))) == 7
    expected = load_file(DATA / f"{kind}.safetensors")
    for name, value in _matrices(dequantized(model, "float32")).items():
        np.testing.assert_array_equal(value, expected[name], name)
    assert ": 7 kept as they are" in capsys.readouterr().err


def test_to_quantise_a_quantised_matrix_again_is_refused():
    with pytest.raises(WeightError, match=r"stored as nf4 with double, and quantize asks for nf4 without double"):
        _load(DATA / "nf4x2", QuantizationConfig("nf4", double=False))
    with pytest.raises(WeightError, match=r"stored as packed int4, and quantize asks for int8"):
        _load(DATA / "ct_int4", QuantizationConfig("int8"))


def _changed(tmp_path, kind, change):
    folder = tmp_path / kind
    shutil.copytree(DATA / kind, folder)
    values = json.loads((folder / "config.json").read_text())
    change(values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_what_cannot_be_read_is_named(tmp_path):
    folder = _changed(tmp_path, "ct_fp8", lambda settings: settings.update(quant_method="gptq"))
    with pytest.raises(WeightError, match=r"config.json: quant_method 'gptq' is not read; bitsandbytes .* are"):
        _load(folder)
    folder = _changed(tmp_path, "ct_int4", lambda settings: None)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.mlp.up_proj.weight_zero_point": np.zeros((8, 2), np.int32)},
        folder / "model.safetensors",
    )
    with pytest.raises(
        WeightError, match=r"zero points, .* is not read \(model.layers.0.mlp.up_proj.weight: weight_zero_point"
    ):
        _load(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_come_back_also_where_words_are_not_full(bits):
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 22)).astype(np.int8)
    words = packing.packed(codes, bits)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(packing.unpacked(words, codes.shape, bits), codes)
