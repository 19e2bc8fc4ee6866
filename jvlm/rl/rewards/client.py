"""Rewards from another process or machine. One that does not come in time is missing; it is never taken for 0."""

from __future__ import annotations

import collections
import dataclasses
import http.client
import json
import random
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from jvlm.errors import UserError
from jvlm.rl.rewards.source import RewardItem, missing
from jvlm.rl.rewards.wire import MOST_ITEMS, WireError, blob_name, item_values, scores_of
from jvlm.scoring.score import Score

_AGAIN = (429, 503)
_REFUSED = (400, 401, 403, 404, 405, 413, 415, 422)
_LONGEST_BODY = 64 * 2**20
_SHOWN = 1000  # missing rewards that are remembered by name


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """How a service is asked.

    Attributes:
      url: address of the server, "http://HOST:PORT".
      key: bearer token; shown nowhere.
      concurrency: requests at a time.
      batch: most items of a request.
      deadline: seconds after which a reward is missing, all tries together.
      timeout: seconds of one try.
      pause: seconds before the second try; each further one waits twice as long, up to ``longest_pause``.
    """

    url: str
    key: str | None = dataclasses.field(default=None, repr=False)
    concurrency: int = 8
    batch: int = 64
    deadline: float = 60.0
    timeout: float = 20.0
    pause: float = 0.5
    longest_pause: float = 10.0

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UserError("the address of a service of rewards is http://HOST:PORT, without a password")
        if not 1 <= self.batch <= MOST_ITEMS or self.concurrency < 1 or min(self.deadline, self.timeout) <= 0:
            raise UserError(f"a service is asked for 1 to {MOST_ITEMS} items at a time, within a time above 0 s")


