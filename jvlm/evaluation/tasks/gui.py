"""Where something is: a point or the centre of a box in a screenshot, a box in a photo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from jvlm.data.errors import ExampleError
from jvlm.data.images import open_image
from jvlm.evaluation.files import Row, as_list, hub, official
from jvlm.evaluation.items import categories, content, key
from jvlm.evaluation.task import Item, Task
from jvlm.evaluation.tasks.kinds import located, mimo

_COMMAND = 'Locate UI components that match the command: "{}".'
_COMMAND_FORM = 'Output a JSON in the format [{"bbox_2d": [...], "label": "{the_whole_command}"}, ...].'
_DESCRIPTION = 'Based on the description: "{}", locate all regions matching the description.'
_DESCRIPTION_FORM = 'Output a JSON in the format [{"bbox_2d": [...], "label": "{the_whole_description}"}, ...].'
_IMAGES = ("image", "img_filename", "image_path", "file_name")


def click_item(
    layout: Literal["xyxy", "xywh", "relative"],
    *,
    instruction: str = "instruction",
    parts: Mapping[str, str] | Sequence[str] = (),
) -> Callable[[Row], Item]:
    """Return a reader of instructions to click.

    Args:
      layout: of the files' boxes: corners, or corner with width and height, in pixels; or corners as shares of the
        image. Never told from the numbers.
    """

    def read(row: Row) -> Item:
        box = _corners(row, as_list(row.need("bbox")), layout)
        shown = content(row, _COMMAND.format(row.text(instruction)), images=_image_of(row))
        name = key(row, "id", "ui_id", "")
        return Item(name, shown, box, answer=str([round(v) for v in box]), categories=categories(row, parts))

    return read


def _image_of(row: Row) -> tuple[str, ...]:
    """Return the one field of the picture."""
    return next(((name,) for name in _IMAGES if row.get(name) is not None), ("image",))


def _corners(row: Row, values: Sequence, layout: str) -> list[float]:
    box = [float(value) for value in values]
    if len(box) != 4:
        raise ExampleError(row.origin, "bbox", f"{len(box)} numbers, not 4", "Copy the file again")
    if layout == "xywh":
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    if layout == "relative":
        if max(box) > 1.001:
            raise ExampleError(row.origin, "bbox", f"{box} are no shares of the image", "Give the files of --list")
        width, height = _size(row)
        return [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
    return box


def _size(row: Row) -> tuple[int, int]:
    """Return (width, height) of the picture."""
    image = row.images(*_image_of(row))[0]
    return open_image(image.source, origin=row.origin, roots=(row.media or ".",)).size


def osworld_item(row: Row) -> Item | None:
    """Return an instruction of OSWorld-G, with a box or a polygon; None for one to be refused."""
    kind = row.text("box_type")
    if kind == "refusal":
        return None
    values = [float(value) for value in as_list(row.need("box_coordinates"))]
    gold = _corners(row, values, "xywh") if kind == "bbox" else values
    shown = content(row, _COMMAND.format(row.text("instruction")), images=_image_of(row))
    parts = {"box_type": kind} | categories(row, ("GUI_types",))
    return Item(key(row, "id", ""), shown, gold, answer=str(gold), categories=parts)


def refcoco_item(row: Row) -> list[Item]:
    """Return a question for each expression of a region; all of one picture belong together."""
    box = _corners(row, as_list(row.need("bbox")), "xywh")
    name = key(row, "question_id", "")
    found = []
    for number, words in enumerate(as_list(row.need("answer", "sentences", "description"))):
        shown = content(row, _DESCRIPTION.format(words), images=_image_of(row))
        group = str(row.get("file_name", "image_id", default=name))
        found.append(Item(f"{name}:{number}", shown, box, answer=str([round(v) for v in box]), group=group))
    return found


def _click(name, files, item, paper, published, note="") -> Task:
    return located(name, "gui", files, item, "point_in_box", _COMMAND_FORM, paper, published, note)


def _refer(name: str, repo: str, part: str, published: dict[str, float]) -> Task:
    files = (hub(f"lmms-lab/{repo}", f"data/{part}-*.parquet"),)
    note = "published scores of MiMo-VL and MM1.5 are averages over parts"
    return located(
        name, "grounding", files, refcoco_item, "box_iou50", _DESCRIPTION_FORM, "arXiv 1608.00272", published, note
    )


_PRO = "an average over English and Chinese instructions is published; screenspot_pro_cn has the Chinese ones"
_AVERAGE = {
    "MiMo-VL-7B-RL (average)": 89.6,
    "MiMo-VL-7B-SFT (average)": 85.7,
    "Qwen2.5-VL-7B (average)": 87.1,
    "MM1.5-3B (average)": 85.6,
}
TASKS = (
    _click(
        "screenspot",
        (hub("rootsautomation/ScreenSpot", "data/test-*.parquet"),),
        click_item("relative", parts=("data_type", "data_source")),
        "arXiv 2401.10935",
        mimo(87.2, 87.3, 84.7),
    ),
    _click(
        "screenspot_v2",
        (
            hub("OS-Copilot/ScreenSpot-v2", "screenspot_*_v2.json", media="screenspotv2_image"),
            official("screenspot_*_v2.json", media="screenspotv2_image"),
        ),
        click_item("xywh", parts=("data_type", "data_source")),
        "arXiv 2410.23218",
        mimo(90.5, 89.5, 88.0),
    ),
    *(
        _click(
            name,
            (hub("likaixin/ScreenSpot-Pro", "annotations/*.json", media="images"),),
            click_item("xyxy", instruction=field, parts=("group", "application", "platform", "ui_type")),
            "arXiv 2504.07981",
            mimo(41.9, 39.9, 29.0),
            _PRO,
        )
        for name, field in (("screenspot_pro", "instruction"), ("screenspot_pro_cn", "instruction_cn"))
    ),
    _click(
        "osworld_g",
        (
            hub("MMInstruction/OSWorld-G", "data/test-*.parquet"),
            official("OSWorld-G.json", media="images"),
        ),
        osworld_item,
        "arXiv 2505.13227",
        mimo(56.1, 54.7, 37.5),
        "instructions to be refused are left out, as in MiMo-VL's report",
    ),
    *(
        _refer(f"{name}_{part.lower()}", repo, part, _AVERAGE if part == "val" else {})
        for name, repo, parts in (
            ("refcoco", "RefCOCO", ("val", "testA", "testB")),
            ("refcoco_plus", "RefCOCOplus", ("val", "testA", "testB")),
            ("refcocog", "RefCOCOg", ("val", "test")),
        )
        for part in parts
    ),
)
