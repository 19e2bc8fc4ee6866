"""Images with the text that is on them and where, as examples for reading and for finding."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from jvlm.data.errors import ExampleError, Origin

Task = Literal["read", "read_boxes", "locate", "act", "document"]
TASKS: tuple[Task, ...] = get_args(Task)
# elements of pages, by their role or else their tag
_CLICKED = frozenset("a button checkbox label link menuitem option radio select summary switch tab".split())
_TYPED = frozenset("input searchbox textarea textbox".split())
_WORDS = ("Paris", "42", "blue shoes", "next Monday", "ada@example.org", "weather")


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of an image.

    Attributes:
      text: what it says; of an element without words its label.
      box: (x1, y1, x2, y2) in pixels of the image.
      kind: "line", "word", "cell", "formula", or the role of an element of a page.
    """

    text: str
    box: tuple[float, float, float, float]
    kind: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image as bytes of a file, all of its text, and its regions in reading order."""

    image: bytes
    size: tuple[int, int]
    text: str
    regions: tuple[Region, ...]


def record(scene: Scene, task: Task, rng: np.random.Generator, origin: Origin) -> dict[str, Any]:
    """Return a scene as a record of the ms-swift format.

    Tasks: "read" asks for all text; "read_boxes" for each region with its box; "locate" for the box of one region,
    drawn from those whose text no other has; "act" for the action on such an element of a page, a click or words typed
    into it, as MiMo-VL writes them (arXiv 2506.03569, Table 5); "document" is the image and its text, without turns.

    Raises:
      ExampleError: a scene without text, or without a region to ask for.
    """
    images = [{"bytes": scene.image, "path": None}]
    if not scene.text.strip():
        raise ExampleError(origin, "text", "no text on the image", "Leave it out: --on_bad_example skip")
    kinds = [one.kind for one in scene.regions]
    if task == "document":
        # a block of text is words, whatever it spells
        blocks = [{"type": "image", "image": images[0]}, {"type": "text", "text": scene.text}]
        return {"document": blocks, "region_kinds": kinds}
    if task == "read":
        messages = [
            {
                "role": "user",
                "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Read the text."}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": scene.text}]},
        ]
        return {"messages": messages, "region_kinds": kinds}
    if task in ("locate", "act"):
        counts = Counter(one.text for one in scene.regions)
        once = [one for one in scene.regions if counts[one.text] == 1 and one.text.strip()]
        if task == "act":
            once = [one for one in once if one.kind in _CLICKED | _TYPED]
        if not once:
            what = "element to click or type into" if task == "act" else "region"
            raise ExampleError(origin, "objects", f"no {what} with a text of its own", "Use --task read")
        chosen = once[int(rng.integers(len(once)))]
        question, answer, shown = "<image>Where is <ref-object>?", "<bbox>", [chosen]
        if task == "act":
            question, answer = _action(chosen, rng)
    else:
        shown = [one for one in scene.regions if one.text.strip()]
        question = "<image>Read each text, with its box."
        answer = "\n".join("<ref-object> <bbox>" for _ in shown)
    places = [_centre(one.box) if task == "act" else _whole(one.box, scene.size) for one in shown]
    objects = {"ref": [one.text for one in shown], "bbox": places}
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "messages": messages,
        "images": images,
        "objects": {**objects, "bbox_type": "real"},
        "region_kinds": [one.kind for one in shown],
    }


def _action(region: Region, rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) of what is to be done with an element."""
    if region.kind in _TYPED:
        words = _WORDS[int(rng.integers(len(_WORDS)))]
        action = f'[{{"action": "input", "text": {json.dumps(words)}, "start_point": <bbox>}}]'
        return f'<image>Type "{words}" into <ref-object>.', action
    return "<image>Click on <ref-object>.", '[{"action": "click", "start_point": <bbox>}]'


def _centre(box: Sequence[float]) -> list[int]:
    """Return the pixel in the middle of a box."""
    return [int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)]


def _whole(box: Sequence[float], size: tuple[int, int]) -> list[int]:
    """Return the smallest box of whole pixels of the image around a box."""
    x1, y1, x2, y2 = box
    return [
        int(np.clip(np.floor(x1), 0, size[0])),
        int(np.clip(np.floor(y1), 0, size[1])),
        int(np.clip(np.ceil(x2), 0, size[0])),
        int(np.clip(np.ceil(y2), 0, size[1])),
    ]
