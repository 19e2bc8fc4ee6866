"""Bodies that published clients send (bodies/clients.jsonl, media cut), and a thousand that nobody should."""

import json
import random
from pathlib import Path

import psutil
import pytest

from tests.server.scripted import MODEL
from tests.server.test_media import PICTURE, data_url

BODIES = [json.loads(line) for line in (Path(__file__).parent / "bodies" / "clients.jsonl").read_text().splitlines()]
ODD = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "a" * 3000,
    "\u2028",
    [],
    {},
    [[]],
    {"a": None},
    "<|im_end|>",
    "data:,",
    "file:///",
]


def with_media(value):
    """The body with an image in place of those that were cut."""
    if isinstance(value, str):
        return data_url(PICTURE) if value.startswith(("data:", "DATA_")) else value
    if isinstance(value, list):
        return [with_media(item) for item in value]
    return {name: with_media(item) for name, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_what_clients_send_is_answered(serve, number):
    entry = BODIES[number]
    body = with_media(entry["body"])
    served = serve(tools="on")
    if body["model"] != MODEL:
        assert served.post(entry["path"], body).status_code == 404
        return
    # this model's template writes no tools, and its context is shorter than some ask for
    body.pop("tools", None)
    body = {name: min(value, 4096) if name == "max_tokens" else value for name, value in body.items()}
    if body.get("stream"):
        events = served.stream(entry["path"], body)
        assert events[-1] == "[DONE]"
        asked = (body.get("stream_options") or {}).get("include_usage")
        assert bool(asked) == (events[-2]["choices"] == [])
    else:
        assert served.post(entry["path"], body).status_code == 200


def changed(value, rng):
    """The value with something odd in a random place."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        return {**value, name: changed(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], changed(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


@pytest.mark.slow
def test_hundreds_of_malformed_requests_crash_nothing_and_keep_no_memory(serve):
    served, rng, process = serve(), random.Random(0), psutil.Process()
    bodies = [(entry["path"], with_media(entry["body"])) for entry in BODIES]
    statuses, before = set(), 0
    for number in range(700):
        path, body = rng.choice(bodies)
        body = changed(body, rng)
        if isinstance(body, dict):
            body = {**body, "stream": False}
            body.pop("stream_options", None)
        text = json.dumps(body).encode()
        if rng.random() < 0.2:
            place = rng.randrange(len(text))
            text = text[:place] + bytes([rng.randrange(256)]) + text[place + rng.randrange(3) :]
        answer = served.post(path, content=text, headers={"content-type": "application/json"})
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 403, 404), (answer.status_code, text[:500])
        if number == 200:  # caches are filled
            before = process.memory_info().rss
    assert process.memory_info().rss < 1.05 * before
    assert {200, 400} <= statuses
    assert served.get("/health").status_code == 200
    assert served.async_engine.in_flight == 0
    assert served.chat().status_code == 200
