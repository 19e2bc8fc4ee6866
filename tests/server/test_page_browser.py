"""The chat page in headless Chromium, against the real server around a scripted engine."""

from __future__ import annotations

import base64
import io
import json

import httpx2
import pytest
from PIL import Image, ImageDraw

from jvlm.server.page import chat_page
from tests import browser
from tests.server.scripted import until

pytestmark = pytest.mark.slow
SIZE = (300, 200)  # pixels of the test's picture
BOX = (28, 28, 112, 84)  # in pixels that the model sees


def picture(size=SIZE) -> bytes:
    """A scene of a cat's and a dog's place."""
    image = Image.new("RGB", size, "#dfe7ee")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, size[1] * 0.66, size[0], size[1]), fill="#b9c7a3")
    draw.ellipse((size[0] * 0.15, size[1] * 0.3, size[0] * 0.35, size[1] * 0.8), fill="#70543e")
    draw.rectangle((size[0] * 0.6, size[1] * 0.4, size[0] * 0.85, size[1] * 0.8), fill="#c96f4a")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


PNG = {"name": "scene.png", "mimeType": "image/png", "buffer": picture()}
# makes a DataTransfer with the picture in it
TRANSFER = """data => { const transfer = new DataTransfer();
const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
transfer.items.add(new File([bytes], 'dropped.png', {type: 'image/png'})); return transfer; }"""


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


@pytest.fixture
def open_page(chromium):
    """Open the page of a server; every test ends without an error in the console."""
    contexts, errors = [], []

    def start(url, allowed=(), **options):
        context = chromium.new_context(viewport={"width": 1200, "height": 800}, **options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                message.type == "error"
                and not any(words in message.text for words in allowed)
                and errors.append(message.text)
            ),
        )
        page.goto(url + "/")
        return page

    yield start
    for context in contexts:
        context.close()
    assert errors == []


def ask(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answers(page):
    return page.locator("article.assistant > .text")


def expect(locator):
    from playwright.sync_api import expect as expected

    return expected(locator)


def test_an_answer_is_streamed_as_text_with_markup_of_its_own_and_usage(serve, open_page):
    text = (
        "# Two\n\nIt is **two**, see <b>this</b> <img src=x onerror=alert(1)>.\n\n- one\n- two\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('é\u2028')\n```\n\n"
        "[site](https://example.org) [bad](javascript:alert(1))"
    )
    served = serve(text)
    page = open_page(served.url)
    expect(page.locator("#model")).to_have_value("toy-vlm")
    ask(page, "How many?")
    shown = answers(page)
    expect(page.locator("article.assistant .note")).to_contain_text("tokens/s")
    expect(shown.locator("h3")).to_have_text("Two")
    expect(shown.locator("strong")).to_have_text("two")
    expect(shown.locator("li")).to_have_count(2)
    expect(shown.locator("td")).to_have_text(["1", "2"])
    expect(shown.locator("pre code")).to_have_text("print('é\u2028')")
    expect(shown.locator("a")).to_have_count(1)
    expect(shown.locator("b, img, script")).to_have_count(0)
    expect(shown).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("article.user .text")).to_have_text("How many?")
    usage = served.chat("How many?").json()["usage"]
    expect(page.locator("article.assistant .note")).to_contain_text(f"{usage['completion_tokens']} tokens")


def test_pictures_come_by_button_drop_and_paste_and_can_be_removed(serve, open_page):
    served = serve("three pictures.")
    page = open_page(served.url)
    page.set_input_files("#files", [PNG])
    previews = page.locator("#attachments img")
    expect(previews).to_have_count(1)
    data = page.evaluate_handle(TRANSFER, base64.b64encode(PNG["buffer"]).decode())
    page.dispatch_event("#main", "drop", {"dataTransfer": data})
    expect(previews).to_have_count(2)
    page.evaluate(
        """data => document.getElementById('prompt').dispatchEvent(
        new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true}))""",
        data,
    )
    expect(previews).to_have_count(3)
    page.click("#attachments li:first-child .remove")
    expect(previews).to_have_count(2)
    ask(page, "Compare.")
    expect(answers(page)).to_have_text("three pictures.")
    expect(page.locator("article.user img")).to_have_count(2)
    sizes = served.engine.requests[0].example.sizes
    assert [size.original for size in sizes] == [SIZE, SIZE]  # the bytes as they were


