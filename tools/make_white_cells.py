"""Build the shards of `make demo-finetune`: where is the white cell in a microscope photo?

    python tools/make_white_cells.py bccd_train bccd_val configs/finetune/white_cells_data

Photos and boxes are of the BCCD set (https://github.com/Shenggan/BCCD_Dataset, MIT): each folder's ``data.jsonl`` has
a line for each photo, with ``image``, ``width``, ``height`` and ``objects`` of ``label`` and ``box``. Photos with
exactly one white cell are used. Each gives square crops that hold the whole cell, turned and mirrored, as small as the
demo's images; no photo is in both files.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from jvlm.data.readers.array_record import SHARD_SUFFIX, write_shard

SIDE = 64
QUESTION = "where is the white cell?"
ANSWER = '```json\n[{"bbox_2d": <bbox>, "label": "white cell"}]\n```'
# Crops of a training photo; a test photo has one, upright.
CROPS = 8
SMALLEST, LARGEST = 320, 480
TURNS = (None, *Image.Transpose)


def examples(folder: Path, *, crops: int) -> Iterator[dict]:
    """Yield the examples of a folder, ``crops`` for each photo with one white cell."""
    for line in (folder / "data.jsonl").read_text().splitlines():
        record = json.loads(line)
        boxes = [o["box"] for o in record["objects"] if o["label"] == "WBC"]
        if len(boxes) != 1:
            continue
        photo = Image.open(folder / record["image"]).convert("RGB")
        name = Path(record["image"]).stem
        for number in range(crops):
            draw = random.Random(f"{name}/{number}")
            turn = None if crops == 1 else draw.choice(TURNS)
            image, box = crop(photo, boxes[0], draw, turn)
            yield {
                "id": f"{name}-{number}",
                "messages": [
                    {"role": "user", "content": f"<image>{QUESTION}"},
                    {"role": "assistant", "content": ANSWER},
                ],
                "images": [{"bytes": as_webp(image), "path": f"{name}-{number}.webp"}],
                "objects": {"bbox": [box]},
            }


def crop(
    photo: Image.Image, box: list[int], draw: random.Random, turn: Image.Transpose | None
) -> tuple[Image.Image, list[int]]:
    """Return a square crop of random size and place around a box, and the box in it, both turned."""
    x1, y1, x2, y2 = box
    side = draw.randint(min(max(SMALLEST, x2 - x1, y2 - y1), LARGEST), LARGEST)
    left = draw.randint(max(0, x2 - side), min(x1, photo.width - side))
    top = draw.randint(max(0, y2 - side), min(y1, photo.height - side))
    image = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    corners = [(x - left) * SIDE / side for x in (x1, x2)], [(y - top) * SIDE / side for y in (y1, y2)]
    if turn is not None:
        image = image.transpose(turn)
        corners = turned(*corners, turn)
    (x1, x2), (y1, y2) = map(sorted, corners)
    return image, [round(x1), round(y1), round(x2), round(y2)]


def turned(xs: list[float], ys: list[float], turn: Image.Transpose) -> tuple[list[float], list[float]]:
    """Return coordinates after a transposition of the image."""
    mirrored = {"x": [SIDE - x for x in xs], "y": [SIDE - y for y in ys]}
    match turn:
        case Image.Transpose.FLIP_LEFT_RIGHT:
            return mirrored["x"], ys
        case Image.Transpose.FLIP_TOP_BOTTOM:
            return xs, mirrored["y"]
        case Image.Transpose.ROTATE_180:
            return mirrored["x"], mirrored["y"]
        case Image.Transpose.ROTATE_90:  # counter-clockwise
            return ys, mirrored["x"]
        case Image.Transpose.ROTATE_270:
            return mirrored["y"], xs
        case Image.Transpose.TRANSPOSE:
            return ys, xs
        case Image.Transpose.TRANSVERSE:
            return mirrored["y"], mirrored["x"]


def as_webp(image: Image.Image) -> bytes:
    """Return the image in about 1.5 kB."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85, method=6)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    for name, folder, crops in (("train", arguments.train, CROPS), ("test", arguments.test, 1)):
        path = arguments.target / f"{name}{SHARD_SUFFIX}"
        print(name, write_shard(path, examples(folder, crops=crops)), "images")


if __name__ == "__main__":
    main()
