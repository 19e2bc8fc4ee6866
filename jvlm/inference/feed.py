"""Many conversations through one engine: the next one begins as soon as there is room, none waits for a batch to end.

Prompts are encoded on threads beside the engine's steps, and only so many of them are held in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.requests import Request

if TYPE_CHECKING:
    from jvlm.inference.engine import Engine
    from jvlm.inference.sampling import SamplingConfig

# Prompts in the engine for each that runs at once: bounds the memory of their pictures. The first so many decide the
# shapes that programs are compiled for, so more of them means fewer compilations.
WINDOW = 8
_THREADS = 2  # that encode prompts
_NUMBERS = itertools.count()  # of requests, so that no two have one id


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer: its tokens, with the stop token if that is what ended it."""

    tokens: tuple[int, ...]
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Asked:
    """A conversation to answer.

    Attributes:
      number: decides random draws, with the seed.
      conversation: a record, a parsed conversation, or what is wrong with it.
      origin: where a record stands, for messages.
      adapter: name of the one that answers; None is the base.
      key: the caller's own.
    """

    number: int
    conversation: Any
    origin: Origin = Origin()
    adapter: str | None = None
    key: Any = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a conversation: an answer, or an error.

    Attributes:
      example: the prompt as the model had it; None where it cannot be encoded.
    """

    asked: Asked
    example: Example | None = None
    completion: Completion | None = None
    error: UserError | None = None


def encode_prompt(engine: Engine, conversation: Any, origin: Origin = Origin()) -> Example:
    """The prompt of a conversation, with room for an answer.

    Raises:
      ExampleError: whatever is wrong with the conversation, and a prompt as long as the model has positions.
    """
    example = engine.processor.encode(parse_example(conversation, origin), generation_prompt=True)
    if not example.length:
        raise ExampleError(example.origin, "messages", "the prompt is empty", "Ask something")
    engine.answer_limit(example)
    return example


def answer_text(processor: Processor, completion: Completion) -> str:
    """The text of an answer, without the token that stopped it."""
    return processor.decode(completion.tokens[:-1] if completion.stopped else completion.tokens)


def answer_each(
    engine: Engine,
    asked: Iterable[Asked],
    sampling: SamplingConfig,
    *,
    batch_size: int,
    ends_at_error: bool = False,
    on_token: Callable[[int, int], None] | None = None,
) -> Generator[Outcome]:
    """Yield what becomes of conversations, as they end.

    Args:
      asked: read only as far as there is room, from the caller's thread.
      batch_size: conversations that run at once; nine times as many are held.
      ends_at_error: begin none behind one that cannot be encoded.
      on_token: called with (number of the conversation, token id) as tokens arrive.
    """
    unencoded: deque[Outcome] = deque()
    running: dict[str, tuple[Asked, Example, list[int]]] = {}

    def requests() -> Iterator[Request]:
        for one, example in _encoded(engine, asked, batch_size):
            if isinstance(example, ExampleError):
                unencoded.append(Outcome(one, error=example))
                if ends_at_error:
                    return
                continue
            params = sampling.params(one.number, detokenize=False)
            request = Request(f"feed-{next(_NUMBERS)}", example, params, adapter=one.adapter)
            running[request.id] = (one, example, [])
            yield request

    with contextlib.closing(engine.run(requests(), most=batch_size * WINDOW)) as events:
        for event in events:
            while unencoded:
                yield unencoded.popleft()
            one, example, tokens = running[event.request_id]
            if event.token is not None:
                tokens.append(event.token)
                if on_token is not None:
                    on_token(one.number, event.token)
            if event.finish_reason is None:
                continue
            del running[event.request_id]
            if event.error is not None:
                yield Outcome(one, example, error=event.error)
            else:
                yield Outcome(one, example, Completion(tuple(tokens), event.finish_reason == "stop"))
    yield from unencoded


def in_order(outcomes: Iterable[Outcome], first: int = 0) -> Iterator[Outcome]:
    """Yield outcomes of conversations that are numbered without gaps in the order of their numbers."""
    ended: dict[int, Outcome] = {}
    for outcome in outcomes:
        ended[outcome.asked.number] = outcome
        while first in ended:
            yield ended.pop(first)
            first += 1


def _encoded(engine: Engine, asked: Iterable[Asked], count: int) -> Iterator[tuple[Asked, Example | ExampleError]]:
    """Yield conversations with their prompts, in order.

    Args:
      count: of prompts that are encoded ahead: as many as answers may end in one step, lest the device wait for them.
    """

    def encode(one: Asked) -> Example | ExampleError:
        if isinstance(one.conversation, ExampleError):
            return one.conversation
        try:
            return encode_prompt(engine, one.conversation, one.origin)
        except ExampleError as error:
            return error

    source, ahead = iter(asked), deque[tuple[Asked, Future[Example | ExampleError]]]()
    count = max(count, 2 * _THREADS)
    with ThreadPoolExecutor(_THREADS, "jvlm-encode") as pool:
        try:
            while True:
                for one in itertools.islice(source, count - len(ahead)):
                    ahead.append((one, pool.submit(encode, one)))
                if not ahead:
                    return
                one, future = ahead.popleft()
                yield one, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
