"""Random small Qwen2-VL checkpoints, in transformers and in jvlm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import jvlm
from tests import support
from tests.families import oracle


def config(ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a small model, in the flat form of the released checkpoints."""
    sizes = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2}
    values = support.tiny_config(ids)
    same = {key: value for key, value in values.items() if key != "vision_config"}
    return {
        **same,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vision_config": {"model_type": "qwen2_vl", "in_chans": 3, "spatial_patch_size": 14, **sizes},
    }


def released(name: str) -> str:
    """The name of a tensor in released files, of its name in memory."""
    return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))


def create(folder: Path, tokenizer: Path) -> support.Tiny:
    """Write a checkpoint as released ones are, and load it with jvlm."""
    values = config(support.token_ids(tokenizer))
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**values)).eval()
    oracle.randomise(model)
    folder.mkdir(parents=True, exist_ok=True)
    support.write_folder(folder, tokenizer, values, limits=(4 * 784, 64 * 784))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "processor_class": "Qwen2VLProcessor"}))
    tensors = {released(name): value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return support.Tiny(folder, values, model, *jvlm.load(folder))
