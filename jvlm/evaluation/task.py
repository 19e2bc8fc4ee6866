"""A benchmark as a record: which files it wants, what is asked, how answers are made, read and scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jvlm.data.content import Part
from jvlm.evaluation.files import Files, Row

Parser = Literal["answer", "spoken", "first_line"]
Style = Literal["task", "boxed"]
BOXED = "Put your final answer in \\boxed{}."
BOXED_TOKENS = 32768  # of MiMo-VL's protocol (arXiv 2506.03569, section 4.1), in which models think before they answer


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
      id: its name in the task; unique, the same whatever part of the task is asked.
      content: text, images and videos of the question, without the task's instruction.
      gold: what is right, as the task's metric wants it; a value of JSON.
      facts: what else the metric needs (options, the size of the image); values of JSON.
      answer: the reference answer as a model would write it: for demonstrations and for reports.
      group: what belongs together: questions about one image, variants of one question. Intervals are over groups.
      categories: names of parts of the task that it is counted in, by kind ("subject": "Physics").
      boxed: what --style boxed says after this question, where that is not what it says after the task's others.
    """

    id: str
    content: tuple[Part, ...]
    gold: Any
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    answer: str = ""
    group: str = ""
    categories: Mapping[str, str] = dataclasses.field(default_factory=dict)
    boxed: str | None = None


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made; fields as of `jvlm.inference.sampling.SamplingConfig`."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      name: as --tasks names it.
      group: which page of --list it is on: "general", "document", "gui", ...
      files: where its data may lie; the first that is there is read.
      item: makes a question of a record of these files, or several; None for a record that is no part of the task.
      metric: a name of `jvlm.evaluation.metrics.METRICS`.
      version: goes up with every change that changes scores.
      instruction: what is said after the question.
      boxed: what is said instead by --style boxed, MiMo-VL's protocol.
      decoding: how answers are made.
      parser: what of a reply is the answer: "answer" is the last \\boxed{} after the thinking, or all after the
        thinking; "spoken" all after the thinking; "first_line" the first line, of models without turns.
      runs: how often each question is asked; the score is the mean (pass@1).
      shots: demonstrations before each question.
      demonstrations: where they are drawn from; empty for the task's own questions.
      demonstrate: makes those of a question of these records, with a generator of random numbers and their number;
        None draws records at random.
      turns: whether questions are turns of a conversation; else one text, as base models continue it.
      summary: a name of `jvlm.evaluation.summaries.SUMMARIES`: how scores of questions become the task's.
      judge: a name of `jvlm.evaluation.judges.PROMPTS`, if published scores are judged by a model.
      unit: what a score of 1 is shown as.
      published: model -> published score, in units.
      paper: where the task comes from.
      note: what to know before a score is compared with a published one.
    """

    name: str
    group: str
    files: tuple[Files, ...]
    item: Callable[[Row], Item | Sequence[Item] | None]
    metric: str
    version: int = 1
    instruction: str = ""
    boxed: str = BOXED
    decoding: Decoding = Decoding()
    parser: Parser = "answer"
    runs: int = 1
    shots: int = 0
    demonstrations: tuple[Files, ...] = ()
    demonstrate: Callable[[Item, Sequence[Row], np.random.Generator, int], list[Item]] | None = None
    turns: bool = True
    summary: str = "mean"
    judge: str | None = None
    unit: float = 100.0
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    paper: str = ""
    note: str = ""

    def items(self, row: Row) -> Sequence[Item]:
        """Return the questions of a record, none for one that is no part of the task. Raises ExampleError."""
        found = self.item(row)
        return [] if found is None else [found] if isinstance(found, Item) else found
