"""A server around a scripted engine: everything but the model is the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from jvlm.data.processor import Processor
from jvlm.inference.async_engine import AsyncEngine
from jvlm.inference.requests import EngineStats, Event, Request, TokenLogprob
from jvlm.inference.text import TextStream
from jvlm.server import app as server_app
from jvlm.server.connections import protocol
from jvlm.server.media import MediaLoader
from jvlm.server.metrics import Metrics
from jvlm.server.sampling import ModelFacts, default_values
from jvlm.server.service import Service
from jvlm.server.settings import ServerSettings
from tests import support

MODEL = "toy-vlm"


def processor_of(folder: Path, tokenizer: Path | None, **settings: Any) -> Processor:
    """The processor of a small model, without its weights; ``settings`` make a tokenizer of its own."""
    from jvlm.weights import hf, io

    if settings:
        tokenizer = support.make_tokenizer(folder / "tokenizer", **settings)
    config = support.tiny_config(support.token_ids(tokenizer))
    model = folder / "model"
    support.write_folder(model, tokenizer, config, limits=(28 * 28, 28 * 28 * 64))
    return hf.load_processor(model, io.read_config(model))


class ScriptedEngine:
    """Answers with texts that are given, a token a step; each request takes the next text, or the last one.

    Attributes:
      requests, aborted: what it was asked.
      hold: while it is clear, a step waits.
      fails: raised by the next step.
    """

    def __init__(self, processor: Processor, *texts: str, max_model_len: int = 4096):
        self.processor, self.texts, self.max_model_len = processor, list(texts), max_model_len
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        self.fails: BaseException | None = None
        self.refuses: BaseException | None = None
        self._running: dict[str, list[Any]] = {}
        self._tokens = 0

    failure = None

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def prepare(self, request: Request) -> None:
        pass

    def submit(self, request: Request) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.requests.append(request)
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        self._running[request.id] = [
            _Row(request, k, list(ids), TextStream(self.processor)) for k in range(request.sampling.n)
        ]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._running.pop(request_id, None)

    def step(self) -> list[Event]:
        self.hold.wait(30)
        if self.fails is not None:
            raise self.fails
        events = [row.step(self.processor) for rows in self._running.values() for row in rows if not row.ended]
        for rows in list(self._running.values()):
            if all(row.ended for row in rows):
                del self._running[rows[0].request.id]
        self._tokens += len(events)
        return events

    def stats(self) -> EngineStats:
        return EngineStats(num_requests_running=len(self._running), generation_tokens=self._tokens)


@dataclasses.dataclass
class _Row:
    request: Request
    index: int
    left: list[int]
    stream: TextStream
    given: int = 0
    text: str = ""
    ended: bool = False

    def step(self, processor: Processor) -> Event:
        sampling, first = self.request.sampling, self.given == 0
        ends = not self.left
        token = processor.tokenizer.eos_token_id if ends else self.left.pop(0)
        self.given += 1
        piece = self.stream.finish() if ends else self.stream.add(token)
        reason = "stop" if ends else "length" if self.given >= sampling.max_tokens else None
        if reason == "length":
            piece += self.stream.finish()
        stop = None
        for text in sampling.stop:
            at = (self.text + piece).find(text)
            if at >= 0:
                piece = (self.text + piece)[: at + (len(text) if sampling.include_stop else 0)][len(self.text) :]
                reason, stop = "stop", text
        self.text += piece
        self.ended = reason is not None
        logprob = None
        if sampling.logprobs is not None:
            logprob = TokenLogprob(token, -0.5, tuple((token + k, -0.5 - k) for k in range(sampling.logprobs)))
        prompt = None
        if first and sampling.prompt_logprobs is not None:
            ids = self.request.example.tokens.tolist()
            prompt = (None, *(TokenLogprob(i, -float(k)) for k, i in enumerate(ids[1:], 1)))
        return Event(
            self.request.id,
            self.index,
            token,
            piece,
            logprob,
            reason,
            stop,
            prompt_tokens=self.request.example.length,
            prompt_logprobs=prompt,
        )


class Served:
    """A server on a port of this machine, in a thread. Use it as a context manager."""

    def __init__(
        self,
        engine: Any,
        processor: Processor,
        *,
        loader: MediaLoader | None = None,
        slots: int = 32,
        vocabulary: int | None = None,
        max_model_len: int = 4096,
        admin: Callable[[Service], Any] | None = None,
        **settings: Any,
    ):
        self.engine = engine
        self.settings = ServerSettings(MODEL, max_model_len=max_model_len, **settings)
        self.async_engine = AsyncEngine(engine, hung_seconds=1.0 if isinstance(engine, ScriptedEngine) else 60.0)
        ends = frozenset({processor.tokenizer.eos_token_id})
        facts = ModelFacts(
            default_values(processor.generation),
            vocabulary or len(processor.tokenizer),
            ends,
            max_model_len,
            self.settings.max_n,
        )
        metrics = Metrics(MODEL, self.async_engine.stats, log=self.log)
        self.lines: list[str] = []
        self.service = Service(self.settings, self.async_engine, processor, facts, metrics, slots=slots, loader=loader)
        app = server_app.build(self.service, log=self.log, admin=None if admin is None else admin(self.service))
        config = uvicorn.Config(
            app,
            http=protocol(self.settings.limits.header_seconds),
            log_config=None,
            access_log=False,
            timeout_keep_alive=5,
        )
        self._server = uvicorn.Server(config)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=asyncio.run, args=(self._server.serve([self._socket]),), daemon=True)

    def log(self, line: str) -> None:
        self.lines.append(line)

    def __enter__(self) -> Served:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not (self._server.started and self.async_engine.ready.is_set()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def __exit__(self, *_: Any) -> None:
        if isinstance(self.engine, ScriptedEngine):
            self.engine.hold.set()
        self._server.should_exit = True
        self._thread.join(20)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=30, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=30, **options)

    def chat(self, messages: Any = "hi", **fields: Any) -> httpx2.Response:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, "[DONE]" among them; comments are left out."""
        with httpx2.stream("POST", self.url + path, json={**body, "stream": True}, timeout=30) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream"), answer.read()
            lines = [line for line in answer.iter_lines() if line]
        found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in found]

    def chat_stream(self, messages: Any = "hi", **fields: Any) -> list[Any]:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.stream("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})


@contextlib.contextmanager
def until(seconds: float = 5.0):
    """Yield a function that waits until a condition holds."""

    def wait(condition):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.005)

    yield wait
