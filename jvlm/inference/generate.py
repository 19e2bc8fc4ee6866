"""Answers to conversations: the public functions."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jvlm.adapters import several
from jvlm.data.content import Conversation
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.engine import Completion, Engine
from jvlm.inference.sampling import SamplingConfig
from jvlm.inference.text import TextStream
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout

# Prompts encoded at a time, in batches: sorted by length within, so that a batch pads little, at bounded memory.
_WINDOW = 8

_STACKED: weakref.WeakKeyDictionary[VLM, tuple[Any, list[Any], VLM]] = weakref.WeakKeyDictionary()
_ENGINES: weakref.WeakKeyDictionary[VLM, Engine] = weakref.WeakKeyDictionary()


def engine_for(model: VLM, processor: Processor, layout: MeshLayout | None = None) -> Engine:
    """The model's engine with its present parameters; made once, so that nothing is compiled twice.

    Args:
      layout: the devices to use, as `jvlm.inference.sharding.layout` gives it; None is one device.
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
    layout: MeshLayout | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    adapter: str | Sequence[str | None] | None = None,
    **sampling: Any,
) -> list[str]:
    """The answer to each conversation, in the order given.

    Args:
      conversations: ms-swift examples; a final assistant turn is dropped, and answered anew.
      batch_size: conversations that run together.
      on_token: called with (index of the conversation, token id) as tokens arrive.
      layout: the devices to use, as `jvlm.inference.sharding.layout` gives it; None is one device.
      adapters: name -> folder of adapters that conversations may ask for, by ``adapter`` or a field "adapter"; read
        and put on the model at the first call with them, and kept with it.
      adapter: the name for all conversations, or one for each; None takes the field, and without one the base.
      sampling: fields of `SamplingConfig`: max_new_tokens, temperature, top_k, top_p, ...

    Raises:
      jvlm.data.errors.ExampleError: a bad conversation, by its index in the list.
      jvlm.errors.UserError: a sampling value outside its range. TypeError: an unknown one.

    Warns:
      UserWarning: answers that ended before ``max_new_tokens`` at the model's last position.
    """
    config = SamplingConfig(**sampling)
    check_batch_size(batch_size)
    if isinstance(conversations, Mapping | str | Conversation):
        raise UserError(f"conversations is one {type(conversations).__name__}; give a list of them")
    if adapters:
        model = _with_adapters(model, adapters)
    engine = engine_for(model, processor, layout)
    names = [adapter] * len(conversations) if adapter is None or isinstance(adapter, str) else list(adapter)
    if len(names) != len(conversations):
        raise UserError(f"adapter names {len(names)} adapters for {len(conversations)} conversations")
    names = [adapter_name(one) if name is None else name for one, name in zip(conversations, names, strict=True)]
    texts: list[str] = []
    for start in range(0, len(conversations), batch_size * _WINDOW):
        window = conversations[start : start + batch_size * _WINDOW]
        examples = [
            encode_prompt(engine, conversation, Origin(number=start + i)) for i, conversation in enumerate(window)
        ]
        request_ids = range(start, start + len(window))
        done = complete(
            engine,
            examples,
            config,
            request_ids=request_ids,
            batch_size=batch_size,
            on_token=on_token,
            adapters=names[start : start + len(window)],
        )
        texts += [answer_text(processor, completion) for completion in done]
        for example, completion in zip(examples, done, strict=True):
            if note := cut_note(engine, example, len(completion.tokens), completion.stopped, config):
                warnings.warn(f"{example.origin}: {note}", stacklevel=2)
    return texts


def adapter_name(example: Any) -> str | None:
    """Return what a conversation says in its field "adapter"."""
    fields = dict(example.extra) if isinstance(example, Conversation) else example
    return fields.get("adapter") if isinstance(fields, Mapping) else None


def _with_adapters(model: VLM, adapters: Mapping[str, str | Path]) -> VLM:
    """Return the model with a choice of adapters, made once for each set of folders and each state of the model."""
    key = tuple((name, str(folder)) for name, folder in adapters.items())
    leaves = jax.tree.leaves(nnx.state(model))
    known = _STACKED.get(model)
    if known is None or known[0] != key or any(a is not b for a, b in zip(leaves, known[1], strict=True)):
        known = _STACKED[model] = key, leaves, several.load(model, adapters)
    return known[2]


