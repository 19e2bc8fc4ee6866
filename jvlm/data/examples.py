"""The ms-swift example, and the document: checked once, here, before anything else sees it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from jvlm.data import time_formats, tool_calls, values
from jvlm.data.boxes import Region, region
from jvlm.data.choices import LossChoice
from jvlm.data.content import (
    Conversation,
    Document,
    Image,
    Message,
    ObjectBox,
    ObjectName,
    ObjectTime,
    Part,
    Text,
    Video,
)
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.image_processor import EXAMPLE_FIELD
from jvlm.data.images import unwrap
from jvlm.data.values import is_null, shown, without_nulls
from jvlm.data.video.sampling import Sampling
from jvlm.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
# Fields of the published format that supervised training has no use for; they are accepted and carried along.
_CARRIED = frozenset(
    "id adapter channel ordered tools label margin solution "
    "rejected_response rejected_messages rejected_images rejected_videos".split()
)
_LOSS = "loss"
_FIELDS = frozenset("messages images image videos video objects chat_template_kwargs".split()) | {_LOSS} | _CARRIED
# A record with one of these, and without messages, is a document.
DOCUMENT, TEXT = "document", "text"
_MOST_WEIGHT = float(np.finfo(np.float32).max)
# Keys of content blocks that hold an image; and those where a number is no setting of it, as other libraries take it.
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
_NO_SETTINGS = frozenset((*IMAGE_KEYS, "video", "index", "id"))
_TAGS = {Image: "<image>", Video: "<video>", ObjectName: "<ref-object>", ObjectBox: "<bbox>", ObjectTime: "<time>"}
_TAG = re.compile(f"({'|'.join(_TAGS.values())})")
# in a text block, media have blocks of their own
_OBJECT_TAG = re.compile(f"({'|'.join(_TAGS[kind] for kind in (ObjectName, ObjectBox, ObjectTime))})")
_KINDS = {tag: kind for kind, tag in _TAGS.items()}


class _Tagged(NamedTuple):
    """A message before its tags, here the types that they stand for, are replaced by parts."""

    role: str
    content: list[str | type]
    loss_weight: float
    fields: tuple[tuple[str, Any], ...]
    loss_given: bool


def parse_example(example: Any, origin: Origin = Origin()) -> Conversation | Document:
    """Check one example of the ms-swift format, or a document. A null is as an absent field; unknown fields are carried
    along.

    Raises:
      ExampleError: wrong type, wrong number of tags, bad role, limit or box; names the field and the fix.
    """
    if isinstance(example, Conversation | Document):
        return example
    if not isinstance(example, dict):
        raise ExampleError(
            origin, "example", f"a {type(example).__name__}, not an object", 'Write {"messages": [...]} per line'
        )
    try:
        return _parse(without_nulls(example), origin)
    except RecursionError as error:
        raise ExampleError(origin, "example", "lists or objects nested too deep", "Make the example flatter") from error


def parse_conversation(example: Any, origin: Origin = Origin()) -> Conversation:
    """Check one example that has turns. Raises ExampleError as `parse_example`, and for a document."""
    parsed = parse_example(example, origin)
    if isinstance(parsed, Document):
        raise ExampleError(
            parsed.origin, "messages", "a document, which has no turns", "Write messages, or leave it out"
        )
    return parsed


def _parse(example: dict, origin: Origin) -> Conversation | Document:
    for field in ("audios", "audio"):
        if field in example and not (isinstance(example[field], list | tuple) and not example[field]):
            raise ExampleError(origin, field, "the models here do not hear", "Remove it, and <audio> from the messages")
    images, videos = _listed(example, "images", "image", origin), _listed(example, "videos", "video", origin)
    listed = {"images": len(images), "videos": len(videos)}
    is_document = "messages" not in example and (DOCUMENT in example or TEXT in example)
    if is_document:
        messages = [_document(example, images, videos, origin)]
    else:
        messages = _messages(example, images, videos, origin)
    for field, media in (("images", images), ("videos", videos)):
        if 0 < listed[field] < len(media):
            raise ExampleError(
                origin, field, "given both here and inside messages", "Keep one of them, so the order is clear"
            )
    objects = _objects(example.get("objects"), len(images), len(videos), origin)
    used = _FIELDS | {DOCUMENT, TEXT} if is_document else _FIELDS
    extra = tuple((k, example[k]) for k in example if k in _CARRIED or k not in used)
    parts = {
        Image: [Image(source, index) for index, source in enumerate(images)],
        Video: [_video(video, index, origin) for index, video in enumerate(videos)],
        **objects,
    }
    contents = _with_parts(messages, parts, unknown_columns(extra), origin)
    common = {
        "image_settings": _image_settings(example.get(EXAMPLE_FIELD), origin),
        "extra": extra,
        "origin": origin,
        "loss": _loss_choice(example.get(_LOSS), origin),
    }
    if is_document:
        return Document(contents[0], **common)
    return Conversation(
        messages=tuple(
            Message(m.role, content, m.loss_weight, m.fields, m.loss_given)
            for m, content in zip(messages, contents, strict=True)
        ),
        tools=tool_calls.schemas(example.get("tools"), origin),
        **common,
    )


def _document(example: dict, images: list, videos: list, origin: Origin) -> _Tagged:
    """Return the pieces of a document, or of a text with tags."""
    if DOCUMENT in example and TEXT in example:
        raise ExampleError(origin, TEXT, f"given together with {DOCUMENT!r}", f"Keep {DOCUMENT!r} only")
    if "tools" in example:
        raise ExampleError(origin, "tools", "a document has no chat template to tell of tools", "Remove it")
    if TEXT in example:
        content = _TAG.split(values.text(example[TEXT], origin, TEXT))
        return _Tagged(DOCUMENT, [_KINDS.get(piece, piece) for piece in content], 1.0, (), False)
    blocks = example[DOCUMENT]
    if not isinstance(blocks, list | tuple) or not blocks:
        problem = "is empty" if isinstance(blocks, list | tuple) else "is not a list of blocks"
        fix = 'Write [{"type": "text", "text": "..."}, {"type": "image", "image": "..."}, ...]'
        raise ExampleError(origin, DOCUMENT, f"{shown(blocks)} {problem}", fix)
    return _Tagged(DOCUMENT, _flatten(blocks, images, videos, origin, DOCUMENT), 1.0, (), False)


def _loss_choice(value: Any, origin: Origin) -> LossChoice | None:
    if value is None or (isinstance(value, str) and value in get_args(LossChoice)):
        return value
    raise ExampleError(origin, _LOSS, f"{shown(value)} is unknown", f"Use one of {', '.join(get_args(LossChoice))}")


def unknown_columns(extra: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """Return the names of the fields carried along that jvlm does not know."""
    return tuple(str(key) for key, _ in extra if key not in _FIELDS)


def hint(name: str) -> str | None:
    """Return the known field that an unknown one may have been meant to be."""
    near = difflib.get_close_matches(name, _FIELDS, n=1)
    return near[0] if near else None


def near_miss(field: str, names: Any) -> str | None:
    """Return what to say where a field is lacking and an unknown one has nearly its name."""
    for name in map(str, names):
        if name not in _FIELDS and hint(name) == field:
            return f"Is {name!r} meant to be {field!r}?"
    return None


def _listed(example: dict, plural: str, singular: str, origin: Origin) -> list:
    if plural in example and singular in example:
        raise ExampleError(origin, singular, f"given together with {plural!r}", f"Keep {plural!r} only")
    value = example.get(plural, example.get(singular))
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _video(value: Any, index: int, origin: Origin) -> Video:
    """Return a video from a path, the bytes of a file, frames, or an object with one of them and settings."""
    field, given = f"videos[{index}]", {}
    if isinstance(value, dict):
        value = without_nulls(value)
        given = {name: value[name] for name in _SAMPLING if name in value}
        unknown = [name for name in value if name not in (*_SAMPLING, "video", "bytes", "path", "url")]
        if unknown:
            fix = f"Use video, bytes or path, and {', '.join(_SAMPLING)}"
            raise ExampleError(origin, field, f"{', '.join(map(shown, unknown))} is not read", fix)
        value = unwrap(value.get("video", value))
    settings = _sampling(given, origin, field)
    if isinstance(value, list | tuple) and value:
        if settings.keys() - {"fps"}:
            raise ExampleError(
                origin, field, f"frames with {', '.join(settings)}", "Of a list of frames only fps is read"
            )
        return Video(tuple(value), index, fps=settings.get("fps"))
    if isinstance(value, str | Path | bytes | bytearray | memoryview) and value:
        file = value if isinstance(value, str | Path) else bytes(value)
        return Video(index=index, file=file, sampling=tuple(settings.items()))
    raise ExampleError(
        origin, "videos", f"{shown(value)} is no video", "Give the path of a video file, or a list of frames"
    )


def _sampling(given: dict[str, Any], origin: Origin, field: str) -> dict[str, Any]:
    """Return the settings of a video's sampling, checked."""
    settings = {}
    for name, value in given.items():
        read = value if name == "rule" else (values.whole if "frames" in name else values.number)(value)
        if read is None:
            raise ExampleError(origin, field, f"{name} is {shown(value)}", "Give a number")
        settings[name] = read
    try:
        Sampling(**settings)
    except UserError as error:
        raise ExampleError(origin, field, str(error), "Correct or remove it") from error
    return settings


