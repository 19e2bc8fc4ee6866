"""Questions out of rows: one for each assistant turn, with what a right answer is."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from jvlm.data.boxes import Place
from jvlm.data.errors import Origin, RowError
from jvlm.data.rows import Conversation, fill_objects
from jvlm.data.turns import calls_tools, items_of, next_turn, turns_alone, without_answer

_MOST_ANSWERS = 100_000  # different answers that are counted at a time
_MEDIA = re.compile("<image>|<video>")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      conversation: what the model is given; ends with a turn of the user or a tool.
      expected: the words of the reference answer; boxes are left as <bbox> tags.
      boxes: reference boxes and points; empty for an answer in words.
      box_images: which image each of them is on.
      turn: which question of its row, from 0.
    """

    conversation: Conversation
    expected: str
    boxes: tuple[Place, ...]
    box_images: tuple[int, ...]
    turn: int

    @property
    def text(self) -> str:
        """The words of the question: the last user turn's, and those of tools after it."""
        words: list[str] = []
        for message in reversed(self.conversation.messages):
            if message.role in ("user", "tool"):
                words.insert(0, _MEDIA.sub("", message.content).strip())
            if message.role == "user":
                break
        return "\n".join(words).strip()

    @property
    def origin(self) -> Origin:
        return self.conversation.origin


def questions_of(row: Conversation) -> list[Question]:
    """Every answer of a row as a question, but for calls of tools; see `jvlm.data.turns.turns_alone`."""
    answers = [alone for alone in turns_alone(row) if not calls_tools(alone.messages[-1])]
    return [_question(alone, turn) for turn, alone in enumerate(answers)]


def next_question(row: Conversation, said: Sequence[str]) -> Question | None:
    """The question after the answers ``said``, which stand before it; None at the end of the row."""
    turn = next_turn(row, said)
    return None if turn is None else _question(turn, len(said))


def _question(asked: Conversation, turn: int) -> Question:
    """A conversation that ends with its answer, as a question.

    Raises:
      RowError: a box of the answer on a picture that is no part of the question.
    """
    answer, own = asked.messages[-1], items_of(asked)[-1]
    conversation = without_answer(asked)
    box_images = tuple(asked.box_images[i] for i in own["boxes"])
    if any(image >= len(conversation.images) for image in box_images):
        raise RowError(
            asked.origin, "objects.image_id", "a box on a picture that the question does not show", "Correct image_id"
        )
    return Question(
        conversation=conversation,
        expected=fill_objects(answer.content, [asked.refs[i] for i in own["refs"]], []),
        boxes=tuple(asked.boxes[i] for i in own["boxes"]),
        box_images=box_images,
        turn=turn,
    )


def normalise(answer: str) -> str:
    """For exact match: case, outer space, a closing full stop and the thinking part do not count."""
    return answer.rpartition("</think>")[2].strip().rstrip(".").casefold()


def _count(counter: Counter, answer: str) -> None:
    """Count an answer; of very many different ones the rarest are forgotten, so that memory is bounded."""
    counter[answer] += 1
    if len(counter) > _MOST_ANSWERS:
        common = counter.most_common(_MOST_ANSWERS // 2)
        counter.clear()
        counter.update(dict(common))


class TextOnlyBaseline:
    """The most frequent training answer to the same words: what can be scored without looking at the picture.

    Training conversations are read one at a time, and answers counted for the questions that will be asked only, so
    that memory does not grow with the training data.

    Args:
      rows: the training conversations.
      asked: the questions that it will be asked.
    """

    def __init__(self, rows: Iterable[Conversation], asked: Iterable[Question]):
        self._answers: dict[str, Counter] = {question.text: Counter() for question in asked}
        everything: Counter = Counter()
        for row in rows:
            for question in questions_of(row):
                if not question.boxes:
                    answer = normalise(question.expected)
                    if question.text in self._answers:
                        _count(self._answers[question.text], answer)
                    _count(everything, answer)
        self._default = everything.most_common(1)[0][0] if everything else ""

    def answer(self, question: Question) -> str:
        counted = self._answers.get(question.text)
        return counted.most_common(1)[0][0] if counted else self._default

    def accuracy(self, questions: Sequence[Question]) -> float:
        """Share of the questions answered in words that it gets right."""
        asked = [q for q in questions if not q.boxes]
        right = sum(self.answer(q) == normalise(q.expected) for q in asked)
        return right / len(asked) if asked else 0.0
