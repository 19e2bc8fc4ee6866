"""Random small Qwen3-VL checkpoints, dense and with experts, in transformers and in jvlm."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import jvlm
from jvlm.families.qwen3_vl.chat_format import TEMPLATE
from tests import support

CLASSES = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def config(ids: dict[str, int], kind: str = "qwen3_vl", **text: Any) -> dict[str, Any]:
    """config.json of a small model, in the nested form of the released checkpoints."""
    vision = {
        "model_type": kind,
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 49,
        "deepstack_visual_indexes": [0, 2],
    }
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": []}
    return {
        "architectures": [CLASSES[kind][1].__name__],
        "model_type": kind,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "vision_config": vision,
        "text_config": {
            "model_type": f"{kind}_text",
            "vocab_size": 352,
            "hidden_size": 64,
            "intermediate_size": 88,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000.0,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            **(experts if kind == "qwen3_vl_moe" else {}),
            **text,
        },
    }


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One random checkpoint on both sides, float32."""

    folder: Path
    config: dict[str, Any]
    torch_model: Any
    model: Any
    processor: Any

    @classmethod
    def create(cls, folder: Path, tokenizer: Path, kind: str, **text: Any) -> Tiny:
        """Write a checkpoint as released ones are, and load it with jvlm."""
        values = config(support.token_ids(tokenizer), kind, **text)
        config_type, model_type = CLASSES[kind]
        torch_model = model_type(config_type(**values)).eval()
        _randomise(torch_model)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(released_tensors(torch_model), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(values))
        write_processor(folder, tokenizer)
        return cls(folder, values, torch_model, *jvlm.load(folder))


def released_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors as released files have them: experts have inputs before outputs, in memory outputs before inputs."""
    return {
        name: (value.swapaxes(1, 2) if ".experts." in name else value).detach().contiguous()
        for name, value in model.named_parameters()
    }


def _randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights at a scale where every one of them, norms and biases included, moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                noise = 0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise
            elif "embed_tokens" not in name and "pos_embed" not in name:
                # experts have outputs before inputs, as all linear maps
                noise = noise / np.sqrt(np.prod(value.shape[2:] if ".experts." in name else value.shape[1:]))
            value.copy_(noise)


def write_processor(folder: Path, tokenizer: Path) -> None:
    """Tokenizer, template, and the files of the image and video processor."""
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    common = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen3VLProcessor",
    }
    images = {"size": {"shortest_edge": 1024, "longest_edge": 32 * 1024}}
    videos = {"size": {"shortest_edge": 1024, "longest_edge": 96 * 1024}}
    images |= {**common, "image_processor_type": "Qwen2VLImageProcessorFast"}
    videos |= {**common, "video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))


def frames(count: int, width: int = 96, height: int = 64, seed: int = 7) -> list[Any]:
    """The frames of a video whose size needs no resize."""
    return [support.picture(width, height, seed + i) for i in range(count)]


def video_text(grid: tuple[int, int, int], frame_times: list[float]) -> str:
    """What transformers' processor writes for a video, of frames at these times."""
    timed = types.SimpleNamespace(fps=1.0, frames_indices=list(frame_times))
    processor = types.SimpleNamespace(
        video_processor=types.SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=lambda *given: Qwen3VLProcessor._calculate_timestamps(None, *given),
    )
    inputs = {"video_grid_thw": np.array([grid]), "video_metadata": [timed]}
    return Qwen3VLProcessor.replace_video_token(processor, inputs, 0)


def inputs_of(tiny: Tiny, example: dict[str, Any], *, generation_prompt: bool = False) -> dict[str, Any]:
    """What transformers' processors give for an example; frames are not resized, and two of them a second."""
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    text = tokenizer.apply_chat_template(
        support.chat_messages(example), tokenize=False, add_generation_prompt=generation_prompt
    )
    result: dict[str, Any] = {}
    if example.get("images"):
        media = Qwen2VLImageProcessorPil.from_pretrained(str(tiny.folder))(example["images"], return_tensors="pt")
        result |= {"pixel_values": media["pixel_values"], "image_grid_thw": media["image_grid_thw"]}
        pads = iter(["<|image_pad|>" * (int(grid.prod()) // 4) for grid in media["image_grid_thw"]])
        text = re.sub(re.escape("<|image_pad|>"), lambda _: next(pads), text)
    if example.get("videos"):
        pixels, grids = [], []
        for video in example["videos"]:
            values = torch.from_numpy(np.stack([np.asarray(frame) for frame in video])).permute(0, 3, 1, 2)[None]
            values = (values.float() / 255 - 0.5) / 0.5
            patches, *grid = Qwen3VLVideoProcessor.patchify(None, values, 16, 2, 2)
            pixels.append(patches[0])
            grids.append(tuple(grid))
            text = text.replace(VIDEO, video_text(tuple(grid), [n / 2 for n in range(len(video))]), 1)
        result |= {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
    ids = tokenizer(text, return_tensors="np")["input_ids"]
    kinds = (ids == tiny.config["image_token_id"]) + 2 * (ids == tiny.config["video_token_id"])
    return {
        **result,
        "input_ids": torch.from_numpy(ids),
        "mm_token_type_ids": torch.from_numpy(kinds.astype(np.int32)),
    }
