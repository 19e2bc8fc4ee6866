"""Rendered examples are the same again, and their boxes hold the ink."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from jvlm import cli
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.prepare.regions import Region, Scene, record
from jvlm.data.prepare.render.degrading import turned
from jvlm.data.prepare.render.source import RenderedExamples, Rendering
from jvlm.errors import UserError

HTML = """<!doctype html><style>body { margin: 0; font: 16px sans-serif } #a { position: absolute; left: 40px;
top: 30px; width: 120px; height: 40px } #hidden { display: none } #under { position: absolute; left: 40px; top: 30px }
#far { position: absolute; top: 9000px }</style><div id=under>covered text</div><button id=a>Buy now</button>
<p id=hidden>never seen</p><p id=far>far below</p>
<h1 style="position:absolute;left:40px;top:120px;margin:0">Shop</h1>"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(
        "The harbour at night.\nIt opened <image> in 1902.\n\nGrüße aus Köln, at <bbox> noon."
    )
    (folder / "formula.txt").write_text("\\frac{a}{b} = \\sqrt{c}\nx^2 + y^2\n\\notacommand{x}\n")
    (folder / "code.py").write_text("def double(x):\n    # twice\n    return 2 * x\n\n\nprint(double(4))\n")
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["item", "price|EUR"], ["tea", "1.20"], ["bread", "3.50"], ["salt", "0.80"]])
    (folder / "page.html").write_text(HTML)
    return folder


FILES = {"text": "text.txt", "columns": "text.txt", "formula": "formula.txt", "code": "code.py", "table": "table.csv"}


def read(inputs, kind, task, count=6, seed=0):
    with RenderedExamples([str(inputs / FILES[kind])], Rendering(kind, count, seed, task)) as drawn:
        return [drawn.read(i).record for i in range(count)]


@pytest.mark.parametrize("kind", FILES)
def test_boxes_hold_all_the_ink_and_nothing_else_of_the_image(inputs, kind):
    for example in read(inputs, kind, "read_boxes"):
        if isinstance(example, ExampleError):
            assert kind == "formula"
            assert "notacommand" in str(example)
            continue
        parsed = parse_example(example)
        pixels = np.asarray(Image.open(io.BytesIO(example["images"][0]["bytes"])).convert("L"), np.float64)
        ink = np.abs(pixels - np.median(pixels)) > 45
        outside = ink.copy()
        for box in parsed.boxes:
            x1, y1, x2, y2 = map(int, box.region.values)
            assert ink[y1:y2, x1:x2].any()
            outside[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1] = False
        if kind in ("table", "columns"):  # rules are outside of the text
            continue
        assert outside.sum() <= 0.002 * ink.sum()


@pytest.mark.parametrize("kind", FILES)
def test_an_example_depends_on_the_seed_and_its_number_alone(inputs, kind):
    first, again, other = (read(inputs, kind, "read", 4, seed) for seed in (1, 1, 2))
    with RenderedExamples([str(inputs / FILES[kind])], Rendering(kind, 4, 1)) as drawn:
        alone = drawn.read(3).record
    assert repr(first) == repr(again)
    assert repr(alone) == repr(first[3])
    assert repr(first[0]) != repr(other[0])


def test_what_is_read_is_what_was_given_whatever_it_spells(inputs):
    texts = [parse_example(example).messages[1].text for example in read(inputs, "text", "read", 2)]
    assert " ".join(texts[0].split()) == "The harbour at night. It opened <image> in 1902."
    assert len(parse_example(read(inputs, "text", "document", 1)[0]).images) == 1
    code = parse_example(read(inputs, "code", "read", 1)[0]).messages[1].text
    assert code in (inputs / "code.py").read_text()
    table = parse_example(read(inputs, "table", "read", 1)[0]).messages[1].text.splitlines()
    assert table[0] == "| item | price\\|EUR |"
    rows = [tuple(line.strip("| ").split(" | ")) for line in table[2:]]
    assert set(rows) <= {("tea", "1.20"), ("bread", "3.50"), ("salt", "0.80")}
    assert rows


