"""The routes of a server of rewards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import jvlm
from jvlm.errors import UserError
from jvlm.rl.rewards.blobs import BlobStore
from jvlm.rl.rewards.desk import Desk, Judged, OtherRequest, QueueFull
from jvlm.rl.rewards.router import Router
from jvlm.rl.rewards.source import RewardItem, UnfitReward, missing
from jvlm.rl.rewards.wire import MOST_ITEMS, result_values
from jvlm.scoring.score import Score
from jvlm.server.errors import APIError, bad
from jvlm.server.guard import App, Guard
from jvlm.server.keys import KeyRing
from jvlm.server.reading import json_only, parse_json, validated
from jvlm.server.settings import MIB, HTTPLimits, KeyLimits, ServerSettings

_NODES = 2_000_000  # values of a body: the token ids of 256 answers
_LONGEST_SECONDS = 3600
_BLOB = r"^sha256:[0-9a-f]{64}$"


@dataclasses.dataclass(frozen=True)
class ServiceSettings:
    """How a server of rewards works.

    Attributes:
      keys: (name, key) of those that may ask; empty lets everybody.
      hosts: values of the Host header that are served; empty serves all.
      workers: requests that are judged at a time.
      max_queue: items that may wait; more are sent away with status 429.
      body_bytes: most bytes of a body.
      blob_bytes: of all pictures that are kept.
      default_task: of the routes of other libraries, whose requests name none.
      seconds: in which those routes must answer.
    """

    keys: tuple[tuple[str, str], ...] = ()
    hosts: tuple[str, ...] = ()
    workers: int = 4
    max_queue: int = 4096
    body_bytes: int = 32 * MIB
    blob_bytes: int = 1024 * MIB
    default_task: str | None = None
    seconds: float = 60.0

    @property
    def limits(self) -> HTTPLimits:
        """Return what a connection may take."""
        return HTTPLimits(body_bytes=self.body_bytes, nodes=_NODES)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Part(_Body):
    """A part of a message: text, or the place of the next picture."""

    type: Literal["text", "image"]
    text: str | None = None


class Message(_Body):
    """A turn of the conversation."""

    role: str
    content: str | list[Part]


class Item(_Body):
    """An answer to be judged."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    task: str
    messages: list[Message] = []
    answer: str
    truncated: bool = False
    thinking_opened: bool = False
    gold: Any = None
    columns: dict[str, Any] = {}
    images: list[Annotated[str, Field(pattern=_BLOB)]] = []
    token_ids: list[int] = []


class RewardBody(_Body):
    """A request for rewards."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    deadline_ms: Annotated[int, Field(ge=1, le=_LONGEST_SECONDS * 1000)] = 20_000
    items: Annotated[list[Item], Field(min_length=1)]


class QueryBody(BaseModel):
    """A request in OpenRLHF's form."""

    query: list[str]
    prompts: list[str]
    labels: list[Any]


class SampleBody(BaseModel):
    """A request in SLIME's form."""

    prompt: Any = ""
    response: str
    label: Any = None


