"""Make the data of the papers in miniature: shards of small pictures, words and films, the same from the same seed.

    python -m tools.mini.make_data mini_data
    python -m tools.mini.make_data mini_data --data FOLDER --share 0.05

For each kind of example `train_KIND.arrayrecord`, `validation_KIND.arrayrecord`, by which settings are chosen, and
`test_KIND.arrayrecord`, which is asked at the end; they share no picture and no film, nor question without one.
Questions of easy-VQA, white cells of BCCD and web pages come from the shards that the repository has; with ``--data``
drawings of openclipart and sentences of NLVR are taken from that folder too, in two parts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jvlm import configs
from jvlm.data.example_source import ExampleSource
from jvlm.data.readers.array_record import SHARD_SUFFIX, write_shard
from jvlm.errors import UserError
from tools.mini import examples
from tools.mini.examples import Example, Maker, asked

EASY_VQA = configs.FOLDER / "mimo_vl" / "easy_vqa_data"
WHITE_CELLS = configs.FOLDER / "finetune" / "white_cells_data"
PAGES = configs.FOLDER / "mini" / "data"
# kind -> (what makes one, how many to train on, how many of each part that is held out)
DRAWN: dict[str, tuple[Maker, int, int]] = {
    "captions": (examples.caption, 4000, 100),
    "interleaved": (examples.page, 1500, 100),
    "language": (examples.spoken, 6000, 100),
    "grounding": (examples.grounding, 8000, 150),
    "counting": (examples.counting, 6000, 150),
    "ocr": (examples.ocr, 6000, 150),
    "video": (examples.video, 3000, 150),
    "text": (examples.text, 4000, 150),
    "reasoning": (examples.reasoning, 4000, 150),
    "instruction": (examples.instruction, 4000, 80),
    "lines": (examples.lines, 4000, 150),
    "math": (examples.math, 2000, 100),
    "code": (examples.code, 2000, 100),
    "science": (examples.science, 2000, 100),
    "multi": (examples.multi, 2000, 100),
    "high_resolution": (examples.high_resolution, 2000, 100),
    "long_documents": (examples.long_document, 2000, 100),
    "long_text": (examples.long_text, 2000, 100),
    "long_video": (examples.long_video, 2000, 100),
    "long_reasoning": (examples.long_reasoning, 2000, 100),
    "dialogue": (examples.dialogue, 3000, 50),
    "descriptions": (examples.description, 3000, 100),
}
HELD_OUT = ("test", "validation")
_MOST_TESTED = 100  # pictures of easy-VQA's official test part that a kind is tested with
_TRIES = 200  # for one that is like none before


def generator(seed: int, kind: str, split: str, number: int) -> np.random.Generator:
    """Return the random numbers of one example, whatever else is made."""
    return np.random.default_rng((seed, zlib.crc32(f"{kind} {split}".encode()), number))


def identity(example: Example) -> set[str]:
    """Return what no other split may have: hashes of the pictures and of the film, or else of the words."""
    files = [image["bytes"] for image in example.get("images", ())]
    files += [block["image"]["bytes"] for block in example.get("document", ()) if block["type"] == "image"]
    films = [b"".join(frame["bytes"] for frame in video["video"]) for video in example.get("videos", ())]
    said = [block["text"] for block in example.get("document", ()) if block["type"] == "text"]
    words = json.dumps(example.get("messages") or said or example.get("text")).encode()
    return {hashlib.sha256(content).hexdigest() for content in [*files, *films] or [words]}


def drawn(seed: int, kind: str, split: str, count: int, taken: set[str]) -> Iterator[Example]:
    """Yield examples with nothing in common with ``taken``, to which those that are held out are added."""
    maker = DRAWN[kind][0]
    number = 0
    for _ in range(count):
        for _ in range(_TRIES):
            example = maker(generator(seed, kind, split, number))
            number += 1
            marks = identity(example)
            if not marks & taken:
                taken |= marks if split in HELD_OUT else set()
                break
        else:
            raise UserError(f"{_TRIES} examples of {kind} in a row were like others: ask for fewer than {count}")
        yield example | {"id": f"{kind}-{split}-{number}"}


def shard(path: Path, step: int = 1, most: int | None = None) -> Iterator[Example]:
    """Yield every ``step``-th record of a shard as it is, of the first ``most``."""
    source = ExampleSource([str(path)])
    for index in range(0, min(len(source), most or len(source)), step):
        yield source[index][1]


def _step(share: float) -> int:
    return max(round(1 / share), 1)


def _asked(share: float, count: int) -> int:
    """Return how many are asked of a kind that has so many."""
    return max(round(count * share), 5)


def questions(share: float) -> dict[str, Iterable[Example]]:
    """Return easy-VQA's questions: those of training as the demo asks them, of each picture held out its first four."""
    train = shard(EASY_VQA / f"questions{SHARD_SUFFIX}", _step(share))
    found: dict[str, Iterable[Example]] = {"train_qa": [{**one, "task": "qa"} for one in train if "objects" not in one]}
    for split, pictures in _pictures(_asked(share, 40)).items():
        asked_of = [_without_box(one["messages"])[:8] for one in pictures]
        rows = zip(pictures, asked_of, strict=True)
        found[f"{split}_qa"] = [{**one, "messages": messages, "objects": None, "task": "qa"} for one, messages in rows]
    return found