def test_columns_are_read_one_after_the_other_and_do_not_overlap(inputs, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(" ".join(f"p{p}w{w}" for w in range(60)) for p in range(8)) + "\n\n" + "x" * 400)
    with RenderedExamples([str(path)], Rendering("columns", 4, task="read_boxes")) as drawn:
        examples = [drawn.read(i).record for i in range(4)]
    for example in examples:
        words = " ".join(example["objects"]["ref"]).split()
        order = [tuple(map(int, w[1:].split("w"))) for w in words if w.startswith("p")]
        # the paragraphs follow one another from where the page begins
        assert len(order) > 20
        start = order[0][0]
        assert order == sorted(order, key=lambda one: ((one[0] - start) % 8, one[1]))
        boxes = np.array(example["objects"]["bbox"])
        columns = sorted({int(x) for x in boxes[:, 0]})
        assert len(columns) >= 2
        for left, right in itertools.pairwise(columns):
            assert boxes[boxes[:, 0] == left, 2].max() <= right


@pytest.mark.parametrize("degrees", [-4.0, 2.5, 90.0])
def test_boxes_of_a_turned_image_are_those_of_what_is_seen_there(degrees):
    image = Image.new("RGB", (300, 200), "white")
    boxes = [(20, 30, 80, 50), (200, 20, 260, 170), (100, 120, 140, 180)]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for box, colour in zip(boxes, colours, strict=True):
        image.paste(colour, box)
    regions = tuple(Region("x", tuple(map(float, box)), "line") for box in boxes)
    new, moved = turned(image, regions, degrees)
    pixels = np.asarray(new).astype(int)
    for region, colour in zip(moved, colours, strict=True):
        ys, xs = np.nonzero(np.abs(pixels - colour).max(axis=2) < 100)
        found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert np.abs(np.subtract(found, region.box)).max() <= 1.0
    assert np.abs(pixels[0, 0] - 255).max() < 3


