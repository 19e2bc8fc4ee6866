"""What an example asks and answers, small enough to be remembered of many: to find what contradicts or repeats."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

from jvlm.data.boxes import Box, Sizes
from jvlm.data.content import Conversation, Document, Image, ObjectBox, ObjectName, ObjectTime, Part, Text

_SHOWN = 60  # characters of an answer
_DIGEST = 8  # bytes


@dataclasses.dataclass(frozen=True)
class Contents:
    """Digests of an example, and what is odd about it.

    Attributes:
      question: digest of all before the last answer, images included; of a document, of all.
      answer: digest of the last answer; of a document it is empty.
      shown: the beginning of the answer.
      boxes: how much of its image each box covers, 0 to 1.
      control: a control token that its text spells; None if there is none.
    """

    question: bytes
    answer: bytes
    shown: str
    boxes: tuple[float, ...]
    control: str | None


def contents_of(
    parsed: Conversation | Document, sizes: Sequence[Sizes], digests: Iterable[bytes], control: re.Pattern
) -> Contents:
    """Return the contents of an example.

    Args:
      sizes: of its images and videos, in the order in which they stand in it.
      digests: of the files of its images and videos.
      control: finds control tokens.
    """
    messages = parsed.messages if isinstance(parsed, Conversation) else ()
    ends = len(messages) and messages[-1].role == "assistant"
    answer = messages[-1].content if ends else ()
    asked = messages[:-1] if ends else messages
    before = [("", parsed.content)] if isinstance(parsed, Document) else [(one.role, one.content) for one in asked]
    question = [*digests, *(piece for role, content in before for piece in (role.encode(), *map(_bytes, content)))]
    words = "".join(part.text for part in parsed.parts if isinstance(part, Text))
    spelled = control.search(words)
    return Contents(
        question=_digest(question),
        answer=_digest(list(map(_bytes, answer))) if answer else b"",
        shown="".join(map(_shown, answer)).strip()[:_SHOWN],
        boxes=tuple(_covered(parsed, sizes)),
        control=None if spelled is None else spelled[0],
    )


def _covered(parsed: Conversation | Document, sizes: Sequence[Sizes]) -> Iterable[float]:
    by_image = {part.index: size for part, size in zip(parsed.media, sizes, strict=False) if isinstance(part, Image)}
    for box in parsed.boxes:
        if isinstance(box.region, Box) and box.image in by_image:
            yield box.region.to("norm1", by_image[box.image]).area


def _digest(pieces: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.digest()[:_DIGEST]


def _bytes(part: Part) -> bytes:
    if isinstance(part, ObjectBox):
        return repr((part.image, part.region)).encode()
    return type(part).__name__.encode() + _shown(part).encode()


def _shown(part: Part) -> str:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, ObjectName):
        return part.name
    if isinstance(part, ObjectBox):
        return str([round(value, 3) for value in part.region.values])
    if isinstance(part, ObjectTime):
        return str(list(part.seconds))
    return ""
