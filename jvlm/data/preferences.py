"""Examples of preferences: a chosen and a rejected answer to one prompt, or an answer that is good or bad by itself.

Fields are those of ms-swift's format, which `jvlm.data.formats` makes of TRL's and LLaMA-Factory's.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jvlm.data import values
from jvlm.data.choices import LossChoice
from jvlm.data.content import Conversation, Document, Message, Part, Text, Video
from jvlm.data.errors import ExampleError, Origin, Rejected
from jvlm.data.examples import parse_conversation
from jvlm.data.loss_choice import with_loss_on
from jvlm.data.packing import Example
from jvlm.data.segments import joined_segments, segment_of
from jvlm.data.values import shown

REJECTED_RESPONSE, REJECTED_MESSAGES = "rejected_response", "rejected_messages"
REJECTED_MEDIA = {"rejected_images": "images", "rejected_videos": "videos"}
LABELS = ("label", "kto_tag")  # ms-swift's and TRL's, LLaMA-Factory's
# keys of `Example.values`
MARGIN, DESIRABLE, ANSWER = "margin", "desirable", "answer"


@dataclasses.dataclass(frozen=True)
class Judged:
    """Conversations that end with an answer, and what is known of each.

    Attributes:
      conversations: of a pair the chosen one, then the rejected one.
      values: of each, see `Example.values`.
    """

    conversations: tuple[Conversation, ...]
    values: tuple[Mapping[str, float], ...]

    @property
    def origin(self) -> Origin:
        """Where the example is from."""
        return self.conversations[0].origin

    @property
    def extra(self) -> tuple[tuple[str, Any], ...]:
        """Fields of the example that are carried along."""
        return self.conversations[0].extra


def pair(example: Conversation | Document, loss: LossChoice | None = None) -> Judged:
    """Return the chosen and the rejected conversation of an example.

    Args:
      loss: which of their turns count; None is the last answer of each.

    Raises:
      ExampleError: no rejected answer, one that is the same as the chosen one, or an answer to nothing.
    """
    chosen = _conversation(example)
    given = values.without_nulls(dict(chosen.extra))
    rejected = _rejected(chosen, given)
    chosen = dataclasses.replace(chosen, extra=tuple((k, v) for k, v in chosen.extra if k not in _REJECTED))
    both = tuple(_with_loss(one, loss) for one in (chosen, rejected))
    if chosen.messages == rejected.messages:
        fix = "Give two different answers, or leave the example out"
        raise ExampleError(chosen.origin, REJECTED_MESSAGES, "the rejected answer is the chosen one", fix)
    margin = given.get(MARGIN)
    number = None if margin is None else values.number(margin)
    if margin is not None and number is None:
        raise ExampleError(chosen.origin, MARGIN, f"{shown(margin)} is not a number", "Give a number, or none")
    return Judged(both, ({} if number is None else {MARGIN: float(number)}, {}))


def labelled(example: Conversation | Document, loss: LossChoice | None = None) -> Judged:
    """Return the conversation of an example whose answer is good or bad by itself, twice.

    The second takes another example's answer once its neighbours are known: see `with_other_answers`.

    Raises:
      ExampleError: no label, or one that is neither true nor false; an answer to nothing.
    """
    conversation = _conversation(example)
    given = values.without_nulls(dict(conversation.extra))
    name = next((name for name in LABELS if name in given), LABELS[0])
    label = values.switch(given.get(name))
    if label is None:
        fix = "Write true for a good answer, false for a bad one"
        raise ExampleError(conversation.origin, name, f"{shown(given.get(name))} is not true or false", fix)
    one = _with_loss(conversation, loss)
    return Judged((one, one), ({DESIRABLE: float(label)}, {}))


def with_answer_numbers(example: Example) -> Example:
    """Return the example with a number for each of its segments: of its tokens, which of them count, and its media.

    It has 52 bits, which a float holds: in a million answers two are the same by chance once in 9,000 times.
    """
    pixels = hashlib.blake2b(digest_size=16)
    for array in (example.patches, example.patch_segment_ids, example.patch_positions):
        pixels.update(np.ascontiguousarray(array).tobytes())
    numbered = []
    for number, values_of_segment in enumerate(example.values, 1):
        inside = example.segments == number
        digest = hashlib.blake2b(pixels.digest(), digest_size=8)
        for array in (example.tokens, example.positions, example.loss_weights > 0, example.vision_index):
            digest.update(np.ascontiguousarray(array[inside]).tobytes())
        answer = int.from_bytes(digest.digest(), "big") >> 12
        numbered.append({**values_of_segment, ANSWER: float(answer)})
    return dataclasses.replace(example, values=tuple(numbered))


def with_other_answers(results: Sequence[Sequence[Example | Rejected]], seq_len: int, longest: int) -> list[list]:
    """Return examples of `labelled` of which each has, as second segment, its prompt with its neighbour's answer.

    Their log-probabilities estimate how far the model has gone from its reference (KTO, arXiv 2402.01306). As in TRL,
    the answer is that of the example before, and of the first one that of the last. It is cut where it does not fit;
    an example without a neighbour has no such answer.

    Args:
      results: what each example of a packing window gave.
      seq_len: tokens of a packed sequence.
      longest: tokens of a conversation.
    """
    usable = [one for result in results for one in result if isinstance(one, Example)]
    others = iter([usable[-1], *usable[:-1]] if usable else [])
    return [
        [_with_answer(one, next(others), seq_len, longest) if isinstance(one, Example) else one for one in result]
        for result in results
    ]


def _with_answer(example: Example, other: Example, seq_len: int, longest: int) -> Example:
    own = segment_of(example, 1)
    begin, answer = _answer(own), segment_of(other, 1)
    room = min(seq_len - own.length, longest) - begin
    taken = slice(_answer(answer), _answer(answer) + max(room, 1))
    tokens = np.concatenate([own.tokens[:begin], answer.tokens[taken]])
    count = len(tokens) - begin
    first = int(own.positions[:begin].max(initial=-1)) + 1
    positions = np.repeat(np.arange(first, first + count, dtype=own.positions.dtype)[:, None], 3, 1)
    weights = answer.loss_weights[taken] * (example is not other)
    nothing = np.zeros(count, own.media.dtype)
    mismatched = dataclasses.replace(
        own,
        tokens=tokens,
        positions=np.concatenate([own.positions[:begin], positions]),
        loss_weights=np.concatenate([own.loss_weights[:begin] * 0, weights]),
        turns=np.concatenate([own.turns[:begin], np.full(count, own.turns[-1], own.turns.dtype)]),
        vision_index=np.concatenate([own.vision_index[:begin], nothing - 1]),
        media=np.concatenate([own.media[:begin], nothing]),
    )
    return joined_segments([own, mismatched], [False, True], [own.values[0], {}])


def _answer(example: Example) -> int:
    """Return the first token of the answer."""
    return int(np.argmax(example.loss_weights > 0))


def _conversation(example: Conversation | Document) -> Conversation:
    if isinstance(example, Document):
        raise ExampleError(
            example.origin, "messages", "a document, which has no answer to prefer", "Write messages, or leave it out"
        )
    return example


def _rejected(chosen: Conversation, given: Mapping[str, Any]) -> Conversation:
    """Return the conversation with the rejected answer, and the chosen one's media where it has none of its own."""
    response, messages = given.get(REJECTED_RESPONSE), given.get(REJECTED_MESSAGES)
    own = {field: given[name] for name, field in REJECTED_MEDIA.items() if name in given}
    if response is not None and messages is not None:
        raise ExampleError(
            chosen.origin, REJECTED_RESPONSE, f"given together with {REJECTED_MESSAGES!r}", "Keep one of them"
        )
    if response is None and messages is None and not own:
        fix = "Give the rejected answer's text as rejected_response, or the whole conversation as rejected_messages"
        raise ExampleError(chosen.origin, REJECTED_RESPONSE, "missing", fix)
    if messages is None and not own and isinstance(response, str):
        text = values.text(response, chosen.origin, REJECTED_RESPONSE)
        answer = Message("assistant", (Text(text),), 1.0)
        return dataclasses.replace(chosen, messages=(*_prompt(chosen), answer), extra=())
    if messages is None:
        raise ExampleError(
            chosen.origin,
            REJECTED_RESPONSE,
            f"{shown(response)} is not text" if response is not None else "missing beside media of its own",
            "Give the answer's text, or the whole conversation as rejected_messages",
        )
    return _parsed(chosen, messages, own)


