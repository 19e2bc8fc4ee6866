"""Pairs of answers about coloured pictures, and a small model for them."""

from __future__ import annotations

import json
from pathlib import Path

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
