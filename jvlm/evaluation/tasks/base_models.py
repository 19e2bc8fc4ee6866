"""Tasks of base models, which continue a text after eight random examples: Idefics2's four (arXiv 2405.02246)."""

from __future__ import annotations

import dataclasses

from jvlm.data.content import Text
from jvlm.evaluation.files import Row, as_list, hub
from jvlm.evaluation.items import key, open_item
from jvlm.evaluation.task import Decoding, Item, Task

SHOTS = 8
_SHORT = Decoding(max_new_tokens=32)
_READ = open_item(template="Question: {question} Answer:", group=("image_id",))


def _asked(row: Row) -> Item | None:
    """Return a question; as a demonstration it has the answer that most annotators gave, of equals the first."""
    item = _READ(row)
    return item and dataclasses.replace(item, answer=max(item.gold, key=item.gold.count))


def _caption(row: Row) -> Item:
    """Return a picture to describe, with all of its captions."""
    golds = [str(one) for one in as_list(row.need("answer", "sentences_raw", "sentences", "annotations_captions"))]
    shown = (*row.images("image")[:1], Text("Caption:"))
    return Item(key(row, "id", "imgid", "image_id", "question_id", ""), shown, golds, answer=golds[0])


def _base(name: str, repo: str, evaluated: str, trained: str, published: dict[str, float], paper: str) -> Task:
    return Task(
        name,
        "base",
        (hub(repo, evaluated),),
        _asked,
        "vqa",
        parser="first_line",
        decoding=_SHORT,
        shots=SHOTS,
        demonstrations=(hub(repo, trained),),
        turns=False,
        published=published,
        paper=paper,
    )


TASKS = (
    _base(
        "vqav2_8shot",
        "lmms-lab/VQAv2",
        "data/validation-*.parquet",
        "data/validation-*.parquet",
        {"Idefics2-8B-base": 70.3},
        "arXiv 1612.00837",
    ),
    _base(
        "textvqa_8shot",
        "lmms-lab/textvqa",
        "data/validation-*.parquet",
        "data/train-*.parquet",
        {"Idefics2-8B-base": 57.9},
        "arXiv 1904.08920",
    ),
    _base(
        "okvqa_8shot",
        "lmms-lab/OK-VQA",
        "data/val*-*.parquet",
        "data/val*-*.parquet",
        {"Idefics2-8B-base": 54.6},
        "arXiv 1906.00067",
    ),
    Task(
        "coco_8shot",
        "base",
        (
            hub("yerevann/coco-karpathy", "data/test-*.parquet"),
            hub("lmms-lab/COCO-Caption", "data/val-*.parquet"),
        ),
        _caption,
        "cider",
        parser="first_line",
        decoding=Decoding(max_new_tokens=48),
        shots=SHOTS,
        demonstrations=(
            hub("yerevann/coco-karpathy", "data/train-*.parquet"),
            hub("lmms-lab/COCO-Caption", "data/val-*.parquet"),
        ),
        turns=False,
        unit=1000.0,
        published={"Idefics2-8B-base": 116.0},
        paper="arXiv 1405.0312",
        note="CIDEr depends on which images are asked: a part by --limit has another score",
    ),
)
