"""The engine: one compiled prefill and one compiled decode step for each bucket of shapes.

Axes: B sequences, S tokens of the longest prompt (rounded up), P patches, T positions of the cache, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jvlm.adapters import several
from jvlm.adapters import steps as adapter_steps
from jvlm.data import packing
from jvlm.data.errors import ExampleError
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference import sharding
from jvlm.inference.compiled import CompiledSteps, ModuleDef
from jvlm.inference.sampling import NOT_FINITE, SamplingArrays, SamplingConfig
from jvlm.inference.token_rules import FILE, token_rules
from jvlm.inference.weights import decoding_state
from jvlm.models import contracts
from jvlm.models.batch import PackedBatch
from jvlm.models.token_ids import token_ids
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.parallel.layout import MeshLayout
from jvlm.weights.finite import BrokenWeights, not_finite

# Shapes are rounded up to 1, 2, 3, 4, 6, 8, 12, ... of these, so that few are ever compiled.
TOKEN_STEP = 16
LANES = 128  # a TPU's kernel for decoding takes caches of whole lanes
PATCH_STEP = 16


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer: its tokens, with the stop token if that is what ended it."""

    tokens: tuple[int, ...]
    stopped: bool


class Engine:
    """Generates for one model. Parameters are prepared once; call `update` after they have changed.

    Args:
      layout: the devices that share the work, all of this process, as `sharding.inference_layout` returns it; None is
        one device.
      ahead: start each step before the tokens of the last are read, so that an accelerator never waits for the
        host; costs one step too many at the end. None: wherever the backend is not CPU.

    Raises:
      ValueError: a layout that cannot generate, or that the model does not divide by.
    """

    def __init__(
        self, model: VLM, processor: Processor, layout: MeshLayout | None = None, *, ahead: bool | None = None
    ):
        contracts.check_generates(model.decoder)
        self.config, self.processor = model.config, processor
        self.ahead = jax.default_backend() != "cpu" if ahead is None else ahead
        self.layout = sharding.check_layout(layout, model.config)
        self.banned, self.banned_first = self._banned()
        self._steps: CompiledSteps | None = None
        self._given: list[Any] = []
        self.update(model)

    def update(self, model: VLM) -> None:
        """Take the parameters that the model holds now; free if they are the same arrays as before.

        On a layout, those that are not where they will be used are copied there.
        """
        given = jax.tree.leaves(nnx.state(model))
        if len(given) == len(self._given) and all(a is b for a, b in zip(given, self._given, strict=True)):
            return
        self._given, self._adapter_names = given, model.adapters
        placed = model if self.layout is None else sharding.shard_params(model, self.layout)
        placed = adapter_steps.with_norms(placed)
        whole, self._leaves = ModuleDef.of(placed, nnx.state(placed))
        decoder, self._decoder_leaves = ModuleDef.of(placed.decoder, decoding_state(placed.decoder))
        if self._steps is None or (self._steps.model, self._steps.decoder) != (whole, decoder):
            self._steps = CompiledSteps(whole, decoder, self.banned, self.layout, self.banned_first)

    def release(self) -> None:
        """Let go of the parameters, not of what is compiled; `update` takes them again.

        Training wants this after generating: on CPU the engine's views keep old parameters alive.
        """
        self._given, self._leaves, self._decoder_leaves = [], [], []

    @property
    def compilations(self) -> dict[str, int]:
        """How many times each step has been compiled."""
        return {"prefill": self._steps.prefill._cache_size(), "decode": self._steps.decode._cache_size()}

    def stop_tokens(self, sampling: SamplingConfig) -> frozenset[int]:
        """The tokens that end a sequence."""
        if sampling.stop_token_ids is not None:
            return frozenset(sampling.stop_token_ids)
        return self._ends()

    def _ends(self) -> frozenset[int]:
        """The checkpoint's end tokens: those of either configuration file, and of its chat template."""
        own = token_ids(self.processor.generation.get("eos_token_id"), f"{FILE}: eos_token_id")
        return frozenset((*own, *self.config.end_token_ids, *self.processor.stop_ids))

    def _banned(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens that are never given, and those that are not given first (None: the same)."""
        ids = self.processor.tokenizer.get_vocab().values()
        rules = token_rules(self.processor.generation, self._ends())
        banned = banned_tokens(self.config, ids, self.processor.delimiter_ids)
        _mark(banned, rules.suppressed)
        if banned.all():
            raise UserError(f"{FILE} forbids every token that may be generated; see suppress_tokens and bad_words_ids")
        if rules.unsupported:
            print(f"{FILE} asks for what is not done here: {'; '.join(rules.unsupported)}", file=sys.stderr)
        if not rules.suppressed_first:
            return banned, None
        first = banned.copy()
        _mark(first, rules.suppressed_first)
        return banned, first

    def answer_limit(self, example: Example) -> int:
        """Return how many tokens may follow a prompt: the model's positions that are left.

        Raises:
          ExampleError: none is left.
        """
        positions, limit = int(example.positions.max(initial=-1)) + 1, self.config.decoder.max_position_embeddings
        if positions >= limit:
            raise ExampleError(
                example.origin,
                "messages",
                f"the prompt takes {positions} positions of the model's {limit} (max_position_embeddings), so none is "
                "left for an answer",
                "Shorten it, or lower max_pixels",
            )
        return limit - positions

    def steps(
        self,
        examples: Sequence[Example],
        sampling: SamplingConfig,
        request_ids: Sequence[int] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> Iterator[list[int | None]]:
        """Yields the next token of every example, None for those that have finished.

        The token that ends a sequence is yielded too. A sequence also ends at the model's last position.

        Args:
          examples: prompts, ended with the opening of an assistant turn.
          request_ids: of the conversations, for the random draws; 0, 1, ... if not given.
          adapters: name of each example's adapter, in a model that has several by name; None is the base.

        Raises:
          ExampleError: a prompt that leaves no position for an answer.
          UserError: scores that are not finite, naming the prompts, and the weights that are not finite either.
        """
        answer_limit = np.array([self.answer_limit(example) for example in examples])
        most = min(sampling.max_new_tokens, int(answer_limit.max()))
        count, B = len(examples), self._batch_size(len(examples))
        batch, lengths = self._batch(examples, B)
        request = np.zeros(B, np.int32)
        request[:count] = range(count) if request_ids is None else request_ids
        arrays, adapted = SamplingArrays.of(sampling, request), self._adapters(adapters, count, B)
        if self.layout is not None:
            batch, lengths, arrays = sharding.shard_batch(self.layout, batch, lengths, arrays)
            adapted = jax.device_put(adapted, (arrays.request_ids.sharding,) * len(adapted))
        on_cpu = jax.default_backend() == "cpu"
        cache_len = packing.bucket(int(lengths.max()) + most, TOKEN_STEP if on_cpu else LANES)
        flags, stop, leaves = sampling.flags, list(self.stop_tokens(sampling)), self._decoder_leaves
        logits, cache = self._steps.prefill(self._leaves, batch, lengths, *adapted)
        token, state = self._steps.first_token(flags, cache_len, leaves, logits, cache, batch, lengths, arrays)
        del logits, cache
        running = np.ones(count, bool)
        for left in reversed(range(most)):
            if left and self.ahead:
                upcoming, state = self._steps.decode(flags, leaves, state, token, arrays, *adapted)
            chosen = np.asarray(token)[:count]
            broken = np.flatnonzero(running & (chosen == NOT_FINITE))
            if broken.size:
                raise self._not_finite([examples[slot] for slot in broken], most - left)
            yield [int(t) if r else None for t, r in zip(chosen, running, strict=True)]
            running &= ~np.isin(chosen, stop) & (most - left < answer_limit)
            if not left or not running.any():
                return
            if not self.ahead:
                upcoming, state = self._steps.decode(flags, leaves, state, token, arrays, *adapted)
            token = upcoming

    def _adapters(self, names: Sequence[str | None] | None, count: int, size: int) -> tuple[np.ndarray, ...]:
        """The numbers of the adapters, none for padding, as further arguments of the steps; () without a choice."""
        indices = several.numbers(self._adapter_names, [None] * count if names is None else names)
        return () if indices is None else (np.pad(indices, (0, size - count)),)

    def _not_finite(self, examples: Sequence[Example], token: int) -> UserError:
        """Why the scores of these prompts are not finite; only now are the weights looked through."""
        model = self._steps.model.bind(self._leaves)
        asked = ", ".join(str(e.origin) for e in examples[:3] if e.origin is not None and e.origin.number is not None)
        asked = f" for {asked}" if asked else ""
        problem = f"the model's scores{asked} are not finite numbers (token {token} of the answer): "
        tensors = not_finite(model)
        if tensors:
            shown = "\n  ".join(tensors[:5])
            more = f"\n  and {len(tensors) - 5} more" if len(tensors) > 5 else ""
            return BrokenWeights(
                f"{problem}{len(tensors)} tensors hold NaN or infinity. Take an earlier checkpoint, or copy the folder "
                f"again:\n  {shown}{more}"
            )
        dtype = model.config.precision.compute_dtype
        return UserError(
            f"{problem}all weights are, so this input overflows {dtype}; try another precision.compute_dtype"
        )

    def completion(self, tokens: Sequence[int], sampling: SamplingConfig) -> Completion:
        """The tokens that `steps` gave for one example, and how they ended."""
        return Completion(tuple(tokens), bool(tokens) and tokens[-1] in self.stop_tokens(sampling))

    def _batch_size(self, count: int) -> int:
        """Slots of a batch of so many prompts: few sizes, and as many for each device."""
        slots = 1 << (count - 1).bit_length()
        parts = 1 if self.layout is None else self.layout.num_shards(self.layout.mesh_axes("batch"))
        return -(-slots // parts) * parts

    def _batch(self, examples: Sequence[Example], slots: int) -> tuple[PackedBatch, np.ndarray]:
        step = packing.patch_step(self.processor.image_processor.patch_group, PATCH_STEP)
        most = max(e.num_patches for e in examples)
        patches = packing.bucket(most, step) if most else 0
        tokens = packing.bucket(max(e.length for e in examples), TOKEN_STEP)
        empty = [[] for _ in range(slots - len(examples))]
        batch = packing.assemble([*([e] for e in examples), *empty], tokens, patches)
        lengths = np.zeros(slots, np.int32)
        lengths[: len(examples)] = [e.length for e in examples]
        return batch, lengths


def banned_tokens(config: VLMConfig, tokens: int | Iterable[int], marks: Sequence[int]) -> np.ndarray:
    """Return which ids [V] have no token, or may be brought by media only, ``marks`` among them.

    Args:
      tokens: the ids that have a token; or the number of tokens, where their ids have no hole.
    """
    banned = np.ones(config.decoder.vocab_size, bool)
    _mark(banned, range(tokens) if isinstance(tokens, int) else tokens, False)
    _mark(banned, config.end_token_ids, False)
    _mark(banned, (*config.media_token_ids, *marks))
    return banned


def _mark(flags: np.ndarray, ids: Iterable[int], value: bool = True) -> None:
    """Set the flags of ids; those that the table does not have are passed over."""
    ids = np.fromiter(ids, np.int64)
    flags[ids[(ids >= 0) & (ids < len(flags))]] = value
