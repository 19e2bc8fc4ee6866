"""Examples to prepare: pages, photos and texts, some of them twice."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.support import GOLDEN, picture

_WORDS = [f"word{i}" for i in range(400)]


def chat(question: str, answer: str, images: Sequence[str] = ()) -> dict:
    content = "<image>" * len(images) + question
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"images": list(images)} if images else {})}


def page(path: Path, words: str, scale: float = 1.0) -> None:
    """A page of one template with other words."""
    image = Image.new("RGB", (400, 560), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 20, 380, 60), fill=(30, 60, 120))
    for line in range(20):
        draw.text(
            (30, 80 + 22 * line),
            words if line == 7 else f"line {line} of the form",
            "black",
            ImageFont.load_default(16),
        )
    image.resize((round(400 * scale), round(560 * scale)), Image.Resampling.LANCZOS).save(path)


def text(seed: int, count: int = 120) -> str:
    return " ".join(random.Random(seed).choices(_WORDS, k=count))


def write_pages(path: Path, count: int) -> None:
    """A PDF file of so many pages, each with its number."""
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with PdfPages(path) as writer:
        for page in range(count):
            figure = Figure(figsize=(3, 3))
            figure.text(0.1, 0.5, f"page {page + 1}")
            writer.savefig(figure)


@pytest.fixture(scope="package")
def examples(tmp_path_factory) -> Path:
    """A JSONL file; the tests know which lines are duplicates of which."""
    folder = tmp_path_factory.mktemp("prepare")
    with Image.open(GOLDEN / "photos" / "skimage_coffee.png") as photo:
        photo.convert("RGB").save(folder / "coffee.png")
        photo.convert("RGB").save(folder / "coffee.jpg", quality=60)
    picture(300, 200, seed=3).save(folder / "smooth.png")
    page(folder / "a.png", "total 41.20")
    page(folder / "a_small.png", "total 41.20", 0.8)
    page(folder / "b.png", "chapter six")
    near = text(1).split()
    near[60] = "other"
    rows = [
        chat("What is it?", "A cup.", ["coffee.png"]),  # 0
        chat("What is it?", "A cup.", ["coffee.jpg"]),  # 1: near of 0
        chat("How hot?", "Very.", ["coffee.png"]),  # 2: near_images of 0
        chat("Read it.", "41.20", ["a.png"]),  # 3
        chat("Read it.", "41.20", ["b.png"]),  # 4: another page of the template
        chat("read it", "41.20", ["a_small.png"]),  # 5: near of 3
        chat("?", text(1)),  # 6
        chat("?", " ".join(near)),  # 7: near_text of 6
        chat("?", text(2)),  # 8
        chat("?", text(1)),  # 9: equal to 6
        chat("What is it?", "A cup.", ["coffee.png"]),  # 10: equal to 0
        chat("Smooth?", "Yes.", ["smooth.png"]),  # 11
        chat("Compare.", "Alike.", ["coffee.png", "a.png"]),  # 12
        chat("Compare.", "Alike.", ["coffee.jpg", "a_small.png"]),  # 13: near of 12
        chat("Compare.", "Alike.", ["coffee.jpg", "b.png"]),  # 14: the second image is another
    ]
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
