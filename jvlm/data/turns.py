"""Parts of a conversation, to learn a turn alone and to ask turns alone or in a chain.

All parts are made by one function, `_select`, so that each message keeps its own media, refs and boxes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from jvlm.data.rows import Conversation, Message

# Field of a conversation -> the tag that takes the next of its items.
_TAGS = {"images": "<image>", "videos": "<video>", "refs": "<ref-object>", "boxes": "<bbox>"}
_TAG = re.compile("<(image|video|bbox|ref-object)>")

Items = dict[str, range]


def turns_alone(row: Conversation) -> list[Conversation]:
    """Each assistant turn that answers something, with its prompt, as a conversation of its own.

    The prompt is what was said since the answer before: user turns, and tools' answers with the turns that called for
    them. The system turn comes along, and so do earlier media: those that users have shown, and pictures that boxes
    of this turn are on. Earlier questions and answers do not, so nothing gives the answer away.
    """
    return [_alone(row, prompt, answer) for prompt, answer in _asked(row)]


def next_turn(row: Conversation, said: Sequence[str]) -> Conversation | None:
    """The row up to its next answer in words, and with it; None if there is no further one.

    Args:
      said: words that take the place of the earlier answers; tags in them stand for nothing. Calls of tools stay, which
        the tools' answers in the row belong to.
    """
    asked = [turn for turn in _asked(row) if not calls_tools(row.messages[turn[1]])]
    if len(said) == len(asked):
        return None
    prompt, end = asked[len(said)]
    words = {answer: _TAG.sub(r"< \1>", text) for (_, answer), text in zip(asked, said, strict=False)}
    own = items_of(row)
    needed = _needed(row, own, [index for index in range(end + 1) if index not in words])
    carried = [("images", i) for answer in words for i in own[answer]["images"] if ("images", i) in needed]
    return _select(row, range(end + 1), words, carried, _first_given(row, prompt))


def calls_tools(message: Message) -> bool:
    """Whether an assistant turn holds calls of tools, which are no answer in words."""
    return any(name == "tool_calls" for name, _ in message.fields)


def without_answer(row: Conversation) -> Conversation:
    """The row without a final assistant turn and its media and boxes."""
    last = len(row.messages) - 1
    return _select(row, range(last)) if row.messages[last].role == "assistant" else row


def items_of(row: Conversation) -> list[Items]:
    """For each message, the items of images, videos, refs and boxes that its tags stand for."""
    begin = dict.fromkeys(_TAGS, 0)
    found = []
    for message in row.messages:
        own = {}
        for field, tag in _TAGS.items():
            # without any objects their tags are words
            end = min(begin[field] + message.content.count(tag), len(getattr(row, field)))
            own[field] = range(begin[field], end)
            begin[field] = end
        found.append(own)
    return found


def _asked(row: Conversation) -> Iterator[tuple[list[int], int]]:
    """(messages of the prompt, message of the answer) of each assistant turn that answers something."""
    prompt: list[int] = []
    answers: list[int] = []  # assistant turns since the last other one
    for index, message in enumerate(row.messages):
        if message.role == "assistant":
            if prompt:
                yield prompt, index
            answers.append(index)
        elif message.role == "tool":
            prompt, answers = [*prompt, *answers, index], []
        elif message.role == "user":
            prompt, answers = [index] if answers else [*prompt, index], []


def _alone(row: Conversation, prompt: list[int], answer: int) -> Conversation:
    system = [0] if row.messages[0].role == "system" else []
    chosen = [*system, *prompt, answer]
    own = items_of(row)
    needed = _needed(row, own, chosen)
    carried = [
        (field, item)
        for index, message in enumerate(row.messages)
        if index not in chosen
        for field, item in _media_in_order(message, own[index])
        if (message.role == "user" and index < answer) or (field, item) in needed
    ]
    alone = _select(row, chosen, {}, carried, _first_given(row, prompt))
    *before, last = alone.messages
    return dataclasses.replace(alone, messages=(*(dataclasses.replace(m, loss_weight=0.0) for m in before), last))


def _needed(row: Conversation, own: list[Items], chosen: Sequence[int]) -> set[tuple[str, int]]:
    """The pictures that the boxes of messages are on."""
    return {("images", row.box_images[box]) for index in chosen for box in own[index]["boxes"]}


def _first_given(row: Conversation, prompt: Sequence[int]) -> int:
    """The first message of a prompt that is a user's, or else a tool's."""
    return min(prompt, key=lambda index: ("user", "tool", "assistant").index(row.messages[index].role))


def _media_in_order(message: Message, own: Items) -> Iterator[tuple[str, int]]:
    items = {f"<{field[:-1]}>": (field, iter(own[field])) for field in ("images", "videos")}
    for tag in re.findall("<image>|<video>", message.content):
        field, left = items[tag]
        yield field, next(left)


def _select(
    row: Conversation,
    chosen: Sequence[int],
    words: Mapping[int, str] | None = None,
    carried: Sequence[tuple[str, int]] = (),
    carrier: int | None = None,
) -> Conversation:
    """The chosen messages, with exactly the items that their tags stand for.

    Args:
      words: replace the contents of messages; the items of these are left out.
      carried: media of messages left out, put in front of the message ``carrier``.
    """
    words, own = words or {}, items_of(row)
    messages, kept = [], {field: [] for field in _TAGS}
    for index in chosen:
        message = row.messages[index]
        if index == carrier:
            for field, item in carried:
                kept[field].append(item)
            tags = "".join(_TAGS[field] for field, _ in carried)
            message = dataclasses.replace(message, content=tags + message.content)
        if index in words:
            message = dataclasses.replace(message, content=words[index], loss_weight=0.0)
        else:
            for field, items in own[index].items():
                kept[field] += items
        messages.append(message)
    number = {image: at for at, image in enumerate(kept["images"])}
    return dataclasses.replace(
        row,
        messages=tuple(messages),
        **{field: tuple(getattr(row, field)[i] for i in items) for field, items in kept.items()},
        # a box on a picture that is left out has none: its number is past the end
        box_images=tuple(number.get(row.box_images[i], len(number)) for i in kept["boxes"]),
    )
