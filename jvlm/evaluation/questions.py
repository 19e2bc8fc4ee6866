"""Questions out of rows: one for each assistant turn, with what a right answer is."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from jvlm.data.boxes import Place
from jvlm.data.errors import Origin
from jvlm.data.rows import Conversation, fill_objects
from jvlm.data.turns import consume, turns_alone

_MEDIA = re.compile("<image>|<video>")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      conversation: what the model is given; ends with the user's turn.
      expected: the words of the reference answer; boxes are left as <bbox> tags.
      boxes: reference boxes and points; empty for an answer in words.
      box_images: which image each of them is on.
      turn: which assistant turn of its row, from 0.
    """

    conversation: Conversation
    expected: str
    boxes: tuple[Place, ...]
    box_images: tuple[int, ...]
    turn: int

    @property
    def text(self) -> str:
        """The words of the question."""
        return _MEDIA.sub("", self.conversation.messages[-1].content).strip()

    @property
    def origin(self) -> Origin:
        return self.conversation.origin


def questions_of(row: Conversation) -> list[Question]:
    """Every assistant turn of a row as a question; see `jvlm.data.turns.turns_alone`."""
    return [_question(alone, turn) for turn, alone in enumerate(turns_alone(row))]


def _question(alone: Conversation, turn: int) -> Question:
    *prompt, answer = alone.messages
    refs, boxes = list(alone.refs), list(range(len(alone.boxes)))
    asked_refs, asked_boxes = consume(prompt[-1].content, refs, boxes)
    conversation = dataclasses.replace(
        alone,
        messages=tuple(prompt),
        refs=tuple(asked_refs),
        boxes=tuple(alone.boxes[i] for i in asked_boxes),
        box_images=tuple(alone.box_images[i] for i in asked_boxes),
    )
    return Question(
        conversation=conversation,
        expected=fill_objects(answer.content, refs, []),
        boxes=tuple(alone.boxes[i] for i in boxes),
        box_images=tuple(alone.box_images[i] for i in boxes),
        turn=turn,
    )


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
