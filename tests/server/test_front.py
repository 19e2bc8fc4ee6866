"""Several servers behind one address."""

import asyncio
import itertools
import json
import socket
import threading

import httpx2
import pytest
import uvicorn

from jvlm.errors import UserError
from jvlm.server import front
from jvlm.server.replicas import device_shares
from jvlm.server.routing import Router, keys_of
from jvlm.server.settings import ServerSettings
from tests.server.process import ONE_AT_A_TIME, ServerProcess, write_model
from tests.server.scripted import MODEL, until
from tests.server.test_media import PICTURE, asked, data_url

KEY = "a-key-of-twenty-letters"


class Front:
    """The front before servers, in a thread."""

    def __init__(self, urls, **settings):
        self.app = front.build(urls, ServerSettings("front", **settings))
        config = uvicorn.Config(self.app, log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=asyncio.run, args=(self._server.serve([self._socket]),), daemon=True)

    def __enter__(self):
        self._thread.start()
        with until(10) as wait:
            wait(lambda: self._server.started and httpx2.get(f"{self.url}/health").status_code == 200)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(20)

    @property
    def backends(self):
        return self.app._app.router.backends

    def chat(self, messages="hi", headers=None, **fields):
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"model": MODEL, "messages": messages, **fields}
        return httpx2.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def body(text, url=None):
    parts = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}).encode()


def healthy(count, **settings):
    router = Router([f"http://{k}" for k in range(count)], **settings)
    for backend in router.backends:
        backend.healthy = True
    return router


def test_a_picture_comes_back_to_where_it_is_known_and_others_are_spread():
    router = healthy(3)
    first = router.choose(keys_of(body("what is it?", "data:a")))
    first.in_flight = 2
    other = router.choose(keys_of(body("what is this?", "data:b")))
    assert other is not first
    assert router.choose(keys_of(body("and the color?", "data:a"))) is first
    assert router.choose(keys_of(body("and the color?", "data:b"))) is other
    long = "a system prompt that many share " * 20
    shared = router.choose(keys_of(body(long + "one")))
    assert router.choose(keys_of(body(long + "two"))) is shared


def test_a_backend_with_far_more_to_do_gets_nothing_for_its_caches():
    router = healthy(2, imbalance=4)
    first = router.choose(keys_of(body("a", "data:a")))
    first.in_flight = 3
    assert router.choose(keys_of(body("b", "data:a"))) is first
    first.in_flight = 4
    assert router.choose(keys_of(body("c", "data:a"))) is not first


def test_only_healthy_backends_are_chosen_and_bodies_may_be_anything():
    router = healthy(2)
    router.backends[0].healthy = False
    assert router.choose(()) is router.backends[1]
    assert router.choose((), [router.backends[1]]) is None
    for odd in (b"", b"[", b"3", b'{"messages": 3}', b"[" * 10_000, b'{"messages": [null, {"content": {"url": 1}}]}'):
        assert isinstance(keys_of(odd), tuple)
    assert keys_of(body("a", "data:a"))[0] != keys_of(body("a", "data:b"))[0]


def test_chips_are_shared_evenly(tmp_path):
    names = [f"{k}.0" for k in range(4)]
    for name in names:
        (tmp_path / "gpus" / name).mkdir(parents=True)
    proc, none = str(tmp_path / "gpus"), str(tmp_path / "none")
    assert device_shares(2, {}, proc=proc, dev=none) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
    ]
    visible = {"CUDA_VISIBLE_DEVICES": "5,7"}
    assert [one["CUDA_VISIBLE_DEVICES"] for one in device_shares(2, visible, proc=proc, dev=none)] == ["5", "7"]
    assert device_shares(3, {"JAX_PLATFORMS": "cpu"}, proc=proc, dev=none) == [{}, {}, {}]
    with pytest.raises(UserError, match="3 cannot share 4"):
        device_shares(3, {}, proc=proc, dev=none)
    for k in range(4):
        (tmp_path / f"accel{k}").touch()
    shares = device_shares(4, {}, proc=none, dev=str(tmp_path))
    assert [one["TPU_VISIBLE_CHIPS"] for one in shares] == ["0", "1", "2", "3"]
    assert device_shares(2, {}, proc=none, dev=none) == [{}, {}]


