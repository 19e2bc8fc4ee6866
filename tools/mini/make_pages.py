"""Make the web pages of the papers in miniature: 64 x 64 pixels, drawn by Chromium, with the boxes of its own layout.

    python -m tools.mini.make_pages configs/mini/data

Each is an HTML file of coloured buttons below a bar; the question is for one of them, and the answer its middle.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from jvlm.data.errors import Origin
from jvlm.data.prepare.render.page import Browser
from jvlm.data.readers.array_record import SHARD_SUFFIX, write_shard
from tools.make_easy_vqa import COLOURS
from tools.mini.drawing import SIDE, as_bytes
from tools.mini.examples import Example, asked, pointed
from tools.mini.make_data import generator, identity

COUNTS = {"test": 150, "train": 2000}
_KINDS = {"button": "border-radius:1px", "switch": "border-radius:9px"}


def html(rng: np.random.Generator) -> str:
    """Return a page of two to four elements in rows, each of a colour of its own."""
    names = [(colour, kind) for colour in COLOURS for kind in _KINDS]
    chosen = [names[i] for i in rng.permutation(len(names))[: int(rng.integers(2, 5))]]
    bar, ground = (f"rgb({','.join(map(str, rng.integers(low, 256, 3)))})" for low in (120, 215))
    parts = []
    for colour, kind in chosen:
        width, height = int(rng.integers(14, 27)), int(rng.integers(8, 15))
        margin = f"{int(rng.integers(1, 5))}px {int(rng.integers(1, 9))}px"
        style = f"background:{colour};width:{width}px;height:{height}px;margin:{margin};{_KINDS[kind]}"
        parts.append(f'<div role="{kind}" aria-label="{colour} {kind}" style="{style}"></div>')
    body = f"margin:0;background:{ground};display:flex;flex-wrap:wrap;align-content:flex-start"
    head = f'<div style="width:100%;height:{int(rng.integers(4, 10))}px;background:{bar}"></div>'
    return f'<!doctype html><html><body style="{body}">{head}{"".join(parts)}</body></html>'


def pages(browser: Browser, split: str, taken: set[bytes], seed: int = 0) -> Iterator[Example]:
    """Yield questions about pages, one each."""
    number = made = 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        while made < COUNTS[split]:
            rng = generator(seed, "gui", split, number)
            number += 1
            file.write_text(html(rng))
            scene = browser.scene(file, rng, Origin(str(file), 1), viewport=(SIDE, SIDE))
            if not scene.regions:
                continue
            chosen = scene.regions[int(rng.integers(len(scene.regions)))]
            box = [round(value) for value in chosen.box]
            middle = [(box[0] + box[2]) // 2, (box[1] + box[3]) // 2]
            image = _opened(scene.image)
            turn = f"click the {chosen.text}.", pointed(chosen.text)
            example = asked([image], turn, objects={"bbox": [middle]}, gold=[box], task="gui")
            marks = identity(example)
            if marks & taken:
                continue
            if split == "test":
                taken |= marks
            made += 1
            yield example | {"id": f"gui-{split}-{number}"}


def _opened(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as opened:
        return as_bytes(opened.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--browser", help="Chromium's file; without it one is looked for on the path")
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    browser, taken = Browser(options.browser), set()
    for split in COUNTS:
        path = options.target / f"{split}_gui{SHARD_SUFFIX}"
        print(path, write_shard(path, pages(browser, split, taken)))
    browser.close()


if __name__ == "__main__":
    main()
