"""The server around the real engine and a small random model."""

import base64
import io
import threading

import httpx2
import pytest

import jvlm
from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig
from tests.server.scripted import MODEL, Served, until
from tests.support import picture


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def served(tiny):
    sizes = EngineConfig(max_slots=4, max_model_len=512, prefill_tokens=(128,), encode_patches=(256,))
    engine = Engine(tiny.model, tiny.processor, sizes)
    with Served(engine, tiny.processor, vocabulary=352, max_model_len=512) as server:
        yield server


def expected(tiny, text, images=()):
    tags = "<image>" * len(images)
    example = {"messages": [{"role": "user", "content": tags + text}], "images": list(images)}
    return jvlm.generate(tiny.model, tiny.processor, [example], max_new_tokens=6)[0]


def parts(text, images=()):
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def test_answers_are_those_of_generate_alone_and_beside_others_streamed_and_not(served, tiny):
    image = picture(80, 60)
    asked = [("what is it?", ()), ("where is the cat?", (image,)), ("count them", (picture(60, 90, 1),))]
    wanted = [expected(tiny, text, images) for text, images in asked]
    found = {}

    def ask(number):
        text, images = asked[number]
        options = {"temperature": 0, "max_tokens": 6}
        whole = served.chat(parts(text, images), **options)
        assert whole.status_code == 200, whole.text
        events = served.chat_stream(parts(text, images), **options)
        streamed = "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1])
        found[number] = whole.json()["choices"][0]["message"]["content"], streamed

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert [found[number] for number in range(len(asked))] == [(text, text) for text in wanted]


def test_the_log_probabilities_of_a_prompt_are_the_models(served):
    body = {"model": MODEL, "prompt": "the cat", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = served.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    found = answer.json()["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])
    whole = served.post("/v1/completions", {**body, "echo": False, "prompt": "the cat"}).json()
    assert found["token_logprobs"][-1] == pytest.approx(whole["choices"][0]["logprobs"]["token_logprobs"][0], abs=1e-4)


def test_a_choice_is_one_of_those_asked_for_and_a_grammar_that_is_none_is_refused(served):
    answer = served.chat("which?", structured_outputs={"choice": ["yes", "no"]}, temperature=1, max_tokens=8)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] in ("yes", "no")
    assert served.chat("which?", guided_grammar="start: (", max_tokens=8).status_code == 400


def test_clients_that_go_away_leave_nothing_behind(served):
    body = {"model": MODEL, "messages": parts("hi"), "stream": True, "max_tokens": 400, "ignore_eos": True}
    for _ in range(5):
        with httpx2.stream("POST", served.url + "/v1/chat/completions", json=body, timeout=30) as answer:
            next(answer.iter_bytes())
    with until(20) as wait:
        wait(lambda: served.async_engine.in_flight == 0 and not served.engine.has_work)
    stats = served.engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)
    assert served.chat(max_tokens=2).status_code == 200
