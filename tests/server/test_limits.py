"""Keys, hosts, sizes and slow connections."""

import json
import socket
import time

import pytest

from jvlm.errors import UserError
from jvlm.server.keys import KeyRing, read_keys
from jvlm.server.settings import HTTPLimits, KeyLimits
from tests.server.scripted import MODEL

KEY = "a-key-of-twenty-letters"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
ROUTES = [("GET", path) for path in ("/v1/models", "/metrics", "/version", "/load", "/openapi.json", "/nothing")] + [
    ("POST", path) for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
]


def exchange(port, data, seconds=5.0):
    """What the server sends until it closes the connection, and whether it has within the time."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(data)
        connection.settimeout(seconds)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except TimeoutError:
            return found, False
        except ConnectionError:
            return found, True
        return found, True


def test_every_route_but_health_needs_a_key(serve):
    served = serve(keys=(("ann", KEY), ("bob", KEY[::-1])))
    assert served.get("/health").status_code == 200
    for method, path in ROUTES:
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
        ):
            call = served.get if method == "GET" else served.post
            answer = call(path, headers={**header, "host": "localhost"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError"), path
    assert served.post("//v1/chat/completions", BODY).status_code == 401
    good = {"authorization": f"Bearer {KEY}"}
    assert served.post("/v1/chat/completions", BODY, headers=good).status_code == 200
    assert served.get("/v1/models", headers={"authorization": f"bearer {KEY[::-1]}"}).status_code == 200
    text = "\n".join(served.lines)
    assert "ann POST /v1/chat/completions 200" in text
    assert KEY not in text


def test_keys_come_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\nann {KEY}\n\n{KEY[::-1]}\n")
    assert read_keys(str(file)) == (("ann", KEY), ("key-4", KEY[::-1]))
    for text, word in (("", "no key"), ("short", "line 1"), (f"{KEY}\n{KEY}", "twice"), ("a b c", "line 1")):
        file.write_text(text)
        with pytest.raises(UserError, match=word):
            read_keys(str(file))


def test_a_key_has_its_share():
    from jvlm.server.errors import APIError

    ring = KeyRing((("ann", KEY),), KeyLimits(in_flight=1, tokens_per_minute=100, media_bytes_per_minute=10))
    ring.begin("ann")
    for more in (lambda: ring.begin("ann"), lambda: ring.take("ann", media_bytes=11)):
        with pytest.raises(APIError) as found:
            more()
        assert found.value.status == 429
    ring.begin("bob")
    ring.end("ann")
    ring.begin("ann")
    ring.take("ann", tokens=60)
    with pytest.raises(APIError):
        ring.take("ann", tokens=60)


def test_hosts_and_origins_are_those_that_are_named(serve):
    served = serve(hosts=("127.0.0.1", "localhost"), cors_origins=("https://good.example",))
    assert served.get("/v1/models").status_code == 200
    assert served.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert served.get("/health", headers={"host": "localhost.evil.example:80"}).status_code == 403
    good = served.get("/v1/models", headers={"origin": "https://good.example"})
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    bad = served.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in bad.headers


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe{}",
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"messages":' + b"[" * 60 + b"]" * 60 + b"}",
        b'{"a":[' + b"{}," * 20_000 + b"{}]}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "wizard", "content": "a"}]}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"role": "user", "content": 3}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]}',
        b'{"messages": [{"role": "user", "content": [[]]}]}',
        b'{"messages": [{"role": "assistant", "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "n": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [3]}, {"role": "user", "content": "a"}]}',
    ],
)
def test_bodies_that_are_wrong_get_a_short_answer(serve, body):
    served = serve()
    answer = served.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert len(answer.content) < 2000
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert served.engine.requests == []


def test_other_content_types_are_refused_and_errors_do_not_echo(serve):
    served = serve()
    assert (
        served.post("/v1/chat/completions", content=b"a=1", headers={"content-type": "text/plain"}).status_code == 415
    )
    secret = "x" * 4500
    answer = served.chat([{"role": "user", "content": "a"}], temperature=secret, top_p=secret, n=secret, seed=secret)
    assert answer.status_code == 400
    assert "xxxx" not in answer.text
    assert len(answer.content) < 1200


def test_bodies_too_large_are_refused_before_they_are_read(serve):
    served = serve(limits=HTTPLimits(body_bytes=100_000))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    announced, _ = exchange(served.port, head + b"Content-Length: 300000000\r\n\r\n")
    assert b" 413 " in announced.split(b"\r\n")[0]
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    counted, _ = exchange(served.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
    assert b" 413 " in counted.split(b"\r\n")[0]
    assert served.chat().status_code == 200


def test_slow_senders_are_cut_off(serve):
    served = serve(limits=HTTPLimits(header_seconds=0.5, body_seconds=0.5))
    began = time.monotonic()
    for data in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX"):
        found, closed = exchange(served.port, data)
        assert (found, closed) == (b"", True)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    found, closed = exchange(served.port, head + b"Content-Length: 100\r\n\r\n{")
    assert b" 408 " in found.split(b"\r\n")[0]
    assert closed
    assert time.monotonic() - began < 8
    assert served.chat().status_code == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(serve, capfd):
    served = serve()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port), 5) as connection:
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
    assert served.chat().status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_reads_nothing_is_given_up(serve):
    served = serve("word " * 30_000, limits=HTTPLimits(write_seconds=0.3))
    served.engine.max_model_len = 10**6
    body = json.dumps({**BODY, "stream": True, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 15
        while served.async_engine.in_flight or not served.engine.requests:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert served.chat().status_code == 200