def _messages(example: dict, images: list, videos: list, origin: Origin) -> list[_Tagged]:
    given = example.get("messages", [])
    if not isinstance(given, list | tuple) or not len(given):
        fix = near_miss("messages", example) or 'Give [{"role": "user", "content": "..."}, ...]'
        is_list = isinstance(given, list | tuple)
        raise ExampleError(origin, "messages", "missing or empty" if is_list else f"{shown(given)} is not a list", fix)
    messages = []
    for index, message in enumerate(given):
        field = f"messages[{index}]"
        message = tool_calls.with_content(message)
        if not isinstance(message, dict) or is_null(message.get("role")) or "content" not in message:
            raise ExampleError(origin, field, "needs 'role' and 'content'", 'Write {"role": "user", "content": "..."}')
        for key in without_nulls(message):
            if key not in ("role", "content", "loss", "loss_scale", *tool_calls.FIELDS):
                raise ExampleError(
                    origin, f"{field}.{key}", "unknown field", "Use role, content, loss, loss_scale, tool_calls"
                )
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1) if isinstance(role, str) else []
            fix = f"Did you mean {near[0]!r}?" if near else f"Use one of {', '.join(ROLES)}"
            raise ExampleError(origin, f"{field}.role", f"unknown role {shown(role)}", fix)
        if role == "system" and index:
            raise ExampleError(origin, f"{field}.role", "a system turn after the first turn", "Move it to the front")
        content = _flatten(message["content"], images, videos, origin, f"{field}.content")
        fields = tool_calls.fields(message, role, origin, field)
        weight = _loss_weight(message, role, origin, field)
        given = any(not is_null(message.get(key)) for key in ("loss", "loss_scale"))
        messages.append(_Tagged(role, content, weight, fields, given))
    return messages


