"""The ms-swift row: checked once, here, before anything else sees it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Any

from jvlm.data.boxes import Place, place
from jvlm.data.errors import Origin, RowError

ROLES = ("system", "user", "assistant", "tool")
# Fields of the published format that supervised training has no use for; they are accepted and carried along.
_CARRIED = frozenset(
    "id channel tools label margin solution rejected_response rejected_messages rejected_images rejected_videos".split()
)
_FIELDS = frozenset("messages images image videos video objects chat_template_kwargs".split()) | _CARRIED
_TEMPLATE_KWARGS = frozenset(
    "min_pixels max_pixels video_min_pixels video_max_pixels fps min_tiles max_tiles num_frames longest_edge "
    "shortest_edge".split()
)
_TAG = re.compile(r"(<image>|<video>)")
_OBJECT_TAG = re.compile(r"(<ref-object>|<bbox>)")


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn: text with <image> and <video> tags, and the weight of its loss (assistant turns only)."""

    role: str
    content: str
    loss_weight: float


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A checked row: tags and media agree in number.

    Attributes:
      images: anything `jvlm.data.images.open_image` opens.
      videos: each a list of frames.
      refs, boxes: what <ref-object> and <bbox> stand for, in order of appearance.
      box_images: which image each box is on.
      limits: this row's own resize limits and frame rate.
      extra: fields carried along.
    """

    messages: tuple[Message, ...]
    images: tuple[Any, ...] = ()
    videos: tuple[tuple[Any, ...], ...] = ()
    refs: tuple[str, ...] = ()
    boxes: tuple[Place, ...] = ()
    box_images: tuple[int, ...] = ()
    limits: tuple[tuple[str, float], ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()
    origin: Origin = Origin()

    def media_order(self) -> list[str]:
        """ "image" or "video" for each tag, in order of appearance."""
        return [tag[1:-1] for message in self.messages for tag in _TAG.findall(message.content)]


def parse_row(row: Any, origin: Origin = Origin()) -> Conversation:
    """Check one row of the ms-swift format.

    Raises:
      RowError: unknown field, wrong type, wrong number of tags, bad role or box; names the field and the fix.
    """
    if isinstance(row, Conversation):
        return row
    if not isinstance(row, dict):
        raise RowError(origin, "row", f"a {type(row).__name__}, not an object", 'Write {"messages": [...]} per line')
    for key in row:
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known fields: {', '.join(sorted(_FIELDS))}"
            raise RowError(origin, key, "unknown field", hint)
    images, videos = _listed(row, "images", "image", origin), _listed(row, "videos", "video", origin)
    listed = {"images": len(images), "videos": len(videos)}
    messages = _messages(row.get("messages"), images, videos, origin)
    for field, media in (("images", images), ("videos", videos)):
        if 0 < listed[field] < len(media):
            raise RowError(
                origin, field, "given both here and inside messages", "Keep one place, so the order is clear"
            )
    refs, boxes, box_images = _objects(row.get("objects"), len(images), origin)
    conversation = Conversation(
        messages=messages,
        images=tuple(images),
        videos=tuple(_frames(v, origin) for v in videos),
        refs=refs,
        boxes=boxes,
        box_images=box_images,
        limits=_limits(row.get("chat_template_kwargs"), origin),
        extra=tuple((k, row[k]) for k in row if k in _CARRIED),
        origin=origin,
    )
    _check_counts(conversation)
    return conversation


def _listed(row: dict, plural: str, singular: str, origin: Origin) -> list:
    if plural in row and singular in row:
        raise RowError(origin, singular, f"given together with {plural!r}", f"Keep {plural!r} only")
    value = row.get(plural, row.get(singular))
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _frames(video: Any, origin: Origin) -> tuple:
    if not isinstance(video, list | tuple) or not video:
        raise RowError(origin, "videos", "a video must be a list of frames", "Extract the frames and list their paths")
    return tuple(video)


def _messages(value: Any, images: list, videos: list, origin: Origin) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise RowError(origin, "messages", "missing or empty", 'Give [{"role": "user", "content": "..."}, ...]')
    messages = []
    for index, message in enumerate(value):
        field = f"messages[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RowError(origin, field, "needs 'role' and 'content'", 'Write {"role": "user", "content": "..."}')
        for key in message:
            if key not in ("role", "content", "loss", "loss_scale"):
                raise RowError(origin, f"{field}.{key}", "unknown field", "Use role, content, loss, loss_scale")
        role = message["role"]
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Use one of {', '.join(ROLES)}"
            raise RowError(origin, f"{field}.role", f"unknown role {role!r}", hint)
        if role == "system" and index:
            raise RowError(origin, f"{field}.role", "a system turn after the first place", "Move it to the front")
        content = _flatten(message["content"], images, videos, origin, f"{field}.content")
        messages.append(Message(role, content, _loss_weight(message, role, origin, field)))
    return tuple(messages)


def _loss_weight(message: dict, role: str, origin: Origin, field: str) -> float:
    loss, scale = message.get("loss"), message.get("loss_scale")
    if loss not in (None, True, False):
        raise RowError(origin, f"{field}.loss", f"{loss!r} is not true or false", "Write true or false")
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf
    ):
        raise RowError(origin, f"{field}.loss_scale", f"{scale!r} is not a weight", "Write a number >= 0")
    if role != "assistant":
        if loss or scale:
            raise RowError(origin, field, f"loss on a {role} turn", "Only assistant turns are learnt")
        return 0.0
    return 0.0 if loss is False else float(1.0 if scale is None else scale)


def _flatten(content: Any, images: list, videos: list, origin: Origin, field: str) -> str:
    """Content blocks (OpenAI or transformers style) to text with tags; their media join the row's lists."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RowError(origin, field, f"a {type(content).__name__} is not text", "Give a string or a list of blocks")
    parts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            parts.append(block["text"])
        elif kind in ("image", "image_url"):
            source = block.get("image", block.get("image_url", block.get("url")))
            if source is not None:
                images.append(source)
            parts.append("<image>")
        elif kind == "video":
            if block.get("video") is not None:
                videos.append(block["video"])
            parts.append("<video>")
        else:
            raise RowError(
                origin,
                field,
                f"cannot read a block of type {kind!r}",
                'Use {"type": "text", "text": "..."}, image, image_url or video blocks',
            )
    return "".join(parts)


