"""The report in headless Chromium, from a file: filters, boxes, several models; no script, no network."""

from __future__ import annotations

import pytest

from jvlm import cli
from jvlm.evaluation import registry
from jvlm.evaluation.run import Settings, evaluate
from tests import browser
from tests.evaluation import benchmarks
from tests.evaluation.benchmarks import Scripted

pytestmark = pytest.mark.slow
TASKS = registry.choose(["docvqa_val,screenspot"], registry.tasks())


def good(text):
    if "match the command" in text:
        return '[{"bbox_2d": [30, 2, 50, 10], "label": "press"}]'
    return text.split("number ")[1].split("?")[0].join(("number ", "")) if "number 5" not in text else "<b>no</b>"


def poor(text):
    if "match the command" in text:
        return "nowhere" if "press 1" in text else "[4, 20]"
    return good(text) if "number 1?" in text else "no"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of two models on two tasks."""
    folder = tmp_path_factory.mktemp("scores")
    benchmarks.docvqa(folder / "data")
    benchmarks.screenspot(folder / "data")
    for name, answer in (("good", good), ("poor", poor)):
        evaluate(Scripted(answer, name=name), TASKS, folder / "data", folder / name, Settings())
    words = ["evaluate", "--report", str(folder / "good"), str(folder / "poor"), "--output", str(folder)]
    assert cli.main(words) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(report):
    with browser.opened(report) as opened:
        yield opened


@pytest.fixture(autouse=True)
def everything(page):
    yield
    for name in ("state", "task", "reason", "model"):
        page.check(f"#{name}-all")


def expect(locator):
    from playwright.sync_api import expect as expected

    return expected(locator)


def test_both_models_stand_side_by_side_with_intervals_and_published_scores(page):
    rows = page.locator("#scores tr")
    expect(rows.nth(0).locator("th")).to_contain_text(["task", "good", "poor", "asked"])
    cells = rows.filter(has_text="docvqa_val").locator("td")
    expect(cells.nth(1)).to_contain_text("83.3")
    expect(cells.nth(2)).to_contain_text("16.7")
    expect(cells.nth(1).locator("small")).to_contain_text("50.0")
    expect(cells.nth(7)).to_contain_text("MiMo-VL-7B-RL 95.7")
    expect(rows.filter(has_text="screenspot").locator("td").nth(4)).to_have_text("0 / 1")


def test_filters_hide_and_show_samples_without_a_script(page):
    shown, questions = page.locator(".sample:visible"), page.locator(".question:visible")
    expect(shown).to_have_count(18)
    page.check("#state-wrong")
    expect(shown).to_have_count(9)
    page.check("#model-1")
    expect(shown).to_have_count(1)
    expect(questions).to_have_count(1)
    expect(questions).to_contain_text("docvqa_val · 5")
    expect(shown).to_contain_text("good · wrong")
    expect(shown.locator("p b")).to_have_text("<b>no</b>")
    page.check("#model-2")
    page.check("#task-2")
    expect(shown).to_have_count(3)
    expect(shown.filter(has_text="unparsed")).to_have_count(1)
    page.check("#state-right")
    expect(shown).to_have_count(0)
    expect(questions).to_have_count(0)


def test_answers_of_both_models_to_a_question_stand_beside_each_other_and_can_be_shown_where_they_differ(page):
    shown, questions = page.locator(".sample:visible"), page.locator(".question:visible")
    titles = [text.split(" · ") for text in shown.locator("small").all_inner_texts()]
    assert [title[0] for title in titles] == ["good", "poor"] * 9
    expect(questions).to_have_count(9)
    boxes = [one.bounding_box() for one in questions.first.locator(".sample").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    page.check("#state-differ")
    expect(shown).to_have_count(14)  # both are wrong about number 5, and right about number 1
    expect(questions).to_have_count(7)
    page.check("#task-2")
    page.locator(".filters label", has_text="unparsed").locator("input").check()
    expect(shown).to_have_count(1)


def test_means_of_groups_and_how_scores_were_made_are_on_the_page(page):
    means = page.locator("#means .row")
    expect(means.filter(has_text="document").locator(".value")).to_have_text(["83.3 of 1 task", "16.7 of 1 task"])
    made = page.locator("#measured tr")
    expect(made.nth(1)).to_be_hidden()
    page.locator("summary").click()
    expect(made).to_have_count(5)
    for words in ("version 1", "max_new_tokens 256", "hash "):
        expect(made.nth(1)).to_contain_text(words)
    expect(page.locator("#scores .note", has_text="published scores are judged by a model")).to_have_count(1)


def test_boxes_of_answer_and_reference_lie_on_the_picture_where_they_are(page):
    page.check("#task-2")
    page.check("#model-1")
    card = page.locator(".sample:visible").first
    picture = card.locator("svg image").bounding_box()
    assert picture["width"] / picture["height"] == pytest.approx(2, rel=0.05)
    for kind, box in (("gold", (28, 0, 56, 14)), ("answer", None)):
        found = card.locator(f"svg .{kind}").bounding_box()
        if box is None:
            centre = (found["x"] + found["width"] / 2, found["y"] + found["height"] / 2)
            assert centre[0] == pytest.approx(picture["x"] + picture["width"] * 40 / 56, abs=4)
            assert centre[1] == pytest.approx(picture["y"] + picture["height"] * 6 / 28, abs=4)
        else:
            assert found["x"] == pytest.approx(picture["x"] + picture["width"] * box[0] / 56, abs=4)
            assert found["width"] == pytest.approx(picture["width"] * (box[2] - box[0]) / 56, abs=6)
            assert found["height"] == pytest.approx(picture["height"] * (box[3] - box[1]) / 28, abs=6)
    assert card.locator("svg .gold").get_attribute("stroke") != card.locator("svg .answer").get_attribute("stroke")


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 400, "height": 800})
    for name in (".wide", ".row", ".filters", ".cards", ".sample"):
        box = page.locator(name).first.bounding_box()
        assert box["x"] + box["width"] <= 400, name
    page.set_viewport_size({"width": 1300, "height": 900})
