"""One turn of a conversation on its own: for asking it in an evaluation, and for learning it without its history."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from jvlm.data.rows import Conversation, Message

_MEDIA = re.compile("<image>|<video>")


def turns_alone(row: Conversation) -> list[Conversation]:
    """Each assistant turn with the user turn before it, as a conversation of its own.

    The system turn and the media seen so far come along; earlier questions and answers do not, so nothing gives the
    answer away.
    """
    system = [m for m in row.messages if m.role == "system"]
    refs, boxes = list(row.refs), list(range(len(row.boxes)))
    media: list[str] = []
    prompt: tuple[Message, list[str], list[int]] | None = None
    found = []
    for message in row.messages:
        own = consume(message.content, refs, boxes)
        if message.role == "user":
            tags = _MEDIA.findall(message.content)
            prompt = (dataclasses.replace(message, content="".join(media) + message.content), *own)
            media += tags
        elif message.role == "assistant" and prompt is not None:
            places = [*prompt[2], *own[1]]
            count = Counter(media)
            found.append(
                dataclasses.replace(
                    row,
                    messages=(*system, prompt[0], message),
                    images=row.images[: count["<image>"]],
                    videos=row.videos[: count["<video>"]],
                    refs=(*prompt[1], *own[0]),
                    boxes=tuple(row.boxes[i] for i in places),
                    box_images=tuple(row.box_images[i] for i in places),
                )
            )
    return found


def consume(text: str, refs: list[str], boxes: list[int]) -> tuple[list[str], list[int]]:
    """Take from both queues what a text's tags stand for."""
    taken_refs = [refs.pop(0) for _ in range(min(text.count("<ref-object>"), len(refs)))]
    taken_boxes = [boxes.pop(0) for _ in range(min(text.count("<bbox>"), len(boxes)))]
    return taken_refs, taken_boxes
