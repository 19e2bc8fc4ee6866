"""Examples that cost the data pipeline what real ones do: drawn receipts and photos, lines of text, and plain text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORDS = "total cash tax invoice table white milk bread 12.50 3.00 change thank you card number date item gross".split()


def receipt(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Return a scan of about 0.8 megapixels with 30 lines of text, and the text."""
    width, height = int(rng.integers(560, 760)), int(rng.integers(1000, 1300))
    paper = rng.normal(235, 6, (height, width, 1)) + rng.normal(0, 2, (height, width, 3))
    image = Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8))
    draw, font, lines = ImageDraw.Draw(image), ImageFont.load_default(size=22), []
    for y in range(40, height - 60, (height - 100) // 30):
        lines.append(_sentence(rng, 5))
        draw.text((40, y), lines[-1], fill=(40, 40, 50), font=font)
    return image, "\n".join(lines)


def photo(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Return a picture of about 0.3 megapixels with colours that change smoothly and edges, and a sentence."""
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    image = small.resize((640, 480), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, size = int(rng.integers(0, 600)), int(rng.integers(0, 440)), int(rng.integers(20, 160))
        draw.ellipse((x, y, x + size, y + size), fill=tuple(map(int, rng.integers(0, 256, 3))))
    image = image.filter(ImageFilter.GaussianBlur(1))
    noisy = np.asarray(image, np.int16) + rng.normal(0, 4, (480, 640, 3)).astype(np.int16)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), _sentence(rng, 12)


def line(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Return a line of text of about 250 x 40 pixels, and the text."""
    text = _sentence(rng, 3)
    image = Image.new("RGB", (250, 40), (245, 245, 240))
    ImageDraw.Draw(image).text((6, 6), text, fill=(20, 20, 20), font=ImageFont.load_default(size=22))
    return image, text


def text(rng: np.random.Generator) -> tuple[None, str]:
    """Return an answer of 50 to 800 words without an image."""
    return None, _sentence(rng, int(rng.integers(50, 800)))


def tiny(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Return a picture of 32 to 64 pixels a side, and a word."""
    size = tuple(int(side) for side in rng.integers(32, 65, 2))
    return Image.new("RGB", size, tuple(map(int, rng.integers(0, 256, 3)))), _sentence(rng, 1)


def _sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), words))


Draw = Callable[[np.random.Generator], tuple[Image.Image | None, str]]


def examples(draw: Draw, count: int, seed: int = 0) -> Iterator[tuple[bytes | None, dict]]:
    """Yield (JPEG, record without its images) of so many examples."""
    for index in range(count):
        image, answer = draw(np.random.default_rng((seed, index)))
        tag = "" if image is None else "<image>"
        messages = [
            {"role": "user", "content": f"{tag}what does it say?"},
            {"role": "assistant", "content": answer},
        ]
        yield None if image is None else jpeg(image), {"messages": messages}


def jpeg(image: Image.Image) -> bytes:
    """Return an image as a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()


def write(folder: Path, name: str, draw: Draw, count: int) -> str:
    """Write examples as JSON lines with images beside them, and return the file."""
    images = folder / name
    images.mkdir(parents=True)
    path = folder / f"{name}.jsonl"
    with open(path, "w") as file:
        for index, (content, record) in enumerate(examples(draw, count)):
            if content is not None:
                (images / f"{index}.jpg").write_bytes(content)
                record["images"] = [f"{name}/{index}.jpg"]
            file.write(json.dumps(record) + "\n")
    return str(path)
