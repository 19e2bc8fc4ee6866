"""Events of the engine to the parts of an answer, the same whether it is streamed or not."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jvlm.inference.requests import Event, TokenLogprob
from jvlm.server.reasoning import ReasoningSplitter
from jvlm.server.tools import Call, ToolCallReader

LEAST_LOGPROB = -9999.0  # JSON has no infinity
Delta = dict[str, Any]


@dataclasses.dataclass
class Usage:
    """Tokens of a request, all of its answers together."""

    prompt: int = 0
    cached: int = 0
    media: int = 0
    completion: int = 0
    reasoning: int = 0

    @property
    def body(self) -> dict[str, Any]:
        """Return the JSON of it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {
                "cached_tokens": self.cached,
                "image_tokens": self.media,
                "multimodal_tokens": self.media,
            },
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class TokenNames:
    """How tokens are shown where they stand alone.

    Args:
      as_ids: as "token_id:123".
    """

    def __init__(self, tokenizer: Any, *, as_ids: bool = False):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, token: int) -> str:
        """Return the text of a token; what is no whole character is replaced."""
        return f"token_id:{token}" if self._as_ids else self._tokenizer.decode([token], skip_special_tokens=False)

    def entry(self, item: TokenLogprob) -> dict[str, Any]:
        """Return the entry of a token in ``logprobs.content``."""
        return {**self._one(item.token, item.logprob), "top_logprobs": [self._one(*top) for top in item.top]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode())}


@dataclasses.dataclass
class ChoiceState:
    """One answer, as far as it has come."""

    index: int
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def take(self, event: Event, own_ends: frozenset[int]) -> None:
        """Note what an event says."""
        if event.token is not None:
            self.tokens.append(event.token)
        ended = event.finish_reason == "stop" and not isinstance(event.stop_reason, str)
        if event.logprob is not None and not (ended and event.token is not None):
            self.logprobs.append(event.logprob)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            self.stop_reason = None if event.stop_reason in own_ends else event.stop_reason


class ChatChoice:
    """One answer of a chat: its thinking, words and calls.

    Args:
      splitter: tells thinking apart; None takes all for words.
      reader: finds calls; None finds none.
      show_reasoning: whether the caller gets the thinking.
      own_ends: end tokens that are no reason to be told.
      one_call: drop calls after the first.
    """

    def __init__(
        self,
        index: int,
        *,
        splitter: ReasoningSplitter | None = None,
        reader: ToolCallReader | None = None,
        show_reasoning: bool = True,
        own_ends: frozenset[int] = frozenset(),
        one_call: bool = False,
    ):
        self.state = ChoiceState(index)
        self.splitter, self.reader = splitter, reader
        self._show, self._own_ends, self._one_call = show_reasoning, own_ends, one_call
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.reasoning_tokens = 0

    @property
    def finish_reason(self) -> str | None:
        """Return how the answer ended, None while it goes on."""
        reason = self.state.finish_reason
        return "tool_calls" if self.calls and reason == "stop" else reason

    def feed(self, event: Event) -> list[Delta]:
        """Return what an event adds to the message."""
        if self.splitter is not None and event.token is not None:
            self.reasoning_tokens += self.splitter.thinking
        self.state.take(event, self._own_ends)
        deltas = self._text(event.text) if event.text else []
        if event.finish_reason is not None:
            deltas += self._finish()
        return deltas

    def message(self) -> dict[str, Any]:
        """Return the whole message."""
        content: str | None = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self._show:
            thinking = "".join(self.reasoning) or None
            message |= {"reasoning": thinking, "reasoning_content": thinking}
        if self.calls:
            message["content"] = content or None
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self.calls]
        return message

    def _text(self, text: str) -> list[Delta]:
        if self.splitter is None:
            return self._words(text)
        deltas: list[Delta] = []
        for kind, piece in self.splitter.feed(text):
            deltas += self._words(piece) if kind == "content" else self._thought(piece)
        return deltas

    def _thought(self, text: str) -> list[Delta]:
        self.reasoning.append(text)
        return [{"reasoning": text, "reasoning_content": text}] if self._show else []

    def _words(self, text: str) -> list[Delta]:
        return self._items([text] if self.reader is None else self.reader.feed(text))

    def _items(self, items: Sequence[str | Call]) -> list[Delta]:
        deltas: list[Delta] = []
        for item in items:
            if isinstance(item, str):
                self.content.append(item)
                deltas.append({"content": item})
            elif not (self._one_call and self.calls):
                deltas += self._call(item)
        return deltas

    def _call(self, call: Call) -> list[Delta]:
        index, name = len(self.calls), call.name
        entry = {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
        self.calls.append({**entry, "function": {"name": name, "arguments": call.arguments}})
        return [
            {"tool_calls": [{**entry, "function": {"name": name, "arguments": ""}}]},
            {"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]},
        ]

    def _finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        if self.splitter is not None:
            for kind, piece in self.splitter.finish():
                deltas += self._words(piece) if kind == "content" else self._thought(piece)
        return deltas + (self._items(self.reader.finish()) if self.reader is not None else [])


def add_usage(usage: Usage, event: Event, first: bool) -> None:
    """Count the tokens of an event; those of the prompt with the first event of a request."""
    usage.completion += event.token is not None
    if first:
        usage.prompt += event.prompt_tokens
        usage.cached += event.cached_tokens


def prompt_logprobs_body(
    items: Sequence[TokenLogprob | None] | None, names: TokenNames
) -> list[Mapping[str, Any] | None] | None:
    """Return the log-probabilities of a prompt as vLLM gives them: for each token a mapping of ids."""
    if items is None:
        return None
    found: list[Mapping[str, Any] | None] = []
    for item in items:
        if item is None:
            found.append(None)
            continue
        ranks = {token: (rank, value) for rank, (token, value) in enumerate(item.top, 1)}
        ranks.setdefault(item.token, (len(item.top) + 1, item.logprob))
        found.append(
            {
                str(token): {
                    "logprob": max(value, LEAST_LOGPROB),
                    "rank": rank,
                    "decoded_token": names.text(token),
                }
                for token, (rank, value) in ranks.items()
            }
        )
    return found
