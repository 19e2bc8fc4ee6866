"""Answers to conversations: the public functions."""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jvlm.adapters import several
from jvlm.data.content import Conversation
from jvlm.data.errors import Origin
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.inference.feed import Asked, Completion, answer_each, answer_text, encode_prompt
from jvlm.inference.requests import EngineConfig, Request
from jvlm.inference.sampling import SamplingConfig
from jvlm.inference.shapes import next_power
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout

_LEAST_SLOTS = 8
_NUMBERS = itertools.count()  # of requests, so that no two have one id

_STACKED: weakref.WeakKeyDictionary[VLM, tuple[Any, list[Any], VLM]] = weakref.WeakKeyDictionary()
_ENGINES: weakref.WeakKeyDictionary[VLM, Engine] = weakref.WeakKeyDictionary()


def engine_for(model: VLM, processor: Processor, layout: MeshLayout | None = None, slots: int = 1) -> Engine:
    """The model's engine with its present parameters; made once, so that nothing is compiled twice.

    Args:
      layout: the devices to use, as `jvlm.inference.sharding.layout` gives it; None is one device.
      slots: answers that should run together.
    """
    engine = _ENGINES.get(model)
    if engine is None or engine.processor is not processor or engine.layout != layout or engine.sizes.max_slots < slots:
        config = EngineConfig(
            max_slots=max(_LEAST_SLOTS, next_power(slots)),
            prefill_tokens=(64, 256, 1024, 2048),
            encode_patches=(256, 1024, 4096, 16384),
        )
        engine = _ENGINES[model] = Engine(model, processor, config, layout)
    else:
        engine.load(model)
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
    engine = engine_for(model, processor, layout, batch_size)
    names = [adapter] * len(conversations) if adapter is None or isinstance(adapter, str) else list(adapter)
    if len(names) != len(conversations):
        raise UserError(f"adapter names {len(names)} adapters for {len(conversations)} conversations")
    names = [adapter_name(one) if name is None else name for one, name in zip(conversations, names, strict=True)]
    asked = (
        Asked(number, conversation, Origin(number=number), name)
        for number, (conversation, name) in enumerate(zip(conversations, names, strict=True))
    )
    texts: dict[int, str] = {}
    outcomes = answer_each(engine, asked, config, batch_size=batch_size, ends_at_error=True, on_token=on_token)
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
            number, example, completion = outcome.asked.number, outcome.example, outcome.completion
            texts[number] = answer_text(processor, completion)
            if note := cut_note(engine, example, len(completion.tokens), completion.stopped, config):
                warnings.warn(f"{example.origin}: {note}", stacklevel=2)
    return [texts[number] for number in range(len(texts))]


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
    on_token: Callable[[int, int], None] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[Completion]:
    """Completions of prompts, in their order.

    ``request_ids`` are the conversations' own, for random draws and ``on_token``.

    Raises:
      UserError: of the first prompt that has no answer, as one whose scores are not finite.
    """
    done = complete_each(
        engine, examples, sampling, request_ids=request_ids, on_token=on_token, adapters=adapters, ends_at_error=True
    )
    for one in done:
        if isinstance(one, UserError):
            raise one
    return done


def complete_each(
    engine: Engine,
    examples: Sequence[Example],
    sampling: SamplingConfig,
    *,
    request_ids: Sequence[int],
    on_token: Callable[[int, int], None] | None = None,
    adapters: Sequence[str | None] | None = None,
    ends_at_error: bool = False,
) -> list[Completion | UserError]:
    """`complete`, with the error of each prompt that has no answer in its place.

    Args:
      ends_at_error: answer no further ones after an error, which is raised.
    """
    names = [None] * len(examples) if adapters is None else adapters
    requests, order = [], {}
    for i, (example, number, name) in enumerate(zip(examples, request_ids, names, strict=True)):
        params = sampling.params(number, detokenize=False)
        request = Request(f"generate-{next(_NUMBERS)}", example, params, adapter=name)
        order[request.id] = i
        requests.append(request)
    tokens: list[list[int]] = [[] for _ in examples]
    stopped, errors = [False] * len(examples), {}
    for event in engine.run(requests):
        i = order[event.request_id]
        if event.error is not None:
            if ends_at_error:
                raise event.error
            errors[i] = event.error
        if event.token is not None:
            tokens[i].append(event.token)
            stopped[i] = event.finish_reason == "stop"
            if on_token is not None:
                on_token(request_ids[i], event.token)
    return [errors.get(i) or Completion(tuple(ids), stopped[i]) for i, ids in enumerate(tokens)]


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
    request = Request(f"stream-{next(_NUMBERS)}", example, sampling.params(), adapter=adapter)
    tokens, stopped = 0, False
    for event in engine.run([request]):
        if event.error is not None:
            raise event.error
        tokens, stopped = tokens + 1, event.finish_reason == "stop"
        if event.text:
            yield event.text
    return cut_note(engine, example, tokens, stopped, sampling)


def check_batch_size(batch_size: int) -> None:
    """Raise UserError for a batch size that is none."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}; it must be a whole number, at least 1")
