"""Qwen2.5-VL and MiMo-VL in llama.cpp: the architecture "qwen2vl", and the projector "qwen2.5vl_merger"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jvlm.errors import UserError
from jvlm.families.gguf import QWEN2, GGUFFormat, GGUFVision
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.vlm import VLMConfig

_LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"visual.merger.ln_q": "v.post_ln", "visual.merger.mlp.0": "mm.0", "visual.merger.mlp.2": "mm.2"}
_PATCHES = "visual.patch_embed.proj.weight"
# What llama.cpp takes for granted (tools/mtmd/clip.cpp): side of an attention window in pixels, frames of a patch.
_WINDOW, _FRAMES = 112, 2
# The side of an image that it reserves memory for.
_IMAGE = 560


def add_keys(writer: Any, config: VLMConfig) -> None:
    """Add the keys of the vision tower and merger. Raises UserError for a tower that llama.cpp computes otherwise."""
    vit = config.encoder
    every = _full_attention_interval(vit)
    if vit.temporal_patch_size != _FRAMES or vit.window_size != _WINDOW:
        raise UserError(
            f"the vision tower has windows of {vit.window_size} pixels and patches of {vit.temporal_patch_size} "
            f"frames; llama.cpp computes {_WINDOW} and {_FRAMES} whatever a file says. Serve the Hugging Face folder"
        )
    writer.add_clip_projector_type("qwen2.5vl_merger")
    writer.add_vision_use_silu(True)
    writer.add_vision_projection_dim(config.decoder.hidden_size)
    writer.add_vision_image_size(_IMAGE)
    writer.add_vision_patch_size(vit.patch_size)
    writer.add_vision_embedding_length(vit.hidden_size)
    writer.add_vision_feed_forward_length(vit.intermediate_size)
    writer.add_vision_block_count(vit.depth)
    writer.add_vision_head_count(vit.num_heads)
    writer.add_vision_image_mean(list(vit.image_mean))
    writer.add_vision_image_std(list(vit.image_std))
    writer.add_vision_n_wa_pattern(every)
    writer.add_vision_attention_layernorm_eps(1e-6)


def _full_attention_interval(vit: QwenViTConfig) -> int:
    """Return every how many layers one attends to the whole image. Raises UserError if they do not come evenly."""
    blocks = vit.fullatt_block_indexes
    every = blocks[0] + 1 if blocks else 0
    if not every or blocks != tuple(range(every - 1, vit.depth, every)):
        raise UserError(
            f"fullatt_block_indexes {blocks} of {vit.depth} layers: llama.cpp knows evenly spaced ones only. Serve the "
            "Hugging Face folder"
        )
    return every


def tensors(name: str, config: VLMConfig) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yield what becomes of a checkpoint's tensor; see `GGUFVision`."""
    module, _, part = name.rpartition(".")
    layer = re.fullmatch(r"visual\.blocks\.(\d+)\.(.+)", module)
    if name == _PATCHES:
        # the convolution over two frames as two of one frame each
        for frame, ending in enumerate(("", ".1")):
            yield f"v.patch_embd.weight{ending}", lambda value, n=frame: value[:, :, n]
    elif layer and layer[2] == "attn.qkv":
        for number, letter in enumerate("qkv"):
            yield f"v.blk.{layer[1]}.attn_{letter}.{part}", lambda value, n=number: _third(value, n)
    elif layer:
        yield f"v.blk.{layer[1]}.{_LAYER[layer[2]]}.{part}", lambda value: value
    elif module in _WHOLE:
        yield f"{_WHOLE[module]}.{part}", lambda value: value


def _third(value: np.ndarray, number: int) -> np.ndarray:
    rows = value.shape[0] // 3
    return value[number * rows : (number + 1) * rows]


GGUF = GGUFFormat(lambda config: "qwen2vl", QWEN2, GGUFVision(add_keys, tensors))
