"""Qwen3-VL in llama.cpp: the architectures "qwen3vl" and "qwen3vlmoe", and the projector "qwen3vl_merger"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jvlm.errors import UserError
from jvlm.families.gguf import QWEN2, GGUFFormat, GGUFVision
from jvlm.models.encoders.native_vit import EPS
from jvlm.models.vlm import VLMConfig

_LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
_LEVEL = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
_WHOLE = {
    "pos_embed": "v.position_embd",
    "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
}
_FRAMES = 2  # of a patch, which llama.cpp takes for granted


def architecture(config: VLMConfig) -> str:
    """Return llama.cpp's name of the language model."""
    return "qwen3vl" if config.decoder.mlp is None else "qwen3vlmoe"


def add_text_keys(writer: Any, config: VLMConfig) -> None:
    """Add into how many of the first layers DeepStack features go."""
    writer.add_num_deepstack_layers(config.connector.levels)


def add_vision_keys(writer: Any, config: VLMConfig) -> None:
    """Add the keys of the vision tower and mergers. Raises UserError for a tower that llama.cpp computes otherwise."""
    vit = config.encoder
    if vit.temporal_patch_size != _FRAMES:
        raise UserError(
            f"the vision tower has patches of {vit.temporal_patch_size} frames; llama.cpp computes {_FRAMES} whatever "
            "a file says. Serve the Hugging Face folder"
        )
    writer.add_clip_projector_type("qwen3vl_merger")
    writer.add_vision_use_gelu(True)
    writer.add_vision_projection_dim(config.decoder.hidden_size)
    writer.add_vision_image_size(vit.position_grid * vit.patch_size)
    writer.add_vision_patch_size(vit.patch_size)
    writer.add_vision_embedding_length(vit.hidden_size)
    writer.add_vision_feed_forward_length(vit.intermediate_size)
    writer.add_vision_block_count(vit.depth)
    writer.add_vision_head_count(vit.num_heads)
    writer.add_vision_image_mean(list(vit.image_mean))
    writer.add_vision_image_std(list(vit.image_std))
    writer.add_vision_spatial_merge_size(vit.spatial_merge_size)
    writer.add_vision_attention_layernorm_eps(EPS)
    writer.add_vision_is_deepstack_layers([layer in vit.deepstack_layers for layer in range(vit.depth)])


def tensors(name: str, config: VLMConfig) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yield what becomes of a checkpoint's tensor; see `GGUFVision`."""
    if not name.startswith("model.visual."):
        return
    module, _, part = name.removeprefix("model.visual.").rpartition(".")
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    level = re.fullmatch(r"deepstack_merger_list\.(\d+)\.(.+)", module)
    if (module, part) == ("patch_embed.proj", "weight"):
        # the convolution over two frames as two of one frame each
        for frame, ending in enumerate(("", ".1")):
            yield f"v.patch_embd.weight{ending}", lambda value, n=frame: value[:, :, n]
    elif module == "patch_embed.proj":
        yield f"v.patch_embd.{part}", lambda value: value
    elif layer:
        yield f"v.blk.{layer[1]}.{_LAYER[layer[2]]}.{part}", lambda value: value
    elif level:
        after = config.encoder.deepstack_layers[int(level[1])]
        yield f"v.deepstack.{after}.{_LEVEL[level[2]]}.{part}", lambda value: value
    else:
        yield f"{_WHOLE[module]}.{part}", lambda value: value


GGUF = GGUFFormat(architecture, QWEN2, GGUFVision(add_vision_keys, tensors), add_text_keys)
