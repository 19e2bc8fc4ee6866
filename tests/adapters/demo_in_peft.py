"""A fine-tune of the demo's model on held-out photos, in transformers + PEFT: greedy answers, token by token.

python -m tests.adapters.demo_in_peft [--base FOLDER] [--run FOLDER]: of what `make demo-finetune` has trained.
`every_peft` does the same with random weights.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import jvlm
from jvlm.data.example_source import ExampleSource
from jvlm.inference import token_rules
from tests.support import ROOT
from tests.weights.every_transformers import packages

PHOTOS = ROOT / "configs/finetune/white_cells_data/test.arrayrecord"
LIMIT = 48
# the run's own limit of pixels is that of its base
READER = "export-peft export-pixels"


def photos(count: int) -> tuple[str, list[Image.Image]]:
    """(the question, held-out photos)."""
    source = ExampleSource((str(PHOTOS),))
    examples = [source[index][1] for index in range(count)]
    (question,) = {example["messages"][0]["content"].removeprefix("<image>") for example in examples}
    return question, [Image.open(io.BytesIO(example["images"][0]["bytes"])).convert("RGB") for example in examples]


def answers(model, processor, question: str, images: list[Image.Image]) -> list[list[int]]:
    """Ids of jvlm's greedy answers, with the token that ends them."""
    ids: list[list[int]] = [[] for _ in images]
    rows = [{"messages": [{"role": "user", "content": f"<image>{question}"}], "images": [image]} for image in images]

    def add(index: int, token: int) -> None:
        ids[index].append(token)

    jvlm.generate(model, processor, rows, on_token=add, max_new_tokens=LIMIT, batch_size=len(rows))
    return ids


def compared(base: Path, adapter: Path, merged: Path, count: int = 24) -> dict[str, list[list[int]]]:
    """Answers by who gave them: "base", "adapter" and "merged" in jvlm, and in transformers with PEFT where needed."""
    question, images = photos(count)
    loaded = {"base": jvlm.load(base), "adapter": jvlm.load(base, adapter=adapter), "merged": jvlm.load(merged)}
    result = {f"jvlm {name}": answers(*pair, question, images) for name, pair in loaded.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}.png" for number in range(count)]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        request = {
            "cases": [
                {"base": str(base), "adapter": None},
                {"base": str(base), "adapter": str(adapter)},
                {"base": str(merged), "adapter": None},
            ],
            "messages": [{"role": "user", "content": content}],
            "images": paths,
            "max_new_tokens": LIMIT,
            # jvlm's engine never gives the token of an image or video, which random weights may well find likeliest
            "never": np.flatnonzero(token_rules.never_given(loaded["base"][0].config, loaded["base"][1])[0]).tolist(),
        }
        (Path(folder) / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "tests.adapters.answer_in_peft", f"{folder}/request.json"]
        done = subprocess.run(
            command, cwd=ROOT, env=packages(READER), capture_output=True, text=True, timeout=1800, check=False
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found = json.loads(done.stdout.splitlines()[-1])
    processor = loaded["base"][1]
    row = {"messages": [{"role": "user", "content": f"<image>{question}"}], "images": images[:1]}
    prompt = processor.encode(row, generation_prompt=True).tokens.tolist()
    if any(other != prompt for other in found["prompts"]):
        raise RuntimeError(f"prompts differ: {prompt} and {found['prompts'][0]}")
    names = ("transformers base", "PEFT adapter", "transformers merged")
    return result | dict(zip(names, found["answers"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/easy_vqa/hf"))
    parser.add_argument("--run", type=Path, default=Path("runs/white_cells"))
    parser.add_argument("--count", type=int, default=24, help="held-out photos")
    options = parser.parse_args()
    found = compared(options.base, options.run / "adapter", options.run / "hf", options.count)
    for name, ids in found.items():
        ours = found["jvlm base" if name.endswith("base") else "jvlm adapter"]
        same = sum(a == b for a, b in zip(ids, ours, strict=True))
        print(f"{name:<20} {same} of {len(ids)} answers, {sum(map(len, ids))} tokens, as jvlm's")


if __name__ == "__main__":
    main()
