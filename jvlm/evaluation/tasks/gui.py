"""Where to click: one point, or the centre of one box, in a screenshot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from jvlm.data.errors import ExampleError
from jvlm.evaluation.files import Row, as_list, hub
from jvlm.evaluation.items import categories, content, key
from jvlm.evaluation.task import Decoding, Item, Task

LOCATE = 'Output a JSON in the format [{"bbox_2d": [x1, y1, x2, y2], "label": "{the_whole_command}"}, ...].'


def click_item(
    layout: Literal["xyxy", "xywh", "relative"], *, ids: Sequence[str] = (), parts: Sequence[str] = ()
) -> Callable[[Row], Item]:
    """Return a reader of instructions to click.

    Args:
      layout: of the files' boxes: corners or width and height, in pixels; or corners as shares of the image.
    """

    def read(row: Row) -> Item:
        box = [float(value) for value in as_list(row.need("bbox"))]
        if len(box) != 4:
            raise ExampleError(row.origin, "bbox", f"{len(box)} numbers, not 4", "Copy the file again")
        if layout == "xywh":
            box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        shown = content(row, f'Locate UI components that match the command: "{row.text("instruction")}".')
        if layout == "relative":
            width, height = size_of(row)
            box = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
        return Item(
            key(row, *ids or ("_number",)),
            shown,
            box,
            answer=str([round(v) for v in box]),
            categories=categories(row, parts),
        )

    return read


def size_of(row: Row) -> tuple[int, int]:
    """Return (width, height) of a record's image, read from its header."""
    from jvlm.data.images import open_image

    known = row.get("image_width"), row.get("image_height")
    if all(known):
        return int(known[0]), int(known[1])
    image = row.images("image")[0]
    return open_image(image.source, origin=row.origin, roots=(row.media or ".",)).size


_CLICK = Decoding(max_new_tokens=512)
screenspot = Task(
    name="screenspot",
    group="gui",
    files=(hub("rootsautomation/ScreenSpot", "data/test-*.parquet"),),
    item=click_item("relative", parts=("data_type", "data_source")),
    metric="point_in_box",
    instruction=LOCATE,
    boxed=LOCATE,
    decoding=_CLICK,
    published={"MiMo-VL-7B-RL": 87.2, "MiMo-VL-7B-SFT": 87.3, "Qwen2.5-VL-7B": 84.7},
    paper="arXiv 2401.10935",
)

TASKS = (screenspot,)
