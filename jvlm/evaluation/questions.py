"""Questions out of examples: one for each assistant turn, with what a right answer is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from jvlm.data.content import Conversation, Image, Message, ObjectBox, ObjectName, ObjectTime, Text, Video
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import tagged
from jvlm.data.turns import calls_tools, next_turn, single_turns, without_answer

_MOST_ANSWERS = 100_000  # different answers that are counted at a time


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      conversation: what the model is given; ends with a turn of the user or a tool.
      expected: the words of the reference answer, in which <bbox> stands for each box and <time> for each time.
      boxes: reference boxes and points; empty for an answer in words.
      turn: which question of its example, from 0.
      times: reference moments and spans of videos.
    """

    conversation: Conversation
    expected: str
    boxes: tuple[ObjectBox, ...]
    turn: int
    times: tuple[ObjectTime, ...] = ()

    @property
    def text(self) -> str:
        """The words of the question: the last user turn's, and those of tools after it."""
        words: list[str] = []
        for message in reversed(self.conversation.messages):
            if message.role in ("user", "tool"):
                words.insert(0, _words(message).strip())
            if message.role == "user":
                break
        return "\n".join(words).strip()

    @property
    def origin(self) -> Origin:
        return self.conversation.origin


def _words(message: Message) -> str:
    return tagged(part for part in message.content if not isinstance(part, Image | Video))


def questions_of(example: Conversation) -> list[Question]:
    """Every answer of an example as a question, but for calls of tools; see `jvlm.data.turns.single_turns`."""
    answers = [turn for turn in single_turns(example) if not calls_tools(turn.messages[-1])]
    return [_question(asked, turn) for turn, asked in enumerate(answers)]


def next_question(example: Conversation, answers: Sequence[str]) -> Question | None:
    """Return the question after so many answers, which stand before it as text; None at the end of the example."""
    turn = next_turn(example, answers)
    return None if turn is None else _question(turn, len(answers))


def _question(asked: Conversation, turn: int) -> Question:
    """A conversation that ends with its answer, as a question.

    Raises:
      ExampleError: a box of the answer on an image that is no part of the question.
    """
    answer, conversation = asked.messages[-1], without_answer(asked)
    shown = {image.index for image in conversation.images}
    if any(box.image not in shown for box in answer.boxes):
        raise ExampleError(
            asked.origin, "objects.image_id", "a box on an image that the question does not show", "Correct image_id"
        )
    named = answer.map(lambda part: Text(part.name) if isinstance(part, ObjectName) else part)
    times = tuple(part for part in answer.content if isinstance(part, ObjectTime))
    return Question(conversation, tagged(named.content), answer.boxes, turn, times)


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
    """The most frequent training answer to the same words: what can be scored without looking at the image.

    Training conversations are read one at a time, and answers counted for the questions that will be asked only, so
    that memory does not grow with the training data.

    Args:
      examples: the training conversations.
      asked: the questions that it will be asked.
    """

    def __init__(self, examples: Iterable[Conversation], asked: Iterable[Question]):
        self._answers: dict[str, Counter] = {question.text: Counter() for question in asked}
        everything: Counter = Counter()
        for example in examples:
            for question in questions_of(example):
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
