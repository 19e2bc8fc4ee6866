"""bitsandbytes, compressed-tensors and transformers themselves, in both directions: `make test-exports`."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import jvlm
from jvlm import cli
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_write import write_peft
from jvlm.models import vlm
from jvlm.weights import hf, table
from tests import support
from tests.adapters.test_several import random_adapter
from tests.quantization.test_export import exported, model  # noqa: F401  (fixtures)
from tests.training.support import write_examples

READ = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig
model = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
save_file({n: t.float().contiguous().clone() for n, t in model.state_dict().items()}, sys.argv[2])
"""


def compare_with_compressed_tensors(folder, read):
    """The values of a folder are those that compressed-tensors dequantises it to."""
    environment = {**os.environ, "PYTHONPATH": str(support.ROOT / ".venv/export-quantised")}
    words = [sys.executable, "-c", READ, str(folder), str(read)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    read, own_model = load_file(read), jvlm.load(folder)[0]
    values = vlm.parameters(own_model)
    rename = table.hf_format(own_model.config).layouts["transformers"]
    entries = table.entries(own_model.config, {path: tuple(v.get_value().shape) for path, v in values.items()})
    assert len(entries) == len(read)
    for entry in entries:
        value = values[entry.path].get_value()
        own = entry.to_checkpoint(np.asarray(value if entry.layer is None else value[entry.layer]))
        np.testing.assert_array_equal(read[rename(entry.name)], own, entry.name)


@pytest.mark.parametrize("method", ["fp8", "rtn", "gptq", "awq"])
def test_compressed_tensors_dequantises_to_the_same_values(exported, method, tmp_path):  # noqa: F811
    folder, _ = exported
    compare_with_compressed_tensors(folder / method, tmp_path / "read.safetensors")


@pytest.mark.parametrize("method", ["fp8", "gptq --quant_bits 4 --group_size 32", "awq --quant_bits 8 --group_size 32"])
def test_what_jvlm_export_makes_of_an_adapter_is_read_too(model, method, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    base, processor = model
    jvlm.save(base, processor, tmp_path / "base")
    write_examples(tmp_path, 16)
    config = AdapterConfig(rank=4, targets=("decoder",), use_rslora=True)
    write_peft(random_adapter(base, config, 1), base.config, tmp_path / "lora", base_name="base")
    words = f"export --adapters lora --dataset examples.jsonl --max_length 256 --output_dir out --quant_method {method}"
    assert cli.main(words.split()) == 0
    compare_with_compressed_tensors(tmp_path / "out", tmp_path / "read.safetensors")


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