def build(router: Router, settings: ServiceSettings, *, log: Callable[[str], None] | None = None) -> App:
    """Return the application.

    Args:
      router: closed with it.
      log: takes a line for each request.
    """
    desk = Desk(router, workers=settings.workers, max_queue=settings.max_queue)
    service = _Service(desk, BlobStore(settings.blob_bytes), settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            desk.close()

    app = FastAPI(title="jvlm rewards", version=jvlm.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.redirect_slashes = False
    _routes(app, service)
    _foreign(app, service)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        texts = {404: "no such route", 405: "this route has another method"}
        return _failed(APIError(error.status_code, texts.get(error.status_code, "the request cannot be answered")))

    @app.exception_handler(APIError)
    async def api_error(_: Request, error: APIError) -> Response:
        return _failed(error)

    guarded = ServerSettings("rewards", keys=settings.keys, hosts=settings.hosts, limits=settings.limits)
    return Guard(app, guarded, KeyRing(settings.keys, KeyLimits()), log)


def _failed(error: APIError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


class _Service:
    def __init__(self, desk: Desk, blobs: BlobStore, settings: ServiceSettings):
        self.desk, self.blobs, self.settings = desk, blobs, settings

    async def read(self, request: Request) -> dict[str, Any]:
        """Return the JSON of a body. Raises APIError."""
        json_only(request.headers.get("content-type"))
        limits = self.settings.limits
        return parse_json(await request.body(), depth=limits.depth, nodes=limits.nodes)

    async def judge(self, identity: str, fingerprint: str, items: Sequence[RewardItem], seconds: float) -> Judged:
        """Return the rewards; all are missing where they are not there in time. Raises APIError."""
        try:
            future = self.desk.submit(identity, fingerprint, items)
        except QueueFull:
            raise APIError(429, "too many items wait", headers={"retry-after": "1"}) from None
        except OtherRequest:
            raise bad("another request had this id; draw a new one", "id") from None
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), seconds)
        except TimeoutError:
            return Judged([missing(f"not judged within {seconds:g} s")] * len(items), seconds * 1e3)
        except UnfitReward as error:
            raise APIError(422, str(error)) from error


def _routes(app: FastAPI, service: _Service) -> None:
    @app.post("/v1/reward")
    async def reward(request: Request) -> Response:
        value = await service.read(request)
        given = value.get("items")
        if isinstance(given, list) and len(given) > MOST_ITEMS:
            raise APIError(413, f"{len(given)} items; at most {MOST_ITEMS} in a request", "items")
        body = validated(RewardBody, value)
        fingerprint = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
        names = dict.fromkeys(name for item in body.items for name in item.images)
        blobs = service.blobs.get(names)
        if unknown := [name for name in names if name not in blobs]:
            error = APIError(409, "pictures are unknown; send them by PUT /v1/blobs/SHA256", "images")
            return JSONResponse({**error.body, "unknown": unknown}, 409)
        items = [_item(item, [blobs[name] for name in item.images]) for item in body.items]
        _check(service.desk.router, items)
        judged = await service.judge(body.id, fingerprint, items, body.deadline_ms / 1e3)
        pairs = zip(items, judged.scores, strict=True)
        each = judged.milliseconds / len(items)
        return JSONResponse({"id": body.id, "results": [result_values(item, score, each) for item, score in pairs]})

    @app.head("/v1/blobs/{sha256}")
    async def has_blob(sha256: str) -> Response:
        return Response(status_code=200 if f"sha256:{sha256}" in service.blobs else 404)

    @app.put("/v1/blobs/{sha256}")
    async def put_blob(sha256: str, request: Request) -> Response:
        try:
            service.blobs.put(f"sha256:{sha256}", await request.body())
        except ValueError as error:
            raise bad(str(error), "sha256") from error
        return Response(status_code=204)

    @app.get("/v1/tasks")
    async def tasks() -> Response:
        described = service.desk.router.describe()
        return JSONResponse({"tasks": [{"name": name, **values} for name, values in described.items()]})

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "waiting": service.desk.waiting})


def _item(item: Item, images: list[bytes]) -> RewardItem:
    return RewardItem(
        item.id,
        item.task,
        item.answer,
        gold=item.gold,
        messages=tuple(message.model_dump(exclude_none=True) for message in item.messages),
        images=tuple(images),
        columns=item.columns,
        truncated=item.truncated,
        thinking_opened=item.thinking_opened,
        token_ids=tuple(item.token_ids),
    )


def _check(router: Router, items: Sequence[RewardItem]) -> None:
    if len({item.id for item in items}) < len(items):
        raise bad("two items have the same id", "items")
    for number, item in enumerate(items):
        try:
            router.route(item)
        except UserError as error:
            raise bad(str(error), f"items[{number}].task") from error


def _foreign(app: FastAPI, service: _Service) -> None:
    """Add the routes by which OpenRLHF and SLIME ask for rewards."""

    async def scores(answers: Sequence[tuple[Any, str, Any]], identity: str) -> list[Score]:
        task = service.settings.default_task
        if task is None:
            raise bad("this route names no task: start the server with --default_task NAME")
        items = [
            RewardItem(str(n), task, text, gold=gold, messages=({"role": "user", "content": prompt},))
            for n, (prompt, text, gold) in enumerate(answers)
        ]
        found = (await service.judge(identity, "", items, service.settings.seconds)).scores
        if lacking := [score for score in found if score.value is None]:
            # these protocols have no word for a missing reward, and 0 would be a lie
            raise APIError(503, f"{len(lacking)} of {len(found)} rewards are missing: {lacking[0].parsed}")
        return found

    @app.post("/get_reward")
    async def get_reward(request: Request) -> Response:
        body = validated(QueryBody, await service.read(request))
        if not len(body.query) == len(body.prompts) == len(body.labels):
            raise bad("query, prompts and labels are of different lengths", "query")
        answers = [
            (prompt, query.removeprefix(prompt), label)
            for query, prompt, label in zip(body.query, body.prompts, body.labels, strict=True)
        ]
        values = [score.value for score in await scores(answers, request.scope["state"]["id"])]
        return JSONResponse({"rewards": values, "scores": values, "extra_logs": {}})

    @app.post("/rm")
    async def sample(request: Request) -> Response:
        body = validated(SampleBody, await service.read(request))
        found = await scores([(str(body.prompt), body.response, body.label)], request.scope["state"]["id"])
        return JSONResponse(found[0].value)
