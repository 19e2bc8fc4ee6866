"""bitsandbytes, compressed-tensors and transformers themselves, in both directions: `make test-exports`."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import jvlm
from jvlm.models import vlm
from jvlm.weights import hf, table
from tests import support
from tests.quantization.test_export import exported, model  # noqa: F401  (fixtures)

READ = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig
model = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
save_file({n: t.float().contiguous().clone() for n, t in model.state_dict().items()}, sys.argv[2])
"""


@pytest.mark.parametrize("method", ["fp8", "rtn", "gptq", "awq"])
def test_compressed_tensors_dequantises_to_the_same_values(exported, method, tmp_path):  # noqa: F811
    folder, _ = exported
    environment = {**os.environ, "PYTHONPATH": str(support.ROOT / ".venv/export-quantised")}
    words = [sys.executable, "-c", READ, str(folder / method), str(tmp_path / "read.safetensors")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    read, own_model = load_file(tmp_path / "read.safetensors"), jvlm.load(folder / method)[0]
    values = vlm.parameters(own_model)
    rename = table.hf_format(own_model.config).layouts["transformers"]
    entries = table.entries(own_model.config, {path: tuple(v.get_value().shape) for path, v in values.items()})
    assert len(entries) == len(read)
    for entry in entries:
        value = values[entry.path].get_value()
        own = entry.to_checkpoint(np.asarray(value if entry.layer is None else value[entry.layer]))
        np.testing.assert_array_equal(read[rename(entry.name)], own, entry.name)


@pytest.mark.parametrize("kind", ["nf4", "nf4x2", "fp4", "int8", "ct_fp8", "ct_int4", "ct_int8"])
def test_checkpoints_that_the_libraries_write_are_read_as_they_read_them(kind, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(support.ROOT / ".venv/export-quantised")}
    script = support.ROOT / "tests/quantization/make_checkpoints.py"
    words = [sys.executable, str(script), str(support.GOLDEN / "qwen2_5_vl_tiny"), str(tmp_path), kind]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = hf.load_weights(tmp_path / kind, hf.read_config(tmp_path / kind))
    values, expected = vlm.parameters(loaded), load_file(tmp_path / f"{kind}.safetensors")
    entries = table.entries(loaded.config, {path: tuple(v.get_value().shape) for path, v in values.items()})
    rename = table.hf_format(loaded.config).layouts["transformers"]
    compared = 0
    for entry in entries:
        if (name := rename(entry.name)) in expected:
            own = entry.to_checkpoint(np.asarray(values[entry.path].get_value()[entry.layer]))
            # int8: bitsandbytes multiplies, then divides by 127
            np.testing.assert_allclose(own, expected[name], rtol=3e-7 if kind == "int8" else 0, atol=0)
            compared += 1
    assert compared == 14
