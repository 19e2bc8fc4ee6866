"""Rendered examples are the same again, and their boxes hold the ink."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from jvlm import cli
from jvlm.data.errors import ExampleError
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
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


FILES = {"text": "text.txt", "formula": "formula.txt", "code": "code.py", "table": "table.csv"}


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
        if kind == "table":  # its rules are outside of the cells' text
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
