"""Which URLs and files are read: addresses are checked where the connection is made, on each redirect again."""

import os
import socket
import threading

import pytest

from jvlm.server.fetch import Fetcher, FetchError, SlowHost, is_public, parse_url
from jvlm.server.local_files import FileRefused, read_below
from jvlm.server.settings import MediaRules

PUBLIC, OTHER = "93.184.216.34", "1.1.1.1"


class Web:
    """A web server on this machine that the fetcher takes for public ones, and the names that it knows."""

    def __init__(self, names, answers):
        self.names, self.answers, self.connected = names, answers, []
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def resolve(self, host, port, **_):
        found = self.names.get(host)
        if found is None:
            raise socket.gaierror("no such name")
        addresses = found.pop(0) if len(found) > 1 and isinstance(found[0], list) else found
        addresses = addresses[0] if isinstance(addresses[0], list) else addresses
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def connect(self, address, timeout):
        self.connected.append(address[0])
        return socket.create_connection(self._server.getsockname(), timeout)

    def fetcher(self, *domains, **rules):
        return Fetcher(MediaRules(domains=domains, **rules), resolve=self.resolve, connect=self.connect)

    def _serve(self):
        while True:
            connection, _ = self._server.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096)
            host = next(line for line in request.split(b"\r\n") if line.lower().startswith(b"host:"))
            key = host.split(b":")[1].strip().decode() + request.split(b" ")[1].decode()
            try:
                for piece in self.answers[key]:
                    if isinstance(piece, float):
                        threading.Event().wait(piece)
                    else:
                        connection.sendall(piece)
            except OSError:
                return  # the fetcher has had enough


def ok(content):
    return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content), content]


def to(location):
    return [f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()]


def test_an_allowed_host_is_asked_at_the_address_that_was_checked():
    web = Web({"a.example": [PUBLIC]}, {"a.example/x?y=1": ok(b"pixels")})
    assert web.fetcher("http://a.example").fetch("http://A.example/x?y=1") == b"pixels"
    assert web.connected == [PUBLIC]


@pytest.mark.parametrize(
    "url",
    [
        "http://b.example/",
        "https://a.example/",
        "http://a.example.b.example/",
        "http://a.example:8080/",
        "http://a.example:22/",
        "http://user@a.example/",
        "http://a.example@127.0.0.1/",
        "http://127.0.0.1:80\\@a.example/",
        "http://a.example\\@127.0.0.1/",
        "http://a.example/\nHost: x",
        "http://a.example /",
        "http://127.1/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://\u2460\u2461\u2466.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://localhost./",
        "http://a.example./",
        "ftp://a.example/",
        "gopher://a.example/",
        "file:///etc/passwd",
        "http:/a.example/",
        "//a.example/",
        "http://a..example/",
        "http://" + "a" * 300 + ".example/",
    ],
)
def test_every_other_form_is_refused_without_a_connection(url):
    web = Web({"a.example": [PUBLIC], "localhost.": ["127.0.0.1"], "127.1": ["127.0.0.1"]}, {})
    with pytest.raises(FetchError):
        web.fetcher("http://a.example", "http://127.1", "http://localhost.").fetch(url)
    assert web.connected == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        [PUBLIC, "192.168.0.1"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        ["fd00::1"],
    ],
)
def test_all_addresses_of_a_name_must_be_public(addresses):
    web = Web({"a.example": addresses}, {"a.example/": ok(b"secret")})
    with pytest.raises(FetchError):
        web.fetcher("http://a.example").fetch("http://a.example/")
    assert web.connected == []


