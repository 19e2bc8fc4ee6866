"""POST /v1/responses: the part of OpenAI's Responses API that keeps nothing on the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from jvlm.inference.requests import Event
from jvlm.server import stream
from jvlm.server.chat import ChatRun
from jvlm.server.errors import APIError, bad
from jvlm.server.protocol import ChatRequest, ResponsesRequest
from jvlm.server.reading import validated
from jvlm.server.service import Service

_CALLS = ("function_call", "function_call_output")


async def respond(
    service: Service, request: ResponsesRequest, identity: str, owner: str, receive: Callable[[], Awaitable[Any]]
) -> Response:
    """Answer a request of the Responses API. Raises APIError."""
    run = ChatRun(service, chat_request(request), identity, owner)
    try:
        await run.begin()
        async with stream.watching(receive, run.abandon):
            first = await run.events()
            if not request.stream:
                return await _whole(run, request, first)
        return stream.EventStream(_Events(run, request).source(first), run.abandon)
    except BaseException:
        run.abandon()
        raise


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """Return the chat request that asks the same. Raises APIError for what would need a state, or is not known."""
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(request, name):
            raise bad("this server keeps no responses; send the whole conversation as input", name)
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        for index, item in enumerate(request.input):
            _add_item(messages, item, f"input[{index}]")
    reasoning = request.reasoning or {}
    body = {
        "model": request.model,
        "messages": messages,
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())] or None,
        "tool_choice": _choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "response_format": _format(request.text),
        "reasoning_effort": reasoning.get("effort"),
        "chat_template_kwargs": request.chat_template_kwargs,
    }
    return validated(ChatRequest, {name: value for name, value in body.items() if value is not None})


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], field: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        call = {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != "reasoning":
        raise bad(f"use message, {' or '.join(_CALLS)}", f"{field}.type")


def _tool(tool: Mapping[str, Any], field: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad("only tools of the type function are supported", f"{field}.type")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _choice(choice: Any) -> Any:
    return {"type": "function", "function": {"name": choice.get("name")}} if isinstance(choice, Mapping) else choice


def _format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    given = (text or {}).get("format")
    if not isinstance(given, Mapping):
        return None
    if given.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: given.get(name) for name in ("name", "schema", "strict")}}
    return dict(given)


async def _whole(run: ChatRun, request: ResponsesRequest, events: list[Event]) -> Response:
    first = True
    while True:
        for event in events:
            run.note(event, first)
            first = False
        if run.done:
            break
        events = await run.events()
    body = _response(run, request, _status(run), _output(run))
    run.abandon()
    return JSONResponse(body)


def _status(run: ChatRun) -> str:
    return "incomplete" if run.choices[0].finish_reason == "length" else "completed"


def _response(run: ChatRun, request: ResponsesRequest, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    usage = run.usage
    return {
        "id": run.id,
        "object": "response",
        "created_at": run.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": run.head["model"],
        "output": output,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": request.reasoning or {"effort": None, "summary": None},
        "store": False,
        "temperature": request.temperature,
        "text": request.text or {"format": {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None
        if status == "in_progress"
        else {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        },
    }


def _output(run: ChatRun) -> list[dict[str, Any]]:
    """Return the items of a whole answer, in the order of a stream."""
    choice, items = run.choices[0], []
    if choice.reasoning:
        items.append(_reasoning(run, "".join(choice.reasoning)))
    if choice.content or not choice.calls:
        items.append(_message(run, "".join(choice.content), "completed"))
    return items + [_call(call, call["function"]["arguments"], "completed") for call in choice.calls]


def _reasoning(run: ChatRun, text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": f"rs_{run.id}", "type": "reasoning", "summary": [], "content": content}


def _message(run: ChatRun, text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
    return {"id": f"msg_{run.id}", "type": "message", "status": status, "role": "assistant", "content": content}


def _call(call: Mapping[str, Any], arguments: str, status: str) -> dict[str, Any]:
    return {
        "id": f"fc_{call['id']}",
        "call_id": call["id"],
        "type": "function_call",
        "name": call["function"]["name"],
        "arguments": arguments,
        "status": status,
    }


class _Events:
    """The events of a streamed response."""

    def __init__(self, run: ChatRun, request: ResponsesRequest):
        self._run, self._request = run, request
        self._number, self._index = -1, -1
        self._open: str | None = None
        self._text = ""

    async def source(self, events: list[Event]) -> AsyncIterator[bytes]:
        """Yield them."""
        run, first = self._run, True
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=_response(run, self._request, "in_progress", []))
        try:
            while True:
                pieces: list[bytes] = [] if events else [stream.PING]
                for event in events:
                    for delta in run.note(event, first):
                        pieces += self._delta(delta)
                    first = False
                yield b"".join(pieces)
                if run.done:
                    break
                events = await run.events()
        except APIError as error:
            body = _response(run, self._request, "failed", [])
            body["error"] = {"code": "server_error", "message": error.message}
            run.abandon()
            yield self._event("response.failed", response=body)
            return
        if not run.choices[0].content and not run.choices[0].calls:
            yield b"".join(self._begin("message"))
        yield b"".join(self._end())
        status = _status(run)
        run.abandon()
        yield self._event(f"response.{status}", response=_response(run, self._request, status, _output(run)))

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return stream.event({"type": kind, "sequence_number": self._number, **fields}, kind)

    def _delta(self, delta: Mapping[str, Any]) -> list[bytes]:
        if "tool_calls" in delta:
            (call,) = delta["tool_calls"]
            return self._call(call) if "id" not in call else []
        kind = "message" if "content" in delta else "reasoning"
        text = delta.get("content", delta.get("reasoning"))
        pieces = [] if self._open == kind else [*self._end(), *self._begin(kind)]
        self._text += text
        where = {"output_index": self._index, "content_index": 0, "item_id": self._item_id(kind)}
        name = "output_text" if kind == "message" else "reasoning_text"
        more = {"logprobs": []} if kind == "message" else {}
        return [*pieces, self._event(f"response.{name}.delta", **where, delta=text, **more)]

    def _item_id(self, kind: str) -> str:
        return f"{'msg' if kind == 'message' else 'rs'}_{self._run.id}"

    def _begin(self, kind: str) -> list[bytes]:
        self._open, self._text = kind, ""
        self._index += 1
        item = _message(self._run, None, "in_progress") if kind == "message" else _reasoning(self._run, "")
        added = self._event("response.output_item.added", output_index=self._index, item=item)
        part = {"type": "output_text", "text": "", "annotations": []}
        if kind != "message":
            part = {"type": "reasoning_text", "text": ""}
        where = {"output_index": self._index, "content_index": 0, "item_id": self._item_id(kind)}
        return [added, self._event("response.content_part.added", **where, part=part)]

    def _end(self) -> list[bytes]:
        if self._open is None:
            return []
        kind, self._open = self._open, None
        where = {"output_index": self._index, "content_index": 0, "item_id": self._item_id(kind)}
        name = "output_text" if kind == "message" else "reasoning_text"
        item = _message(self._run, self._text, "completed") if kind == "message" else _reasoning(self._run, self._text)
        more = {"logprobs": []} if kind == "message" else {}
        part = item["content"][0] if item["content"] else {"type": name, "text": ""}
        return [
            self._event(f"response.{name}.done", **where, text=self._text, **more),
            self._event("response.content_part.done", **where, part=part),
            self._event("response.output_item.done", output_index=self._index, item=item),
        ]

    def _call(self, delta: Mapping[str, Any]) -> list[bytes]:
        """Return the events of one call, which is whole when it is known."""
        pieces, call = self._end(), self._run.choices[0].calls[delta["index"]]
        self._index += 1
        arguments, where = call["function"]["arguments"], {"output_index": self._index, "item_id": f"fc_{call['id']}"}
        name = "response.function_call_arguments"
        return [
            *pieces,
            self._event("response.output_item.added", output_index=self._index, item=_call(call, "", "in_progress")),
            self._event(f"{name}.delta", **where, delta=arguments),
            self._event(f"{name}.done", **where, arguments=arguments, name=call["function"]["name"]),
            self._event(
                "response.output_item.done", output_index=self._index, item=_call(call, arguments, "completed")
            ),
        ]
