"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from jvlm.errors import UserError
from jvlm.inference.async_engine import Answer, EngineDead
from jvlm.inference.requests import Event, StepFailed, TokenLogprob
from jvlm.server import stream, tools
from jvlm.server.answers import ChatChoice, TokenNames, Usage, add_usage, prompt_logprobs_body
from jvlm.server.errors import APIError, bad, of_user_error
from jvlm.server.protocol import ChatRequest, Sampling
from jvlm.server.reasoning import CLOSE, ReasoningSplitter
from jvlm.server.sampling import grammar_of, sampling_params
from jvlm.server.service import Service

FINGERPRINT = "jvlm"


class ChatRun:
    """One chat request: its prompt, its answers, and what is written of them.

    Args:
      identity: of the request, made by the server.
      owner: of the caller's key.
    """

    def __init__(self, service: Service, request: ChatRequest, identity: str, owner: str):
        self.service, self.request, self.id, self.owner = service, request, identity, owner
        self.began, self.created = time.monotonic(), int(time.time())
        self.adapter = service.adapter_of(request.model)
        self.usage = Usage()
        self.choices: list[ChatChoice] = []
        self.prompt_logprobs: Any = None
        self._end = service.begin(owner)
        self._answer: Answer | None = None
        self._counted = False

    async def begin(self) -> None:
        """Read the conversation and hand it to the engine. Raises APIError."""
        request, service = self.request, self.service
        check_stream(request)
        if request.modalities not in (None, ["text"]):
            raise bad("only text is generated", "modalities")
        given = tools.check_tools(request.tools or ())
        forced = tools.chosen_tools(given, request.tool_choice)
        shown = () if request.tool_choice == "none" else given if forced is None else tuple(forced)
        if shown and not service.reads_tools:
            raise bad("the chat template of this model knows no tools", "tools")
        self.prompt = prompt = await service.prompt_of(request, shown, self.owner)
        grammar = grammar_of(
            request,
            after=CLOSE if prompt.begins_inside else None,
            has_image=bool(prompt.example.sizes),
            tool_call=None if forced is None else tools.call_grammar(forced),
        )
        sampling = sampling_params(request, service.facts, prompt.example.length, grammar=grammar)
        self.choices = [self._choice(index, shown) for index in range(sampling.n)]
        self.names = TokenNames(service.processor.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._answer = await service.submit(prompt, sampling, request, self.id, self.owner, self.adapter)

    def _choice(self, index: int, shown: Sequence[dict[str, Any]]) -> ChatChoice:
        service, request = self.service, self.request
        splitter = ReasoningSplitter(begins_inside=self.prompt.begins_inside) if service.tells_reasoning else None
        return ChatChoice(
            index,
            splitter=splitter,
            reader=tools.ToolCallReader(shown) if shown else None,
            show_reasoning=request.include_reasoning,
            own_ends=service.facts.end_ids - frozenset(request.stop_token_ids or ()),
            one_call=request.parallel_tool_calls is False,
        )

    def abandon(self) -> None:
        """Let go of everything; harmless after the end."""
        if self._answer is not None:
            self._answer.abort()
            if not self._counted:
                self._counted = True
                self.service.metrics.ended(self._answer, self.began, self.usage.prompt, self.usage.completion)
                self.service.metrics.broken_call(sum(c.reader.broken for c in self.choices if c.reader is not None))
        self._end()

    async def events(self) -> list[Event]:
        """Return further events; [] where the client must be shown that somebody is there. Raises APIError."""
        try:
            return await self._answer.events(self.service.settings.ping_seconds)
        except UserError as error:
            raise of_user_error(error) from error
        except EngineDead as error:
            raise APIError(503, "the engine has stopped") from error
        except StepFailed as error:
            raise APIError(503, "the device failed while it computed this; ask again") from error

    @property
    def done(self) -> bool:
        """Whether there are no further events."""
        return self._answer.done

    def note(self, event: Event, first: bool) -> list[dict[str, Any]]:
        """Count an event; returns what it adds to its choice."""
        add_usage(self.usage, event, first)
        if first:
            self.usage.prompt = event.prompt_tokens or self.prompt.example.length
            self.usage.media = self.prompt.media_tokens
            self.prompt_logprobs = event.prompt_logprobs
        choice = self.choices[event.index]
        before = choice.reasoning_tokens
        deltas = choice.feed(event)
        self.usage.reasoning += choice.reasoning_tokens - before
        return deltas

    @property
    def head(self) -> dict[str, Any]:
        """Return the fields that every chunk begins with."""
        name = self.adapter or self.request.model or self.service.settings.model_name
        return {
            "id": self.id,
            "object": "chat.completion.chunk" if self.request.stream else "chat.completion",
            "created": self.created,
            "model": name,
            "system_fingerprint": FINGERPRINT,
        }

    def extra(self) -> dict[str, Any]:
        """Return what only the whole answer tells: sizes of images, tokens of the prompt."""
        found = self.service.sizes_body(self.prompt)
        if self.request.return_token_ids:
            found["prompt_token_ids"] = self.prompt.example.tokens.tolist()
        if self.request.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs_body(self.prompt_logprobs, self.names)
        return found

    def logprobs(self, items: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Return the log-probabilities of tokens; None where nobody asked."""
        return {"content": [self.names.entry(item) for item in items]} if self.request.logprobs else None


async def chat(
    service: Service, request: ChatRequest, identity: str, owner: str, receive: Callable[[], Awaitable[Any]]
) -> Response:
    """Answer a chat request. Raises APIError."""
    run = ChatRun(service, request, identity, owner)
    try:
        await run.begin()
        if not request.stream:
            async with stream.watching(receive, run.abandon):
                return await _whole(run)
        async with stream.watching(receive, run.abandon):
            first = await run.events()
        return stream.EventStream(_chunks(run, first), run.abandon)
    except BaseException:
        run.abandon()
        raise


async def _whole(run: ChatRun) -> Response:
    first = True
    while not run.done:
        for event in await run.events():
            run.note(event, first)
            first = False
    body = {**run.head, "choices": [_choice_body(run, choice) for choice in run.choices], "usage": run.usage.body}
    run.abandon()
    return JSONResponse({**body, **run.extra()})


def _choice_body(run: ChatRun, choice: ChatChoice) -> dict[str, Any]:
    state = choice.state
    body = {
        "index": state.index,
        "message": choice.message(),
        "logprobs": run.logprobs(state.logprobs),
        "finish_reason": choice.finish_reason,
        "stop_reason": state.stop_reason,
    }
    return body | ({"token_ids": state.tokens} if run.request.return_token_ids else {})


async def _chunks(run: ChatRun, events: list[Event]) -> AsyncIterator[bytes]:
    """Yield the stream of an answer, errors included; an error after the first event is an event of its own."""
    writer, request = stream.ChunkWriter(run.head), run.request
    options = request.stream_options
    is_plain = not (_tells_usage(request) or request.logprobs or request.return_token_ids)
    begun: set[int] = set()
    told: dict[int, int] = {}
    first = True
    try:
        while True:
            pieces: list[bytes] = [] if events else [stream.PING]
            words: dict[int, str] = {}  # of choices, not written yet: those of several steps share a chunk
            for event in events:
                deltas = run.note(event, first)
                if is_plain and event.finish_reason is None and event.index in begun and _are_words(deltas):
                    words[event.index] = words.get(event.index, "") + "".join(delta["content"] for delta in deltas)
                    continue
                pieces += [writer.words(*item) for item in words.items() if item[1]]
                words = {}
                more = run.extra() if first else {}
                first = False
                pieces += _of_event(run, writer, event, deltas, begun, told, more)
            pieces += [writer.words(*item) for item in words.items() if item[1]]
            if pieces:
                yield b"".join(pieces)
            if run.done:
                break
            events = await run.events()
        if options is not None and options.include_usage:
            yield writer.chunk([], usage=run.usage.body)
    except APIError as error:
        yield stream.event(error.body)
    run.abandon()
    yield stream.DONE


def _of_event(
    run: ChatRun,
    writer: stream.ChunkWriter,
    event: Event,
    deltas: list[dict[str, Any]],
    begun: set[int],
    told: dict[int, int],
    more: dict[str, Any],
) -> list[bytes]:
    """Return the chunks of one event."""
    choice, request, index = run.choices[event.index], run.request, event.index
    usage = run.usage.body if _tells_usage(request) else None
    entries: list[dict[str, Any]] = []
    if index not in begun:
        begun.add(index)
        entries.append({"delta": {"role": "assistant", "content": ""}})
    entries += [{"delta": delta} for delta in stream.merged(deltas)]
    if event.finish_reason is not None:
        entries.append({"delta": {}, "finish_reason": choice.finish_reason, "stop_reason": choice.state.stop_reason})
    elif request.return_token_ids and not entries:
        entries.append({"delta": {}})
    if request.logprobs and entries:
        items = choice.state.logprobs[told.get(index, 0) :]
        told[index] = len(choice.state.logprobs)
        entries[-1 if len(entries) == 1 else 1 if "role" in entries[0]["delta"] else 0]["logprobs"] = (
            run.logprobs(items) if items else None
        )
    if request.return_token_ids and event.token is not None:
        entries[-1]["token_ids"] = [event.token]
    bodies = [{"index": index, "logprobs": None, "finish_reason": None, **entry} for entry in entries]
    return [writer.chunk([body], usage=usage, **(more if number == 0 else {})) for number, body in enumerate(bodies)]


def _tells_usage(request: ChatRequest) -> bool:
    """Whether every chunk tells the usage so far."""
    return request.stream_options is not None and request.stream_options.continuous_usage_stats


def _are_words(deltas: list[dict[str, Any]]) -> bool:
    return all(len(delta) == 1 and "content" in delta for delta in deltas)


def check_stream(request: Sampling) -> None:
    """Raise APIError for options of a stream where none is asked for."""
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options needs stream: true", "stream_options")
