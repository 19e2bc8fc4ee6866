"""A server process that strangers mean harm to: it reads nothing that it may not, keeps nothing, and goes on."""

import concurrent.futures
import json
import os
import random
import socket
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from tests import support
from tests.server import hostile
from tests.server.process import MODEL, ServerProcess, write_model
from tests.server.scripted import until
from tests.server.test_bodies import BODIES, changed, with_media
from tests.server.test_limits import exchange
from tests.server.test_media import PICTURE, data_url

pytestmark = pytest.mark.slow
SECRET = "the-secret-of-this-machine"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("media")
    (top / "allowed" / "folder").mkdir(parents=True)
    (top / "allowed" / "a.png").write_bytes(PICTURE)
    (top / "secret.png").write_bytes(PICTURE)
    (top / "allowed" / "link.png").symlink_to(top / "secret.png")
    return top


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """A server whose every file and connection is noted; ``localhost`` is an allowed host that is not public."""
    model = write_model(tmp_path_factory.mktemp("model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUDIT_LOG", str(folder / "audit"))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "audit"), prepend=os.pathsep)
        patch.setenv("SERVER_SECRET", SECRET)
        allowed = ["--allowed-local-media-path", str(folder / "allowed")]
        domains = ["--allowed-media-domains", "http://localhost", "localhost"]
        with ServerProcess(model, *allowed, *domains, "--no-log-requests") as server:
            # what is read once is read now: decoders, the checker of grammars
            assert server.chat([hostile.image("a.png")]).status_code == 200
            assert server.chat("hi", guided_regex="a+").status_code == 200
            server.model, server.noted = model, (folder / "audit").stat().st_size
            yield server
    assert "Traceback" not in server.log


@pytest.fixture
def audited(served, folder):
    """Fails where anything but what may be was opened, resolved, connected to or started meanwhile."""
    start = (folder / "audit").stat().st_size
    yield
    with open(folder / "audit", "rb") as file:
        file.seek(start)
        lines = file.read().decode().splitlines()
    may = (sys.prefix, sys.base_prefix, str(support.ROOT), str(served.model), str(folder / "allowed"), "/dev/null")
    own = ("/proc/self/", "/proc/cpuinfo", "/proc/stat", "/proc/meminfo", "/sys/", "/dev/shm/", "/dev/urandom")
    wrong = []
    for line in lines:
        _, event, what = line.split(" ", 2)
        plain = what.strip("b'\"")
        if event == "open":
            fine = plain.isdigit() or plain.startswith((*may, *own)) or what == "None"
        elif event == "open-below":
            fine = "/" not in plain and plain != ".."
        elif event == "subprocess.Popen":
            fine = plain == sys.executable
        else:
            fine = event in ("os.listdir", "os.scandir", "socket.getaddrinfo") and (
                plain.startswith((*may, *own)) or plain == "localhost"
            )
        if not fine:
            wrong.append(line)
    assert not wrong, "\n".join(wrong[:50])


def memory(served):
    one = served.process
    sizes = 0
    for process in (one, *one.children(recursive=True)):
        try:
            sizes += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return sizes


def is_idle(served):
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return all(served.metric(name) == 0 for name in names) and served.get("/load").json() == {"server_load": 0}


@pytest.mark.parametrize("name", ["corpus"])
def test_every_case_gets_its_status_and_no_answer_tells_anything(served, audited, folder, name):
    wrong = []
    for name, route, body, statuses in hostile.cases():
        answer = served.post(route, {"model": MODEL, **body} if route != "/detokenize" else body)
        text = answer.text
        if answer.status_code not in statuses:
            wrong.append((name, answer.status_code, text[:300]))
        leaks = [
            word for word in (str(folder), "root:", SECRET, " at 0x", "Traceback", "site-packages") if word in text
        ]
        if leaks or len(text) > 4000:
            wrong.append((name, leaks, text[:300]))
    assert not wrong, "\n".join(map(str, wrong))
    texts = {
        served.chat([hostile.image(url)]).json()["error"]["message"]
        for url in ("absent.png", "link.png", "/etc/passwd", "http://localhost/", "https://evil.example/a.png")
    }
    assert len(texts) == 1  # nobody learns what is there
    assert served.chat().status_code == 200


