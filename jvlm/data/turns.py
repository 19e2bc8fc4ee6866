"""Turns of a conversation, to train on one by itself, and to ask them independently or one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jvlm.data.content import Conversation, Image, Message, Text, Video


def single_turns(example: Conversation) -> list[Conversation]:
    """Return each assistant turn that answers something, with its prompt, as a conversation of its own.

    The prompt is what came since the answer before: user turns, and tools' answers with the turns that called for
    them. The system turn comes along, and so do earlier media: those that users have shown, and images that boxes
    of this turn are on. Earlier questions and answers do not, so nothing gives the answer away.
    """
    return [_single(example, prompt, answer) for prompt, answer in _asked(example)]


def next_turn(example: Conversation, answers: Sequence[str]) -> Conversation | None:
    """Return the example up to its next answer in words, and with it; None if there is no further one.

    Args:
      answers: texts that take the place of the earlier answers. Calls of tools stay, which the tools' answers in the
        example belong to.
    """
    asked = [turn for turn in _asked(example) if not calls_tools(example.messages[turn[1]])]
    if len(answers) == len(asked):
        return None
    prompt, end = asked[len(answers)]
    texts = {answer: text for (_, answer), text in zip(asked, answers, strict=False)}
    on = _images_of_boxes(example.messages[index] for index in range(end + 1) if index not in texts)
    carried = [part for answer in texts for part in example.messages[answer].media if _is_image(part, on)]
    return _select(example, range(end + 1), texts, carried, _first_given(example, prompt))


def calls_tools(message: Message) -> bool:
    """Return whether an assistant turn holds calls of tools, which are no answer in words."""
    return any(name == "tool_calls" for name, _ in message.fields)


def without_answer(example: Conversation) -> Conversation:
    """Return the example without a final assistant turn."""
    *before, last = example.messages
    return dataclasses.replace(example, messages=tuple(before)) if last.role == "assistant" else example


def _asked(example: Conversation) -> Iterator[tuple[list[int], int]]:
    """(messages of the prompt, message of the answer) of each assistant turn that answers something."""
    prompt: list[int] = []
    answers: list[int] = []  # assistant turns since the last other one
    for index, message in enumerate(example.messages):
        if message.role == "assistant":
            if prompt:
                yield prompt, index
            answers.append(index)
        elif message.role == "tool":
            prompt, answers = [*prompt, *answers, index], []
        elif message.role == "user":
            prompt, answers = [index] if answers else [*prompt, index], []


def _single(example: Conversation, prompt: list[int], answer: int) -> Conversation:
    system = [0] if example.messages[0].role == "system" else []
    chosen = [*system, *prompt, answer]
    on = _images_of_boxes(example.messages[index] for index in chosen)
    carried = [
        part
        for index, message in enumerate(example.messages)
        if index not in chosen
        for part in message.media
        if (message.role == "user" and index < answer) or _is_image(part, on)
    ]
    single = _select(example, chosen, {}, carried, _first_given(example, prompt))
    *before, last = single.messages
    return dataclasses.replace(single, messages=(*(dataclasses.replace(m, loss_weight=0.0) for m in before), last))


def _images_of_boxes(messages: Iterable[Message]) -> set[int]:
    """Return the indices of the images that the boxes of messages are on."""
    return {box.image for message in messages for box in message.boxes}


def _is_image(part: Image | Video, indices: set[int]) -> bool:
    return isinstance(part, Image) and part.index in indices


def _first_given(example: Conversation, prompt: Sequence[int]) -> int:
    """Return the first message of a prompt that is a user's, or else a tool's."""
    return min(prompt, key=lambda index: ("user", "tool", "assistant").index(example.messages[index].role))


def _select(
    example: Conversation,
    chosen: Sequence[int],
    texts: Mapping[int, str],
    carried: Sequence[Image | Video],
    carrier: int,
) -> Conversation:
    """Return the chosen messages.

    Args:
      texts: replace the contents of messages.
      carried: media of messages left out, put in front of the message ``carrier``.
    """
    messages = []
    for index in chosen:
        message = example.messages[index]
        if index == carrier:
            message = dataclasses.replace(message, content=(*carried, *message.content))
        if index in texts:
            message = dataclasses.replace(message, content=(Text(texts[index]),), loss_weight=0.0)
        messages.append(message)
    return dataclasses.replace(example, messages=tuple(messages))
