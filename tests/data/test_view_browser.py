"""The page of `jvlm data view` in headless Chromium: boxes lie where they are, nothing sticks out or is asked for."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image, ImageDraw

from jvlm.data.processor import Processor
from jvlm.data.view import page as page_of
from jvlm.data.view.run_view import run_view
from tests import browser
from tests.training import support

pytestmark = pytest.mark.slow
BOX, POINT = (40, 10, 100, 50), (20, 30)  # pixels of the original image of 120 x 60


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page about examples with boxes, near images, rejected ones and a long word."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("view_browser")
    for name, shade in (("a", 0), ("b", 40)):
        image = Image.new("RGB", (120, 60), (250, 250, 250))
        draw = ImageDraw.Draw(image)
        draw.rectangle(BOX, fill=(200, shade, 0))
        draw.ellipse((14, 24, 26, 36), fill=(0, 0, 200))
        image.save(folder / f"{name}.png")

    def example(answer, image, boxes=(), role="assistant"):
        turns = [{"role": "user", "content": "<image>where is the red shape?"}, {"role": role, "content": answer}]
        return {"messages": turns, "images": [image], **({"objects": {"bbox": list(boxes)}} if boxes else {})}

    lines = [
        example("<bbox>", "a.png", [BOX]),
        example("<bbox> <bbox>", "b.png", [BOX, POINT]),
        example("red" * 60, "a.png"),
        example("red", "gone.png"),
        example("red", "a.png", role="nobody"),
    ]
    (folder / "shapes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment = support.experiment(folder, folder / "shapes.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(str(experiment.tokenizer), local_files_only=True)
    changes = {"on_bad_example": "skip", "seq_len": "auto", "max_patches": "auto"}
    config = dataclasses.replace(experiment.data, train=(str(folder / "shapes.jsonl"),), **changes)
    processor = Processor(tokenizer, experiment.model, experiment.processor)
    path = folder / "report.html"
    path.write_bytes(page_of.render([run_view("data", config, processor, seed=0, samples=6)]))
    return path


@pytest.fixture(scope="module")
def opened(report):
    with browser.opened(report) as page:
        yield page


def test_boxes_and_points_lie_within_a_pixel_of_where_they_are(opened):
    card = opened.locator(".sample", has_text="shapes.jsonl, line 2").first
    picture = card.locator("svg image").bounding_box()
    scale = picture["width"] / 120, picture["height"] / 60
    box = card.locator("svg rect").bounding_box()
    # the middle of a line of two pixels
    corners = (box["x"] + 1, box["y"] + 1, box["x"] + box["width"] - 1, box["y"] + box["height"] - 1)
    for found, value, axis in zip(corners, BOX, (0, 1, 0, 1), strict=True):
        start = (picture["x"], picture["y"])[axis]
        assert found == pytest.approx(start + value * scale[axis], abs=1)
    point = card.locator("svg circle").bounding_box()
    assert point["x"] + point["width"] / 2 == pytest.approx(picture["x"] + POINT[0] * scale[0], abs=1)
    assert point["y"] + point["height"] / 2 == pytest.approx(picture["y"] + POINT[1] * scale[1], abs=1)


@pytest.mark.parametrize("width", [1300, 420])
def test_nothing_sticks_out_of_the_page(opened, width):
    opened.set_viewport_size({"width": width, "height": 900})
    for kind in (".box", ".pair", "h2", "h3", ".tokens", "nav a", ".ticks span"):
        for box in (one.bounding_box() for one in opened.locator(kind).all()):
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width, kind
    opened.set_viewport_size({"width": 1300, "height": 900})


def test_links_at_the_top_lead_to_the_parts(opened):
    links = opened.locator("nav a")
    assert links.count() >= 4
    for link in links.all():
        target = opened.locator(link.get_attribute("href"))
        assert target.count() == 1
        link.click()
        assert target.bounding_box()["y"] < 900
    assert "shapes.jsonl" in opened.locator("h3", has_text="Samples of").inner_text()
    assert opened.locator("div.fault", has_text="unknown role 'nobody'").count() == 1