def _parsed(chosen: Conversation, messages: Any, own: Mapping[str, Any]) -> Conversation:
    record = {"messages": messages, **own}
    borrowed = {}
    if not _brings_media(messages):
        for field, parts in (("images", chosen.images), ("videos", chosen.videos)):
            if field not in own and parts:
                borrowed[field] = parts
                record[field] = [f"{field}[{part.index}]" for part in parts]
    try:
        rejected = parse_conversation(record, chosen.origin)
    except ExampleError as error:
        field = error.field if error.field in record and error.field != "messages" else f"rejected_{error.field}"
        raise ExampleError(error.origin, field, error.problem, error.fix) from error

    def with_source(part: Part) -> Part:
        field = "videos" if isinstance(part, Video) else "images"
        is_borrowed = part in rejected.media and field in borrowed
        return borrowed[field][part.index] if is_borrowed else part

    same = ("image_settings", "image_choice", "tools", "loss")
    rejected = rejected.map(with_source)
    return dataclasses.replace(rejected, **{name: getattr(chosen, name) for name in same})


def _brings_media(messages: Any) -> bool:
    """Whether content blocks of messages hold images or videos themselves."""
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list | tuple) else []
    blocks = [b for content in contents if isinstance(content, list | tuple) for b in content if isinstance(b, dict)]
    return any(block.get("type") != "text" and len(values.without_nulls(block)) > 1 for block in blocks)


def _prompt(conversation: Conversation) -> tuple[Message, ...]:
    """Return the messages up to the last that is no assistant's."""
    others = [index for index, message in enumerate(conversation.messages) if message.role != "assistant"]
    return conversation.messages[: others[-1] + 1] if others else ()


def _with_loss(conversation: Conversation, loss: LossChoice | None) -> Conversation:
    """Return the conversation with a loss weight of 0 or 1 on each turn. Raises ExampleError if it ends in none."""
    prompt = _prompt(conversation)
    if conversation.messages[-1].role != "assistant" or not any(message.role in ("user", "tool") for message in prompt):
        problem = "no answer at its end" if conversation.messages[-1].role != "assistant" else "an answer to nothing"
        raise ExampleError(conversation.origin, "messages", problem, "Give a user turn and the assistant's answer")
    conversation = with_loss_on(dataclasses.replace(conversation, loss=None), loss or "last_answer")
    for index, message in enumerate(conversation.messages):
        if message.loss_weight not in (0.0, 1.0):
            raise ExampleError(
                conversation.origin,
                f"messages[{index}].loss_scale",
                f"{message.loss_weight:g}: log-probabilities of answers count each token whole",
                "Leave it out, or write loss true or false",
            )
    return conversation


_REJECTED = (REJECTED_RESPONSE, REJECTED_MESSAGES, *REJECTED_MEDIA)