def test_answers_streams_errors_and_numbers_come_through(serve):
    one, two = serve("the answer is two."), serve("the answer is two.")
    with Front([one.url, two.url]) as door:
        assert door.chat().json()["choices"][0]["message"]["content"] == "the answer is two."
        with httpx2.stream(
            "POST",
            f"{door.url}/v1/chat/completions",
            json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True},
        ) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            text = answer.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert door.chat(temperature=-1).json()["error"]["param"] == "temperature"
        assert door.chat(asked(data_url(PICTURE))).json()["images_size"] == [[80, 60]]
        assert httpx2.get(f"{door.url}/v1/models").json()["data"][0]["id"] == MODEL
        assert httpx2.get(f"{door.url}/v1/nothing").status_code == 404
        assert "Content-Security-Policy" in httpx2.get(f"{door.url}/").headers
        numbers = httpx2.get(f"{door.url}/metrics").text
        for k in (0, 1):
            assert f'vllm:num_requests_running{{engine="{k}",model_name="{MODEL}"}}' in numbers
        assert numbers.count("# TYPE vllm:num_requests_running gauge") == 1
        assert httpx2.get(f"{door.url}/load").json() == {"server_load": 0}


def test_a_backend_that_is_gone_is_passed_over(serve):
    one, two = serve(), serve()
    with Front([one.url, two.url]) as door:
        with until(10) as wait:
            wait(lambda: all(backend.healthy for backend in door.backends))
        one.__exit__()
        assert [door.chat(f"question {k}").status_code for k in range(6)] == [200] * 6
        two.__exit__()
        answer = door.chat()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_client_that_goes_away_frees_its_request_behind_the_front(serve):
    served = serve("word " * 50)
    with Front([served.url]) as door:
        served.engine.hold.clear()
        for stream in (True, False):
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(f"{door.url}/v1/chat/completions", json=body, timeout=0.4)
        with until(10) as wait:
            wait(lambda: served.async_engine.in_flight == 0)
            served.engine.hold.set()
            wait(lambda: not served.engine.has_work)
            wait(lambda: httpx2.get(f"{door.url}/load").json() == {"server_load": 0})
        assert door.chat(max_tokens=1).status_code == 200


def test_keys_are_asked_for_before_anything_is_passed_on(serve):
    served = serve(keys=(("ann", KEY),))
    with Front([served.url], keys=(("ann", KEY),)) as door:
        for path in ("/v1/models", "/metrics", "/load", "/v1/chat/completions"):
            assert httpx2.get(door.url + path).status_code == 401
        good = {"authorization": f"Bearer {KEY}"}
        assert door.chat(headers=good).status_code == 200
        assert "vllm:" in httpx2.get(f"{door.url}/metrics", headers=good).text
        assert KEY not in "".join(served.lines)


@pytest.mark.slow
def test_two_engines_of_one_command_answer_alike_and_one_that_dies_is_started_again(tmp_path):
    model = write_model(tmp_path)
    options = ("--data_parallel", "2", "--compile-cache", str(tmp_path / "programs"))
    with ServerProcess(model, *options, sizes=ONE_AT_A_TIME, module="tests.server.short_lived") as server:
        with until(400) as wait:
            wait(lambda: server.get("/metrics").text.count("vllm:num_requests_running{") == 2)
        salts, texts = itertools.count(), set()

        def both_have_answered() -> bool:  # a salt of its own, or one engine gets all: it has the prefix
            answer = server.chat("hi", max_tokens=8, cache_salt=f"salt {next(salts)}")
            assert answer.status_code == 200
            texts.add(answer.json()["choices"][0]["message"]["content"])
            counts = [line for line in server.get("/metrics").text.splitlines() if "generation_tokens_total{" in line]
            assert len(counts) == 2
            return all(float(line.rpartition(" ")[2]) > 0 for line in counts)

        with until(60) as wait:
            wait(both_have_answered)
        assert len(texts) == 1
        children = server.process.children()
        assert len(children) == 2
        ports = [child.cmdline()[child.cmdline().index("--port") + 1] for child in children]
        backends = [f"http://127.0.0.1:{port}" for port in ports]
        with ServerProcess(None, "--backends", *backends) as before:  # as before servers of other hosts
            assert {before.chat("hi", max_tokens=8).json()["choices"][0]["message"]["content"]} == texts
            assert before.get("/metrics").text.count("vllm:num_requests_running{") == 2
        children[0].kill()
        assert [server.chat(f"again {k}").status_code for k in range(6)] == [200] * 6
        with until(400) as wait:
            wait(lambda: len(server.process.children()) == 2 and children[0] not in server.process.children())
            wait(lambda: server.get("/metrics").text.count("vllm:num_requests_running{") == 2)
    assert "started again" in server.log
    assert not any(child.is_running() for child in children)
