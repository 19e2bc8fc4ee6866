"""The page of a step shows every group's pictures, boxes, answers and rewards, and asks the network for nothing."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import re

import pytest
from PIL import Image

from jvlm import cli
from jvlm.rl import samples, step_log
from jvlm.rl.records import AnswerRecord, GroupRecord
from jvlm.rl.rewards.config import rules
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rollout_files import ROLLOUTS, RolloutWriter
from tests import browser
from tests.rl.test_rollout_files import PROMPT

HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script>"><img src=http://evil.example/y>'
SIZE = (120, 80)  # of the picture in the numbers of the boxes


def picture(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(out, "PNG")
    return out.getvalue()


BOXES = ([10, 10, 60, 50], [12, 8, 70, 55], [0, 0, 120, 80], [90, 60, 110, 75])
GOLD = [12, 10, 60, 50]


def boxes_group(serial, *, selected=True):
    item = dataclasses.replace(
        PROMPT, gold=[GOLD], columns={"size": list(SIZE)}, messages=({"role": "user", "content": "<image>where?"},)
    )
    texts = [f"<think>{HOSTILE}</think>{box}" for box in BOXES]
    with rules() as router:
        scores = router.scores([dataclasses.replace(item, answer=text) for text in texts])
    answers = [
        AnswerRecord(
            (5, 6, 2), (-0.1,) * 3, (0.3,) * 3, (0,) * 3, text, "stop", score.value, score.reason, score.parsed
        )
        for text, score in zip(texts, scores, strict=True)
    ]
    if selected:
        answers = [dataclasses.replace(a, shaped=a.reward, advantage=n - 1.5) for n, a in enumerate(answers)]
    return GroupRecord(serial, 7, PROMPT.id, "boxes", 0, False, 9, tuple(answers), selected=selected), item


def text_group(serial, reward):
    item = RewardItem("b.jsonl, line 2", "text", "", gold="two", messages=({"role": "user", "content": HOSTILE},))
    answers = tuple(
        AnswerRecord((5, 2), (-0.1,) * 2, (), (0,) * 2, HOSTILE, "stop", value, "wrong") for value in (0.0, reward)
    )
    return GroupRecord(serial, 1, item.id, "text", 0, True, 9, answers), item


@pytest.fixture
def run(tmp_path):
    """A run of two steps."""
    writer = RolloutWriter(tmp_path / ROLLOUTS)
    for step in (1, 2):
        groups = [boxes_group(10 * step), boxes_group(10 * step + 1, selected=False), text_group(10 * step + 2, None)]
        for group, item in groups:
            writer.append(step, group, item, [picture("navy")] if group.task == "boxes" else [])
        writer.finish_step(step, step_log.values_of([group for group, _ in groups]))
    return tmp_path


class Tags(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of the style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        self.text += "" if self.open == "style" else data


def test_the_page_has_all_boxes_of_a_group_with_rewards_and_reasons_and_loads_nothing(run):
    assert cli.main(["rl-samples", str(run), "--step", "1"]) == 0
    page = Tags((run / samples.SAMPLES).read_text())
    assert "Rollouts of step 1" in page.text
    drawn = [{k: float(v[k]) for k in ("x", "y", "width", "height")} for tag, v in page.tags if tag == "rect"]
    own = [{"x": b[0], "y": b[1], "width": b[2] - b[0], "height": b[3] - b[1]} for b in (*BOXES, GOLD)]
    assert drawn == own * 2
    views = [values["viewbox"] for tag, values in page.tags if tag == "svg"]
    assert views == ["0 0 120.0 80.0"] * 2
    colours = [values["stroke"] for tag, values in page.tags if tag == "rect"][:4]
    hues = [int(re.match(r"hsl\((\d+) ", colour)[1]) for colour in colours]
    assert hues == sorted(hues)  # by advantage, which rises in the fixture
    assert hues[0] < hues[-1]
    loaded = [v for _, values in page.tags for n, v in values.items() if n in ("src", "href", "data", "srcset")]
    assert loaded
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object"}
    assert page.text.count(HOSTILE) == 4 * 2 + 2 + 1  # thinking of boxes; answers and the question of text
    group, _ = boxes_group(10)
    for answer in group.answers:
        assert f"{answer.reward:.3f}" in page.text
    assert "right: [[12, 10, 60, 50]]" in page.text


def test_the_last_step_is_the_default_and_other_files_are_not_overwritten(run, capsys):
    target = run / "look.html"
    assert cli.main(["rl-samples", str(run), "--output", str(target)]) == 0
    assert "Rollouts of step 2" in target.read_text()
    (run / "notes.html").write_text("mine")
    for words in (["--output", str(run / "notes.html")], ["--step", "9"]):
        assert cli.main(["rl-samples", str(run), *words]) == 2
    assert (run / "notes.html").read_text() == "mine"
    assert cli.main(["rl-samples", str(run / "nothing")]) == 2
    assert "holds no rollouts" in capsys.readouterr().err


def test_groups_of_every_task_are_shown_the_worst_and_the_best_first_and_few_of_a_large_step(run):
    def one(serial, task, reward, selected=True):
        group, item = text_group(serial, reward)
        group = dataclasses.replace(group, task=task, selected=selected)
        return samples.StoredGroup(1, group, dataclasses.replace(item, task=task))

    groups = [one(n, "a", n / 100) for n in range(1, 40)] + [one(100, "b", 0.5), one(101, "a", 0.0, selected=False)]
    order = [stored.group.serial for stored in samples.chosen(groups)]
    assert order[:6] == [1, 100, 39, 2, 38, 3]
    assert len(order) == 24
    assert samples.chosen(groups, 100)[-1].group.serial == 101
    big = b"\x89PNG" + bytes(200_000)
    whole = samples.render(1, groups, lambda _: [big], {}, largest=10**9)
    small = samples.render(1, groups, lambda _: [big], {}, largest=2_000_000)
    assert len(whole) > 6_000_000 > 2_000_000 >= len(small)
    assert 0 < small.count(b"<section") < whole.count(b"<section") == 24


def test_rewards_of_a_run_are_computed_again(run, capsys):
    # those of the text group are not what a reward would give: the only ones that differ
    assert cli.main(["rl-rescore", str(run), "--steps", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("boxes: 8 of 8 rewards are the stored ones; mean 0.")
    assert lines[1].startswith("text: 1 of 2 rewards are the stored ones")
    assert "group 12, answer 1: None (wrong) is 0.0 (wrong) now" in lines[2]
    (run / "other.json").write_text(
        '{"boxes": {"rule": "boxes", "options": {"overlap": "iou"}}, "text": {"rule": "text"}}'
    )
    assert cli.main(["rl-rescore", str(run), "--rewards", str(run / "other.json")]) == 1
    iou = 48 * 40 / (50 * 40)  # of the first box
    assert f"({iou}" in (found := capsys.readouterr().out) or f"is {iou}" in found
    assert "boxes: 0 of 16" in found


@pytest.mark.slow
def test_chromium_draws_the_page_and_its_filter_without_an_error(run):
    cli.main(["rl-samples", str(run), "--step", "1"])
    with browser.chromium() as started:
        page = started.new_context(viewport={"width": 1200, "height": 900}, offline=True).new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.goto((run / samples.SAMPLES).as_uri())
        assert page.locator(".group:visible").count() == 3
        box, image = page.locator("rect.gold").first.bounding_box(), page.locator("svg image").first.bounding_box()
        for side, (low, high), whole in (("x", (12, 60), 120), ("y", (10, 50), 80)):
            length = "width" if side == "x" else "height"
            scale = image[length] / whole
            assert box[side] - image[side] == pytest.approx(low * scale, abs=1.5)
            assert box[length] == pytest.approx((high - low) * scale, abs=3)
        page.get_by_label("text").check()
        assert page.locator(".group:visible").count() == 1
        page.get_by_label("boxes").check()
        page.locator("summary").first.click()
        assert page.get_by_text("evil.example").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert errors == []