def _pictures(count: int) -> dict[str, list[Example]]:
    """Return, of easy-VQA's official test pictures, the first ``count`` to test with and others to choose by."""
    every = list(shard(EASY_VQA / f"test{SHARD_SUFFIX}", most=_MOST_TESTED + count))
    return {"test": every[:count], "validation": every[_MOST_TESTED:]}


def _without_box(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = [pair for pair in zip(messages[::2], messages[1::2], strict=True) if "<bbox>" not in pair[1]["content"]]
    return _with_image_first([dict(message) for pair in pairs for message in pair])


def _with_image_first(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the picture before the first of them."""
    plain = [{**message, "content": message["content"].removeprefix("<image>")} for message in messages]
    return [{**plain[0], "content": "<image>" + plain[0]["content"]}, *plain[1:]]


def places(share: float) -> dict[str, Iterable[Example]]:
    """Return easy-VQA's places and the white cells of BCCD, for grounding."""
    train = shard(EASY_VQA / f"where{SHARD_SUFFIX}", _step(share))
    found: dict[str, Iterable[Example]] = {"train_where": ({**one, "task": "where"} for one in train)}
    for split, pictures in _pictures(_asked(share, 100)).items():
        rows = []
        for one in pictures:
            pairs = zip(one["messages"][::2], one["messages"][1::2], strict=True)
            pair = next(pair for pair in pairs if "<bbox>" in pair[1]["content"])
            rows.append({**one, "messages": _with_image_first(list(pair)), "task": "where"})
        found[f"{split}_where"] = rows
    cells = _in_three("cells", WHITE_CELLS, "", share, 40)
    return found | {name: [{**one, "task": "cells"} for one in rows] for name, rows in cells.items()}


def web_pages(share: float) -> dict[str, Iterable[Example]]:
    """Return the shards of web pages, made by `tools.mini.make_pages`."""
    return _in_three("gui", PAGES, "_gui", share, 100)


def _in_three(kind: str, folder: Path, suffix: str, share: float, validation: int) -> dict[str, Iterable[Example]]:
    """Return two shards in three parts: the first examples of that of training are held out to choose settings by."""
    rows = list(shard(folder / f"train{suffix}{SHARD_SUFFIX}", _step(share)))
    held_out = rows[: _asked(share, validation)]
    marks = set().union(*map(identity, held_out))
    return {
        f"train_{kind}": [one for one in rows[len(held_out) :] if not identity(one) & marks],
        f"validation_{kind}": held_out,
        f"test_{kind}": shard(folder / f"test{suffix}{SHARD_SUFFIX}", _step(share)),
    }


def of_folder(folder: Path, share: float) -> dict[str, Iterable[Example]]:
    """Return what a folder of data has: titled drawings, sentences about pictures. One in ten is held out."""
    found: dict[str, list[Example]] = {}
    for name in ("openclipart", "nlvr_dev"):
        file = folder / name / "data.jsonl"
        if not file.exists():
            continue
        with open(file, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for number, row in enumerate(rows[:: _step(share)]):
            split = "test" if number % 10 == 0 else "train"
            image = _small(file.parent / row["image"])
            if name == "openclipart":
                example = {"text": f"<image>{row['title'].lower()}.", "images": [{"bytes": image, "path": None}]}
            else:
                judged = "yes" if row["label"] == "true" else "no"
                example = asked([image], (f"true? {row['sentence'].lower()}", judged), task="text")
            found.setdefault(f"{split}_{name.removesuffix('_dev')}", []).append(example)
    if not found:
        raise UserError(f"{folder} has neither openclipart/data.jsonl nor nlvr_dev/data.jsonl: leave --data out")
    return found


def _small(path: Path) -> bytes:
    """Return a picture of about 64 x 64 pixels, with its aspect, as a file."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = (64 * 64 / (image.width * image.height)) ** 0.5
    image = image.resize((max(round(image.width * scale), 16), max(round(image.height * scale), 16)))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90)
    return file.getvalue()


def make(
    target: Path,
    *,
    seed: int = 0,
    share: float = 1.0,
    data: Path | None = None,
    on_written: Callable[[str, int], None] = lambda name, count: None,
) -> dict[str, int]:
    """Write all shards. Returns file -> number of examples, which ``on_written`` is told as each is written."""
    target.mkdir(parents=True, exist_ok=True)
    written: dict[str, int] = {}

    def write(name: str, content: Iterable[Example]) -> None:
        written[name] = write_shard(target / f"{name}{SHARD_SUFFIX}", content)
        on_written(name, written[name])

    taken: set[str] = set()
    for split in HELD_OUT:
        for kind, (_, _, held_out) in DRAWN.items():
            write(f"{split}_{kind}", drawn(seed, kind, split, _asked(share, held_out), taken))
    for kind, (_, train, _) in DRAWN.items():
        write(f"train_{kind}", drawn(seed, kind, "train", max(round(share * train), 40), taken))
    others = questions(share) | places(share) | web_pages(share) | (of_folder(data, share) if data else {})
    for name, content in others.items():
        write(name, content)
    (target / "made.json").write_text(json.dumps({"seed": seed, "share": share, "examples": written}, indent=1))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the examples of each kind; 0.05 for a rehearsal")
    parser.add_argument("--data", type=Path, help="folder with openclipart and nlvr_dev")
    options = parser.parse_args()

    def tell(name: str, count: int) -> None:
        print(f"{name}: {count:,}", flush=True)

    make(options.target, seed=options.seed, share=options.share, data=options.data, on_written=tell)


if __name__ == "__main__":
    main()
