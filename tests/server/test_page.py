"""The chat page as it is sent: its policy, its size, where it is served."""

import base64
import hashlib
import re

import httpx2
import pytest

from jvlm.server.page import chat_page


@pytest.fixture(scope="module")
def page():
    return chat_page()


@pytest.mark.parametrize(("tag", "directive"), [("script", "script-src"), ("style", "style-src")])
def test_the_policy_allows_the_script_and_the_style_of_the_page_and_nothing_else(page, tag, directive):
    (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.S)
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert page.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_one_small_file_that_needs_no_other_place(page):
    assert len(page.text.encode()) < 150_000
    assert page.text.isascii() or "charset=" in page.text[:200]
    namespaces = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[\w.-]+\.[\w/.-]+", page.text)) <= namespaces
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"'](?!data:)", page.text)
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "style="):
        assert unsafe not in page.text
    assert not re.search(r"\son[a-z]+=", page.text.split("<script>")[0])


def test_every_element_that_the_script_asks_for_is_there_once_and_has_a_label(page):
    markup, script = page.text.split("<script>")
    ids = re.findall(r'\bid="([\w-]+)"', markup)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= set(ids)
    for field in re.findall(r"<(?:input|textarea|select)\b[^>]*>", markup):
        name = re.search(r'id="([\w-]+)"', field)[1]
        before = markup[: markup.index(field)]
        inside_label = before.rfind("<label") > before.rfind("</label>")
        assert inside_label or "aria-label=" in field or f'for="{name}"' in markup, field


def test_the_server_sends_the_page_without_a_key_unless_it_is_switched_off(serve, page):
    served = serve(keys=(("me", "k" * 32),))
    answer = served.get("/")
    assert answer.status_code == 200
    assert answer.text == page.text
    assert answer.headers["content-type"].startswith("text/html")
    assert {name: answer.headers[name] for name in page.headers} == dict(page.headers)
    assert served.get("/v1/models").status_code == 401
    assert serve(page=False).get("/").status_code == 404


def test_tokenize_tells_the_sizes_that_the_page_needs_to_write_a_box(serve, processor):
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (90, 60)).save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    body = httpx2.post(serve().url + "/tokenize", json={"messages": [{"role": "user", "content": content}]}).json()
    assert body["images_size"] == [[90, 60]]
    assert all(side % 28 == 0 for side in body["jvlm_processed_size"][0])
    assert body["jvlm_box_space"] == "resized"