def test_degraded_examples_are_the_same_again_and_hold_their_text_in_their_boxes(inputs):
    settings = Rendering("text", 6, task="read_boxes", degrade=1.0)
    with RenderedExamples([str(inputs / "text.txt")], settings) as drawn:
        examples, again = ([drawn.read(i).record for i in range(6)] for _ in range(2))
    assert repr(examples) == repr(again)
    with RenderedExamples([str(inputs / "text.txt")], dataclasses.replace(settings, degrade=0.0)) as drawn:
        plain = [drawn.read(i).record for i in range(6)]
    sizes = set()
    for example, before in zip(examples, plain, strict=True):
        assert example["objects"]["ref"] == before["objects"]["ref"]
        with Image.open(io.BytesIO(example["images"][0]["bytes"])) as image:
            assert image.format == "JPEG"
            pixels = np.asarray(image.convert("L"), np.float64)
        size = Image.open(io.BytesIO(before["images"][0]["bytes"])).size
        sizes.add(pixels.shape[::-1] == size)
        ink = np.abs(pixels - np.median(pixels)) > 90
        inside = np.zeros_like(ink)
        for x1, y1, x2, y2 in example["objects"]["bbox"]:
            inside[max(y1 - 3, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 3] = True
        assert ink.sum() > 50
        assert (ink & ~inside).sum() <= 0.02 * ink.sum()
    assert sizes == {True, False}  # some are turned


def test_an_action_is_a_point_in_the_element_as_mimo_writes_it(tiny):
    regions = (
        Region("Buy now", (40.0, 30.0, 160.0, 70.0), "button"),
        Region("Search", (10.0, 100.0, 90.0, 120.0), "input"),
        Region("Shop", (0.0, 0.0, 30.0, 10.0), "h1"),
    )
    file = io.BytesIO()
    Image.new("RGB", (196, 140), "white").save(file, "PNG")
    scene = Scene(file.getvalue(), (196, 140), "Buy now Search Shop", regions)
    answers = set()
    for seed in range(20):
        parsed = parse_example(record(scene, "act", np.random.default_rng(seed), Origin()))
        answer = render_answer(tiny, parsed)
        (action,) = json.loads(answer)
        expected = {"click": (100, 50, "Click on Buy now."), "input": (50, 110, 'Type "')}[action["action"]]
        assert parsed.messages[0].text.startswith(expected[2][:6])
        sizes = tiny.processor.encode(parsed).sizes[0]
        scaled = [round(v * new / old) for v, new, old in zip(expected, sizes.resized, sizes.original, strict=False)]
        assert np.abs(np.subtract(action["start_point"], scaled)).max() <= 1
        answers.add(action["action"])
    assert answers == {"click", "input"}
    with pytest.raises(ExampleError, match="no element to click"):
        record(Scene(scene.image, scene.size, "Shop", regions[2:]), "act", np.random.default_rng(0), Origin())


def render_answer(tiny, parsed) -> str:
    encoded = tiny.processor.encode(parsed)
    learnt = encoded.tokens[encoded.loss_weights > 0]
    return tiny.processor.tokenizer.decode(learnt, skip_special_tokens=True)


def test_a_character_that_no_font_has_is_an_error_of_its_example(tmp_path):
    (tmp_path / "text.txt").write_text("plain\n\nwith \U000131f0 in it")
    with RenderedExamples([str(tmp_path / "text.txt")], Rendering("text", 2)) as drawn:
        assert isinstance(drawn.read(0).record, dict)
        assert "no font has U+131F0" in str(drawn.read(1).record)
    with pytest.raises(UserError, match="not a font"):
        RenderedExamples([str(tmp_path / "text.txt")], Rendering("text", 2, fonts=(str(tmp_path / "text.txt"),)))


def test_the_command_writes_shards_and_counts_what_cannot_be_drawn(inputs, tmp_path, capsys):
    listed = tmp_path / "rejected.jsonl"
    words = ["formula", str(inputs / "formula.txt"), "--count", "9", "--task", "locate"]
    words += ["--on_bad_example", "skip", "--rejected", str(listed), "--examples_per_shard", "5"]
    assert cli.main(["data", "render", *words, "--output", str(tmp_path / "out")]) == 0
    assert "9 examples read, 6 written, 3 left out" in capsys.readouterr().out
    assert len(listed.read_text().splitlines()) == 3
    shards = ExampleSource([f"{tmp_path}/out/*.arrayrecord"])
    assert len(shards) == 6
    assert all(len(parse_example(shards[i][1]).boxes) == 1 for i in range(6))


@pytest.mark.slow
def test_a_page_has_the_boxes_of_what_can_be_seen_as_chromium_lays_it_out(inputs):
    settings = Rendering("page", 8, task="read_boxes")
    with RenderedExamples([str(inputs / "page.html")], settings) as drawn:
        examples = [drawn.read(i).record for i in range(8)]
        again = [drawn.read(i).record for i in range(8)]
    assert json.dumps(examples, default=repr) == json.dumps(again, default=repr)
    scales = set()
    for example in examples:
        names = example["objects"]["ref"]
        assert names == ["Buy now", "Shop"]
        assert example["region_kinds"] == ["button", "h1"]
        x1, y1, x2, y2 = example["objects"]["bbox"][0]
        scale = x1 / 40
        scales.add(scale)
        # the style sheet says where the button is
        assert (x1, y1, x2, y2) == tuple(round(scale * v) for v in (40, 30, 160, 70))
        size = Image.open(io.BytesIO(example["images"][0]["bytes"])).size
        assert (size[0] / scale, size[1] / scale) in ((1280, 800), (1024, 768), (820, 1180), (390, 844))
    assert len(scales) > 1


@pytest.mark.slow
def test_an_action_on_a_page_is_in_the_middle_of_its_button(inputs):
    with RenderedExamples([str(inputs / "page.html")], Rendering("page", 4, task="act")) as drawn:
        examples = [drawn.read(i).record for i in range(4)]
    for example in examples:
        assert example["objects"]["ref"] == ["Buy now"]
        x, y = example["objects"]["bbox"][0]
        assert x / y == pytest.approx(2.0, abs=0.05)
        assert x / 100 in (1.0, 1.5, 2.0)
        assert json.loads(example["messages"][1]["content"].replace("<bbox>", "0")) == [
            {"action": "click", "start_point": 0}
        ]
