"""Quantised checkpoints as their own libraries write them, and the values that those compute from them.

Runs with bitsandbytes and compressed-tensors before the packages of the environment (`make test-exports`):

    PYTHONPATH=.venv/export-quantised python tests/quantization/make_checkpoints.py SOURCE OUT nf4x2 ...

Each OUT/<kind> is a folder as ``save_pretrained`` writes it; OUT/<kind>.safetensors has the dequantised matrices of the
language model, under the names of transformers.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

LANGUAGE = "model.language_model.layers."
BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4x2": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
COMPRESSED = {
    "ct_fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "ct_int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "ct_int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
}


def with_bitsandbytes(source: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    import bitsandbytes

    config = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **BITSANDBYTES[kind])
    load = AutoModelForImageTextToText.from_pretrained
    model = load(source, quantization_config=config, device_map="cpu", dtype=torch.float32)
    model.save_pretrained(folder)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            found[f"{name}.weight"] = weight
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            state = module.weight
            found[f"{name}.weight"] = state.CB.to(torch.float32) * state.SCB[:, None] / 127
    return found


def with_compressed_tensors(source: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
    from transformers import CompressedTensorsConfig

    form, weights = COMPRESSED[kind]
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    group = {"targets": ["Linear"], "weights": {**weights, "symmetric": True}}
    settings = {"config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*visual.*"], "format": form}
    config = QuantizationConfig.model_validate(settings)
    apply_quantization_config(model, config)
    for module in model.modules():
        if is_module_quantized(module) and hasattr(module, "weight_scale"):
            args = module.quantization_scheme.weights
            grouped = module.weight.reshape(*module.weight_scale.shape[:2], -1)
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            module.weight_scale.data, module.quantization_status = (
                scale.to(module.weight.dtype),
                QuantizationStatus.FROZEN,
            )
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    again = CompressedTensorsConfig(dequantize=True)
    load = AutoModelForImageTextToText.from_pretrained
    return load(folder, quantization_config=again, dtype=torch.float32).state_dict()


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    for kind in sys.argv[3:]:
        make = with_bitsandbytes if kind in BITSANDBYTES else with_compressed_tensors
        found = make(source, out / kind, kind)
        chosen = {n: t.detach().float().contiguous().clone() for n, t in found.items() if n.startswith(LANGUAGE)}
        save_file({n: t for n, t in chosen.items() if n.endswith("_proj.weight")}, out / f"{kind}.safetensors")
        stored = load_file(out / kind / "model.safetensors")
        print(
            kind,
            json.dumps({n: [str(t.dtype), list(t.shape)] for n, t in stored.items() if ".0.self_attn.q_proj" in n}),
        )


if __name__ == "__main__":
    main()
