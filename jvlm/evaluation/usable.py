"""Examples to evaluate on: those that cannot be asked are named before the training, or left out and listed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jvlm.data.content import Conversation
from jvlm.data.errors import ExampleError, Rejected, grouped
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_conversation, parse_example
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.evaluation.questions import questions_of

_PARSED = 5000  # examples of larger files are looked at in a sample of so many


def check(
    patterns: Sequence[str],
    processor: Processor,
    *,
    options: FormatOptions = FormatOptions(),
    max_examples: int | None = None,
    seconds: float = 20.0,
) -> None:
    """Look at the examples as scoring will, images included: all of a small set, else those that the time allows.

    Raises:
      UserError: examples that cannot be asked, by reason, with the first files and lines.
    """
    source = ExampleSource(patterns, options)
    count = min(len(source), max_examples or len(source))
    spread = np.unique(np.linspace(0, count - 1, min(count, _PARSED)).astype(int))
    order = [int(i) for i in np.random.default_rng(0).permutation(spread)]
    began, looked, rejected, block = time.perf_counter(), 0, [], 32
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(order), block):
            part = order[start : start + block]
            errors = pool.map(lambda i: _rejected(lambda: encode(source[i], processor)), part)
            rejected += [example for example in errors if example is not None]
            looked += len(part)
            if time.perf_counter() - began > seconds:
                break
    if rejected:
        rejected.sort(key=lambda example: (example.file, example.number))
        raise UserError(
            f"evaluation.data: {len(rejected)} of {looked} examples looked at cannot be asked:\n{grouped(rejected)}\n"
            "Mend or remove them; nothing was trained yet"
        )


def encode(element: tuple, processor: Processor) -> Conversation:
    """A checked example whose images are there and which has something to ask. Raises ExampleError."""
    conversation = parsed(element)
    processor.encode(conversation)
    if not questions_of(conversation):
        raise ExampleError(
            conversation.origin, "messages", "no assistant turn to ask for", "Add one, or remove the example"
        )
    return conversation


def parsed(element: tuple) -> Conversation:
    """A checked example of an `ExampleSource`. Raises ExampleError."""
    origin, example = element
    if isinstance(example, ExampleError):
        raise example
    return parse_conversation(example, origin)


def _rejected(work: Callable[[], object]) -> Rejected | None:
    try:
        work()
    except ExampleError as error:
        return Rejected.of(error, "bad")
    return None


def examples_of(
    patterns: Sequence[str],
    read: Callable[[tuple], Conversation] = parsed,
    *,
    options: FormatOptions = FormatOptions(),
    max_examples: int | None = None,
    rejected: list[Rejected],
) -> Iterator[Conversation]:
    """The examples that can be read, one at a time; the others are appended to ``rejected``."""
    source = ExampleSource(patterns, options)
    for index in range(min(len(source), max_examples or len(source))):
        try:
            yield read(source[index])
        except ExampleError as error:
            rejected.append(Rejected.of(error, "bad"))


def training_conversations(
    patterns: Sequence[str], options: FormatOptions = FormatOptions(), *, rejected: list[Rejected] | None
) -> Iterator[Conversation]:
    """The conversations of training data, one at a time; documents, which ask nothing, are passed over.

    Args:
      rejected: gets the examples that cannot be read; without it, the ExampleError of the first is raised.
    """
    source = ExampleSource(patterns, options)
    for index in range(len(source)):
        origin, record = source[index]
        try:
            if isinstance(record, ExampleError):
                raise record
            example = parse_example(record, origin)
        except ExampleError as error:
            if rejected is None:
                raise
            rejected.append(Rejected.of(error, "bad"))
            continue
        if isinstance(example, Conversation):
            yield example
