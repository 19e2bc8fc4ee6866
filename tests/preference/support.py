"""Pairs of answers about coloured pictures, and a small model for them."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jvlm.models import vlm
from tests.support import make_tokenizer
from tests.training.support import COLOURS, write_examples


def write_pairs(folder: Path, count: int = 12) -> Path:
    """A JSONL of pairs in ms-swift's format; of three, the first has no picture, the last two."""
    examples = [json.loads(line) for line in write_examples(folder, count).read_text().splitlines()]
    lines = []
    for number, example in enumerate(examples):
        question, answer = example["messages"][:2]
        wrong = [name for name in COLOURS if name not in answer["content"]][number % 2]
        lines.append({**example, "messages": [question, answer], "rejected_response": f"it is {wrong}"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_labels(folder: Path, count: int = 12) -> Path:
    """A JSONL of answers with a label: good ones, and every other one a bad one."""
    lines = []
    for number, line in enumerate(write_pairs(folder, count).read_text().splitlines()):
        example = json.loads(line)
        wrong = example.pop("rejected_response")
        if number % 2:
            example["messages"][1]["content"] = wrong
        lines.append({**example, "label": not number % 2})
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def moved(model, scale=0.02):
    """Values of another model of the same shape, by path."""
    rng = np.random.default_rng(1)
    values = {path: v.get_value() for path, v in vlm.variables(model).items()}
    return {
        path: value + scale * jnp.asarray(rng.standard_normal(value.shape), value.dtype)
        for path, value in values.items()
    }


# Without the usual line break after a turn: TRL counts it as a token of the answer, and here answers end before it.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_text_model(folder: Path, seed: int) -> Path:
    """A small Qwen2 with random weights, as transformers writes it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    make_tokenizer(folder, chat_template=TEMPLATE)
    Qwen2ForCausalLM(config).save_pretrained(str(folder))
    return folder
