"""The prompts of a run: what is asked, and what a right answer is, from any examples of the training data.

An example with a reference of its own (``gold``, ``solution``, ``ground_truth`` or ``answer``) is one prompt. Of any
other one each assistant turn is a question whose reference it is: its boxes, in the numbers that the model writes, or
its words.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from jvlm.data.box_formats import FORMATS
from jvlm.data.boxes import CoordinateSpace, Sizes
from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Image, ObjectBox
from jvlm.data.errors import ExampleError, Origin, Rejected, grouped
from jvlm.data.examples import parse_conversation, tagged
from jvlm.data.mixture.examples import Examples
from jvlm.data.packing import Example, check_fits
from jvlm.data.processor import Processor
from jvlm.data.turns import without_answer
from jvlm.errors import UserError
from jvlm.evaluation.questions import questions_of
from jvlm.rl.rewards.router import Router
from jvlm.rl.rewards.source import RewardItem, RewardSource

GOLDS = ("gold", "solution", "ground_truth", "answer")
TASKS = ("task", "data_source", "ability")
# tasks of examples that name none: with boxes in their answer, with a span of a video, and without either
_BOXES, _SPAN, _TEXT = "boxes", "span", "text"
_TAIL = 16  # tokens of a prompt in which an opened <think> is looked for


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt.

    Attributes:
      conversation: ends with a turn of the user or a tool.
      gold: what is right; of ``boxes`` it follows when the sizes of the images are known.
      boxes: of the reference answer.
      columns: further fields of the example.
    """

    conversation: Conversation
    task: str
    gold: Any
    boxes: tuple[ObjectBox, ...]
    columns: dict[str, Any]

    @property
    def origin(self) -> Origin:
        return self.conversation.origin


class EncodedPrompt(NamedTuple):
    """A prompt as arrays, and its answers' reward without an answer."""

    example: Example
    item: RewardItem


@dataclasses.dataclass(frozen=True)
class Limits:
    """What fits: tokens of a prompt, patches of a sequence, patches of an image."""

    tokens: int
    patches: int
    image_patches: int | None


