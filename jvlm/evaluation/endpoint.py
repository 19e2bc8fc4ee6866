"""A server that speaks OpenAI's protocol of chats, asked over HTTP: several requests at a time, failed ones again."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from jvlm.errors import UserError

_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
_LONGEST_WAIT = 60.0  # s between tries
_SHOWN = 300  # characters of a server's message
A = TypeVar("A")
B = TypeVar("B")


class EndpointError(Exception):
    """A request that failed for good; says how, without the key."""


@dataclasses.dataclass(frozen=True)
class ChatAnswer:
    """What a server answered."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A server and a model on it.

    Attributes:
      url: up to and with /v1.
      model: as the server names it.
      key_variable: environment variable with the key; its value is neither kept nor written anywhere.
      concurrency: requests at a time.
      tries: of one request, with growing pauses between; refused requests (400, 401, 404, ...) have only one.
      timeout: of one try in seconds.
      extra: further fields of the request.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    tries: int = 5
    timeout: float = 600.0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pause: float = 1.0

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{self.url} is no address of a server; give it as http://HOST:PORT/v1")
        if parts.username or parts.password:
            raise UserError(f"the address holds a password; put it into the variable {self.key_variable} instead")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def models(self) -> list[str]:
        """Return the models of the server. Raises EndpointError."""
        return [str(one.get("id")) for one in self._send("/models", None).get("data", [])]

    def chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> ChatAnswer:
        """Return the answer to a conversation. Raises EndpointError after the last try."""
        values = self._send("/chat/completions", {"model": self.model, "messages": messages, **sampling, **self.extra})
        try:
            choice = values["choices"][0]
            message, usage = choice["message"], values.get("usage") or {}
            thinking, text = message.get("reasoning_content"), message.get("content") or ""
            if thinking:
                text = f"<think>{thinking}</think>{text}"
            return ChatAnswer(
                text, choice.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens")
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(f"{self.url} answered without choices: {str(values)[:_SHOWN]}") from error

    def map(self, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Yield what ``work`` returns for each item, as they are done, so many at a time as the endpoint allows."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            source, running = iter(items), set[Future[B]]()
            try:
                while True:
                    while len(running) < 2 * self.concurrency and (item := next(source, _END)) is not _END:
                        running.add(pool.submit(work, item))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                for future in running:
                    future.cancel()

    def _send(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(1, self.tries + 1):
            try:
                return self._try(path, data)
            except urllib.error.HTTPError as error:
                said = error.read(4000).decode(errors="replace")[:_SHOWN]
                problem, after = f"{error.code} {error.reason}: {said}", error.headers.get("Retry-After", "")
                if error.code not in _AGAIN:
                    raise EndpointError(f"{self.url}{path} refused the request: {problem}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem, after = f"{type(error).__name__}: {error}", ""
            if attempt < self.tries:
                pause = float(after) if after.replace(".", "", 1).isdigit() else self.pause * 2 ** (attempt - 1)
                time.sleep(min(pause, _LONGEST_WAIT))
        raise EndpointError(f"{self.url}{path} failed {self.tries} times, the last time with {problem}")

    def _try(self, path: str, data: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            values = json.loads(response.read())
        if not isinstance(values, dict):
            raise ValueError("the answer is no JSON object")
        return values


class _End:
    pass


_END: Any = _End()
