"""The models and conversations of the GPU pass: published shapes with random weights, synthetic images and text."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

from jvlm import families
from jvlm.data import packing
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig

# any tokenizer with the special tokens will do: its ids are the first few hundred of the model's vocabulary
TOKENIZER = Path(__file__).resolve().parents[2] / "configs/mimo_vl/easy_vqa_data/tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what defines the work, so that two programs given the same options do the same."""
    parser.add_argument("--preset", default="qwen2_5_vl_7b")
    parser.add_argument("--layers", type=int, help="decoder layers; None is all")
    parser.add_argument("--tokens", type=int, default=8192, help="of a packed sequence")
    parser.add_argument("--patches", type=int, default=12288)
    parser.add_argument("--rows", type=int, default=1, help="packed sequences of a batch")
    parser.add_argument("--largest", type=int, default=896, help="side of the largest images, in pixels")
    parser.add_argument("--remat", default="dots", help="what jvlm recomputes; torch checkpoints whole layers")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--params", default="float32", help="dtype of the parameters")
    parser.add_argument("--small", action="store_true", help="a small model for a rehearsal on CPU")


def workload(arguments: argparse.Namespace, precision: Precision) -> tuple[VLMConfig, Processor, list[list[Example]]]:
    """Return the model's configuration, its processor, and the conversations of each packed sequence."""
    if arguments.small:
        arguments.layers, arguments.tokens, arguments.patches, arguments.largest = 2, 1024, 2048, 224
    config = model_config(arguments.preset, arguments.layers, precision, arguments.small)
    processor = processor_of(config)
    sizes = arguments.tokens, arguments.patches, arguments.largest
    return config, processor, fill_sequences(processor, arguments.rows, *sizes)


def model_config(preset: str, layers: int | None, precision: Precision, small: bool) -> VLMConfig:
    """Return a published shape with so many decoder layers (None: all); ``small`` shrinks it for a rehearsal on CPU."""
    config = families.preset(preset)
    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
    }
    ids["image_token_id"], ids["video_token_id"] = ids.pop("image_pad_token_id"), ids.pop("video_pad_token_id")
    decoder, encoder = config.decoder, config.encoder
    if layers is not None:
        decoder = dataclasses.replace(decoder, num_layers=layers)
    if small:
        decoder = dataclasses.replace(
            decoder, hidden_size=256, num_heads=4, num_kv_heads=2, intermediate_size=512, vocab_size=2048,
            mrope_section=(8, 12, 12),
        )  # fmt: skip
        encoder = dataclasses.replace(
            encoder, depth=4, hidden_size=128, num_heads=4, intermediate_size=256, fullatt_block_indexes=(3,)
        )
    return dataclasses.replace(
        config,
        **ids,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        decoder=decoder,
        encoder=encoder,
        precision=precision,
    )


def processor_of(config: VLMConfig) -> Processor:
    """Return the processor of such a model."""
    return Processor(AutoTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True), config)


def conversation(rng: np.random.Generator, largest: int) -> dict[str, Any]:
    """Return a question about one or two images of up to ``largest`` pixels a side, and about as long an answer."""
    sizes = [28 * rng.integers(largest // 56, largest // 28 + 1, 2) for _ in range(rng.integers(1, 3))]
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]
    question = "<image>" * len(images) + "what is in the image? " * int(rng.integers(2, 12))
    vision_tokens = sum(int(w * h) // 28**2 for w, h in sizes)
    answer = "there is a red shape in the image. " * int(vision_tokens * rng.uniform(0.05, 0.2))
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": images,
    }


def fill_sequences(processor: Processor, rows: int, tokens: int, patches: int, largest: int) -> list[list[Example]]:
    """Return the conversations of packed sequences, packed as training packs a window of its data.

    They are the fullest ``rows`` of a window eight times as large, since the last of a window are those left over.
    """
    rng, examples, windows = np.random.default_rng(0), [], 8 * rows
    while (
        sum(e.length for e in examples) < windows * tokens and sum(e.num_patches for e in examples) < windows * patches
    ):
        examples.append(processor.encode(conversation(rng, largest)))
    sequences = [[examples[i] for i in packed] for packed in packing.best_fit(examples, tokens, patches)]
    return sorted(sequences, key=lambda sequence: -sum(e.length for e in sequence))[:rows]