class Prompts:
    """The prompts of the examples that can be asked, by number.

    Args:
      rewards: by which the references are checked.
      task: of examples that name none.
      with_images: give the rewards the pictures.

    Attributes:
      rejected: examples that cannot be asked.

    Raises:
      UserError: no example can be asked, or more are bad than ``data.max_bad_fraction`` allows.
    """

    def __init__(
        self,
        processor: Processor,
        config: DataConfig,
        rewards: RewardSource,
        *,
        task: str | None = None,
        with_images: bool = False,
    ):
        self.processor, self._rewards, self._task, self._with_images = processor, rewards, task, with_images
        self._judges_all = isinstance(rewards, Router) and rewards.otherwise is not None
        self.examples = Examples.open(config)
        self.rejected: list[Rejected] = []
        self._places: list[tuple[int, int]] = []  # (example, which of its questions)
        for index in range(len(self.examples)):
            try:
                found = self._questions(index)
                for question in found:
                    self._check(question)
            except ExampleError as error:
                if config.on_bad_example == "error":
                    raise
                self.rejected.append(Rejected.of(error, "bad"))
                continue
            self._places += [(index, turn) for turn in range(len(found))]
        count = len(self.examples)
        if not self._places or len(self.rejected) > config.max_bad_fraction * count:
            raise UserError(
                f"{len(self.rejected)} of {count} examples cannot be asked (data.max_bad_fraction "
                f"{config.max_bad_fraction:g}):\n{grouped(self.rejected)}"
            )

    def __len__(self) -> int:
        return len(self._places)

    def question(self, number: int) -> Question:
        """Return a prompt."""
        index, turn = self._places[number]
        return self._questions(index)[turn]

    def images(self, number: int) -> list[bytes]:
        """Return the images of a prompt as image files, which are its own where it holds files.

        Raises:
          ExampleError: one that cannot be read.
        """
        question = self.question(number)
        files = [_file(image) for image in question.conversation.images]
        if None not in files:
            return [content for content in files if content is not None]
        opened = self.processor.with_open_media(question.conversation).images
        return [_png(shown) if content is None else content for content, shown in zip(files, opened, strict=True)]

    def _questions(self, index: int) -> list[Question]:
        origin, record = self.examples[index]
        if isinstance(record, ExampleError):
            raise record
        conversation = parse_conversation(record, origin)
        extra = dict(conversation.extra)
        named = next((extra[name] for name in TASKS if extra.get(name) is not None), self._task)
        golds = [extra[name] for name in GOLDS if extra.get(name) is not None]
        if golds:
            if named is None and not self._judges_all:
                problem = "no task, by which the reward is chosen"
                raise ExampleError(origin, "task", problem, "Write a task, or give --task.rewards.task")
            return [Question(without_answer(conversation), _TEXT if named is None else str(named), golds[0], (), extra)]
        questions = questions_of(conversation)
        if not questions:
            fix = f"Write the right answer as {GOLDS[0]!r}, or as an assistant turn"
            raise ExampleError(origin, GOLDS[0], "missing, and there is no answer", fix)
        found = []
        for question in questions:
            spans = [time.seconds for time in question.times if len(time.seconds) == 2]
            is_span = named is None and not question.boxes and len(spans) == len(question.times) == 1
            task = _BOXES if question.boxes else _SPAN if is_span else _TEXT
            gold = list(spans[0]) if is_span else question.expected
            task = task if named is None else str(named)
            found.append(Question(question.conversation, task, gold, question.boxes, extra))
        return found

    def _check(self, question: Question) -> None:
        """Raise ExampleError for a reference that its reward cannot use, as far as that is known without images."""
        if question.boxes or (question.conversation.media and "size" not in question.columns):
            return
        self._check_item(question.origin, self._item(question, None, ()))

    def _check_item(self, origin: Origin, item: RewardItem) -> None:
        try:
            self._rewards.check(item)
        except UserError as error:
            raise ExampleError(origin, GOLDS[0], str(error), "Correct it, or leave the example out") from error

    def encode(self, number: int, limits: Limits) -> EncodedPrompt:
        """Return a prompt as arrays. Raises ExampleError for one that cannot be asked, or does not fit."""
        question = self.question(number)
        if self._with_images:
            opened = self.processor.with_open_media(question.conversation)
            question = dataclasses.replace(question, conversation=opened)
        example = self.processor.encode(question.conversation, generation_prompt=True)
        check_fits(example, limits.tokens, limits.patches, None, limits.image_patches)
        images = [_png(image) for image in question.conversation.images] if self._with_images else []
        item = self._item(question, example.sizes[: len(question.conversation.images)], images)
        tail = self.processor.tokenizer.decode([int(token) for token in example.tokens[-_TAIL:]]).rstrip()
        item = dataclasses.replace(item, thinking_opened=tail.endswith("<think>"))
        self._check_item(question.origin, item)
        return EncodedPrompt(example, item)

    def _item(self, question: Question, sizes: Sequence[Sizes] | None, images: Sequence[bytes]) -> RewardItem:
        gold, columns = question.gold, dict(question.columns)
        if sizes:
            columns.setdefault("size", list(self._extent(sizes[0])))
        if question.boxes and sizes is not None:
            shown = {image.index: size for image, size in zip(question.conversation.images, sizes, strict=True)}
            space = self._space
            gold = [list(box.region.to(space, shown[box.image]).values) for box in question.boxes]
        messages = tuple(
            {"role": message.role, "content": tagged(message.content)} for message in question.conversation.messages
        )
        return RewardItem(str(question.origin), question.task, "", gold, messages, tuple(images), columns)

    @property
    def _space(self) -> CoordinateSpace:
        """The space of the numbers that the model writes."""
        config = self.processor.config
        return config.box_space or FORMATS[config.box_format].space

    def _extent(self, sizes: Sizes) -> tuple[float, float]:
        """Return the width and height of an image in the numbers that the model writes."""
        match self._space:
            case "original":
                return sizes.original
            case "resized":
                return sizes.resized
            case "norm1":
                return 1.0, 1.0
            case _:
                return 1000.0, 1000.0


def _file(image: Image) -> bytes | None:
    """Return the content of an image that is held as a file; None of others."""
    source = image.source
    if isinstance(source, dict):
        source = source.get("bytes")
    return bytes(source) if isinstance(source, bytes | bytearray) else None


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.source.save(buffer, "PNG")
    return buffer.getvalue()
