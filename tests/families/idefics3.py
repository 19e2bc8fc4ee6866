"""Random small checkpoints of Idefics3 and SmolVLM2, in transformers and in jvlm."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm

import jvlm
from tests import support
from tests.families import oracle

CLASSES = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
FAKE, IMAGE, GLOBAL, END = "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"
CELLS = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
# SmolVLM's tokenizers have a token for each place; Idefics3's spells places out
SPECIAL = {
    "idefics3": ("<|begin_of_text|>", "<|end_of_text|>", FAKE, IMAGE, END),
    "smolvlm": ("<|im_start|>", "<|im_end|>", FAKE, IMAGE, END, GLOBAL, *CELLS),
}
TILE, PATCH, LONGEST, TOKENS = 60, 14, 180, 4
# as the published folders have it: without videos
TEMPLATE = (
    "{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
NUMBERS = {3: "three", 4: "four", 21: "twenty-one"}


def config(kind: str, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a small model."""
    begin, end = SPECIAL[kind][:2]
    return {
        "architectures": [CLASSES[kind][1].__name__],
        "model_type": kind,
        "image_token_id": ids[IMAGE],
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": f"{kind}_vision",
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 352,
            "hidden_size": 64,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "max_position_embeddings": 4096,
            "bos_token_id": ids[begin],
            "eos_token_id": ids[end],
            "pad_token_id": ids[end],
        },
    }


def create(folder: Path, kind: str) -> support.Tiny:
    """Write a checkpoint as released ones are, and load it with jvlm."""
    begin, end = SPECIAL[kind][:2]
    tokenizer = support.make_tokenizer(
        folder, SPECIAL[kind], bos_token=begin, eos_token=end, pad_token=end, chat_template=begin + TEMPLATE
    )
    values = config(kind, support.token_ids(tokenizer))
    config_type, model_type = CLASSES[kind]
    model = model_type(config_type(**values)).eval()
    oracle.randomise(model)
    model.save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").unlink(missing_ok=True)
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    preprocessor = {
        "do_image_splitting": True,
        "image_processor_type": f"{name}ImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "max_image_size": {"longest_edge": TILE},
        "processor_class": f"{name}Processor",
        "resample": 1,
        "size": {"longest_edge": LONGEST},
    }
    if kind == "smolvlm":
        preprocessor["video_sampling"] = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": LONGEST}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    processor = {"image_seq_len": TOKENS, "processor_class": f"{name}Processor"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return support.Tiny(folder, values, model, *jvlm.load(folder))


def image_processor(folder: Path) -> Idefics3ImageProcessorPil:
    """transformers' image processor of a folder, in its form without torchvision; SmolVLM's is the same code."""
    return Idefics3ImageProcessorPil.from_pretrained(str(folder))


def video_text(count: int, rate: float) -> str:
    """What SmolVLM's processor writes for a video of frames at a rate."""
    times = [number / rate for number in range(count)]
    metadata = types.SimpleNamespace(fps=rate, timestamps=times, duration=count / rate)
    stub = types.SimpleNamespace(
        image_seq_len=TOKENS, image_token=IMAGE, fake_image_token=FAKE, global_image_token=GLOBAL
    )
    processing_smolvlm.num2words = NUMBERS.__getitem__
    inputs = {"pixel_values": np.zeros((1, count)), "video_metadata": [metadata]}
    return processing_smolvlm.SmolVLMProcessor.replace_video_token(stub, inputs, 0)


def inputs_of(tiny: support.Tiny, example: dict[str, Any], *, generation_prompt: bool = False) -> dict[str, Any]:
    """What transformers' processors give for an example; a video has one frame a second."""
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    videos = example.get("videos") or []
    template = processing_smolvlm.DEFAULT_CHAT_TEMPLATE if videos else tokenizer.chat_template
    text = tokenizer.apply_chat_template(
        support.chat_messages(example),
        chat_template=template,
        tokenize=False,
        add_generation_prompt=generation_prompt,
    )
    result: dict[str, Any] = {}
    pixels = []
    if example.get("images"):
        options = {"return_row_col_info": True, "return_tensors": "pt"}
        media = image_processor(tiny.folder)([example["images"]], **options)
        pixels.append(media["pixel_values"])
        grids = zip(media["rows"][0], media["cols"][0], strict=True)
        tags = (FAKE, IMAGE, GLOBAL)
        texts = iter([processing_smolvlm.get_image_prompt_string(*grid, TOKENS, *tags) for grid in grids])
        text = re.sub(IMAGE, lambda _: next(texts), text)
    for frames in videos:
        media = image_processor(tiny.folder)([list(frames)], do_image_splitting=False, return_tensors="pt")
        pixels.append(media["pixel_values"])
        text = text.replace("<video>", video_text(len(frames), 1.0), 1)
    if pixels:
        result["pixel_values"] = torch.cat(pixels, 1)
    ids = tokenizer(text, return_tensors="np", add_special_tokens=False)["input_ids"]
    return {**result, "input_ids": torch.from_numpy(ids)}
