"""Changes to a training example, drawn anew each epoch from the seed, the epoch and the example alone.

Both are of Idefics2's fine-tuning (arXiv 2405.02246, and its code): the turns of a conversation about the same images
in another order, and images made larger.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jvlm.data import values
from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Image, Message, Parsed, Part, Text, Video
from jvlm.data.errors import ExampleError
from jvlm.data.image_choice import with_choice
from jvlm.data.values import shown

ORDERED = "ordered"  # field of an example whose turns depend on their order


def augmented(example: Parsed, config: DataConfig, rng: np.random.Generator) -> Parsed:
    """Return the example with what the configuration asks for; nothing is drawn for what it does not."""
    if config.shuffle_turns and isinstance(example, Conversation):
        example = shuffle_turns(example, rng, config.max_turns, first=config.media_first)
    elif config.media_first and isinstance(example, Conversation):
        example = media_first(example)
    if config.newline_probability and isinstance(example, Conversation):
        example = with_newlines(example, config.newline_probability, rng)
    if config.image_choices:
        example = with_choice(example, config.image_choices, rng)
    if config.upscale_probability:
        example = upscale(example, config, rng)
    return example


def media_first(conversation: Conversation) -> Conversation:
    """Return the conversation with its images and videos before the words of its first question.

    It stays as it is if an assistant, a tool or the system shows one.
    """
    if any(message.media and message.role != "user" for message in conversation.messages):
        return conversation
    first = next((n for n, message in enumerate(conversation.messages) if message.role == "user"), None)
    if first is None:
        return conversation
    bare = [_without_media(message) for message in conversation.messages]
    bare[first] = dataclasses.replace(bare[first], content=(*conversation.media, *bare[first].content))
    return dataclasses.replace(conversation, messages=tuple(bare))


def with_newlines(conversation: Conversation, probability: float, rng: np.random.Generator) -> Conversation:
    """Return the conversation with a line break before the words of a share of its users' turns."""

    def change(message: Message) -> Message:
        if message.role != "user" or rng.random() >= probability:
            return message
        first = next((n for n, part in enumerate(message.content) if not isinstance(part, Image | Video)), None)
        if first is None:
            return message
        return dataclasses.replace(message, content=(*message.content[:first], Text("\n"), *message.content[first:]))

    return dataclasses.replace(conversation, messages=tuple(map(change, conversation.messages)))


def shuffle_turns(
    conversation: Conversation, rng: np.random.Generator, most: int | None = None, *, first: bool = False
) -> Conversation:
    """Return the conversation with its questions, each with its answer, in an order drawn anew.

    Images and videos move to the front of the first question, in their order, so that none comes after a question about
    it. A conversation keeps its order if it says ``"ordered": true``, if tools take part, if it does not alternate
    between a user and an assistant, or if an assistant turn shows an image.

    Args:
      most: questions that stay, the first of the new order; None is all.
      first: media come first in conversations that keep their order, too, as with `media_first`.

    Raises:
      ExampleError: an ``ordered`` that is neither true nor false.
    """
    begin = 1 if conversation.messages[0].role == "system" else 0
    turns = conversation.messages[begin:]
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    roles = [message.role for message in turns]
    fixed = (
        _is_ordered(conversation)
        or roles != ["user", "assistant"] * (len(turns) // 2)
        or any(answer.media or question.fields or answer.fields for question, answer in pairs)
    )
    if fixed or len(pairs) < 2:
        return media_first(conversation) if first else conversation
    order = rng.permutation(len(pairs))[:most]
    chosen = [message for number in order for message in pairs[number]]
    bare = [message if not message.media else _without_media(message) for message in chosen]
    first = dataclasses.replace(bare[0], content=(*conversation.media, *bare[0].content))
    return dataclasses.replace(conversation, messages=(*conversation.messages[:begin], first, *bare[1:]))


def _is_ordered(conversation: Conversation) -> bool:
    value = dict(conversation.extra).get(ORDERED)
    ordered = False if value is None else values.switch(value)
    if ordered is None:
        raise ExampleError(conversation.origin, ORDERED, f"{shown(value)} is not true or false", "Write true or false")
    return ordered


def _without_media(message: Message) -> Message:
    return dataclasses.replace(message, content=tuple(part for part in message.content if part not in message.media))


def upscale(example: Parsed, config: DataConfig, rng: np.random.Generator) -> Parsed:
    """Return the example with a share ``upscale_probability`` of its images to be made larger.

    The factor is drawn from a triangular distribution over ``upscale_range`` whose mode is the largest, as Idefics2's
    code has it.
    """
    low, high = config.upscale_range

    def change(part: Part) -> Part:
        if not isinstance(part, Image) or rng.random() >= config.upscale_probability:
            return part
        factor = low if low == high else rng.triangular(low, high, high)
        return dataclasses.replace(part, upscale=float(factor), upscale_limit=config.upscale_longest_edge)

    return example.map(change)