def test_a_name_that_changes_its_address_is_resolved_once():
    web = Web({"a.example": [[PUBLIC], ["127.0.0.1"]]}, {"a.example/": ok(b"pixels")})
    assert web.fetcher("http://a.example").fetch("http://a.example/") == b"pixels"
    assert web.connected == [PUBLIC]


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1/secret", "http://b.example/", "https://a.example:1/", "file:///etc/passwd", ""]
)
def test_a_redirect_to_what_is_not_allowed_is_not_followed(location):
    web = Web({"a.example": [PUBLIC], "b.example": [OTHER]}, {"a.example/": to(location), "b.example/": ok(b"x")})
    with pytest.raises(FetchError):
        web.fetcher("http://a.example").fetch("http://a.example/")
    assert web.connected == [PUBLIC]


def test_redirects_to_allowed_hosts_are_followed_a_few_times():
    answers = {"a.example/": to("http://b.example/x"), "b.example/x": ok(b"pixels"), "b.example/": to("/")}
    web = Web({"a.example": [PUBLIC], "b.example": [OTHER]}, answers)
    fetcher = web.fetcher("http://a.example", "http://b.example")
    assert fetcher.fetch("http://a.example/") == b"pixels"
    with pytest.raises(FetchError):
        fetcher.fetch("http://b.example/")


def test_what_is_too_large_or_too_slow_is_given_up():
    answers = {
        "a.example/large": [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 1000] * 100],
        "a.example/slow": [b"HTTP/1.1 200 OK\r\n\r\n", *[0.1, b"x"] * 30],
        "a.example/silent": [5.0],
        "a.example/odd": [b"SSH-2.0 hello\r\n"],
        "a.example/missing": [b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"],
    }
    web = Web({"a.example": [PUBLIC]}, answers)
    fetcher = web.fetcher("http://a.example", fetch_bytes=5000, fetch_seconds=0.5)
    for name in ("large", "odd", "missing"):
        with pytest.raises(FetchError):
            fetcher.fetch(f"http://a.example/{name}")
    for name in ("slow", "silent"):
        with pytest.raises(SlowHost):
            fetcher.fetch(f"http://a.example/{name}")


@pytest.mark.parametrize(
    "address",
    [
        "::1",
        "fc00::1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
        "fe80::1%lo",
        "198.18.0.1",
        "100.64.0.1",
    ],
)
def test_mapped_and_tunnelled_addresses_are_not_public(address):
    assert not is_public(address)


def test_public_addresses_are_public():
    assert is_public("8.8.8.8")
    assert is_public("2606:4700::1111")
    assert parse_url("https://93.184.216.34/x").host == "93.184.216.34"


@pytest.fixture
def folder(tmp_path):
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    (allowed / "in").mkdir(parents=True)
    secret.mkdir()
    (allowed / "in" / "a b.png").write_bytes(b"pixels")
    (secret / "key").write_bytes(b"secret")
    (allowed / "link").symlink_to(secret / "key")
    (allowed / "way").symlink_to(secret)
    os.mkfifo(allowed / "pipe")
    return allowed


def test_files_below_the_folder_are_read(folder):
    for name in ("in/a b.png", str(folder / "in/a b.png"), f"file://{folder}/in/a%20b.png"):
        assert read_below(str(folder), name, 100) == b"pixels"


@pytest.mark.parametrize(
    "name",
    [
        "link",
        "way/key",
        "../secret/key",
        "in/../../secret/key",
        "/etc/passwd",
        "file:///etc/passwd",
        "in",
        "",
        ".",
        "pipe",
        "missing",
        "file://host/in/a",
        "in/a%20b.png",
        "a\0b",
        "file:in",
        "in/a b.png/x",
        "x" * 5000,
        "/proc/self/environ",
    ],
)
def test_everything_else_is_refused_in_one_way(folder, name):
    with pytest.raises(FileRefused) as found:
        read_below(str(folder), name, 100)
    assert str(found.value) == ""


def test_no_file_is_read_where_no_folder_is_allowed_or_it_is_too_large(folder):
    with pytest.raises(FileRefused):
        read_below(None, str(folder / "in/a b.png"), 100)
    with pytest.raises(FileRefused):
        read_below(str(folder), "in/a b.png", 5)
