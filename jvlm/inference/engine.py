"""The engine: one compiled prefill and one compiled decode step for each bucket of shapes.

Axes: B rows, S tokens of the longest prompt (rounded up), P patches, T places of the cache, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from jvlm.data import packing
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.inference.sampling import Kind, Knobs, SamplingConfig, sample
from jvlm.inference.weights import decoding_state
from jvlm.models.batch import DecodeStep, PackedBatch
from jvlm.models.vlm import VLM

# Shapes are rounded up to 1, 2, 3, 4, 6, 8, 12, ... of these, so that few are ever compiled.
TOKEN_STEP = 16
LANES = 128  # a TPU's kernel for decoding takes caches of whole lanes
PATCH_STEP = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that changes from token to token; donated, so that the cache is updated in place.

    Attributes:
      cache: for each layer, arrays [B, T, ...].
      place: place in the cache of the token that comes next.
      position: its rotary position, the same on all axes.
      step: number of tokens chosen so far.
      seen: tokens of prompt and answer, kept only when repetition is penalised.
    """

    cache: list[Any]
    place: Int[Array, " B"]
    position: Int[Array, " B"]
    step: Int[Array, ""]
    seen: Bool[Array, "B V"] | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer: its tokens, with the stop token if that is what ended it."""

    tokens: tuple[int, ...]
    stopped: bool


class Engine:
    """Generates for one model. Parameters are prepared once; call `update` after they have changed.

    Args:
      ahead: start each step before the tokens of the last are read, so that an accelerator never waits for the
        host; costs one step too many at the end. None: wherever the backend is not CPU.
    """

    def __init__(self, model: VLM, processor: Processor, *, ahead: bool | None = None):
        self.config, self.processor = model.config, processor
        self.ahead = jax.default_backend() != "cpu" if ahead is None else ahead
        self.banned = _banned(model, processor)
        self._graph: Any = None
        self._known: list[Any] = []
        self.update(model)

    def update(self, model: VLM) -> None:
        """Take the parameters that the model holds now; free if they are the same arrays as before."""
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        if len(leaves) == len(self._known) and all(a is b for a, b in zip(leaves, self._known, strict=True)):
            return
        self._known = leaves
        decoder_graph, _ = nnx.split(model.decoder)
        self._decoder_leaves, decoder_tree = jax.tree.flatten(decoding_state(model.decoder))
        if self._graph != (graph, tree):
            self._graph, self._decoder_graph = (graph, tree), (decoder_graph, decoder_tree)
            self._prefill = jax.jit(self._prefill_step)
            self._begin = jax.jit(self._begin_step, static_argnums=(0, 1))
            self._decode = jax.jit(self._decode_step, static_argnums=0, donate_argnums=2)

    def release(self) -> None:
        """Let go of the parameters, not of what is compiled; `update` takes them again.

        Training wants this after generating: on CPU the engine's views keep old parameters alive.
        """
        self._known, self._decoder_leaves = [], []

    @property
    def compilations(self) -> dict[str, int]:
        """How many times each step has been compiled."""
        return {"prefill": self._prefill._cache_size(), "decode": self._decode._cache_size()}

    def stop_tokens(self, sampling: SamplingConfig) -> frozenset[int]:
        """The tokens that end a sequence."""
        if sampling.stop_token_ids is not None:
            return frozenset(sampling.stop_token_ids)
        own = self.processor.generation.get("eos_token_id")
        own = own if isinstance(own, list) else [own]
        return frozenset(int(i) for i in (*own, self.config.eos_token_id, *self.processor.stop_ids) if i is not None)

    def steps(
        self, examples: Sequence[Example], sampling: SamplingConfig, numbers: Sequence[int] | None = None
    ) -> Iterator[list[int | None]]:
        """Yields the next token of every example, None for those that have finished.

        The token that ends a sequence is yielded too.

        Args:
          examples: prompts, ended with the opening of an assistant turn.
          numbers: of the conversations, for the random draws; 0, 1, ... if not given.
        """
        count, B = len(examples), 1 << (len(examples) - 1).bit_length()
        batch, lengths = self._batch(examples, B)
        rows = np.zeros(B, np.int32)
        rows[:count] = range(count) if numbers is None else numbers
        knobs = Knobs.of(sampling, rows)
        on_cpu = jax.default_backend() == "cpu"
        places = packing.bucket(int(lengths.max()) + sampling.max_new_tokens, TOKEN_STEP if on_cpu else LANES)
        kind, stop, leaves = sampling.kind, list(self.stop_tokens(sampling)), self._decoder_leaves
        logits, cache = self._prefill(self._known, batch, lengths)
        token, state = self._begin(kind, places, leaves, logits, cache, batch, lengths, knobs)
        del logits, cache
        running = np.ones(count, bool)
        for left in reversed(range(sampling.max_new_tokens)):
            if left and self.ahead:
                upcoming, state = self._decode(kind, leaves, state, token, knobs)
            chosen = np.asarray(token)[:count]
            yield [int(t) if r else None for t, r in zip(chosen, running, strict=True)]
            running &= ~np.isin(chosen, stop)
            if not left or not running.any():
                return
            if not self.ahead:
                upcoming, state = self._decode(kind, leaves, state, token, knobs)
            token = upcoming

    def completion(self, tokens: Sequence[int], sampling: SamplingConfig) -> Completion:
        """The tokens that `steps` gave for one example, and how they ended."""
        return Completion(tuple(tokens), bool(tokens) and tokens[-1] in self.stop_tokens(sampling))

    def _batch(self, examples: Sequence[Example], rows: int) -> tuple[PackedBatch, np.ndarray]:
        step = packing.patch_step(self.processor.vision.patch_group, PATCH_STEP)
        most = max(e.num_patches for e in examples)
        patches = packing.bucket(most, step) if most else 0
        tokens = packing.bucket(max(e.length for e in examples), TOKEN_STEP)
        empty = [[] for _ in range(rows - len(examples))]
        batch = packing.assemble([*([e] for e in examples), *empty], tokens, patches)
        lengths = np.zeros(rows, np.int32)
        lengths[: len(examples)] = [e.length for e in examples]
        return batch, lengths

    def _prefill_step(self, leaves, batch: PackedBatch, lengths):
        """Logits after each prompt's last token, and the cache of the prompt, [layers, B, S, ...]."""
        graph, tree = self._graph
        model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        hidden, cache, _ = model.hidden(batch)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        return model.decoder.logits(last), cache

    def _begin_step(self, kind: Kind, places: int, leaves, logits, cache, batch: PackedBatch, lengths, knobs: Knobs):
        """The first token, and the state for the next."""
        seen = None
        if kind.penalised:
            tokens = jnp.where(batch.segment_ids > 0, batch.tokens, logits.shape[1])
            rows = jnp.arange(len(tokens))[:, None]
            seen = jnp.zeros(logits.shape, bool).at[rows, tokens].set(True, mode="drop")
        token = sample(logits, kind, knobs, jnp.int32(0), banned=self.banned, seen=seen)
        return token, DecodeState(
            cache=self._decoder(leaves).open_cache(cache, places),
            place=lengths,
            position=batch.positions.max((1, 2)) + 1,
            step=jnp.int32(1),
            seen=seen,
        )

    def _decoder(self, leaves):
        graph, tree = self._decoder_graph
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))

    def _decode_step(self, kind: Kind, leaves, state: DecodeState, token, knobs: Knobs):
        """Run the tokens last chosen through the decoder and choose the next."""
        decoder = self._decoder(leaves)
        B = len(token)
        hidden, cache, _ = decoder(
            decoder.embed(token[:, None]),
            jnp.broadcast_to(state.position[:, None, None], (B, 1, 3)),
            jnp.ones((B, 1), jnp.int32),
            cache=state.cache,
            step=DecodeStep(state.place),
        )
        seen = None if state.seen is None else state.seen.at[jnp.arange(B), token].set(True)
        chosen = sample(decoder.logits(hidden[:, 0]), kind, knobs, state.step, banned=self.banned, seen=seen)
        return chosen, DecodeState(cache, state.place + 1, state.position + 1, state.step + 1, seen)


def _banned(model: VLM, processor: Processor) -> np.ndarray:
    """Ids without a token, and those that only media may bring."""
    banned = np.arange(model.config.decoder.vocab_size) >= len(processor.tokenizer)
    media = np.asarray([*model.config.media_token_ids, *processor.mark_ids])
    banned[media[media < len(banned)]] = True
    return banned