def encode_prompt(engine: Engine, conversation: Any, origin: Origin = Origin()) -> Example:
    """The prompt of a conversation, with room for an answer.

    Raises:
      ExampleError: whatever is wrong with the conversation, and a prompt as long as the model has positions.
    """
    example = engine.processor.encode(parse_example(conversation, origin), generation_prompt=True)
    if not example.length:
        raise ExampleError(example.origin, "messages", "the prompt is empty", "Ask something")
    engine.answer_limit(example)
    return example


def cut_note(engine: Engine, example: Example, tokens: int, stopped: bool, sampling: SamplingConfig) -> str | None:
    """What to say of an answer of so many tokens that the model's last position ended; None for other answers."""
    if stopped or tokens >= sampling.max_new_tokens:
        return None
    limit = engine.config.decoder.max_position_embeddings
    return (
        f"the answer ends after {tokens} of max_new_tokens = {sampling.max_new_tokens}: the prompt takes "
        f"{limit - engine.answer_limit(example)} of the model's {limit} positions (max_position_embeddings)"
    )


def complete(
    engine: Engine,
    examples: Sequence[Example],
    sampling: SamplingConfig,
    *,
    request_ids: Sequence[int],
    batch_size: int,
    on_token: Callable[[int, int], None] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[Completion]:
    """Completions of prompts, in their order; prompts of like length run together.

    ``request_ids`` are the conversations' own, for random draws and ``on_token``.
    """
    check_batch_size(batch_size)
    order = sorted(range(len(examples)), key=lambda i: (examples[i].length, examples[i].num_patches))
    done: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        chosen = [request_ids[i] for i in batch]
        tokens: list[list[int]] = [[] for _ in batch]
        names = None if adapters is None else [adapters[i] for i in batch]
        for step in engine.steps([examples[i] for i in batch], sampling, chosen, names):
            for slot, token in enumerate(step):
                if token is not None:
                    tokens[slot].append(token)
                    if on_token is not None:
                        on_token(chosen[slot], token)
        done.update({i: engine.completion(ids, sampling) for i, ids in zip(batch, tokens, strict=True)})
    return [done[i] for i in range(len(examples))]


def answer_text(processor: Processor, completion: Completion) -> str:
    """The text of an answer, without the token that stopped it."""
    return processor.decode(completion.tokens[:-1] if completion.stopped else completion.tokens)


def stream(
    model: VLM,
    processor: Processor,
    conversation: Any,
    *,
    layout: MeshLayout | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    adapter: str | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """The answer to one conversation in pieces, as they become readable; they join up to `generate`'s answer.

    Args:
      adapters, adapter: as in `generate`, for one conversation.

    Raises and warns as `generate`.
    """
    config = SamplingConfig(**sampling)
    if adapters:
        model = _with_adapters(model, adapters)
    name = adapter_name(conversation) if adapter is None else adapter
    several.numbers(model.adapters, [name])  # a name that is not known is an error now, and not at the first piece
    engine = engine_for(model, processor, layout)
    return _with_warning(stream_example(engine, encode_prompt(engine, conversation), config, name))


def _with_warning(pieces: Generator[str, None, str | None]) -> Iterator[str]:
    note = yield from pieces
    if note:
        warnings.warn(note, stacklevel=2)


def stream_example(
    engine: Engine, example: Example, sampling: SamplingConfig, adapter: str | None = None
) -> Generator[str, None, str | None]:
    """`stream` of a prompt that is encoded already. Returns what `cut_note` says of the answer."""
    stop, text, tokens = engine.stop_tokens(sampling), TextStream(engine.processor), []
    for (token,) in engine.steps([example], sampling, adapters=[adapter]):
        tokens.append(token)
        piece = "" if token in stop else text.add(token)
        if piece:
            yield piece
    if rest := text.finish():
        yield rest
    return cut_note(engine, example, len(tokens), tokens[-1] in stop, sampling)


def check_batch_size(batch_size: int) -> None:
    """Raise UserError for a batch size that is none."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}; it must be a whole number, at least 1")
