"""The steps of generation as programs: what is compiled, and the shape and place of all that it touches.

The engine runs them; a planner compiles the same ones for devices that are described and not present.

Axes: B rows, S tokens of the longest prompt (rounded up), P patches, T places of the cache, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from jvlm.inference.sampling import Kind, Knobs, sample
from jvlm.models import placement
from jvlm.models.batch import DecodeStep, PackedBatch
from jvlm.parallel.layout import Layout
from jvlm.parallel.sharded import Sharded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that changes from token to token; donated, so that the cache is updated in place.

    Attributes:
      cache: for each layer, arrays [B, ...].
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

    def by_rows(self) -> DecodeState:
        """Each device has what belongs to its rows. The cache is in its place already."""
        place, position = (placement.current().constrain(x, ("batch",)) for x in (self.place, self.position))
        seen = None if self.seen is None else placement.current().constrain(self.seen, ("batch", None))
        return DecodeState(self.cache, place, position, self.step, seen)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A module without its arrays: what a compiled step is made for."""

    graph: nnx.GraphDef
    tree: Any

    @classmethod
    def of(cls, module: nnx.Module, state: nnx.State) -> tuple[Structure, list[Any]]:
        """(structure, leaves) of a module with its state, or one that holds the same in another form."""
        leaves, tree = jax.tree.flatten(state)
        return cls(nnx.split(module)[0], tree), leaves

    def bind(self, leaves: Sequence[Any]) -> Any:
        """The module with these arrays."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


class Steps:
    """Compiled steps of a model; its parameters are arguments, as the leaves of two structures.

    Attributes:
      prefill: ``(model leaves, batch, lengths) -> (logits after each prompt's last token, cache)``, the cache of the
        prompt as [layers, B, S, ...].
      begin: ``(kind, places, decoder leaves, logits, cache, batch, lengths, knobs) -> (first token, state)``.
      decode: ``(kind, decoder leaves, state, token, knobs) -> (next token, state)``. The state is donated.
    """

    def __init__(self, model: Structure, decoder: Structure, banned: np.ndarray, layout: Layout | None):
        self.model, self.decoder, self.banned = model, decoder, banned
        self._placement = Sharded(layout) if layout is not None else None
        self.prefill = jax.jit(self._prefill)
        self.begin = jax.jit(self._begin, static_argnums=(0, 1))
        self.decode = jax.jit(self._decode, static_argnums=0, donate_argnums=2)

    def _prefill(self, leaves, batch: PackedBatch, lengths):
        with placement.use(self._placement):
            model = self.model.bind(leaves)
            hidden, cache, _ = model.hidden(batch)
            last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
            return model.decoder.logits(last), cache

    def _begin(self, kind: Kind, places: int, leaves, logits, cache, batch: PackedBatch, lengths, knobs: Knobs):
        seen = None
        if kind.penalised:
            tokens = jnp.where(batch.segment_ids > 0, batch.tokens, logits.shape[1])
            rows = jnp.arange(len(tokens))[:, None]
            seen = jnp.zeros(logits.shape, bool).at[rows, tokens].set(True, mode="drop")
        token = sample(logits, kind, knobs, jnp.int32(0), banned=self.banned, seen=seen)
        with placement.use(self._placement):
            cache = self.decoder.bind(leaves).open_cache(cache, places)
            state = DecodeState(cache, lengths, batch.positions.max((1, 2)) + 1, jnp.int32(1), seen)
            return placement.current().constrain(token, ("batch",)), state.by_rows()

    def _decode(self, kind: Kind, leaves, state: DecodeState, token, knobs: Knobs):
        B = len(token)
        with placement.use(self._placement):
            decoder = self.decoder.bind(leaves)
            hidden, cache, _ = decoder(
                decoder.embed(token[:, None]),
                jnp.broadcast_to(state.position[:, None, None], (B, 1, 3)),
                jnp.ones((B, 1), jnp.int32),
                cache=state.cache,
                step=DecodeStep(state.place),
            )
            seen = None if state.seen is None else state.seen.at[jnp.arange(B), token].set(True)
            logits = decoder.logits(hidden[:, 0])
            chosen = sample(logits, kind, knobs, state.step, banned=self.banned, seen=seen)
            after = DecodeState(cache, state.place + 1, state.position + 1, state.step + 1, seen)
            return placement.current().constrain(chosen, ("batch",)), after.by_rows()
