"""The examples of the miniature papers: each kind a function of a generator of random numbers, none like another.

An example has its reward's name in ``task``, and in ``gold`` what the reward compares where that is not the answer.
Places are pixels of pictures that MiMo-VL's models do not resize, so that the ``gold`` of clicks, which the reward
compares, is in the numbers that the model writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tools.mini import drawing
from tools.mini.drawing import DIRECTIONS, SHAPES, WORDS, as_bytes, paper, scene, shapes

Example = dict[str, Any]
Maker = Callable[[np.random.Generator], Example]
WORD_WEIGHT = 4.0  # of an answer of a word or two, beside boxes of fifteen tokens


def asked(
    images: Sequence[Image.Image | bytes], *turns: tuple[str, str], weight: float = WORD_WEIGHT, **more
) -> Example:
    """Return a conversation about images, which stand before its first question."""
    messages = []
    for number, (question, reply) in enumerate(turns):
        tags = "<image>" * len(images) if number == 0 else ""
        messages.append({"role": "user", "content": tags + question})
        scale = 1.0 if "<bbox>" in reply else weight
        messages.append({"role": "assistant", "content": reply, "loss_scale": scale})
    return {"messages": messages, "images": [_file(image) for image in images], **more}


def _file(image: Image.Image | bytes) -> dict[str, Any]:
    return {"bytes": image if isinstance(image, bytes) else as_bytes(image), "path": None}


def boxed(name: str) -> str:
    """Return the answer that gives the box of something, in MiMo-VL's form."""
    return f'```json\n[{{"bbox_2d": <bbox>, "label": "{name}"}}]\n```'


def pointed(name: str) -> str:
    """Return the answer that points at something."""
    return f'```json\n[{{"point_2d": <bbox>, "label": "{name}"}}]\n```'


def listed(names: Sequence[str]) -> str:
    """Return "a red circle and a blue triangle"."""
    return " and ".join(f"a {name}" for name in names)


def caption(rng) -> Example:
    drawn = shapes(rng, int(rng.integers(1, 3)))
    drawn.sort(key=lambda one: one.box[0])
    text = f"{listed([one.name for one in drawn])}."
    return {"text": f"<image>{text}", "images": [_file(scene(drawn, paper(rng)))]}


def page(rng) -> Example:
    """Return an interleaved page: two or three pictures, each behind words about it."""
    blocks: list[dict] = []
    for number in range(int(rng.integers(2, 4))):
        drawn = shapes(rng, 1)
        blocks.append({"type": "text", "text": f"figure {number + 1} shows {listed([drawn[0].name])}."})
        blocks.append({"type": "image", "image": _file(scene(drawn, paper(rng)))})
    return {"document": blocks}


def grounding(rng, side: int = drawing.SIDE, count: int = 3) -> Example:
    drawn = shapes(rng, int(rng.integers(1, count + 1)), side=side)
    chosen = drawn[int(rng.integers(len(drawn)))]
    turn = f"where is the {chosen.name}?", boxed(chosen.name)
    return asked([scene(drawn, paper(rng), side)], turn, objects={"bbox": [list(chosen.box)]}, task="grounding")


def high_resolution(rng) -> Example:
    return grounding(rng, side=2 * drawing.SIDE, count=4) | {"task": "grounding"}


def counting(rng) -> Example:
    drawn = shapes(rng, int(rng.integers(1, 6)), sizes=(9, 15), unique=False)
    if rng.random() < 0.5:
        return asked(
            [scene(drawn, paper(rng))],
            ("how many shapes are there?", str(len(drawn))),
            gold=len(drawn),
            task="counting",
        )
    kind = SHAPES[int(rng.integers(3))]
    count = sum(one.kind == kind for one in drawn)
    return asked([scene(drawn, paper(rng))], (f"how many {kind}s are there?", str(count)), gold=count, task="counting")


def ocr(rng) -> Example:
    word = WORDS[int(rng.integers(len(WORDS)))] if rng.random() < 0.5 else str(int(rng.integers(10, 100)))
    return asked([drawing.text(word, rng)], ("read the text.", word), task="ocr")


