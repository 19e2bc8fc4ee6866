"""POST /v1/completions: prompts without a chat template, as evaluation harnesses ask for log-probabilities."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from jvlm.errors import UserError
from jvlm.inference.async_engine import Answer, EngineDead
from jvlm.inference.requests import Event, SamplingParams, StepFailed, TokenLogprob
from jvlm.server import stream
from jvlm.server.answers import LEAST_LOGPROB, ChoiceState, TokenNames, Usage, add_usage, prompt_logprobs_body
from jvlm.server.chat import FINGERPRINT, check_stream
from jvlm.server.errors import APIError, of_user_error
from jvlm.server.protocol import CompletionRequest
from jvlm.server.sampling import grammar_of, sampling_params
from jvlm.server.service import Prompt, Service


@dataclasses.dataclass
class _Asked:
    """One prompt, and its answers."""

    prompt: Prompt
    text: str
    answer: Answer
    choices: list[ChoiceState]
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    begun: bool = False


class CompletionRun:
    """One request of any number of prompts.

    Args:
      identity: of the request, made by the server.
      owner: of the caller's key.
    """

    def __init__(self, service: Service, request: CompletionRequest, identity: str, owner: str):
        self.service, self.request, self.id, self.owner = service, request, identity, owner
        self.began, self.created = time.monotonic(), int(time.time())
        self.adapter = service.adapter_of(request.model)
        self.usage, self.names = Usage(), TokenNames(service.processor.tokenizer)
        self.asked: list[_Asked] = []
        self._end = service.begin(owner)
        self._counted = False

    async def begin(self) -> None:
        """Encode the prompts and hand them to the engine. Raises APIError."""
        request, service = self.request, self.service
        check_stream(request)
        self.names = TokenNames(service.processor.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        given = request.prompt
        prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        encoded = [await service.completion_prompt(prompt) for prompt in prompts]
        grammar = grammar_of(request, after=None, has_image=False)
        sampling = sampling_params(request, service.facts, max(p.example.length for p in encoded), grammar=grammar)
        if request.echo and request.logprobs is not None and sampling.prompt_logprobs is None:
            sampling = dataclasses.replace(sampling, prompt_logprobs=request.logprobs)
        for number, (prompt, encoding) in enumerate(zip(prompts, encoded, strict=True)):
            text = prompt if isinstance(prompt, str) else service.processor.tokenizer.decode(prompt)
            own = f"{self.id}-{number}"
            answer = await service.submit(encoding, sampling, request, own, self.owner, self.adapter)
            choices = [ChoiceState(number * sampling.n + k) for k in range(sampling.n)]
            self.asked.append(_Asked(encoding, text, answer, choices))
        self.sampling: SamplingParams = sampling

    def abandon(self) -> None:
        """Let go of everything; harmless after the end."""
        for asked in self.asked:
            asked.answer.abort()
        if not self._counted:
            self._counted = True
            for asked in self.asked:
                generated = sum(len(choice.tokens) for choice in asked.choices)
                self.service.metrics.ended(asked.answer, self.began, asked.prompt.example.length, generated)
        self._end()

    @property
    def head(self) -> dict[str, Any]:
        """Return the fields that every chunk begins with."""
        name = self.adapter or self.request.model or self.service.settings.model_name
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": name,
            "system_fingerprint": FINGERPRINT,
        }

    def note(self, asked: _Asked, event: Event) -> ChoiceState:
        """Count an event; returns the choice that it is of."""
        add_usage(self.usage, event, not asked.begun)
        if not asked.begun:
            self.usage.prompt += 0 if event.prompt_tokens else asked.prompt.example.length
            asked.prompt_logprobs = event.prompt_logprobs
        asked.begun = True
        choice = asked.choices[event.index]
        choice.take(event, self.service.facts.end_ids - frozenset(self.request.stop_token_ids or ()))
        if not self._left_out:
            choice.text += event.text
        return choice

    @property
    def _left_out(self) -> bool:
        """Whether the caller wants no token at all, and the engine gives one nevertheless."""
        return self.request.max_tokens == 0

    def body(self, asked: _Asked, choice: ChoiceState) -> dict[str, Any]:
        """Return a whole choice."""
        request = self.request
        body = {
            "index": choice.index,
            "text": (asked.text if request.echo else "") + choice.text,
            "logprobs": self.logprobs(asked, choice.logprobs, 0, with_prompt=request.echo),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if request.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_body(asked.prompt_logprobs, self.names)
        if request.return_token_ids:
            body |= {"token_ids": choice.tokens, "prompt_token_ids": asked.prompt.example.tokens.tolist()}
        return body

    def logprobs(
        self, asked: _Asked, items: Sequence[TokenLogprob], offset: int, *, with_prompt: bool
    ) -> dict[str, Any] | None:
        """Return the log-probabilities of tokens, those of the prompt first where it is echoed."""
        if self.request.logprobs is None:
            return None
        rows: list[tuple[int, TokenLogprob | None]] = []
        if with_prompt:
            tokens = asked.prompt.example.tokens.tolist()
            given = asked.prompt_logprobs or [None] * len(tokens)
            rows += zip(tokens, given, strict=True)
        if not self._left_out:
            rows += [(item.token, item) for item in items]
        texts = [self.names.text(token) for token, _ in rows]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if item is None else max(item.logprob, LEAST_LOGPROB) for _, item in rows],
            "top_logprobs": [None if item is None else self._top(item) for _, item in rows],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        found = {self.names.text(item.token): max(item.logprob, LEAST_LOGPROB)}
        for token, value in item.top:
            found.setdefault(self.names.text(token), max(value, LEAST_LOGPROB))
        return found


async def completions(
    service: Service, request: CompletionRequest, identity: str, owner: str, receive: Callable[[], Awaitable[Any]]
) -> Response:
    """Answer a request for completions. Raises APIError."""
    run = CompletionRun(service, request, identity, owner)
    try:
        await run.begin()
        async with stream.watching(receive, run.abandon):
            if not request.stream:
                return await _whole(run)
            first = await _next(run, run.asked[0])
        return stream.EventStream(_chunks(run, first), run.abandon)
    except BaseException:
        run.abandon()
        raise


async def _next(run: CompletionRun, asked: _Asked) -> list[Event]:
    try:
        return await asked.answer.events(run.service.settings.ping_seconds)
    except UserError as error:
        raise of_user_error(error) from error
    except EngineDead as error:
        raise APIError(503, "the engine has stopped") from error
    except StepFailed as error:
        raise APIError(503, "the device failed while it computed this; ask again") from error


async def _whole(run: CompletionRun) -> Response:
    for asked in run.asked:
        while not asked.answer.done:
            for event in await _next(run, asked):
                run.note(asked, event)
    choices = [run.body(asked, choice) for asked in run.asked for choice in asked.choices]
    usage = run.usage
    if run.request.max_tokens == 0:
        usage.completion = 0
    run.abandon()
    return JSONResponse({**run.head, "choices": choices, "usage": usage.body})


async def _chunks(run: CompletionRun, first: list[Event]) -> AsyncIterator[bytes]:
    """Yield the streams of all prompts, mixed as their tokens come."""
    writer, queue = stream.ChunkWriter(run.head), asyncio.Queue()

    async def read(asked: _Asked, events: list[Event]) -> None:
        try:
            while True:
                await queue.put((asked, events))
                if asked.answer.done:
                    break
                events = await _next(run, asked)
            await queue.put((asked, None))
        except APIError as error:
            await queue.put((asked, error))

    tasks = [asyncio.ensure_future(read(asked, first if k == 0 else [])) for k, asked in enumerate(run.asked)]
    try:
        left = len(tasks)
        while left:
            asked, found = await queue.get()
            if isinstance(found, APIError):
                yield stream.event(found.body)
                break
            if found is None:
                left -= 1
                continue
            pieces = [_chunk(run, writer, asked, event) for event in found]
            yield b"".join(pieces) or stream.PING
        else:
            if run.request.stream_options is not None and run.request.stream_options.include_usage:
                yield writer.chunk([], usage=run.usage.body)
    finally:
        for task in tasks:
            task.cancel()
    run.abandon()
    yield stream.DONE


def _chunk(run: CompletionRun, writer: stream.ChunkWriter, asked: _Asked, event: Event) -> bytes:
    request, choice = run.request, asked.choices[event.index]
    echo = request.echo and not choice.tokens
    before, told = len(choice.text), len(choice.logprobs)
    run.note(asked, event)
    offset = before if echo or not request.echo else before + len(asked.text)
    body = {
        "index": choice.index,
        "text": (asked.text if echo else "") + choice.text[before:],
        "logprobs": run.logprobs(asked, choice.logprobs[told:], offset, with_prompt=echo),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if request.return_token_ids:
        body["token_ids"] = [] if event.token is None else [event.token]
    options = request.stream_options
    usage = run.usage.body if options is not None and options.continuous_usage_stats else None
    return writer.chunk([body], usage=usage)
