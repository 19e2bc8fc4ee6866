"""Messages of OpenAI's API to jvlm's typed parts: text stays text, media are read by `jvlm.server.media` alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jvlm.data import tool_calls
from jvlm.data.content import Conversation, Image, Message, Part, Text, Video
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_conversation
from jvlm.server.errors import bad, of_user_error
from jvlm.server.media import MediaSource

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_WORDS = ("text", "input_text", "output_text", "refusal", "thinking", "summary_text", "reasoning_text")
_IMAGES, _VIDEOS = ("image_url", "input_image", "image"), ("video_url", "video", "input_video")
_DETAILS = ("auto", "low", "high", "original")
_MOST_NAME = 512


@dataclasses.dataclass(frozen=True)
class _Turn:
    role: str
    content: tuple[str | MediaSource, ...]
    fields: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outline:
    """A conversation whose media are not read yet.

    Attributes:
      sources: its media in order.
      objects: boxes beside the messages, in ms-swift's form; with them, or with listed media, tags are in the text.
    """

    turns: tuple[_Turn, ...]
    sources: tuple[MediaSource, ...]
    tools: tuple[dict[str, Any], ...] = ()
    template_values: tuple[tuple[str, Any], ...] = ()
    image_settings: tuple[tuple[str, Any], ...] = ()
    is_tagged: bool = False
    objects: dict[str, Any] | None = None

    def with_last_user_text(self, text: str) -> Outline:
        """Return the outline with a text at the end of the last user turn."""
        for index in reversed(range(len(self.turns))):
            turn = self.turns[index]
            if turn.role == "user":
                turn = dataclasses.replace(turn, content=(*turn.content, text))
                return dataclasses.replace(self, turns=(*self.turns[:index], turn, *self.turns[index + 1 :]))
        return self

    def conversation(self, media: Sequence[Image | Video]) -> Conversation:
        """Return the conversation with its media, in the order of ``sources``. Raises APIError."""
        if self.is_tagged:
            return self._tagged(media)
        left = iter(media)
        messages = tuple(
            Message(turn.role, tuple(_part(item, left) for item in turn.content), fields=turn.fields)
            for turn in self.turns
        )
        return Conversation(
            messages,
            image_settings=self.image_settings,
            tools=self.tools,
            template_values=self.template_values,
            is_literal=True,
        )

    def _tagged(self, media: Sequence[Image | Video]) -> Conversation:
        """Of messages with <image> and <video> tags, and boxes."""
        example = {
            "messages": [
                {
                    "role": turn.role,
                    "content": "".join(map(str, turn.content)),
                    **{name: value for name, value in turn.fields if name != "reasoning_content"},
                }
                for turn in self.turns
            ],
            "images": [part.source for part in media if isinstance(part, Image)],
            "videos": [list(part.frames) for part in media if isinstance(part, Video)],
            **({} if self.objects is None else {"objects": self.objects}),
        }
        try:
            parsed = parse_conversation(example)
        except ExampleError as error:
            raise of_user_error(error) from error
        videos = iter(part for part in media if isinstance(part, Video))
        parsed = parsed.map(lambda part: next(videos) if isinstance(part, Video) else part)
        return dataclasses.replace(
            parsed,
            image_settings=self.image_settings,
            tools=self.tools,
            template_values=self.template_values,
            is_literal=True,
        )


def _part(item: str | MediaSource, media: Any) -> Part:
    return Text(item) if isinstance(item, str) else next(media)


def outline(
    messages: Sequence[Mapping[str, Any]],
    *,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    objects: dict[str, Any] | None = None,
    sampling: tuple[tuple[str, Any], ...] = (),
    tools: tuple[dict[str, Any], ...] = (),
    template_values: Mapping[str, Any] = {},
    image_settings: Mapping[str, Any] = {},
) -> Outline:
    """Return what messages say, with what they name of media listed.

    Args:
      images, videos, objects: beside the messages, as ms-swift's clients send them.
      sampling: of each video, fields of `jvlm.data.video.sampling.Sampling`.
      tools, template_values, image_settings: as of a `Conversation`.

    Raises:
      APIError: a message, part or call that is not of a known form; names the field.
    """
    turns = tuple(_turn(message, f"messages[{index}]", sampling) for index, message in enumerate(messages))
    if not any(turn.role in ("user", "tool") for turn in turns):
        raise bad("no user turn, so there is nothing to answer", "messages")
    inside = tuple(item for turn in turns for item in turn.content if isinstance(item, MediaSource))
    listed = (
        *(_listed("image", value, f"images[{i}]", ()) for i, value in enumerate(images or ())),
        *(_listed("video", value, f"videos[{i}]", sampling) for i, value in enumerate(videos or ())),
    )
    if listed and inside:
        raise bad(
            "images beside the messages and inside them; keep one of them, so that their order is clear", "images"
        )
    values = tuple(template_values.items())
    settings = tuple(image_settings.items())
    is_tagged = bool(listed) or objects is not None
    return Outline(turns, listed or inside, tools, values, settings, is_tagged, objects)


def _turn(message: Mapping[str, Any], field: str, sampling: tuple[tuple[str, Any], ...]) -> _Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad(f"use one of {', '.join(_ROLES)}", f"{field}.role")
    role, content = _ROLES[role], message.get("content")
    calls = message.get("tool_calls") or []
    if content is None:
        if role != "assistant":
            raise bad("content is missing", f"{field}.content")
        content = ""
    pieces = tuple(_pieces(content, role, f"{field}.content", sampling))
    return _Turn(role, pieces, _fields(message, role, calls, field))


def _fields(message: Mapping[str, Any], role: str, calls: Any, field: str) -> tuple[tuple[str, Any], ...]:
    """Return what the template is given beside role and content."""
    given: dict[str, Any] = {}
    if role == "assistant" and calls:
        given["tool_calls"] = calls
    if role == "tool":
        for name in ("tool_call_id", "name"):
            if message.get(name) is not None:
                if not isinstance(message[name], str) or len(message[name]) > _MOST_NAME:
                    raise bad("not a short text", f"{field}.{name}")
                given[name] = message[name]
    try:
        found = tool_calls.fields(given, role, Origin(), field)
    except ExampleError as error:
        raise of_user_error(error) from error
    thinking = message.get("reasoning_content") or message.get("reasoning")
    if role == "assistant" and thinking:
        if not isinstance(thinking, str):
            raise bad("not text", f"{field}.reasoning")
        found = (*found, ("reasoning_content", thinking))
    return found


def _pieces(content: Any, role: str, field: str, sampling: tuple[tuple[str, Any], ...]) -> list[str | MediaSource]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise bad("neither text nor a list of parts", field)
    found: list[str | MediaSource] = []
    for index, part in enumerate(content):
        where = f"{field}[{index}]"
        if isinstance(part, str):
            found.append(part)
            continue
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise bad("a part is an object with a type", where)
        kind = part["type"]
        if kind in _WORDS:
            text = part.get("text", part.get(kind))
            if not isinstance(text, str):
                raise bad("not text", f"{where}.text")
            found.append(text)
        elif kind in (*_IMAGES, *_VIDEOS):
            if role == "assistant":
                raise bad("an assistant turn has no media", where)
            found.append(_media(part, kind, where, sampling))
        else:
            raise bad(f"no part of this type is known; use text, {_IMAGES[0]} or {_VIDEOS[0]}", f"{where}.type")
    return found


def _media(part: Mapping[str, Any], kind: str, field: str, sampling: tuple[tuple[str, Any], ...]) -> MediaSource:
    is_image = kind in _IMAGES
    names = ("image_url", "image", "url") if is_image else ("video_url", "video", "url")
    name = next((n for n in names if part.get(n) is not None), None)
    if name is None:
        raise bad(f"no {names[0]} in it", field)
    value, detail = part[name], part.get("detail")
    where = f"{field}.{name}"
    if isinstance(value, Mapping):
        detail = value.get("detail", detail)
        value, where = value.get("url", value.get("path")), f"{where}.url"
    if not isinstance(value, str) or not value:
        raise bad("not a URL", where)
    detail = "auto" if detail is None else detail
    if is_image and detail not in _DETAILS:
        raise bad(f"use one of {', '.join(_DETAILS)}", f"{field}.detail")
    bare = kind in ("image", "video")
    return MediaSource("image" if is_image else "video", value, where, detail, bare, () if is_image else sampling)


def _listed(kind: str, value: Any, field: str, sampling: tuple[tuple[str, Any], ...]) -> MediaSource:
    if isinstance(value, Mapping):
        value = value.get("url", value.get("path", value.get("base64")))
    if not isinstance(value, str) or not value:
        raise bad("neither a URL nor base64", field)
    return MediaSource(kind, value, field, bare=True, sampling=sampling)
