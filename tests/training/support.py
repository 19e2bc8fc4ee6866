"""A small experiment on the demo's tokenizer and pictures made here."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jvlm import configs
from jvlm.training.config import Experiment

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def write_examples(folder: Path, count: int = 24, *, alike: bool = False) -> Path:
    """A JSONL of conversations about coloured pictures of several sizes; some have no picture, some two.

    With ``alike`` all are the same one: what is learnt then does not depend on their order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    examples = []
    for index in range(count):
        images, tags, said = [], "", []
        for _ in range(1 if alike else index % 3):
            colour = names[0 if alike else int(rng.integers(len(names)))]
            size = (32, 48) if alike else (int(rng.integers(24, 60)), int(rng.integers(24, 60)))
            Image.new("RGB", size, COLOURS[colour]).save(folder / f"{index}_{len(images)}.png")
            images.append(f"{index}_{len(images)}.png")
            tags += "<image>"
            said.append(colour)
        messages = [
            {"role": "user", "content": f"{tags}what color is the shape?"},
            {"role": "assistant", "content": " ".join(said) or "no"},
            {"role": "user", "content": "is there a red shape?"},
            {"role": "assistant", "content": "yes" if "red" in said else "no"},
        ]
        examples.append({"messages": messages, "images": images})
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def experiment(folder: Path, examples: Path, *overrides: str, **changes: Any) -> Experiment:
    """The demo's experiment, small and without stages, on ``examples``, with its run under ``folder``."""
    result = _parsed(overrides)
    if result.output_root == FOLDER:
        result = dataclasses.replace(result, output_root=str(folder))
    if result.data.train == (EXAMPLES,):
        result = dataclasses.replace(result, data=dataclasses.replace(result.data, train=(str(examples),)))
    return dataclasses.replace(result, **{"stages": (), **changes})


FOLDER, EXAMPLES = "the folder", "the examples.jsonl"


@functools.cache
def _parsed(overrides: tuple[str, ...]) -> Experiment:
    """The experiment of the command line, with placeholders for the two paths; a parse takes a third of a second."""
    fields = {
        "--name": "run",
        "--output_root": FOLDER,
        "--data.train": EXAMPLES,
        "--data.batch_size": "2",
        "--data.seq_len": "192",
        "--data.max_patches": "192",
        "--data.pack_window": "6",
        "--processor.image.min_pixels": "1024",
        "--model.encoder.hidden_size": "32",
        "--model.encoder.num_heads": "2",
        "--model.encoder.intermediate_size": "48",
        "--model.decoder.hidden_size": "32",
        "--model.decoder.num_heads": "2",
        "--model.decoder.num_kv_heads": "1",
        "--model.decoder.intermediate_size": "48",
        "--steps": "8",
        "--log_interval_steps": "1",
        "--checkpoint.save_interval_steps": "3",
        "--evaluation.aim": "None",
        "--evaluation.aim_iou": "None",
    }
    arguments = [value for pair in fields.items() for value in pair]
    arguments += ["--model.decoder.mrope_section", "2", "3", "3", "--evaluation.data"]
    return configs.load("mimo_vl/easy_vqa", [*arguments, *overrides])


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss of a run's log."""
    lines = (folder / "run" / "logging.jsonl").read_text().splitlines()
    return {line["step_number"]: line["loss"] for line in map(json.loads, lines)}