def video(rng, moves: int = 1, frames: int = 4) -> Example:
    names = [list(DIRECTIONS)[int(rng.integers(4))]]
    while len(names) < moves:
        names.append([name for name in DIRECTIONS if name != names[-1]][int(rng.integers(3))])
    drawn = drawing.film(rng, names, frames * moves)
    question = "which way does it move?" if moves == 1 else "which ways does it move?"
    messages = [
        {"role": "user", "content": f"<video>{question}"},
        {"role": "assistant", "content": ", then ".join(names), "loss_scale": WORD_WEIGHT},
    ]
    return {"messages": messages, "videos": [{"video": [_file(one) for one in drawn], "fps": 2}], "task": "video"}


def long_video(rng) -> Example:
    return video(rng, moves=3)


def sums(rng, terms: int = 2) -> Example:
    """Return a sum below 100 with its way: a step for each term, thought before the answer."""
    numbers = [int(value) for value in rng.integers(1, 99 // terms + 1, terms)]
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}.")
        total += number
    question = " + ".join(map(str, numbers)) + " = ?"
    return asked([], (question, f"<think>{' '.join(steps)}</think>{total}"), weight=1.0, gold=total, task="reasoning")


def reasoning(rng) -> Example:
    return sums(rng, int(rng.integers(2, 4)))


def long_reasoning(rng) -> Example:
    return sums(rng, int(rng.integers(4, 7)))


def lookup(rng, pairs: int = 4) -> Example:
    """Return a list of words with their numbers, and a question for one."""
    words = [WORDS[i] for i in rng.permutation(len(WORDS))[:pairs]]
    numbers = [int(value) for value in rng.integers(10, 100, pairs)]
    shown = ", ".join(f"{word} {number}" for word, number in zip(words, numbers, strict=True))
    chosen = int(rng.integers(pairs))
    return asked([], (f"{shown}. what is {words[chosen]}?", str(numbers[chosen])), task="text")


def text(rng) -> Example:
    return lookup(rng, int(rng.integers(2, 5)))


def long_text(rng) -> Example:
    return lookup(rng, int(rng.integers(12, 21)))


def long_document(rng) -> Example:
    """Return pages of six pictures, of which one shows what is asked for."""
    drawn = shapes(rng, 6, side=400)  # six that differ
    pages = []
    for shape in drawn:
        (other,) = shapes(rng, 1)
        width, height = other.box[2] - other.box[0], other.box[3] - other.box[1]
        size = min(width, height) if shape.kind == "circle" else None
        box = (*other.box[:2], other.box[0] + (size or width), other.box[1] + (size or height))
        pages.append(scene([drawing.Shape(shape.colour, shape.kind, box)], paper(rng)))
    chosen = int(rng.integers(6))
    turn = f"which picture shows a {drawn[chosen].name}?", str(chosen + 1)
    return asked(pages, turn, task="documents")


def instruction(rng) -> Example:
    """Return a conversation of two turns about one picture."""
    drawn = shapes(rng, 2)
    one, other = drawn[0], drawn[-1]
    turns = [
        (f"what colour is the {one.kind}?", one.colour),
        (f"is there a {other.name}?", "yes"),
        (f"is there a {one.colour} {SHAPES[(SHAPES.index(one.kind) + 1) % 3]}?", "no"),
    ]
    if other.kind == one.kind or (other.colour, other.kind) == (one.colour, turns[2][0].split()[-1].rstrip("?")):
        turns = [("what shapes are there?", listed([s.name for s in sorted(drawn, key=lambda s: s.box[0])]))]
    chosen = [turns[i] for i in rng.permutation(len(turns))[:2]]
    return asked([scene(drawn, paper(rng))], *chosen, task="instruction")


_ORDER = ("first", "second", "third")
_LONG_WEIGHT = 1.0  # of each token of an answer of whole sentences


def _told(rng) -> tuple[list[drawing.Shape], dict[str, str]]:
    """Return two or three shapes from left to right, and what can be said of them in a sentence each."""
    drawn = sorted(shapes(rng, int(rng.integers(2, 4))), key=lambda one: one.box[0])
    highest = min(drawn, key=lambda one: (one.box[1], one.box[0]))
    largest = max(drawn, key=lambda one: ((one.box[2] - one.box[0]) * (one.box[3] - one.box[1]), -one.box[0]))
    places = [f"the {number} is a {one.name}" for number, one in zip(_ORDER, drawn, strict=False)]
    others = listed([one.name for one in drawn if one is not highest]).replace("a ", "the ", 1).replace(" a ", " the ")
    return drawn, {
        "count": f"there are {len(drawn)} shapes in the picture.",
        "places": f"from left to right, {', '.join(places)}.",
        "highest": f"the {highest.name} is the highest: it is above {others}.",
        "largest": f"the {largest.name} is the largest.",
    }


def description(rng) -> Example:
    """Return a picture told in whole sentences, as in ShareGPT4V."""
    drawn, told = _told(rng)
    turn = "describe the picture in detail.", " ".join(told.values())
    return asked([scene(drawn, paper(rng))], turn, weight=_LONG_WEIGHT, task="descriptions")


def dialogue(rng) -> Example:
    """Return a conversation of three turns about one picture, each answer whole sentences, as in LLaVA's."""
    drawn, told = _told(rng)
    shown = f"from left to right there is {listed([one.name for one in drawn])}."
    one = drawn[int(rng.integers(len(drawn)))]
    name = one.name if rng.random() < 0.5 else f"{one.colour} {SHAPES[(SHAPES.index(one.kind) + 1) % 3]}"
    there = any(other.name == name for other in drawn)
    turns = [
        ("what do you see?", f"{told['count']} {told['places']}"),
        ("which of the shapes is the highest?", told["highest"]),
        ("which of the shapes is the largest?", f"{told['largest']} {shown}"),
        (
            f"is there a {name}, and what else?",
            f"{'yes' if there else 'no'}, there is {'a' if there else 'no'} {name}. {shown}",
        ),
    ]
    chosen = [turns[i] for i in rng.permutation(len(turns))[:3]]
    return asked([scene(drawn, paper(rng))], *chosen, weight=_LONG_WEIGHT, task="dialogue")


def lines(rng) -> Example:
    """Return a wide strip with two words: too small to be read where a picture is made square."""
    words = [WORDS[int(rng.integers(len(WORDS)))], str(int(rng.integers(10, 100)))]
    text = " ".join(words[i] for i in rng.permutation(2))
    return asked([drawing.text(text, rng, (128, 32), 22)], ("read the text.", text), task="text")


def math(rng) -> Example:
    one, other = (int(value) for value in rng.integers(1, 10, 2))
    picture = drawing.text(f"{one} + {other}", rng)
    return asked([picture], ("what is the result?", str(one + other)), gold=one + other, task="counting")


def code(rng) -> Example:
    """Return a shape and the line of SVG that draws one like it."""
    shape = shapes(rng, 1, sizes=(20, 40))[0]
    tag = {"circle": "circle", "rectangle": "rect", "triangle": "polygon"}[shape.kind]
    return asked([scene([shape], paper(rng))], ("write it as svg.", f'<{tag} fill="{shape.colour}"/>'), task="text")


def science(rng) -> Example:
    """Return a diagram of two shapes and an arrow from one to the other."""
    picture, names = drawing.diagram(rng)
    return asked([picture], ("what does the arrow point to?", names[1]), task="text")


def multi(rng) -> Example:
    """Return two pictures, of which one has more shapes."""
    counts = [int(value) for value in rng.permutation([1, 2, 3, 4])[:2]]
    pictures = [scene(shapes(rng, count, sizes=(10, 18), unique=False), paper(rng)) for count in counts]
    answer = "the first" if counts[0] > counts[1] else "the second"
    return asked(pictures, ("which picture has more shapes?", answer), task="text")


def spoken(rng) -> Example:
    """Return a document of words alone, of the kinds that conversations are made of."""
    kind = int(rng.integers(4))
    if kind == 0:
        names = [one.name for one in shapes(rng, int(rng.integers(1, 3)))]
        return {"text": f"{listed(names)}."}
    if kind == 1:
        first = sums(rng, int(rng.integers(2, 5)))["messages"]
        return {"text": f"{first[0]['content']} {first[1]['content']}"}
    if kind == 2:
        first = text(rng)["messages"]
        return {"text": f"{first[0]['content']} {first[1]['content']}"}
    drawn = shapes(rng, 1)[0]
    return {"text": f"where is the {drawn.name}? {boxed(drawn.name).replace('<bbox>', str(list(drawn.box)))}"}