def _loss_weight(message: dict, role: str, origin: Origin, field: str) -> float:
    loss, scale = message.get("loss"), message.get("loss_scale")
    has_loss = True if loss is None else values.switch(loss)
    if has_loss is None:
        raise ExampleError(origin, f"{field}.loss", f"{shown(loss)} is not true or false", "Write true or false")
    weight = 1.0 if scale is None else values.number(scale)
    if weight is None or not 0 <= weight <= _MOST_WEIGHT:
        raise ExampleError(origin, f"{field}.loss_scale", f"{shown(scale)} is not a weight", "Write a number >= 0")
    if role != "assistant":
        if (loss is not None and has_loss) or (scale is not None and weight):
            raise ExampleError(origin, field, f"loss on a {role} turn", "Only assistant turns may have one")
        return 0.0
    return float(weight) if has_loss else 0.0


def _flatten(content: Any, images: list, videos: list, origin: Origin, field: str) -> list[str | type]:
    """Text with tags, or content blocks (OpenAI or transformers style), as words and the types that tags stand for.

    Media of blocks join the example's lists. Text blocks hold words, whatever they spell of media.
    """
    if isinstance(content, str):
        return [_KINDS.get(piece, piece) for piece in _TAG.split(values.text(content, origin, field))]
    if not isinstance(content, list | tuple):
        raise ExampleError(
            origin, field, f"a {type(content).__name__} is not text", "Give a string or a list of blocks"
        )
    return [piece for block in content for piece in _block(block, images, videos, origin, field)]


