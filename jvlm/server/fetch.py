"""Images and videos from hosts that the operator allows.

Every address is checked where the connection is made, on each redirect again: a name is resolved once, all of its
addresses must be public, and the connection goes to one of those. No proxy, no cookies, no credentials.
"""

from __future__ import annotations

import dataclasses
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from jvlm.server.settings import MediaRules

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[!-\[\]^-~]*)?(?:#[!-~]*)?",
    re.ASCII | re.IGNORECASE,
)
_REDIRECTS = 3
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::ffff:0:0/96", "fec0::/10")
    )
)
_CHUNK = 64 * 1024

Resolve = Callable[..., list[tuple[Any, ...]]]
Connect = Callable[[tuple[str, int], float], socket.socket]


class FetchError(Exception):
    """A URL that is not allowed, or gives nothing that can be used; why is not told to the caller."""


class SlowHost(FetchError):
    """An allowed host that took too long."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A URL, taken apart by one parser."""

    scheme: str
    host: str
    port: int
    path: str


def parse_url(url: str) -> Target:
    """Return the parts of a URL. Raises FetchError for every form that two parsers could read differently."""
    match = _URL.fullmatch(url)
    if match is None or len(url) > 4096:
        raise FetchError("not a plain URL")
    scheme, host = match["scheme"].lower(), match["host"].lower()
    usual = 443 if scheme == "https" else 80
    port = int(match["port"] or usual)
    if port != usual:
        raise FetchError("a port of its own")
    labels = host.split(".")
    if not all(labels) or re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)", labels[-1]):
        _canonical(host)
    return Target(scheme, host, port, match["path"] or "/")


def _canonical(host: str) -> None:
    try:
        if str(ipaddress.IPv4Address(host)) == host:
            return
    except ValueError:
        pass
    raise FetchError("a number that is no canonical address")


def is_public(address: str) -> bool:
    """Return whether an address belongs to the public Internet, whatever it is mapped or tunnelled to."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    inside = any(ip.version == network.version and ip in network for network in _NOT_PUBLIC)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or inside or mapped is not None or "%" in address)


class Fetcher:
    """Reads allowed URLs; blocks, so it is called from a thread.

    Args:
      resolve, connect: stand in for `socket.getaddrinfo` and `socket.create_connection` in tests.
    """

    def __init__(
        self,
        rules: MediaRules,
        *,
        resolve: Resolve = socket.getaddrinfo,
        connect: Connect = socket.create_connection,
    ):
        self.rules, self._resolve, self._connect = rules, resolve, connect
        self._allowed = frozenset(
            name.lower() if "://" in name else f"https://{name.lower()}" for name in rules.domains
        )
        self._tls = ssl.create_default_context() if rules.domains else None

    def fetch(self, url: str) -> bytes:
        """Return what a URL holds.

        Raises:
          FetchError: not allowed, not public, not there, or too large. SlowHost: took too long.
        """
        deadline = time.monotonic() + self.rules.fetch_seconds
        for _ in range(_REDIRECTS + 1):
            target = parse_url(url)
            if f"{target.scheme}://{target.host}" not in self._allowed:
                raise FetchError("the host is not allowed")
            content, location = self._get(target, self._address(target), deadline)
            if location is None:
                return content
            url = urllib.parse.urljoin(url, location)
        raise FetchError("too many redirects")

    def _address(self, target: Target) -> str:
        """One of the host's addresses, all of which are public."""
        try:
            found = self._resolve(target.host, target.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise FetchError("no such host") from error
        addresses = [entry[4][0] for entry in found]
        if not addresses or not all(map(is_public, addresses)):
            raise FetchError("an address that is not public")
        return addresses[0]

    def _get(self, target: Target, address: str, deadline: float) -> tuple[bytes, str | None]:
        """Return the content, or where it is said to be."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise SlowHost("redirects took too long")
        expired = threading.Event()
        try:
            plain = self._connect((address, target.port), min(self.rules.connect_seconds, left))
        except TimeoutError as error:
            raise SlowHost("does not accept") from error
        except OSError as error:
            raise FetchError("cannot be reached") from error
        timer = threading.Timer(left, _cut, (plain, expired))
        timer.daemon = True
        timer.start()
        try:
            found = self._exchange(target, plain, left)
            if expired.is_set():  # the end of what was cut looks like the end of the content
                raise SlowHost("too slow")
            return found
        except TimeoutError as error:
            raise SlowHost("too slow") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if expired.is_set():
                raise SlowHost("too slow") from error
            raise FetchError("broken answer") from error
        finally:
            timer.cancel()
            plain.close()

    def _exchange(self, target: Target, plain: socket.socket, seconds: float) -> tuple[bytes, str | None]:
        plain.settimeout(seconds)
        connection = http.client.HTTPConnection(target.host, target.port)
        if target.scheme == "https":
            connection.sock = self._tls.wrap_socket(plain, server_hostname=target.host)
        else:
            connection.sock = plain
        with connection.sock:
            headers = {"Host": target.host, "User-Agent": "jvlm", "Accept": "*/*", "Connection": "close"}
            connection.request("GET", target.path, headers=headers)
            with connection.getresponse() as response:
                if response.status in (301, 302, 303, 307, 308):
                    location = response.headers.get("location")
                    if not location:
                        raise FetchError("a redirect to nowhere")
                    return b"", location
                if response.status != 200:
                    raise FetchError("not there")
                return self._read(response), None

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        content, most = bytearray(), self.rules.fetch_bytes
        while chunk := response.read(_CHUNK):
            content += chunk
            if len(content) > most:
                raise FetchError("too large")
        return bytes(content)


def _cut(connection: socket.socket, expired: threading.Event) -> None:
    """End a connection in the middle of whatever it does."""
    expired.set()
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already
