"""Answers to conversations: the public functions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jvlm.data.errors import Origin
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.data.rows import parse_row
from jvlm.inference.engine import Completion, Engine
from jvlm.inference.sampling import SamplingConfig
from jvlm.inference.text import TextStream
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import Layout

# Prompts encoded at a time, in batches: sorted by length within, so that a batch pads little, at bounded memory.
_WINDOW = 8

_ENGINES: weakref.WeakKeyDictionary[VLM, Engine] = weakref.WeakKeyDictionary()


def engine_for(model: VLM, processor: Processor, layout: Layout | None = None) -> Engine:
    """The model's engine with its present parameters; made once, so that nothing is compiled twice.

    Args:
      layout: the devices to use, as `jvlm.inference.serving.layout` gives it; None is one device.
    """
    engine = _ENGINES.get(model)
    if engine is None or engine.processor is not processor or engine.layout != layout:
        engine = _ENGINES[model] = Engine(model, processor, layout)
    else:
        engine.update(model)
    return engine


def generate(
    model: VLM,
    processor: Processor,
    conversations: Sequence[Any],
    *,
    batch_size: int = 8,
    on_token: Callable[[int, int], None] | None = None,
    layout: Layout | None = None,
    **sampling: Any,
) -> list[str]:
    """The answer to each conversation, in the order given.

    Args:
      conversations: ms-swift rows; a final assistant turn is dropped, and answered anew.
      batch_size: conversations that run together.
      on_token: called with (index of the conversation, token id) as tokens arrive.
      layout: the devices to use, as `jvlm.inference.serving.layout` gives it; None is one device.
      sampling: fields of `SamplingConfig`: max_new_tokens, temperature, top_k, top_p, ...

    Raises:
      jvlm.data.errors.RowError: a bad conversation; row is its place in the list, counted from 1.
      ValueError, TypeError: a sampling value outside its range, or an unknown one.
    """
    config = SamplingConfig(**sampling)
    _check_batch_size(batch_size)
    engine = engine_for(model, processor, layout)
    texts: list[str] = []
    for start in range(0, len(conversations), batch_size * _WINDOW):
        window = conversations[start : start + batch_size * _WINDOW]
        examples = [
            processor.encode(parse_row(row, Origin(row=start + i)), generation_prompt=True)
            for i, row in enumerate(window, 1)
        ]
        numbers = range(start, start + len(window))
        done = complete(engine, examples, config, numbers=numbers, batch_size=batch_size, on_token=on_token)
        texts += [answer_text(processor, completion) for completion in done]
    return texts


def complete(
    engine: Engine,
    examples: Sequence[Example],
    sampling: SamplingConfig,
    *,
    numbers: Sequence[int],
    batch_size: int,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Completions of prompts, in their order; prompts of like length run together.

    ``numbers`` are the conversations' own, for random draws and ``on_token``.
    """
    _check_batch_size(batch_size)
    order = sorted(range(len(examples)), key=lambda i: (examples[i].length, examples[i].num_patches))
    done: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        chosen = [numbers[i] for i in batch]
        tokens: list[list[int]] = [[] for _ in batch]
        for step in engine.steps([examples[i] for i in batch], sampling, chosen):
            for row, token in enumerate(step):
                if token is not None:
                    tokens[row].append(token)
                    if on_token is not None:
                        on_token(chosen[row], token)
        done.update({i: engine.completion(ids, sampling) for i, ids in zip(batch, tokens, strict=True)})
    return [done[i] for i in range(len(examples))]


def answer_text(processor: Processor, completion: Completion) -> str:
    """The text of an answer, without the token that stopped it."""
    return processor.decode(completion.tokens[:-1] if completion.stopped else completion.tokens)


def stream(
    model: VLM, processor: Processor, conversation: Any, *, layout: Layout | None = None, **sampling: Any
) -> Iterator[str]:
    """The answer to one conversation in pieces, as they become readable; they join up to `generate`'s answer."""
    config = SamplingConfig(**sampling)
    example = processor.encode(conversation, generation_prompt=True)
    return stream_example(engine_for(model, processor, layout), example, config)


def stream_example(engine: Engine, example: Example, sampling: SamplingConfig) -> Iterator[str]:
    """`stream` of a prompt that is encoded already."""
    stop, text = engine.stop_tokens(sampling), TextStream(engine.processor)
    for (token,) in engine.steps([example], sampling):
        piece = "" if token in stop else text.add(token)
        if piece:
            yield piece
    if rest := text.finish():
        yield rest


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