def _block(block: Any, images: list, videos: list, origin: Origin, field: str) -> list[str | type]:
    """Return pieces of a block. Media in it join their list; a block without a source is among the example's own."""
    given = without_nulls(block) if isinstance(block, dict) else {}
    kind = given.pop("type", None)
    for key, value in given.items():
        if values.number(value) is not None and key not in _NO_SETTINGS:
            raise ExampleError(
                origin, field, f"{key!r} of a single image is not read", "Give the example's chat_template_kwargs"
            )
    media = {key: given[key] for key in (*IMAGE_KEYS, "video") if key in given}
    if kind == "text" and not media and isinstance(given.get("text"), str):
        pieces = _OBJECT_TAG.split(values.text(given["text"], origin, field))
        return [_KINDS.get(piece, piece) for piece in pieces]
    if kind in ("image", "image_url") and "video" not in media and len(media) <= 1:
        images += media.values()
        return [Image]
    if kind == "video" and media.keys() <= {"video"}:
        videos += media.values()
        return [Video]
    problem = f"cannot read a block of type {shown(kind)} with {', '.join(map(shown, given)) or 'nothing in it'}"
    fix = 'Use {"type": "text", "text": "..."}, image, image_url or video blocks, each with one source'
    raise ExampleError(origin, field, problem, fix)


def _objects(value: Any, images: int, videos: int, origin: Origin) -> dict[type, list]:
    """Return what the tags of objects stand for, by kind."""
    if is_null(value):
        return {ObjectName: [], ObjectBox: [], ObjectTime: []}
    if not isinstance(value, dict) or not set(without_nulls(value)) <= {"ref", "bbox", "bbox_type", "image_id", "time"}:
        raise ExampleError(origin, "objects", "not of the known form", "Use ref, bbox, bbox_type, image_id and time")
    value = without_nulls(value)
    lists = {key: _as_list(value.get(key, []), origin, f"objects.{key}") for key in ("ref", "bbox", "image_id", "time")}
    refs = [ObjectName(values.text(ref, origin, f"objects.ref[{i}]")) for i, ref in enumerate(lists["ref"])]
    box_type = value.get("bbox_type", "real")
    if box_type not in ("real", "norm1"):
        raise ExampleError(origin, "objects.bbox_type", f"unknown {shown(box_type)}", "Use 'real' or 'norm1'")
    boxes = tuple(_box(box, box_type, origin, f"objects.bbox[{i}]") for i, box in enumerate(lists["bbox"]))
    given = lists["image_id"] if "image_id" in value else [0] * len(boxes)
    if len(given) != len(boxes):
        raise ExampleError(origin, "objects.image_id", f"{len(given)} ids for {len(boxes)} boxes", "Give one per box")
    box_images = tuple(values.whole(image_id) for image_id in given)
    for image_id, raw in zip(box_images, given, strict=True):
        if image_id is None or not 0 <= image_id < max(images, 1):
            raise ExampleError(origin, "objects.image_id", f"{shown(raw)} with {images} images", "Count from 0")
    if lists["time"] and not videos:
        raise ExampleError(origin, "objects.time", "times without a video", "Add the video")
    return {
        ObjectName: refs,
        ObjectBox: [ObjectBox(box, image) for box, image in zip(boxes, box_images, strict=True)],
        ObjectTime: [_time(time, origin, f"objects.time[{i}]") for i, time in enumerate(lists["time"])],
    }


def _time(value: Any, origin: Origin, field: str) -> ObjectTime:
    given = value.tolist() if isinstance(value, np.ndarray) else value
    seconds = [values.number(one) for one in (given if isinstance(given, list | tuple) else [given])]
    try:
        if None in seconds:
            raise ValueError(f"{shown(value)} is no time: give one number of seconds, or a beginning and an end")
        time_formats.check(seconds)
    except ValueError as error:
        raise ExampleError(origin, field, str(error), "Write 12.5 or [12.5, 31.0]") from error
    return ObjectTime(tuple(map(float, seconds)))


