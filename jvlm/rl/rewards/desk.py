"""The work of a server of rewards: a bounded queue, and the same answer to a request that is sent again."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from jvlm.rl.rewards.router import Router
from jvlm.rl.rewards.source import RewardItem
from jvlm.scoring.score import Score

_MOST_KEPT = 20_000


class QueueFull(Exception):
    """More waits than may; ask again later."""


class OtherRequest(Exception):
    """A request with the identity of another."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """The rewards of a request.

    Attributes:
      scores: of its items.
      milliseconds: that they took, of all together.
    """

    scores: list[Score]
    milliseconds: float


class Desk:
    """Judges requests in threads.

    Args:
      workers: requests that are judged at a time.
      max_queue: items that may wait or be judged; more are sent away.
      keep_seconds: how long the answer to a request is kept for it to be asked again.
    """

    def __init__(self, router: Router, *, workers: int, max_queue: int, keep_seconds: float = 3600.0):
        self.router, self._most, self._keep = router, max_queue, keep_seconds
        self._pool = ThreadPoolExecutor(workers, "rewards")
        self._kept: collections.OrderedDict[str, tuple[float, str, Future[Judged]]] = collections.OrderedDict()
        self._lock, self.waiting = Lock(), 0

    def submit(self, identity: str, fingerprint: str, items: Sequence[RewardItem]) -> Future[Judged]:
        """Return the rewards of a request to come; those of the same request if it was here before.

        Args:
          fingerprint: of all that the request holds.

        Raises:
          QueueFull: too much waits.
          OtherRequest: ``identity`` was another request's.
        """
        with self._lock:
            now = time.monotonic()
            while self._kept and (next(iter(self._kept.values()))[0] < now or len(self._kept) > _MOST_KEPT):
                self._kept.popitem(last=False)
            if identity in self._kept:
                _, known, future = self._kept[identity]
                if known != fingerprint:
                    raise OtherRequest
                return future
            if self.waiting and self.waiting + len(items) > self._most:
                raise QueueFull
            self.waiting += len(items)
            future = self._pool.submit(self._judge, items)
            self._kept[identity] = (now + self._keep, fingerprint, future)
        future.add_done_callback(lambda _: self._leave(len(items)))
        return future

    def _leave(self, items: int) -> None:
        with self._lock:
            self.waiting -= items

    def _judge(self, items: Sequence[RewardItem]) -> Judged:
        began = time.perf_counter()
        scores = self.router.scores(items)
        return Judged(scores, (time.perf_counter() - began) * 1e3)

    def close(self) -> None:
        """Judge nothing more, and close the rewards."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.router.close()
