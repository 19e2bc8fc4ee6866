"""Regions that a question names or asks for: Flickr30k Entities, LVIS, Ferret-Bench, and widgets of mobile screens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from jvlm.data.boxes import Box, Point, Region
from jvlm.data.content import ObjectBox, Part, Text
from jvlm.data.errors import ExampleError
from jvlm.evaluation.files import Row, as_list, hub, official
from jvlm.evaluation.items import key
from jvlm.evaluation.task import Decoding, Item, Task
from jvlm.evaluation.tasks.kinds import BRIEF, located, rated

_SHARES = re.compile(r"\[\s*([01]?\.\d+(?:\s*,\s*[01]?\.\d+){3})\s*\]")


def with_regions(text: str) -> tuple[Part, ...]:
    """Return a text whose boxes of shares, "[0.1, 0.2, 0.3, 0.4]", are boxes that a model is told in its own form."""
    parts: list[Part] = []
    for at, piece in enumerate(_SHARES.split(text)):
        if at % 2:
            parts.append(ObjectBox(Box(*(float(value) for value in piece.split(",")), "norm1")))
        elif piece:
            parts.append(Text(piece))
    return tuple(parts)


def _phrases(row: Row) -> list[Item]:
    """Return a question for each phrase of a caption of Flickr30k Entities that has a box."""
    caption, found = row.text("caption"), []
    name = f"{row.get('original_img_id', 'id')}:{row.get('sentence_id', default=row.origin.number)}"
    boxes: dict[tuple[int, int], list[float]] = {}
    for one in row.list("annotations"):
        x, y, width, height = (float(value) for value in one["bbox"])
        start, end = (int(place) for place in one["tokens_positive"][0])
        known = boxes.get((start, end), [x, y, x + width, y + height])
        boxes[start, end] = [
            min(known[0], x),
            min(known[1], y),
            max(known[2], x + width),
            max(known[3], y + height),
        ]
    for (start, end), box in sorted(boxes.items()):
        asked = f'The image shows: "{caption}" Where in the image is "{caption[start:end]}"?'
        shown = (*row.images("file_name"), Text(asked))
        gold = [round(value, 2) for value in box]
        found.append(Item(f"{name}:{start}", shown, gold, {"union": True}, str([round(v) for v in box]), name))
    return found


def _object(form: str) -> Callable[[Row], Item]:
    """Return a reader of Ferret's questions about objects of LVIS, which name a right class and a wrong one."""

    def read(row: Row) -> Item:
        width, height = float(row.need("width")), float(row.need("height"))
        if form == "point":
            x, y = (float(value) for value in row.need("sample_point"))
            region: Region = Point(x / width, y / height, "norm1")
        else:
            region = Box(*(min(max(float(value), 0.0), 1.0) for value in row.need("bbox_norm")), "norm1")
        right, wrong = (row.text(name).replace("_", " ") for name in ("name", "neg_class"))
        first, second = (right, wrong) if row.origin.number % 2 else (wrong, right)
        names = [part for one in (right, *map(str, row.list("synonyms"))) for part in _names(one)]
        shown = (
            *Row({"image": row.text("image_path").rpartition("/")[2]}, row.origin, row.form, row.media).images("image"),
            Text("Is the object "),
            ObjectBox(region),
            Text(f" of the image a {first} or a {second}?"),
        )
        return Item(key(row, "id", ""), shown, names, {"wrong": _names(wrong)}, right, str(row.get("image_path")))

    return read


def _names(name: str) -> list[str]:
    """Return the names in a class of LVIS: "bow_(decorative_ribbons)" has two."""
    parts = [part.strip(" )") for part in name.replace("_", " ").split("(")]
    return [part for part in parts if part]


def _described(row: Row) -> Item:
    """Return a question of Ferret-Bench; its boxes and its reference's are shares of the image."""
    shown = (*row.images("image"), *with_regions(row.text("question", "text")))
    kind = {"category": str(row.get("category", default=""))}
    name = f"{kind['category']}:{key(row, 'question_id', '')}"
    answer = row.text("gpt_answer", "answer")
    return Item(name, shown, [answer], answer=answer, categories=kind)


def _captions(row: Row) -> list[str]:
    found = [str(one) for one in as_list(row.need("captions")) if str(one).strip()]
    if not found:
        raise ExampleError(row.origin, "captions", "none of them has words", "Leave the record out")
    return found


def _screen(row: Row) -> Item:
    """Return a screen of Screen2Words, with all of its summaries."""
    golds, name = _captions(row), key(row, "screenId", "file_name")
    shown = (*row.images("image"), Text("Sum up this screen of a mobile app in a phrase."))
    return Item(name, shown, golds, answer=golds[0])


def _widget(row: Row) -> Item:
    """Return a widget of Widget Captioning, with all of its captions."""
    golds, screen = _captions(row), str(row.need("screenId"))
    box = [float(value) for value in as_list(row.need("bbox"))]
    if len(box) != 4 or max(box) > 1.001:
        raise ExampleError(row.origin, "bbox", f"{box} are no shares of the image", "Give the files of --list")
    shown = (
        *row.images("image"),
        Text("Say in a few words what the element "),
        ObjectBox(Box(*(min(max(value, 0.0), 1.0) for value in box), "norm1")),
        Text(" of this screen of a mobile app does."),
    )
    return Item(f"{screen}:{key(row, '')}", shown, golds, answer=golds[0], group=screen)


def _flickr(part: str) -> Task:
    file = f"final_flickr_mergedGT_{part}.json"
    return located(
        f"flickr30k_{part}",
        "grounding",
        (official(file, records="images", attach="annotations", media="flickr30k-images"),),
        _phrases,
        "box_iou50",
        'Output a JSON in the format [{"bbox_2d": [...], "label": "{the_phrase}"}, ...].',
        "arXiv 1505.04870",
        {"MM1.5-3B (test)": 85.9},
        "boxes of a phrase are joined to one, of the reference and of the answer; the question is in our words",
    )


def _lvis(form: str, published: float) -> Task:
    return Task(
        f"lvis_ref_{form}",
        "grounding",
        (official("lvis_v1_minival_inserted_image_name.json*", media="val2017"),),
        _object(form),
        "names_one",
        decoding=BRIEF,
        published={"MM1.5-30B": published},
        paper="arXiv 2310.07704",
        note="an answer with both names counts for none",
    )


def _ui(name: str, repo: str, item: Callable[[Row], Item | Sequence[Item]], published: float, paper: str) -> Task:
    return Task(
        name,
        "gui",
        (hub(repo, "data/test-*.parquet"),),
        item,
        "cider",
        decoding=Decoding(max_new_tokens=64),
        unit=1000.0,
        published={"MM1.5-UI-3B": published},
        paper=paper,
        note="CIDEr depends on which images are asked: a part by --limit has another score",
    )


TASKS = (
    _flickr("val"),
    _flickr("test"),
    _lvis("box", 84.9),
    _lvis("point", 61.4),
    rated(
        "ferret_bench",
        "grounding",
        (hub("lmms-lab/Ferret-Bench", "data/test-*.parquet"), official("ferret_bench.jsonl", media="val2017")),
        _described,
        "arXiv 2310.07704",
        {"MM1.5-30B": 77.1},
        summary="macro_category",
    ),
    _ui("screen2words", "rootsautomation/RICO-Screen2Words", _screen, 103.3, "arXiv 2108.03353"),
    _ui("widgetcap", "rootsautomation/RICO-WidgetCaptioning", _widget, 145.0, "arXiv 2010.04295"),
)