def _objects(value: Any, images: int, origin: Origin):
    if value is None:
        return (), (), ()
    if not isinstance(value, dict) or not set(value) <= {"ref", "bbox", "bbox_type", "image_id"}:
        raise RowError(origin, "objects", "not of the known form", "Use ref, bbox, bbox_type and image_id")
    for key in ("ref", "bbox", "image_id"):
        if not isinstance(value.get(key, []), list | tuple | type(None)):
            raise RowError(origin, f"objects.{key}", f"{value[key]!r} is not a list", "Give a list, one entry per tag")
    refs, boxes = tuple(value.get("ref") or ()), tuple(value.get("bbox") or ())
    for index, ref in enumerate(refs):
        if not isinstance(ref, str):
            raise RowError(origin, f"objects.ref[{index}]", f"{ref!r} is not text", "Give a string")
    box_type = value.get("bbox_type", "real")
    if box_type not in ("real", "norm1"):
        raise RowError(origin, "objects.bbox_type", f"unknown {box_type!r}", "Use 'real' or 'norm1'")
    for index, box in enumerate(boxes):
        _check_box(box, box_type, origin, f"objects.bbox[{index}]")
    image_ids = value.get("image_id")
    image_ids = tuple(image_ids) if image_ids is not None else (0,) * len(boxes)
    if len(image_ids) != len(boxes):
        raise RowError(origin, "objects.image_id", f"{len(image_ids)} ids for {len(boxes)} boxes", "Give one per box")
    for image_id in image_ids:
        if not isinstance(image_id, int) or not 0 <= image_id < max(images, 1):
            raise RowError(origin, "objects.image_id", f"{image_id!r} with {images} images", "Count from 0")
    space = "original" if box_type == "real" else "norm1"
    return refs, tuple(place(box, space) for box in boxes), image_ids


def _check_box(box: Any, box_type: str, origin: Origin, field: str) -> None:
    is_numbers = isinstance(box, list | tuple) and all(isinstance(v, int | float) for v in box)
    if not is_numbers or len(box) not in (2, 4):
        raise RowError(origin, field, f"{box!r} is not a point or box", "Give 2 or 4 numbers")
    if len(box) == 4 and (box[0] > box[2] or box[1] > box[3]):
        raise RowError(origin, field, f"{list(box)} has its corners swapped", "Order them x1, y1, x2, y2")
    if box_type == "norm1" and not all(0 <= v <= 1 for v in box):
        raise RowError(origin, field, f"{list(box)} is outside 0..1", "Use bbox_type 'real' for pixels")


def _limits(value: Any, origin: Origin) -> tuple[tuple[str, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise RowError(origin, "chat_template_kwargs", "not an object", 'Give e.g. {"max_pixels": 200704}')
    for key, number in value.items():
        field = f"chat_template_kwargs.{key}"
        if key not in _TEMPLATE_KWARGS:
            raise RowError(origin, field, "unknown field", f"Known: {', '.join(sorted(_TEMPLATE_KWARGS))}")
        if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
            raise RowError(origin, field, f"{number!r} is not a positive number", "Correct or remove it")
    return tuple(value.items())


def _check_counts(conversation: Conversation) -> None:
    text = "".join(m.content for m in conversation.messages)
    origin = conversation.origin
    for tag, field, count in (
        ("<image>", "images", len(conversation.images)),
        ("<video>", "videos", len(conversation.videos)),
        ("<bbox>", "objects.bbox", len(conversation.boxes)),
        ("<ref-object>", "objects.ref", len(conversation.refs)),
    ):
        if text.count(tag) != count and (count or tag in ("<image>", "<video>")):
            raise RowError(
                origin, field, f"{text.count(tag)} {tag} tags but {count} entries", "Give one entry for each tag"
            )


def split_media(content: str) -> list[dict[str, str]]:
    """Content as the blocks that chat templates expect."""
    blocks = []
    for part in _TAG.split(content):
        if part in ("<image>", "<video>"):
            blocks.append({"type": part[1:-1]})
        elif part:
            blocks.append({"type": "text", "text": part})
    return blocks


def fill_objects(content: str, refs: list[str], boxes: list[str]) -> str:
    """Replace <ref-object> and <bbox> by the next of each list, which are consumed."""
    queues = {"<ref-object>": refs, "<bbox>": boxes}
    return "".join(queues[part].pop(0) if queues.get(part) else part for part in _OBJECT_TAG.split(content))