def _as_list(value: Any, origin: Origin, field: str) -> list:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ExampleError(origin, field, f"{shown(value)} is not a list", "Give a list, one entry per tag")
    return list(value)


def _box(box: Any, box_type: str, origin: Origin, field: str) -> Region:
    if isinstance(box, np.ndarray):
        box = box.tolist()
    numbers = [values.number(v) for v in box] if isinstance(box, list | tuple) else []
    if len(numbers) not in (2, 4) or None in numbers:
        raise ExampleError(origin, field, f"{shown(box)} is not a point or box", "Give 2 or 4 finite numbers")
    if len(numbers) == 4 and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
        raise ExampleError(origin, field, f"{shown(numbers)} has its corners swapped", "Order them x1, y1, x2, y2")
    if box_type == "norm1" and not all(0 <= v <= 1 for v in numbers):
        raise ExampleError(origin, field, f"{shown(numbers)} is outside 0..1", "Use bbox_type 'real' for pixels")
    return region(numbers, "original" if box_type == "real" else "norm1")


def _image_settings(value: Any, origin: Origin) -> tuple[tuple[str, Any], ...]:
    if is_null(value):
        return ()
    if not isinstance(value, dict):
        raise ExampleError(origin, EXAMPLE_FIELD, "not an object", 'Give e.g. {"max_pixels": 200704}')
    return tuple((str(key), given) for key, given in without_nulls(value).items())


def _with_parts(
    messages: list[_Tagged], parts: dict[type, list], unknown: Sequence[str], origin: Origin
) -> list[tuple[Part, ...]]:
    """Return contents in which each tag is the next part of its kind. Raises ExampleError if the numbers differ."""
    fields = {
        Image: "images",
        Video: "videos",
        ObjectBox: "objects.bbox",
        ObjectName: "objects.ref",
        ObjectTime: "objects.time",
    }
    left = {}
    for kind, field in fields.items():
        tag, count = _TAGS[kind], len(parts[kind])
        tags = sum(message.content.count(kind) for message in messages)
        if tags != count:
            meant = None if count else near_miss(field.partition(".")[0], unknown)
            # without any objects <bbox>, <ref-object> and <time> are words
            if count or meant or kind in (Image, Video):
                fix = meant or "Give one entry for each tag"
                raise ExampleError(origin, field, f"{tags} {tag} tags but {count} entries", fix)
        if count:
            left[kind] = iter(parts[kind])
    return [tuple(_parts_of(message.content, left)) for message in messages]


def _parts_of(content: Iterable[str | type], parts: Mapping[type, Iterator]) -> list[Part]:
    """Return the parts of a message; a tag of a kind that the example has no parts of is a part of the words."""
    found: list[Part] = []
    in_words = False
    for piece in content:
        if not isinstance(piece, str) and piece in parts:
            found.append(next(parts[piece]))
            continue
        words = piece if isinstance(piece, str) else _TAGS[piece]
        if in_words or (piece is not words and found and isinstance(found[-1], Text)):
            found[-1] = Text(found[-1].text + words)
        else:
            found.append(Text(words))
        in_words = piece is not words
    return found


def tagged(content: Iterable[Part]) -> str:
    """Return content as it stands in files, with a tag for each part that is no text."""
    return "".join(part.text if isinstance(part, Text) else _TAGS[type(part)] for part in content)


def image_tags(text: str) -> int:
    """Return how many <image> tags a text holds that somebody types."""
    return text.count(_TAGS[Image])


def user_message(text: str, images: Sequence[Any], *, first: int = 0) -> Message:
    """Return a user's turn out of typed text, whose <image> tags stand for the images in order.

    Args:
      first: index of the first of the images.

    Raises:
      ExampleError: another number of tags than of images.
    """
    (message,) = parse_conversation({"messages": [{"role": "user", "content": text}], "images": list(images)}).messages
    return message.map(lambda part: Image(part.source, part.index + first) if isinstance(part, Image) else part)
