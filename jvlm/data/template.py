"""Conversations to token ids through the checkpoint's own chat template, with the weight of every token's loss."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
import numpy as np

from jvlm.data import answer_spans, vocabulary
from jvlm.data.answer_spans import Span, TemplateFacts
from jvlm.data.chat_format import ChatFormat
from jvlm.data.content import Image, Message, Part, Text
from jvlm.data.control_tokens import ControlTokens, any_of, change_strings, is_paired
from jvlm.data.errors import ExampleError, Origin
from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Chat:
    """What is rendered: ``stand_ins`` are those of guarded text, ``template`` replaces the tokenizer's.

    ``values`` are given to the template, ``begun`` is the beginning of the answer, behind the prompt.
    """

    messages: tuple[Message, ...]
    generation_prompt: bool = False
    tools: tuple[Any, ...] = ()
    origin: Origin = Origin()
    stand_ins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str | None = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    begun: str = ""
    is_literal: bool = False

    def texts(self) -> Iterator[str]:
        """All text from outside."""
        for message in self.messages:
            yield from (part.text for part in message.content if isinstance(part, Text))
            if message.fields:
                yield from _strings(message.fields)
        yield from _strings(self.tools)
        yield from _strings(dict(self.values))
        if self.begun:
            yield self.begun

    def changed(self, change: Callable[[str], str]) -> _Chat:
        """With all text from outside changed."""
        messages = tuple(
            dataclasses.replace(
                m.map(lambda part: Text(change(part.text)) if isinstance(part, Text) else part),
                fields=tuple((name, change_strings(value, change)) for name, value in m.fields),
            )
            for m in self.messages
        )
        return dataclasses.replace(
            self,
            messages=messages,
            tools=tuple(change_strings(self.tools, change)),
            values=change_strings(dict(self.values), change),
            begun=change(self.begun),
        )

    def with_text(self, index: int, text: str) -> _Chat:
        changed = dataclasses.replace(self.messages[index], content=(Text(text),))
        return dataclasses.replace(self, messages=(*self.messages[:index], changed, *self.messages[index + 1 :]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


class ChatTemplate:
    """Renders messages and tokenizes them.

    Text from outside (messages, tools) stays text: where it spells a control token, that spelling is tokenized as
    ordinary text. Control tokens are those that the tokenizer calls special, and added tokens that the template writes
    around turns. Other added tokens (<think>, <tool_call>, locations) are words that any text may hold.

    Args:
      tokenizer: a fast transformers tokenizer; one without a template is given the family's.
      chat_format: how the family's templates are used.
      language: text in which answers are written; tokens in it are words, too.

    Raises:
      UserError: a template that is no template, or that writes no token after an answer, whose end would have no loss.
    """

    def __init__(self, tokenizer: Any, chat_format: ChatFormat, language: str = ""):
        self.tokenizer, self.chat_format, self._language = tokenizer, chat_format, language
        self._known: dict[tuple[str, int], TemplateFacts] = {}
        media = [name for name in (chat_format.image, chat_format.video) if name is not None]
        self._media = any_of(media)
        self._facts_of(())

    @property
    def templates(self) -> str | dict[str, str]:
        """The templates in use: the tokenizer's, one or several by name, or else the family's."""
        return self.tokenizer.chat_template or self.chat_format.template

    @property
    def facts(self) -> TemplateFacts:
        """What is known about the template for examples without tools."""
        return self._facts_of(())

    @property
    def _default(self) -> str | None:
        return None if self.tokenizer.chat_template else self.chat_format.template

    def render(self, messages: tuple[Message, ...], *, generation_prompt: bool, tools: tuple[Any, ...] = ()) -> str:
        """Return the prompt as text, one placeholder for each image and video."""
        return self._render(_Chat(messages, generation_prompt, tools))

    def tokenize(
        self,
        messages: tuple[Message, ...],
        *,
        generation_prompt: bool,
        origin: Origin,
        tools: tuple[Any, ...] = (),
        prompt_weight: float = 0.0,
        values: Mapping[str, Any] = {},
        begun: str = "",
        is_literal: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int32 [n], loss weights float32 [n], turn int32 [n]) before media placeholders are expanded.

        An assistant turn has a loss as the template renders it, up to and including its end-of-turn token. ``turn`` is
        the number of the last turn whose loss tokens have begun, counting assistant turns from 1. In a prompt nothing
        has a loss: both are 0 with ``generation_prompt``, and templates may then shorten earlier turns (drop their
        thinking, say).

        Args:
          prompt_weight: loss weight of all that is no assistant turn.
          values: what the template is given beside messages and tools.
          begun: of a prompt, the beginning of the answer, which is to be continued.
          is_literal: spellings of media tokens in text are text; otherwise they are refused.

        Raises:
          ExampleError: text that cannot be encoded, media tokens in it, a conversation that the template refuses or
            part of which it leaves out, or an assistant turn that is not found in the rendering.
        """
        chat = _Chat(messages, generation_prompt, tools, origin, values=values, begun=begun, is_literal=is_literal)
        texts = list(chat.texts())
        self._check_texts(chat, texts)
        text = self._render(chat)
        self._check_whole(chat, text)
        facts = self._facts_of(tools)
        suspects = [suspect for suspect in map(facts.control.suspect, texts) if suspect]
        plain = text
        if suspects:
            chat, text = self._guarded(chat, text, facts, suspects[0])
        spans = self._spans(chat, text, facts)
        if suspects and facts.control.differ(plain, text):
            ids, starts, ends = self._encode_guarded(chat, text, facts, suspects[0])
        else:
            ids, starts, ends = self._encode(plain)
        weights = np.full(len(ids), 0.0 if generation_prompt else prompt_weight, np.float32)
        turn = np.zeros(len(ids), np.int32)
        # a token that begins with the space before an answer is part of it
        for number, (span, weight) in enumerate(spans, 1):
            weights[(ends > span.begin) & (starts < span.end)] = weight
            turn[ends > span.begin] = number
        return ids, weights, turn

    def _check_texts(self, chat: _Chat, texts: list[str]) -> None:
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            begin = max(error.start - 20, 0)
            raise ExampleError(
                chat.origin,
                "messages",
                f"half of a surrogate pair, \\u{ord(error.object[error.start]):x}, which is no character, in "
                f"{error.object[begin : error.start + 20]!r}",
                "Write the whole character, or U+FFFD in its place",
            ) from error
        if any(map(self._media.search, texts)) and not (chat.is_literal and self._guards_media(chat)):
            self._check_media(chat)

    def _guards_media(self, chat: _Chat) -> bool:
        """Whether media tokens are control tokens, which text cannot spell."""
        return {self.chat_format.image, self.chat_format.video} - {None} <= self._facts_of(chat.tools).control.names

    def _check_media(self, chat: _Chat) -> None:
        """Raise ExampleError for media tokens in text, but for a prompt's earlier answers, which stop nothing."""
        others = tuple(m for m in chat.messages if not (chat.generation_prompt and m.role == "assistant"))
        texts = dataclasses.replace(chat, messages=others).texts()
        literal = sum(len(self._media.findall(text)) for text in texts)
        if literal:
            tags = sum(len(m.media) for m in chat.messages)
            raise ExampleError(
                chat.origin,
                "messages",
                f"{literal + tags} media tokens in the text for {tags} media",
                "Write <image> or <video>; a literal media token in the text is not allowed",
            )

    def _check_whole(self, chat: _Chat, text: str) -> None:
        """Raise ExampleError if the template leaves out something that the example holds."""
        if chat.tools and self._renders_as(text, dataclasses.replace(chat, tools=())):
            raise ExampleError(
                chat.origin,
                "tools",
                "the chat template does not use them: with and without them it writes the same",
                "Describe them in the system turn, or take a model whose template uses tools",
            )
        if any(m.fields for m in chat.messages):
            bare = tuple(dataclasses.replace(m, fields=()) if _calls(m) else m for m in chat.messages)
            if bare != chat.messages and self._renders_as(text, dataclasses.replace(chat, messages=bare)):
                raise ExampleError(
                    chat.origin,
                    "messages",
                    "the chat template does not use tool_calls: with and without them it writes the same",
                    "Write the calls in the content, as this model writes them",
                )
        for index, message in enumerate(chat.messages):
            for part in message.content:
                words = part.text.strip() if isinstance(part, Text) else ""
                if words and words not in text and self._renders_as(text, chat.with_text(index, "word")):
                    raise ExampleError(
                        chat.origin,
                        "messages",
                        f"the chat template leaves out the {message.role} turn {words[:40]!r}",
                        "Put its words into a turn that the template writes",
                    )

    def _renders_as(self, text: str, chat: _Chat) -> bool:
        try:
            return self._render(chat) == text
        except ExampleError:
            return False

    def _guarded(self, chat: _Chat, text: str, facts: TemplateFacts, suspect: str) -> tuple[_Chat, str]:
        """Return conversation and its rendering with stand-ins in what text from outside spells of control tokens."""
        try:
            stand_ins, _ = facts.control.stand_ins(text)
        except ValueError as error:
            raise self._not_text(chat, suspect, f"the example holds {error} too") from error
        guarded = dataclasses.replace(
            chat.changed(functools.partial(facts.control.guard, stand_ins=stand_ins)), stand_ins=stand_ins
        )
        rendered = self._render(guarded)
        if rendered.translate({ord(s): letter for letter, s in stand_ins.items()}) != text:
            raise self._not_text(chat, suspect, "the chat template takes it for its own")
        return guarded, rendered

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int32, first and last character of each token) of a rendering.

        As a call of the tokenizer gives them, which spends as long again on its other arguments.
        """
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != self.tokenizer.split_special_tokens:
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        encoded = backend.encode(text, add_special_tokens=self.chat_format.special_tokens)
        return np.asarray(encoded.ids, np.int32), *np.asarray(encoded.offsets, np.int64).reshape(-1, 2).T

    def _encode_guarded(self, chat: _Chat, text: str, facts: TemplateFacts, suspect: str):
        try:
            return facts.control.encode(text, chat.stand_ins, add_special_tokens=self.chat_format.special_tokens)
        except ValueError as error:
            raise self._not_text(chat, suspect, f"with {error} it cannot be told apart") from error

    @staticmethod
    def _not_text(chat: _Chat, suspect: str, why: str) -> ExampleError:
        return ExampleError(
            chat.origin, "messages", f"{suspect!r} cannot be written as ordinary text here: {why}", "Change the words"
        )

    def _spans(self, chat: _Chat, text: str, facts: TemplateFacts) -> list[tuple[Span, float]]:
        turns = [i for i, m in enumerate(chat.messages) if m.role == "assistant"]
        if chat.generation_prompt or not turns:
            return []
        for index in turns:
            if chat.messages[index].media:
                raise ExampleError(
                    chat.origin,
                    "messages",
                    "media in an assistant turn, which cannot have a loss",
                    "Write assistant turns without media tags",
                )
        spans = answer_spans.by_opening(text, facts, len(turns)) or self._marked_spans(chat, text, facts, turns)
        if not any(span.closed for span in spans):
            raise ExampleError(
                chat.origin,
                "messages",
                "the chat template writes no special token after an answer, so the end of answers would have no loss",
                "Let the template write the end-of-turn token after each assistant turn; if the tokenizer lacks it: "
                f"{vocabulary.GROW}",
            )
        return [(span, chat.messages[i].loss_weight) for span, i in zip(spans, turns, strict=True)]

    def _marked_spans(self, chat: _Chat, text: str, facts: TemplateFacts, turns: list[int]) -> list[Span]:
        try:
            _, free = facts.control.stand_ins(text, 2 * len(turns))
        except ValueError as error:
            raise self._not_text(chat, "the example", f"it holds {error}") from error
        marks = list(zip(free[::2], free[1::2], strict=True))
        marked, tight = (self._marked(chat, turns, marks, tight) for tight in (False, True))
        rendered, marked_spans = answer_spans.read_marks(self._render(marked), marks)
        # white space in front of an answer's words is its own where it goes with the answer's
        bare, bare_spans = rendered, marked_spans
        if tight != marked:
            bare, bare_spans = answer_spans.read_marks(self._render(tight), marks)
        spans = []
        for index, span, bare_span in zip(turns, marked_spans, bare_spans, strict=True):
            if rendered != text or span is None or bare_span is None or _calls(chat.messages[index]):
                spans.append(self._prefix_span(chat, text, facts, index))
            else:
                own = answer_spans.space_before(text, span[0]) - answer_spans.space_before(bare, bare_span[0])
                spans.append(answer_spans.from_marks(text, *span, max(own, 0), facts))
        return spans

    @staticmethod
    def _marked(chat: _Chat, turns: list[int], marks: list[tuple[str, str]], tight: bool) -> _Chat:
        for index, (begin, end) in zip(turns, marks, strict=True):
            chat = chat.with_text(index, answer_spans.mark(chat.messages[index].text, begin, end, tight=tight))
        return chat

    def _prefix_span(self, chat: _Chat, text: str, facts: TemplateFacts, index: int) -> Span:
        try:
            before, after = (
                self._render(dataclasses.replace(chat, messages=chat.messages[:end])) if end else ""
                for end in (index, index + 1)
            )
            span = answer_spans.by_prefix(text, before, after, facts)
        except ExampleError:
            span = None
        if span is None:
            raise ExampleError(
                chat.origin,
                "messages",
                "the chat template changes the words of an assistant turn, so what to learn cannot be told apart",
                "Write the turn as the template renders it",
            )
        return span

    def _render(self, chat: _Chat) -> str:
        messages = [{"role": m.role, "content": self._content(m), **dict(m.fields)} for m in chat.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=list(chat.tools) or None,
                chat_template=chat.template or self._default,
                tokenize=False,
                add_generation_prompt=chat.generation_prompt,
                **chat.values,
            )
            text += chat.begun
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, which fails in as many ways
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise ExampleError(
                chat.origin,
                "messages",
                f"the chat template cannot take the conversation: {kind}{error}",
                "Change it to what the model's template takes, or give the model another template",
            ) from error
        if self.chat_format.space_after_image:
            bracket = "<" + chat.stand_ins.get("<", "")
            text = re.sub(rf"{re.escape(self.chat_format.image)}(?=[^\s{bracket}])", f"{self.chat_format.image} ", text)
        return text

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        """Return the content as templates of the family take it."""
        if self.chat_format.inline:
            return "".join(part.text if isinstance(part, Text) else self.chat_format.image for part in message.content)
        if self.chat_format.always_blocks or message.media:
            return [self._block(part) for part in message.content] or [{"type": "text", "text": ""}]
        return message.text

    def _block(self, part: Part) -> dict[str, str]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        is_image = isinstance(part, Image) or self.chat_format.video is None
        return {"type": "image" if is_image else "video"}

    def _facts_of(self, tools: tuple[Any, ...]) -> TemplateFacts:
        """Return what is known about the template that an example with such tools is given."""
        try:
            source = self.tokenizer.get_chat_template(self._default, tools=list(tools) or None)
        except ValueError as error:
            raise UserError(f"the tokenizer's chat templates cannot be used: {error}") from error
        known = source, len(self.tokenizer)
        if known not in self._known:
            self._known[known] = self._examine(source)
        return self._known[known]

    def _examine(self, source: str) -> TemplateFacts:
        """Render a plain conversation and see what the template writes around its words."""
        # digits have no case, which templates may change
        asked, answered = ("80671", "80672"), ("80673", "80674")
        turns = tuple(
            Message(role, words, 0.0)
            for pair in zip(asked, answered, strict=True)
            for role, words in zip(("user", "assistant"), pair, strict=True)
        )
        prompt, bare, whole = (
            self._probe(_Chat(messages, generation_prompt, template=source))
            for messages, generation_prompt in ((turns[:1], True), (turns[:1], False), (turns, False))
        )
        whole = whole or self._probe(_Chat(turns[:2], template=source))
        added = self.tokenizer.added_tokens_decoder.values()
        names = {t.content for t in added}
        special = {t.content for t in added if t.special} | (names & set(self.tokenizer.all_special_tokens))
        written = {name for name in names if name in f"{prompt} {whole}" and not is_paired(name, names)}
        odd = {t.content for t in added if t.single_word or not t.content.strip()}
        control = ControlTokens(
            self.tokenizer, {name for name in (special | written) - odd if name not in self._language}
        )
        opening = prompt[len(bare) :] if prompt.startswith(bare) else ""
        ends = {name for name in (self.tokenizer.eos_token, *self.chat_format.stops) if name in control.names}
        headers = set(control.pattern.findall(opening))
        last = next((words for words in reversed(answered) if words in whole), None)
        if last is not None:
            tail = whole.rpartition(last)[2]
            closing = control.pattern.search(tail)
            # a base model's tokenizer may lack the family's token: it answers, and examples to learn are refused
            lacking = any(stop in tail for stop in self.chat_format.stops)
            if (closing is None or (tail[: closing.start()].strip() and not headers)) and not lacking:
                raise UserError(
                    f"the chat template writes {tail!r} after an answer, no special token of the tokenizer: a model "
                    f"trained with it would never learn to stop. Let it write the end-of-turn token there, for "
                    f"example {self.tokenizer.eos_token or self.chat_format.stops!r}"
                )
            ends |= {closing[0]} if closing else set()
            headers |= set(control.pattern.findall(whole.partition(answered[0])[2].partition(asked[-1])[0]))
        return TemplateFacts(control, opening, frozenset(ends), frozenset(headers - ends))

    def _probe(self, chat: _Chat) -> str:
        """Return the rendering of a plain conversation; empty if the template refuses that one, as it may."""
        try:
            return self._render(chat)
        except ExampleError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                cause = error.__cause__
                raise UserError(f"the chat template is not valid: line {cause.lineno}: {cause}") from error
            return ""


def _calls(message: Message) -> bool:
    """Whether a turn calls tools."""
    return any(name == "tool_calls" for name, _ in message.fields)
