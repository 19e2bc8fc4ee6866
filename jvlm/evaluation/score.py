"""Ask, compare, count."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from jvlm.data.boxes import Box, Region, match_score
from jvlm.data.content import Conversation, Image
from jvlm.data.errors import ExampleError
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_conversation
from jvlm.data.processor import Processor
from jvlm.data.time_formats import parse, temporal_iou
from jvlm.evaluation.clients import LocalClient, Prompt
from jvlm.evaluation.questions import Question, next_question, normalise, questions_of
from jvlm.evaluation.task import Decoding
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout
from jvlm.progress import Progress

YES_NO = frozenset(("yes", "no"))
# when an answered time is right: overlap of a span with its reference, seconds of a moment from its reference
_OVERLAP, _SECONDS = 0.5, 1.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question and the model's response.

    Attributes:
      score: 1 or 0 for words, mean IoU for boxes.
      reference, predicted: boxes and points, expected and answered, in pixels of the original image.
      parsed: whether an answer that should hold boxes does.
    """

    question: Question
    response: str
    score: float
    reference: tuple[Region, ...] = ()
    predicted: tuple[Region, ...] = ()
    parsed: bool = True


@dataclasses.dataclass(frozen=True)
class Scores:
    """What was reached; shares are of 1. ``accuracy`` counts answers in words, ``mean_iou`` answers with boxes."""

    questions: int
    accuracy: float | None
    yes_no: float | None
    other: float | None
    boxes: int
    mean_iou: float | None
    iou_at_half: float | None
    unparsed_boxes: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Scores:
        words = [a for a in answers if not a.question.boxes]
        boxed = [a for a in answers if a.question.boxes]
        yes_no = [a for a in words if normalise(a.question.expected) in YES_NO]
        other = [a for a in words if normalise(a.question.expected) not in YES_NO]
        return cls(
            questions=len(words),
            accuracy=_mean(words),
            yes_no=_mean(yes_no),
            other=_mean(other),
            boxes=len(boxed),
            mean_iou=_mean(boxed),
            iou_at_half=float(np.mean([a.score >= 0.5 for a in boxed])) if boxed else None,
            unparsed_boxes=sum(not a.parsed for a in boxed),
        )


def _mean(answers: Sequence[Answer]) -> float | None:
    return float(np.mean([a.score for a in answers])) if answers else None


def load_examples(patterns: Sequence[str], max_examples: int | None = None) -> list[Conversation]:
    """The checked examples of files. Raises the ExampleError of the first bad one: a test set must be whole."""
    source = ExampleSource(patterns)
    examples = []
    for index in range(min(len(source), max_examples or len(source))):
        origin, example = source[index]
        if isinstance(example, ExampleError):
            raise example
        examples.append(parse_conversation(example, origin))
    return examples


def ask(
    model: VLM,
    processor: Processor,
    examples: Sequence[Conversation],
    *,
    ask: str = "independent",
    max_new_tokens: int = 64,
    batch_size: int = 64,
    layout: MeshLayout | None = None,
) -> list[Answer]:
    """Answers to every question of the examples, greedy, in order of example and turn.

    Args:
      ask: "independent" or "multi_turn", as in `jvlm.training.config.EvaluationConfig`.
      layout: as in `jvlm.generate`.

    Raises:
      ExampleError: a question that cannot be read, its images for one.
    """
    questions = [question for example in examples for question in questions_of(example)]
    client = LocalClient(model, processor, batch_size=batch_size, layout=layout)
    decoding = Decoding(max_new_tokens=max_new_tokens)
    with Progress(total=len(questions), desc="asking", unit="question") as bar:

        def run(conversations: list[Conversation]) -> list[str]:
            texts: dict[str, str] = {}
            prompts = (Prompt(str(n), conversation, n) for n, conversation in enumerate(conversations))
            for reply in client.replies(prompts, decoding):
                if reply.cause is not None:
                    raise reply.cause
                texts[reply.id] = reply.text
                bar.update()
            return [texts[str(n)] for n in range(len(conversations))]

        if ask == "independent":
            answered = list(zip(questions, run([q.conversation for q in questions]), strict=True))
        else:
            answered = _multi_turn(examples, run)
    return [score(question, response, processor) for question, response in answered]


def _multi_turn(examples: Sequence[Conversation], run) -> list[tuple[Question, str]]:
    """(question, answer) turn by turn over all examples, each turn after the model's own earlier answers."""
    answered: list[list[tuple[Question, str]]] = [[] for _ in examples]
    while True:
        asked = [
            next_question(example, [text for _, text in of_example])
            for example, of_example in zip(examples, answered, strict=True)
        ]
        going = [i for i, question in enumerate(asked) if question is not None]
        if not going:
            return [pair for of_example in answered for pair in of_example]
        for i, text in zip(going, run([asked[i].conversation for i in going]), strict=True):
            answered[i].append((asked[i], text))


def score(question: Question, response: str, processor: Processor) -> Answer:
    """Exact match for words; of an answer with times whether each is found (spans with an IoU of 0.5 or more, moments
    within a second); for boxes and points the mean match_score (`jvlm.data.boxes`) of the best one-to-one
    assignment, in which one that is missing counts 0. Points in an answer count only where points are expected."""
    if not question.boxes:
        if question.times:
            right = _finds([time.seconds for time in question.times], parse(response))
        else:
            right = normalise(response) == normalise(question.expected)
        return Answer(question, response, float(right))
    regions = [item.region for item in processor.read_regions(response)]
    if all(isinstance(box.region, Box) for box in question.boxes):
        regions = [region for region in regions if isinstance(region, Box)]
    media = zip(question.conversation.media, processor.encode(question.conversation).sizes, strict=True)
    images = {part.index: sizes for part, sizes in media if isinstance(part, Image)}
    expected = [(box.region, images[box.image]) for box in question.boxes]
    table = np.array(
        [[match_score(reference, region, sizes) for region in regions] for reference, sizes in expected]
    ).reshape(len(question.boxes), len(regions))
    pairs = linear_sum_assignment(-table)
    return Answer(
        question,
        response,
        score=float(table[pairs].sum() / len(question.boxes)),
        reference=tuple(region.to("original", sizes) for region, sizes in expected),
        predicted=tuple(region.to("original", expected[0][1]) for region in regions),
        parsed=bool(regions),
    )


def _finds(expected: Sequence[tuple[float, ...]], found: Sequence[tuple[float, ...]]) -> bool:
    """Whether there is an answered time of its own for each expected one, and no other."""
    if len(expected) != len(found):
        return False
    table = np.array([[_is_found(one, other) for other in found] for one in expected])
    return bool(table[linear_sum_assignment(~table)].all())


def _is_found(expected: tuple[float, ...], found: tuple[float, ...]) -> bool:
    if len(expected) != len(found):
        return False
    if len(expected) == 1:
        return abs(expected[0] - found[0]) <= _SECONDS
    return temporal_iou(expected, found) >= _OVERLAP


def write(answers: Sequence[Answer], path: Path) -> None:
    """One JSON line for each answer."""
    with open(path, "w") as file:
        for answer in answers:
            line: dict[str, Any] = {
                "file": answer.question.origin.file,
                "number": answer.question.origin.number,
                "turn": answer.question.turn,
                "question": answer.question.text,
                "expected": answer.question.expected,
                "response": answer.response,
                "score": round(answer.score, 4),
            }
            if answer.question.boxes:
                line["boxes"] = [region.values for region in answer.reference]
                line["predicted"] = [region.values for region in answer.predicted]
                line["parsed"] = answer.parsed
            file.write(json.dumps(line) + "\n")
