"""Rewards from a second process: that dies, is slow, is full, knows no key or no picture."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from jvlm.errors import UserError
from jvlm.rl.rewards.client import ClientConfig, RewardClient
from jvlm.rl.rewards.shortage import Shortage
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rewards.wire import item_values
from tests.support import ROOT

KEY = "a-key-of-sixteen-letters"
PLUGIN = """
import time

def wait(completions, seconds, **_):
    for value in seconds:
        time.sleep(value or 0)
    return [1.0] * len(completions)

def look(completions, images, **_):
    return [len(image[0]) / 1000 for image in images]

def fail(completions, **_):
    raise RuntimeError("broken")

def lack(completions, **_):
    return [None] * len(completions)
"""


class Server:
    """``jvlm reward-serve`` as a process that can be killed and started again at its address."""

    def __init__(self, folder, *words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "plugin.py").write_text(PLUGIN)
        (folder / "keys").write_text(f"trainer {KEY}\n")
        tasks = {name: {"plugin": f"plugin.py:{name}"} for name in ("wait", "look", "fail", "lack")}
        (folder / "rewards.json").write_text(json.dumps({**tasks, "count": {"rule": "count"}}))
        self.words = ["--rewards", str(folder / "rewards.json"), "--api_key_file", str(folder / "keys"), *words]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "jvlm.cli", "reward-serve", "--port", str(self.port), *self.words]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait(self):
        """Return once it answers."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.stderr.read()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=60)[1]

    def client(self, **settings):
        return RewardClient(ClientConfig(self.url, **{"key": KEY, "pause": 0.05, "longest_pause": 0.2} | settings))

    def post(self, path, values, key=KEY):
        """Return (status, JSON, headers) of a request that no client of ours makes."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = values if isinstance(values, bytes) else json.dumps(values).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=30) as answer:
                return answer.status, json.loads(answer.read()), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), error.headers


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    words = ["--max_queue", "8", "--workers", "2", "--default_task", "count"]
    server = Server(tmp_path_factory.mktemp("rewards"), *words).wait()
    yield server
    assert KEY not in server.stop()


def _count(name, answer="7", gold=7):
    return RewardItem(name, "count", answer, gold=gold)


def _wait(name, seconds):
    return RewardItem(name, "wait", "x", columns={"seconds": seconds})


def test_rewards_come_in_the_order_of_the_items_and_failures_are_missing(server):
    items = [_count("a"), RewardItem("b", "fail", "x"), _count("c", "8"), RewardItem("d", "lack", "x")]
    items.append(_count("e", gold="many"))
    with server.client() as client:
        scores = client.scores(items)
        assert [score.value for score in scores] == [1, None, 0, None, None]
        assert [score.reason for score in scores] == ["ok", "service_error", "wrong", "service_error", "gold_unusable"]
        assert "plugin.py:fail raised RuntimeError: broken" in scores[1].parsed
        assert client.missing == {"service_error": 2, "gold_unusable": 1}
        assert list(client.missing_ids) == ["b", "d", "e"]
        client.check_service([(_count("a"), 1), (_count("b", "8"), 0)])
        with pytest.raises(UserError, match=r"item b: the reward must be 1 and is 0\.0 \(wrong"):
            client.check_service([(_count("b", "8"), 1)])
        with pytest.raises(UserError, match="has no task 'poem'; it has count"):
            client.check_service([(RewardItem("p", "poem", "x"), 1)])


def test_pictures_are_sent_once(server):
    sent = []
    with server.client() as client:
        original = client._send

        def send(method, path, *rest):
            sent.append(method)
            return original(method, path, *rest)

        client._send = send
        items = [RewardItem(str(n), "look", "x", images=(b"p" * 500,)) for n in range(3)]
        for _ in range(2):
            assert [score.value for score in client.scores(items)] == [0.5] * 3
    assert sent == ["POST", "PUT", "POST", "POST"]


def test_messages_name_no_file_to_the_server_and_videos_are_refused():
    image, video = {"type": "image", "image": "/home/me/x.png"}, {"type": "video", "video": "x.mp4"}
    asked = {"role": "user", "content": [image, {"type": "text", "text": "How many?"}]}
    values = item_values(RewardItem("a", "count", "7", messages=(asked,), images=(b"x",)))
    assert values["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "How many?"}]
    with pytest.raises(UserError, match=r"item a, messages: .* not 'video'"):
        item_values(RewardItem("a", "count", "7", messages=({"role": "user", "content": [video]},)))


def test_a_wrong_key_is_an_error_and_no_reward(server):
    with server.client(key="another-key-of-letters") as client:
        with pytest.raises(UserError, match="refused the request: 401 a valid key is needed"):
            client.scores([_count("a")])
        with pytest.raises(UserError, match="401"):
            client.describe()
    assert "another-key" not in repr(client.config)


def test_a_slow_server_makes_rewards_missing_at_the_deadline(server):
    with server.client(deadline=0.4) as client:
        began = time.monotonic()
        score = client.scores([_wait("slow", 3.0)])[0]
        assert time.monotonic() - began < 2.5
        assert (score.value, score.reason) == (None, "service_error")
        assert list(client.missing_ids) == ["slow"]


def test_a_try_that_takes_too_long_is_made_again_and_judged_once(server):
    with server.client(timeout=0.3, deadline=20) as client:
        assert client.scores([_wait("again", 1.0)])[0].value == 1
        assert client.retries >= 2  # had it begun anew each time, none would have come to an end


def test_a_full_server_sends_away_and_the_client_comes_again(server):
    with server.client(concurrency=6, batch=4, deadline=60) as client:
        scores = client.scores([_wait(f"w{n}", 0.05) for n in range(24)])
        assert [score.value for score in scores] == [1] * 24
        assert client.retries > 0


def test_no_more_requests_are_on_their_way_than_allowed(server):
    with server.client(concurrency=1, batch=1) as client:
        futures, began = [], time.monotonic()
        for n in range(4):
            futures.append(client.submit([_wait(f"b{n}", 0.3)]))
        assert time.monotonic() - began > 0.5  # the third and fourth had to wait
        assert all(future.result()[0].value == 1 for future in futures)


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_judges_is_asked_again_when_it_is_back(tmp_path):
    server = Server(tmp_path).wait()
    try:
        with server.client(deadline=90) as client:
            future = client.submit([_wait("a", 1.5), _count("b", "8")])
            time.sleep(0.4)
            assert not future.done()
            server.kill()
            server.start()
            assert [score.value for score in future.result(timeout=90)] == [1, 0]
            assert client.retries > 0
            assert not client.missing
    finally:
        server.kill()


def test_a_server_that_stays_dead_makes_rewards_missing(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with RewardClient(ClientConfig(f"http://127.0.0.1:{port}", deadline=0.3, pause=0.05)) as client:
        scores = client.scores([_count("a"), _count("b")])
        assert [(score.value, score.reason) for score in scores] == [(None, "service_error")] * 2
        assert "ConnectionRefusedError" in scores[0].parsed


_GOOD = {"id": "1", "items": [{"id": "a", "task": "count", "answer": "7", "gold": 7}]}


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"answer": 7}, 400, "items[0].answer"),
        ({"wrong": 1}, 400, "items[0].wrong"),
        ({"task": "poem"}, 400, "'poem' has no reward"),
        ({"images": ["/etc/passwd"]}, 400, "items[0].images[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/x"}]}]}, 400, "items[0].messages[0]"),
        ({"images": ["sha256:" + "0" * 64]}, 409, "pictures are unknown"),
    ],
)
def test_a_malformed_item_is_named_with_its_field(server, change, status, message):
    found, body, _ = server.post("/v1/reward", {"id": "1", "items": [_GOOD["items"][0] | change]})
    assert found == status
    assert message in body["error"]["message"] + str(body["error"]["param"])


def test_other_requests_that_are_refused(server):
    assert server.post("/v1/reward", {"id": "2", "items": _GOOD["items"] * 257})[0] == 413
    assert server.post("/v1/reward", {"id": "2", "items": _GOOD["items"] * 2})[0] == 400
    assert server.post("/v1/reward", b"{")[0] == 400
    assert server.post("/v1/reward", b'{"id": "2", "items": [NaN]}')[0] == 400
    assert server.post("/v1/reward", _GOOD, key="x")[0] == 401
    assert server.post("/v1/blobs/" + "0" * 64, b"x")[0] == 405
    request = urllib.request.Request(
        f"{server.url}/v1/blobs/{'0' * 64}", b"x", {"Authorization": f"Bearer {KEY}"}, method="PUT"
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_the_same_request_has_the_same_answer_and_its_id_is_taken(server):
    first = server.post("/v1/reward", _GOOD | {"id": "same"})
    again = server.post("/v1/reward", _GOOD | {"id": "same", "deadline_ms": 5})
    assert first[:2] == again[:2]
    assert first[1]["results"][0]["value"] == 1
    other = {"id": "same", "items": [_GOOD["items"][0] | {"answer": "8"}]}
    assert server.post("/v1/reward", other)[1]["error"]["param"] == "id"


def test_openrlhf_and_slime_are_answered_and_a_missing_reward_is_no_number(server):
    asked = {"query": ["How many?7", "How many?8"], "prompts": ["How many?"] * 2, "labels": [7, 7]}
    status, body, _ = server.post("/get_reward", asked)
    assert (status, body["rewards"]) == (200, [1, 0])
    assert server.post("/rm", {"prompt": "How many?", "response": "7", "label": 7})[:2] == (200, 1)
    assert server.post("/get_reward", asked | {"labels": [7, "many"]})[0] == 503
    assert server.post("/get_reward", asked | {"labels": [7]})[0] == 400


class _Odd:
    """A server that answers every request with the same bytes."""

    def __init__(self, body, status=200):
        self._listener = socket.create_server(("127.0.0.1", 0))
        head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self._data = head.encode() + body
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(self._data)

    def close(self):
        self._listener.close()


@pytest.mark.parametrize(
    ("body", "status", "match"),
    [
        (b"not JSON", 200, "not of the protocol"),
        (b"[]", 200, "not of the protocol"),
        (b'{"id": "x", "results": []}', 200, "not those of the items"),
        (
            b'{"id": "fixed", "results": [{"id": "a", "value": 2, "reason": "ok"}]}',
            200,
            "2 is not a number from 0 to 1",
        ),
        (b'{"id": "fixed", "results": [{"id": "a", "value": NaN, "reason": "ok"}]}', 200, "nan is not a number"),
        (b'{"id": "fixed", "results": [{"id": "a", "value": true, "reason": "ok"}]}', 200, "True is not a number"),
        (b'{"error": {"message": "judge is unfit"}}', 422, "judge is unfit"),
    ],
)
def test_an_answer_against_the_protocol_is_an_error_and_no_reward(monkeypatch, body, status, match):
    monkeypatch.setattr("jvlm.rl.rewards.client.uuid.uuid4", lambda: "fixed")
    odd = _Odd(body, status)
    try:
        with RewardClient(ClientConfig(odd.url, deadline=5)) as client, pytest.raises(UserError, match=match):
            client.scores([_count("a")])
    finally:
        odd.close()


def test_a_server_with_a_bug_makes_rewards_missing():
    odd = _Odd(b"oops", 500)
    try:
        with RewardClient(ClientConfig(odd.url, deadline=5)) as client:
            assert client.scores([_count("a")])[0].value is None
            assert client.retries == 0
    finally:
        odd.close()


def test_a_run_stops_where_too_many_groups_have_no_reward():
    shortage = Shortage(0.01, 100)
    for _ in range(300):
        shortage.note(64, 0)
    for _ in range(64):
        shortage.note(64, 1)
    with pytest.raises(UserError, match="65 groups of answers in 100 steps had no reward"):
        shortage.note(64, 1)
    with pytest.raises(UserError, match=r"in 1 steps .*service_error"):
        Shortage(0.01, 50).note(64, 64, "service_error")


def test_a_server_for_other_machines_needs_keys():
    from jvlm.cli import reward_serve

    with pytest.raises(UserError, match="there are no keys"):
        reward_serve.run(["--host", "0.0.0.0"])
    with pytest.raises(UserError, match="--default_task poem has no reward"):
        reward_serve.run(["--default_task", "poem"])