@pytest.mark.parametrize(
    "text",
    [
        '```json\n[{"bbox_2d": [28, 28, 112, 84], "label": "2 cats"}]\n```',
        "<ref>2 cats</ref><box>(28,28),(112,84)</box>",
        "<box>[[28, 28, 112, 84]]</box>",
        "They are at [28, 28, 112, 84].",
        "<|object_ref_start|>2 cats<|object_ref_end|><|box_start|>(28,28),(112,84)<|box_end|>",
        "2 cats <28,28,112,84>",
    ],
)
def test_boxes_are_drawn_in_pixels_of_the_original(serve, open_page, text):
    served = serve(text)
    page = open_page(served.url)
    page.set_input_files("#files", [PNG])
    ask(page, "Where?")
    expect(page.locator(".region-list li")).to_have_count(1)
    expect(page.locator("article.assistant .note")).to_contain_text("tokens")
    resized = served.engine.requests[0].example.sizes[0].resized
    assert resized != SIZE
    scale = [SIZE[k % 2] / resized[k % 2] for k in range(4)]
    x1, y1, x2, y2 = (value * by for value, by in zip(BOX, scale, strict=True))
    read = """(canvas, points) => [canvas.width, canvas.height, ...points.map(([x, y]) =>
      canvas.getContext('2d').getImageData(Math.round(x), Math.round(y), 1, 1).data[3])]"""
    # the middles of three sides (the upper one has the label), the middle, and a place outside
    points = [
        [x1, (y1 + y2) / 2],
        [x2, (y1 + y2) / 2],
        [(x1 + x2) / 2, y2],
        [(x1 + x2) / 2, (y1 + y2) / 2],
        [x2 + 30, y2],
    ]
    width, height, *alphas = page.locator("canvas.regions").evaluate(read, points)
    assert (width, height) == SIZE
    assert [alpha > 200 for alpha in alphas] == [True, True, True, False, False]
    page.hover(".region-list li")
    assert 20 < page.locator("canvas.regions").evaluate(read, points)[5] < 80


def test_a_box_is_drawn_while_the_answer_still_comes_and_words_are_streamed(serve, open_page, processor):
    begin = '[{"point_2d": [56, 56], "label": "nose"}, {"bbox_2d": [28, 28, 112, 84], "label": "cat"}'
    served = serve(f"{begin}]\n\nThe end.")
    engine, steps = served.engine, []
    most = len(processor.tokenizer(begin, add_special_tokens=False)["input_ids"])

    def step(step=engine.step):
        steps.append(1)
        if len(steps) == most + 1:
            engine.hold.clear()
        return step()

    engine.step = step
    page = open_page(served.url)
    page.set_input_files("#files", [PNG])
    ask(page, "Where?")
    expect(page.locator(".region-list li")).to_have_count(2)
    expect(page.locator(".region-list li").first).to_contain_text("nose")
    expect(page.locator("#halt")).to_be_visible()
    expect(answers(page)).not_to_contain_text("The end")
    engine.hold.set()
    expect(answers(page)).to_contain_text("The end.")
    expect(page.locator("#send")).to_be_visible()


