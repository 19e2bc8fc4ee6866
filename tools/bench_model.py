"""The model, the conversations and the inputs of both sides that the parts of the bench share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from jvlm.data import packing
from jvlm.data.packing import Example
from jvlm.data.processor import Processor

TOKENIZER = Path(__file__).parents[1] / "configs/mimo_vl/easy_vqa_data/tokenizer"
VOCABULARY = 16384


def make_checkpoint(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """Return a random model in a Hugging Face folder, and the same in torch."""
    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER))
    # a word for every id of the model: jvlm never emits an id without one, transformers does
    tokenizer.add_tokens([f"<|word_{i}|>" for i in range(len(tokenizer), VOCABULARY)])
    ids = {t: tokenizer.convert_tokens_to_ids(f"<|{t}|>") for t in ("image_pad", "video_pad", "vision_start", "im_end")}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 8,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_heads": 4,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [3, 7],
            "tokens_per_second": 2,
        },
        tie_word_embeddings=True,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_start"] + 1,
        eos_token_id=ids["im_end"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return model


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of 20 to 200 words about zero to two images of 84 to 336 pixels."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        sizes = [tuple(28 * rng.integers(3, 13, 2)) for _ in range(index % 3)]
        images = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]
        words = "is there a red shape in the image? " * int(rng.integers(2, 24))
        messages = [
            {"role": "user", "content": "<image>" * len(images) + words},
            {"role": "assistant", "content": "yes, " * int(rng.integers(4, 40))},
        ]
        examples.append({"messages": messages, "images": images})
    return examples


def filled(examples: list[Example], processor: Processor) -> dict[str, int]:
    """Return the shape of a sequence that the examples fill, as training's packing fills those of its config."""
    step = packing.patch_step(processor.image_processor.patch_group, 128)
    patches = sum(e.num_patches for e in examples)
    return {"seq_len": -(-sum(e.length for e in examples) // 64) * 64, "max_patches": -(-patches // step) * step}


def torch_inputs(examples: list[Example], processor: Processor) -> dict[str, torch.Tensor]:
    """Return the same conversations as transformers wants them: left-padded, pixels normalised, explicit positions."""
    longest = max(e.length for e in examples)
    tokens = np.full((len(examples), longest), processor.tokenizer.pad_token_id, np.int64)
    mask = np.zeros_like(tokens)
    labels = np.full_like(tokens, -100)
    positions = np.ones((3, *tokens.shape), np.int64)
    encoder = processor.model.encoder
    unit = encoder.patch_size * encoder.spatial_merge_size
    mean = np.repeat(np.float32(encoder.image_mean), encoder.patch_values // 3)
    std = np.repeat(np.float32(encoder.image_std), encoder.patch_values // 3)
    pixels, grids = [], []
    for record, example in enumerate(examples):
        span = slice(longest - example.length, longest)
        tokens[record, span], mask[record, span] = example.tokens, 1
        labels[record, span] = np.where(example.loss_weights > 0, example.tokens, -100)
        positions[:, record, span] = example.positions.T
        index = example.vision_index[example.vision_index >= 0]
        cells = example.patches.reshape(-1, 4, encoder.patch_values)[index]
        pixels.append((cells.reshape(-1, encoder.patch_values).astype(np.float32) / 255 - mean) / std)
        grids += [[1, 2 * (h // unit), 2 * (w // unit)] for _, (w, h) in example.sizes]
    result = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "labels": labels}
    if grids:
        result |= {"pixel_values": np.concatenate(pixels), "image_grid_thw": np.asarray(grids)}
    result["mm_token_type_ids"] = (tokens == processor.model.image_token_id).astype(np.int64)
    return {name: torch.from_numpy(value) for name, value in result.items()}
