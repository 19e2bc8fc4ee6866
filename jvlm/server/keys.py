"""Keys that callers must know, and what each may take."""

from __future__ import annotations

import collections
import hmac
import time
from collections.abc import Sequence
from pathlib import Path

from jvlm.errors import UserError, file_errors
from jvlm.server.errors import APIError
from jvlm.server.settings import KeyLimits

_MINUTE = 60.0
_LEAST_LENGTH = 16
EVERYBODY = "everybody"


def read_keys(path: str) -> tuple[tuple[str, str], ...]:
    """Return (name, key) of each line of a file, "KEY" or "NAME KEY"; lines that begin with # are left out.

    Raises:
      UserError: a file that cannot be read or has no key, a key that is short, or one given twice.
    """
    with file_errors(path, "read"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    keys: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.lstrip().startswith("#"):
            continue
        if len(words) > 2 or len(words[-1]) < _LEAST_LENGTH or not words[-1].isascii():
            raise UserError(
                f"{path}, line {number}: not a key; write KEY or NAME KEY, a key being at least {_LEAST_LENGTH} ASCII "
                "characters without spaces"
            )
        keys.append((words[0] if len(words) == 2 else f"key-{number}", words[-1]))
    if not keys:
        raise UserError(f"{path} has no key; write one on each line")
    if len({key for _, key in keys}) < len(keys):
        raise UserError(f"{path} has the same key twice; keep one")
    return tuple(keys)


class KeyRing:
    """Knows the keys, and counts what their owners take.

    Args:
      keys: (name, key) pairs; without any, everybody may ask.
    """

    def __init__(self, keys: Sequence[tuple[str, str]], limits: KeyLimits):
        self._keys = [(name, key.encode()) for name, key in keys]
        self._limits = limits
        self._in_flight: collections.Counter[str] = collections.Counter()
        self._taken: dict[str, collections.deque[tuple[float, int, int]]] = collections.defaultdict(collections.deque)

    def owner(self, authorization: bytes | None) -> str | None:
        """Return the name of the key in an Authorization header; None for a key that is none.

        The header is compared with every key, in a time that depends on none of them.
        """
        if not self._keys:
            return EVERYBODY
        scheme, _, given = (authorization or b"").partition(b" ")
        found = None
        for name, key in self._keys:
            if hmac.compare_digest(given.strip(), key):
                found = name
        return found if scheme.lower() == b"bearer" else None

    def begin(self, owner: str) -> None:
        """Count a request, until `end`. Raises APIError for one too many at once."""
        most = self._limits.in_flight
        if most and self._in_flight[owner] >= most:
            raise _too_many(f"{most} requests at once")
        self._in_flight[owner] += 1

    def end(self, owner: str) -> None:
        """Count a request as ended."""
        self._in_flight[owner] -= 1

    def take(self, owner: str, *, tokens: int = 0, media_bytes: int = 0) -> None:
        """Count what a request takes. Raises APIError where it is more than a minute's share."""
        now, taken = time.monotonic(), self._taken[owner]
        while taken and taken[0][0] < now - _MINUTE:
            taken.popleft()
        for most, index, more, what in (
            (self._limits.tokens_per_minute, 1, tokens, "tokens"),
            (self._limits.media_bytes_per_minute, 2, media_bytes, "media bytes"),
        ):
            if most and sum(entry[index] for entry in taken) + more > most:
                raise _too_many(f"{most} {what} a minute")
        if self._limits.tokens_per_minute or self._limits.media_bytes_per_minute:
            taken.append((now, tokens, media_bytes))


def _too_many(what: str) -> APIError:
    return APIError(429, f"more than {what}", headers={"retry-after": "5"})