def test_boxes_are_on_the_picture_that_is_chosen_and_in_the_units_that_are_chosen(serve, open_page):
    served = serve('{"bbox_2d": [500, 500, 1000, 1000]}')
    page = open_page(served.url)
    other = {**PNG, "name": "other.png", "buffer": picture((120, 240))}
    page.set_input_files("#files", [PNG, other])
    page.click("#open-settings")
    page.select_option("#space", "norm1000")
    page.click("text=Done")
    ask(page, "Where?")
    expect(page.locator(".region-list li")).to_have_text(["box (60, 120, 120, 240)"])
    page.select_option("figcaption select", index=0)
    expect(page.locator(".region-list li")).to_have_text(["box (150, 100, 300, 200)"])


def test_stop_ends_the_answer_here_and_in_the_engine(serve, open_page):
    served = serve("word " * 400)
    served.engine.hold.clear()
    page = open_page(served.url)
    ask(page, "Talk.")
    expect(page.locator("#halt")).to_be_visible()
    page.click("#halt")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("article.assistant .note")).to_contain_text("stopped")
    served.engine.hold.set()
    with until() as wait:
        wait(lambda: served.engine.aborted)


def test_regenerate_and_edit_make_versions_that_can_be_gone_through(serve, open_page):
    served = serve("first.", "second.", "third.")
    page = open_page(served.url)
    ask(page, "One?")
    expect(answers(page)).to_have_text("first.")
    page.click("text=Regenerate")
    expect(answers(page)).to_have_text("second.")
    page.click("article.assistant [aria-label='Version before']")
    expect(answers(page)).to_have_text("first.")
    page.click("text=Edit")
    expect(page.locator("#prompt")).to_have_value("One?")
    page.click("#cancel-edit")
    expect(answers(page)).to_have_text("first.")
    expect(page.locator("#prompt")).to_have_value("")
    page.click("text=Edit")
    ask(page, "Two?")
    expect(answers(page)).to_have_text("third.")
    expect(page.locator("article.user .text")).to_have_text("Two?")
    page.click("article.user [aria-label='Version before']")
    expect(page.locator("article.user .text")).to_have_text("One?")


def test_thinking_is_folded_and_settings_reach_the_engine(serve, open_page):
    served = serve("<think>two cats, so</think>two.", reasoning="on")
    page = open_page(served.url)
    page.click("#open-settings")
    page.fill("#temperature", "0.5")
    page.fill("#top_k", "7")
    page.fill("#seed", "11")
    page.fill("#max_tokens", "50")
    page.fill("#system", "Be short.")
    page.fill("#schema", "{")
    expect(page.locator("#schema-error")).to_contain_text("No JSON")
    page.fill("#schema", "")
    page.click("text=Done")
    ask(page, "How many?")
    expect(answers(page)).to_have_text("two.")
    expect(page.locator(".thinking summary")).to_contain_text("Thought")
    expect(page.locator(".thinking-text")).to_be_hidden()
    page.click(".thinking summary")
    expect(page.locator(".thinking-text")).to_have_text("two cats, so")
    sampling = served.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0.5, 7, 11, 50)


def test_a_box_drawn_by_mouse_is_written_into_the_prompt_as_the_model_sees_it(serve, open_page):
    served = serve("a cat.")
    page = open_page(served.url)
    page.set_input_files("#files", [PNG])
    page.fill("#prompt", "What is in")
    page.click("#attachments .thumb")
    frame = page.locator("#viewer-canvas").bounding_box()
    page.mouse.move(frame["x"] + frame["width"] * 0.25, frame["y"] + frame["height"] * 0.25)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] * 0.75, frame["y"] + frame["height"] * 0.5)
    page.mouse.up()
    expect(page.locator("#viewer")).to_be_hidden()
    before, _, numbers = page.input_value("#prompt").partition("[")
    assert before == "What is in "
    url = "data:image/png;base64," + base64.b64encode(PNG["buffer"]).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    told = served.post("/tokenize", {"messages": [{"role": "user", "content": content}]}).json()
    width, height = told["jvlm_processed_size"][0]
    found = json.loads("[" + numbers.strip())
    expected = [width * 0.25, height * 0.25, width * 0.75, height * 0.5]
    assert all(abs(a - b) <= 2 for a, b in zip(found, expected, strict=True))


