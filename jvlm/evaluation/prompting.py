"""Prompts out of the items of a task."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from jvlm.data.config import FewShot
from jvlm.data.content import Conversation, Document, Message, ObjectBox, ObjectTime, Part, Text
from jvlm.data.errors import Origin
from jvlm.data.few_shot import joined
from jvlm.evaluation.task import Item, Style, Task


def prompt(
    task: Task, item: Item, shots: Sequence[Item] = (), *, style: Style = "task", origin: Origin = Origin()
) -> Conversation | Document:
    """Return what a model is given for an item, with demonstrations before it."""
    if not task.turns:
        pieces = [piece for shot in shots for piece in (*shot.content, Text(f" {shot.answer}\n\n"))]
        return Document((*_numbered(pieces), *_numbered(item.content, _images(pieces))), ends=False, origin=origin)
    turns = []
    for one in (*shots, item):
        instruction = task.instruction
        if style == "boxed":
            instruction = task.boxed if one.boxed is None else one.boxed
        messages = [Message("user", with_instruction(one.content, instruction))]
        if one is not item:
            answer = f"\\boxed{{{one.answer}}}" if style == "boxed" else one.answer
            messages.append(Message("assistant", (Text(answer),)))
        turns.append(Conversation(tuple(messages), origin=origin))
    return joined(turns, FewShot()) if shots else turns[0]


def _images(parts: Sequence[Part]) -> int:
    return sum(hasattr(part, "source") for part in parts)


def _numbered(parts: Sequence[Part], first: int = 0) -> list[Part]:
    """Return parts whose images count on."""
    numbered: list[Part] = []
    for part in parts:
        if hasattr(part, "source"):
            part, first = dataclasses.replace(part, index=first), first + 1
        numbered.append(part)
    return numbered


def with_instruction(content: Sequence[Part], instruction: str) -> tuple[Part, ...]:
    """Return a question with what is said after it."""
    if not instruction:
        return tuple(content)
    last = content[-1] if content else None
    if isinstance(last, Text):
        return (*content[:-1], Text(f"{last.text}\n{instruction}"))
    return (*content, Text(instruction))


def shown(parts: Sequence[Part]) -> str:
    """Return a content as text, <image> and <video> for media, regions in the space that they are given in."""
    return "".join(map(_shown, parts))


def _shown(part: Part) -> str:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, ObjectBox):
        return str([round(value, 3) for value in part.region.values])
    if isinstance(part, ObjectTime):
        return str(list(part.seconds))
    return f"<{type(part).__name__.lower()}>"


def prompt_hash(example: Conversation | Document) -> str:
    """Return a short hash of the words of a prompt, and of where media stand."""
    if isinstance(example, Document):
        text = shown(example.content)
    else:
        text = "\0".join(f"{message.role}\1{shown(message.content)}" for message in example.messages)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