class RewardClient:
    """Asks a server of rewards. Use it as a context manager, or call `close`.

    Attributes:
      missing: how many rewards did not come, by why.
      missing_ids: the latest of their items.
      retries: tries that had to be made again.
    """

    def __init__(self, config: ClientConfig):
        self.config = config
        self.missing: collections.Counter[str] = collections.Counter()
        self.missing_ids: collections.deque[str] = collections.deque(maxlen=_SHOWN)
        self.retries = 0
        self._pool = ThreadPoolExecutor(config.concurrency, "reward-client")
        # so many requests wait or run; one more holds up whoever asks, and through it the engines
        self._room = threading.BoundedSemaphore(2 * config.concurrency)
        self._lock = threading.Lock()
        self._draw = random.Random()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ask nothing more."""
        self._pool.shutdown(cancel_futures=True)

    def describe(self) -> dict[str, Any]:
        """Return what decides the rewards, as the server tells."""
        return {"reward": "service", "url": self.config.url, "tasks": self._get("/v1/tasks")["tasks"]}

    def check(self, item: RewardItem) -> None:
        """Do nothing: the server says of each item what is wrong with it."""

    def check_service(self, golden: Sequence[tuple[RewardItem, float]]) -> None:
        """Ask for known rewards, before any are relied on.

        Raises:
          UserError: the service has no such task, is not there, or gives other values.
        """
        known = {task["name"] for task in self._get("/v1/tasks")["tasks"]}
        for item, _ in golden:
            if item.task not in known:
                raise UserError(f"{self.config.url} has no task {item.task!r}; it has {', '.join(sorted(known))}")
        for (item, value), score in zip(golden, self.scores([item for item, _ in golden]), strict=True):
            if score.value is None or abs(score.value - value) > 1e-6:
                raise UserError(
                    f"{self.config.url}, task {item.task!r}, item {item.id}: the reward must be {value:g} and is "
                    f"{score.value} ({score.reason}: {score.parsed})"
                )

    def scores(self, items: Sequence[RewardItem]) -> list[Score]:
        """Return the reward of each item; None for one that did not come. Raises UserError as `submit`'s futures do."""
        size = self.config.batch
        futures = [self.submit(items[start : start + size]) for start in range(0, len(items), size)]
        return [score for future in futures for score in future.result()]

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Score]]:
        """Return rewards to come of at most ``batch`` items; waits where too many are on their way.

        The future raises UserError where asking again would not help: a key that is none, an item that is refused.
        """
        if len(items) > self.config.batch:
            raise ValueError(f"{len(items)} items are more than a batch of {self.config.batch}")
        self._room.acquire()
        try:
            future = self._pool.submit(self._ask, list(items))
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def _ask(self, items: list[RewardItem]) -> list[Score]:
        found = self._scores(items)
        with self._lock:
            for item, score in zip(items, found, strict=True):
                if score.value is None:
                    self.missing[score.reason] += 1
                    self.missing_ids.append(item.id)
        return found

    def _scores(self, items: list[RewardItem]) -> list[Score]:
        config, identity = self.config, str(uuid.uuid4())
        end = time.monotonic() + config.deadline
        values = {"id": identity, "items": [item_values(item) for item in items]}
        problem, attempt = "no try", 0
        while (left := end - time.monotonic()) > 0:
            least = 0.0
            try:
                body = json.dumps({**values, "deadline_ms": max(int(left * 1000), 1)}).encode()
                status, headers, answer = self._send("POST", "/v1/reward", body, min(config.timeout, left))
                if status == 200:
                    return scores_of(answer, identity, items)
                problem = f"{status} {_said(answer)}"
                if status == 409 and self._send_blobs(answer, items, end):
                    continue
                if status in _REFUSED:
                    raise UserError(f"the service of rewards {config.url} refused the request: {problem}")
                if status not in _AGAIN:
                    break
                least = _seconds(headers.get("Retry-After"))
            except WireError as error:
                raise UserError(f"the service of rewards {config.url}: {error}") from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            pause = min(config.pause * 2**attempt, config.longest_pause) * self._draw.uniform(0.5, 1.0)
            attempt += 1
            with self._lock:
                self.retries += 1
            time.sleep(max(min(max(pause, least), end - time.monotonic()), 0))
        return [missing(f"{config.url} gave no reward: {problem}")] * len(items)

    def _send_blobs(self, answer: bytes, items: Sequence[RewardItem], end: float) -> bool:
        """Send the pictures that the server does not know; return whether it took them."""
        known = {blob_name(image): image for item in items for image in item.images}
        try:
            unknown = json.loads(answer)["unknown"]
            contents = [(name, known[name]) for name in unknown]
        except (ValueError, KeyError, TypeError) as error:
            raise WireError(f"status 409 without the pictures that lack: {_said(answer)}") from error
        for name, content in contents:
            left = max(min(self.config.timeout, end - time.monotonic()), 0.001)
            status, _, said = self._send("PUT", f"/v1/blobs/{name.removeprefix('sha256:')}", content, left)
            if status in _REFUSED:
                raise UserError(f"the service of rewards {self.config.url} refused a picture: {status} {_said(said)}")
            if status != 204:
                return False
        return True

    def _get(self, path: str) -> dict[str, Any]:
        """Return the JSON of a route. Raises UserError."""
        try:
            status, _, body = self._send("GET", path, None, self.config.timeout)
            if status == 200:
                return json.loads(body)
            problem = f"{status} {_said(body)}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        raise UserError(f"the service of rewards {self.config.url}{path} does not answer: {problem}")

    def _send(
        self, method: str, path: str, body: bytes | None, seconds: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return status, headers and body of one try, which takes about so many seconds at most."""
        parts = urllib.parse.urlsplit(self.config.url)
        kinds: dict[str, Callable[..., http.client.HTTPConnection]] = {
            "http": http.client.HTTPConnection,
            "https": http.client.HTTPSConnection,
        }
        end = time.monotonic() + seconds
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=seconds)
        try:
            headers = {"Content-Type": "application/octet-stream" if method == "PUT" else "application/json"}
            if self.config.key:
                headers["Authorization"] = f"Bearer {self.config.key}"
            connection.request(method, parts.path.rstrip("/") + path, body, headers)
            socket = connection.sock
            response = connection.getresponse()
            content = bytearray()
            while piece := response.read1(65536):
                content += piece
                left = end - time.monotonic()
                if left <= 0 or len(content) > _LONGEST_BODY:
                    raise TimeoutError(f"the answer was not whole after {seconds:.3g} s and {len(content)} bytes")
                socket.settimeout(left)
            return response.status, response.headers, bytes(content)
        finally:
            connection.close()


def _said(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return body[:300].decode(errors="replace")


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdigit() and len(text) < 6 else 0.0