def test_conversations_stay_are_exported_and_imported_and_the_key_is_not_kept_with_them(serve, open_page, tmp_path):
    key = "k" * 32
    served = serve("kept.", keys=(("me", key),))
    page = open_page(served.url, allowed=("401",))
    expect(page.locator("#status")).to_contain_text("key")
    page.click("#open-settings")
    page.fill("#key", key)
    page.click("text=Done")
    expect(page.locator("#model")).to_have_value("toy-vlm")
    page.set_input_files("#files", [PNG])
    ask(page, "Keep this.")
    expect(answers(page)).to_have_text("kept.")
    page.reload()
    page.click("#conversations .open")
    expect(answers(page)).to_have_text("kept.")
    expect(page.locator("article.user img")).to_have_count(1)
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "export.json"
    download.value.save_as(file)
    assert key not in file.read_text()
    assert page.evaluate("() => JSON.stringify(localStorage)").find(key) < 0
    page.click("#clear")
    expect(page.locator("#conversations li")).to_have_count(0)
    value = json.loads(file.read_text())
    value["conversations"].append({"id": "x", "messages": [{"id": 1}]})
    file.write_text(json.dumps(value))
    page.set_input_files("#import-file", str(file))
    expect(page.locator("#status")).to_contain_text("1 were not in the form")
    expect(answers(page)).to_have_text("kept.")


def test_an_error_of_the_server_is_told_in_the_conversation_and_is_not_sent_back(serve, open_page):
    served = serve("at last.")
    page = open_page(served.url, allowed=("400",))
    page.click("#open-settings")
    page.fill("#max_tokens", "100000")
    page.click("text=Done")
    ask(page, "Hi")
    expect(page.locator("article.assistant .error")).to_contain_text("max_tokens is 100000")
    page.click("#open-settings")
    page.fill("#max_tokens", "")
    page.click("text=Done")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Hi again")
    assert [message["role"] for message in request.value.post_data_json["messages"]] == ["user", "user"]
    expect(answers(page).last).to_have_text("at last.")


def test_the_page_works_below_a_prefix(serve, open_page):
    served = serve("below.")

    def pass_on(route, request):
        path = request.url.split("/models/vlm", 1)[1]
        body = request.post_data_buffer
        headers = {"content-type": "application/json"} if body else {}
        answer = httpx2.request(request.method, served.url + path, content=body, headers=headers)
        route.fulfill(status=answer.status_code, headers=dict(answer.headers), body=answer.content)

    page = open_page(served.url)
    page.context.route("**/models/vlm/**", pass_on)
    page.goto(served.url + "/models/vlm/")
    ask(page, "Hi")
    expect(answers(page)).to_have_text("below.")


def test_the_policy_holds_back_scripts_and_other_places(serve, open_page):
    page = open_page(serve().url, allowed=("Content Security Policy", "violates"))
    assert (
        page.evaluate("""() => { const script = document.createElement('script'); script.textContent = 'window.ran = 1';
        document.body.append(script); return window.ran ?? null; }""")
        is None
    )
    assert (
        page.evaluate("""() => fetch('http://127.0.0.2:9/').then(() => 'sent', error => error.name)""") == "TypeError"
    )
    assert "unsafe" not in chat_page().headers["content-security-policy"]


def test_on_a_phone_nothing_is_wider_than_the_screen_and_everything_is_reached(serve, open_page):
    page = open_page(serve('[{"bbox_2d": [28, 28, 112, 84], "label": "cat"}] ' + "word" * 60).url)
    page.set_viewport_size({"width": 360, "height": 740})
    page.set_input_files("#files", [PNG])
    ask(page, "Where?")
    expect(page.locator("article.assistant .note")).to_contain_text("tokens")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.click("#menu")
    expect(page.locator("#new")).to_be_in_viewport()
    page.click("#new")
    expect(page.locator("#sidebar")).to_be_hidden()