@pytest.mark.parametrize("name", hostile.RAW)
def test_what_is_no_http_ends_its_connection_alone(served, audited, name):
    found, _ = exchange(served.port, hostile.RAW[name], 15)
    line = found.split(b"\r\n")[0]
    assert line == b"" or line.split(b" ")[1] in (b"200", b"400", b"401", b"403", b"404", b"405", b"431"), line
    assert b"root:" not in found
    assert served.chat().status_code == 200


def test_hundreds_of_malformed_requests_keep_no_memory_and_no_page(served, audited):
    rng = random.Random(1)
    bodies = [(entry["path"], with_media(entry["body"])) for entry in BODIES]

    def ask(number):
        own = random.Random(number)
        path, body = own.choice(bodies)
        body = changed({**body, "model": MODEL, "stream": False}, own)
        if isinstance(body, dict):
            body = {**body, "max_tokens": 4} if "max_tokens" not in body else body
            body.pop("stream_options", None)
        text = json.dumps(body).encode()
        if own.random() < 0.2:
            place = own.randrange(len(text))
            text = text[:place] + bytes([own.randrange(256)]) + text[place + own.randrange(3) :]
        answer = served.post(path, content=text, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 403, 404, 415), (answer.status_code, text[:500])
        return answer.status_code

    numbers = [rng.randrange(10**9) for _ in range(700)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        statuses = set(pool.map(ask, numbers[:200]))
        before = memory(served)
        statuses |= set(pool.map(ask, numbers[200:]))
    assert {200, 400} <= statuses
    assert memory(served) < 1.05 * before
    with until(20) as wait:
        wait(lambda: is_idle(served))


def test_slow_connections_are_cut_off_and_hold_up_nobody(served, audited):
    began, open_ones = time.monotonic(), []
    for number in range(120):
        connection = socket.create_connection(("127.0.0.1", served.port), 5)
        connection.sendall((b"", HEAD[:-9], HEAD + b"Content-Length: 100\r\n\r\n{")[number % 3])
        open_ones.append(connection)
    while time.monotonic() - began < 12:
        asked = time.monotonic()
        assert served.chat().status_code == 200
        assert time.monotonic() - asked < 5
        time.sleep(0.5)
    closed = 0
    for number, connection in enumerate(open_ones):
        connection.settimeout(1 if number % 3 < 2 else 40)
        try:
            found = connection.recv(4096)
        except ConnectionError:
            found = b""
        closed += found == b"" or b" 408 " in found
        connection.close()
    assert closed == len(open_ones)


def test_clients_that_leave_in_the_middle_free_their_pages(served, audited):
    body = {"model": MODEL, "max_tokens": 500, "ignore_eos": True}
    parts = [hostile.image(data_url(PICTURE)), {"type": "text", "text": "tell"}]

    def leave(number):
        asked = {**body, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": str(number)}]}]}
        text = json.dumps({**asked, "stream": bool(number % 2)}).encode()
        with socket.create_connection(("127.0.0.1", served.port), 5) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(text) + text)
            connection.settimeout(30)
            if number % 2:
                connection.recv(1 + number)  # in the middle of the stream
            else:
                time.sleep(0.02 * (number % 5))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(40)))
        before = memory(served)
        list(pool.map(leave, range(40, 140)))
    with until(30) as wait:
        wait(lambda: is_idle(served))
    assert memory(served) < 1.05 * before
    assert served.chat().status_code == 200


def test_an_expensive_grammar_does_not_hold_up_others(served, audited):
    slow = {"guided_json": hostile.SLOW_SCHEMA}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        bombs = [pool.submit(served.chat, "hi", **slow) for _ in range(3)]
        times = []
        while not all(one.done() for one in bombs):
            began = time.monotonic()
            assert served.chat().status_code == 200
            times.append(time.monotonic() - began)
    assert {one.result().status_code for one in bombs} == {400}
    assert max(times, default=0) < 4
    assert served.get("/health").status_code == 200


def test_the_audit_sees_what_is_read(served, folder):
    """The control: a file that may be read is in the notes."""
    before = (folder / "audit").stat().st_size
    assert served.chat([hostile.image("a.png")]).status_code == 200
    assert b"a.png" in (folder / "audit").read_bytes()[before:]
    assert httpx2.get(f"{served.url}/health").status_code == 200
