"""The vision tower and merger of Qwen2.5-VL as the GGUF file that llama.cpp calls mmproj."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jvlm.errors import UserError
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.vlm import VLM
from jvlm.weights.gguf_export import files
from jvlm.weights.gguf_export.files import ReadLayer, Tensor, Written

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
# The side of an attention window, which llama.cpp takes for granted (tools/mtmd/clip.cpp), and of an image that it
# reserves memory for.
WINDOW, _IMAGE_SIDE = 112, 560


def write_vision(
    model: VLM, path: Path, *, format: str = "f16", read: ReadLayer | None = None, name: str | None = None
) -> Written:
    """Write the vision tower and merger. Arguments are those of `write_text`.

    A fine-tuned vision tower needs its own file: with that of the base its training is lost without a word.

    Raises:
      UserError: another vision tower than Qwen2.5-VL's; one that llama.cpp computes otherwise; a model with adapters.
    """
    vit = model.config.encoder
    if model.adapters is not None:
        raise UserError("the model has adapters: merge them first; llama.cpp has none for the vision tower")
    if not isinstance(vit, QwenViTConfig):
        raise UserError(
            f"the vision tower {type(vit).__name__} of family {model.config.family} has no GGUF form in llama.cpp; "
            "written are those of qwen2_5_vl. Serve the Hugging Face folder"
        )
    every = _full_attention(vit)
    if vit.temporal_patch_size != 2 or vit.window_size != WINDOW:
        raise UserError(
            f"the vision tower has windows of {vit.window_size} pixels and patches of {vit.temporal_patch_size} "
            f"frames; llama.cpp computes {WINDOW} and 2 whatever a file says"
        )

    def keys(writer: Any) -> None:
        if name:
            writer.add_name(name)
        writer.add_type("mmproj")
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("qwen2.5vl_merger")
        writer.add_vision_use_silu(True)
        writer.add_vision_projection_dim(model.config.decoder.hidden_size)
        writer.add_vision_image_size(_IMAGE_SIDE)
        writer.add_vision_patch_size(vit.patch_size)
        writer.add_vision_embedding_length(vit.hidden_size)
        writer.add_vision_feed_forward_length(vit.intermediate_size)
        writer.add_vision_block_count(vit.depth)
        writer.add_vision_head_count(vit.num_heads)
        writer.add_vision_image_mean(list(vit.image_mean))
        writer.add_vision_image_std(list(vit.image_std))
        writer.add_vision_n_wa_pattern(every)
        writer.add_vision_attention_layernorm_eps(1e-6)

    return files.write(path, "clip", keys, _tensors(model, read or files.values_of(model)), format)


def _full_attention(vit: QwenViTConfig) -> int:
    """Every how many layers one attends to the whole image. Raises UserError if they do not come evenly."""
    blocks = vit.fullatt_block_indexes
    every = blocks[0] + 1 if blocks else 0
    if not every or blocks != tuple(range(every - 1, vit.depth, every)):
        raise UserError(
            f"fullatt_block_indexes {blocks} of {vit.depth} layers: llama.cpp knows evenly spaced ones only"
        )
    return every


def _tensors(model: VLM, read: ReadLayer) -> Iterator[Tensor]:
    for entry in files.entries(model):
        tensor = files.tensor_of(entry, entry.name, read)
        module, _, part = entry.name.rpartition(".")
        match = re.fullmatch(r"visual\.blocks\.(\d+)\.(.+)", module)
        if entry.name == _PATCHES:
            # the convolution over two frames as two of one frame each
            shape = (*entry.shape[:2], *entry.shape[3:])
            for frame, ending in enumerate(("", ".1")):
                yield Tensor(f"v.patch_embd.weight{ending}", shape, lambda t=tensor, n=frame: t.read()[:, :, n])
        elif match and match[2] == "attn.qkv":
            rows = entry.shape[0] // 3
            for number, letter in enumerate("qkv"):
                cut = slice(number * rows, (number + 1) * rows)
                name = f"v.blk.{match[1]}.attn_{letter}.{part}"
                yield Tensor(name, (rows, *entry.shape[1:]), lambda t=tensor, c=cut: t.read()[c])
        elif match:
            yield files.tensor_of(entry, f"v.blk.{match[1]}.{_LAYER[match[2]]}.{part}", read)
        elif module in _WHOLE:
            yield files.tensor_of(entry, f"{_WHOLE[module]}.{part}", read)
