"""Questions out of rows: one for each assistant turn, with what a right answer is."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from jvlm.data.errors import Origin
from jvlm.data.rows import Conversation, Message, fill_objects

_MEDIA = re.compile("<image>|<video>")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      conversation: what the model is given; ends with the user's turn.
      expected: the words of the reference answer; boxes are left as <bbox> tags.
      boxes: reference boxes (x1, y1, x2, y2) in pixels of the original picture; empty for an answer in words.
      turn: which assistant turn of its row, from 0.
    """

    conversation: Conversation
    expected: str
    boxes: tuple[tuple[float, ...], ...]
    turn: int

    @property
    def text(self) -> str:
        """The words of the question."""
        return _MEDIA.sub("", self.conversation.messages[-1].content).strip()

    @property
    def origin(self) -> Origin:
        return self.conversation.origin


def questions_of(row: Conversation) -> list[Question]:
    """Every assistant turn of a row as a question in a conversation of its own.

    The pictures seen so far come along; earlier questions and answers do not, so nothing gives the answer away.
    """
    system = [m for m in row.messages if m.role == "system"]
    media: list[str] = []
    prompt: Message | None = None
    found = []
    for index, message in enumerate(row.messages):
        if message.role == "user":
            own = _MEDIA.findall(message.content)
            prompt = dataclasses.replace(message, content="".join(media) + message.content)
            media += own
        elif message.role == "assistant" and prompt is not None:
            found.append(_question(row, [*system, prompt], index, media, len(found)))
    return found


def _question(row: Conversation, messages: list[Message], index: int, media: list[str], turn: int) -> Question:
    refs, boxes = list(row.refs), list(range(len(row.boxes)))
    for earlier in row.messages[: index - 1]:
        consume(earlier.content, refs, boxes)
    prompt_refs, prompt_boxes = consume(messages[-1].content, refs, boxes)
    answer_refs, answer_boxes = consume(row.messages[index].content, refs, boxes)
    count = Counter(media)
    conversation = dataclasses.replace(
        row,
        messages=tuple(messages),
        images=row.images[: count["<image>"]],
        videos=row.videos[: count["<video>"]],
        refs=tuple(prompt_refs),
        boxes=tuple(row.boxes[i] for i in prompt_boxes),
        box_images=tuple(row.box_images[i] for i in prompt_boxes),
    )
    expected = fill_objects(row.messages[index].content, list(answer_refs), [])
    return Question(conversation, expected, tuple(row.boxes[i] for i in answer_boxes), turn)


def consume(text: str, refs: list[str], boxes: list[int]) -> tuple[list[str], list[int]]:
    """Take from both queues what a text's tags use."""
    taken_refs = [refs.pop(0) for _ in range(min(text.count("<ref-object>"), len(refs)))]
    taken_boxes = [boxes.pop(0) for _ in range(min(text.count("<bbox>"), len(boxes)))]
    return taken_refs, taken_boxes


def normalise(answer: str) -> str:
    """For exact match: case, outer space, a closing full stop and the thinking part do not count."""
    return answer.rpartition("</think>")[2].strip().rstrip(".").casefold()


class TextOnlyFloor:
    """The most frequent training answer to the same words: what can be scored without looking.

    Args:
      rows: the training conversations.
    """

    def __init__(self, rows: Iterable[Conversation]):
        self._answers: dict[str, Counter] = {}
        everything: Counter = Counter()
        for row in rows:
            for question in questions_of(row):
                if not question.boxes:
                    answer = normalise(question.expected)
                    self._answers.setdefault(question.text, Counter())[answer] += 1
                    everything[answer] += 1
        self._default = everything.most_common(1)[0][0] if everything else ""

    def answer(self, question: Question) -> str:
        counted = self._answers.get(question.text)
        return counted.most_common(1)[0][0] if counted else self._default

    def accuracy(self, questions: Sequence[Question]) -> float:
        """Share of the questions answered in words that it gets right."""
        asked = [q for q in questions if not q.boxes]
        right = sum(self.answer(q) == normalise(q.expected) for q in asked)
        return right / len(asked) if asked else 0.0
