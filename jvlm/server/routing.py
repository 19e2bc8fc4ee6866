"""Which of several engines answers a request: one that has its pictures and its beginning in its caches, if it may.

As SGLang's and vLLM's routers do, a request goes where its prefix was seen, unless that engine has much more to do than
another. Pictures count by what their URL says, which for data: URLs is all of their bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_REMEMBERED = 65_536
_BEGINNING = 256  # characters of a conversation by which its prefix is known
_PICTURE, _PREFIX = 4, 1
_MOST_NODES = 20_000


@dataclasses.dataclass
class Backend:
    """A server with an engine.

    Attributes:
      url: "http://HOST:PORT".
      in_flight: requests that it answers for us.
      sent: requests that it was chosen for.
    """

    url: str
    healthy: bool = False
    in_flight: int = 0
    sent: int = 0


def keys_of(body: bytes) -> tuple[tuple[bytes, int], ...]:
    """Return (hash, weight) of what an engine may know of a request: its pictures, and its beginning.

    A body that is no JSON has none; the engine that gets it says what is wrong.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(value, Mapping):
        return ()
    shared = [value.get("model"), value.get("cache_salt")]
    prompt = value.get("messages", value.get("prompt", value.get("input")))
    texts: list[str] = []
    pictures: list[str] = []
    for kind, text in _leaves([prompt, value.get("images"), value.get("videos")]):
        (pictures if kind == "media" else texts).append(text)
    found = [(_hash([*shared, "media", url]), _PICTURE) for url in dict.fromkeys(pictures)]
    beginning = "\n".join(texts)[:_BEGINNING]
    if beginning:
        found.append((_hash([*shared, "text", beginning]), _PREFIX))
    return tuple(found)


def _leaves(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the texts of JSON in order; those that name or hold media as "media"."""
    left, nodes = [("", value)], 0
    while left and nodes < _MOST_NODES:
        name, item = left.pop()
        nodes += 1
        if isinstance(item, str):
            is_media = name in ("url", "image_url", "video_url", "image", "video") or item[:5].lower() == "data:"
            yield ("media" if is_media else "text"), item
        elif isinstance(item, Mapping):
            left += reversed([(str(inner), part) for inner, part in item.items()])
        elif isinstance(item, list):
            left += [(name, part) for part in reversed(item)]


def _hash(values: Sequence[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        text = str(value).encode(errors="surrogatepass")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()


class Router:
    """Chooses backends.

    Args:
      imbalance: a backend with so many more requests than the idlest one gets no further one for its caches.
    """

    def __init__(self, urls: Sequence[str], *, imbalance: int = 8):
        self.backends = [Backend(url) for url in urls]
        self._imbalance = imbalance
        self._known: collections.OrderedDict[bytes, Backend] = collections.OrderedDict()

    def choose(self, keys: Sequence[tuple[bytes, int]], tried: Sequence[Backend] = ()) -> Backend | None:
        """Return the backend for a request, and remember that it will know it; None where none is healthy.

        Args:
          keys: as `keys_of` returns them.
          tried: those that it was sent to in vain.
        """
        able = [one for one in self.backends if one.healthy and one not in tried]
        if not able:
            return None
        hits: collections.Counter[int] = collections.Counter()
        for key, weight in keys:
            known = self._known.get(key)
            if known is not None:
                hits[id(known)] += weight
        least = min(one.in_flight for one in able)
        free = [one for one in able if one.in_flight - least < self._imbalance]
        chosen = min(free, key=lambda one: (-hits[id(one)], one.in_flight, one.sent))
        chosen.sent += 1
        for key, _ in keys:
            self._known[key] = chosen
            self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return chosen
