"""The compiled programs of generation, and the shape and sharding of what they keep on the devices.

The engine runs them; a planner compiles the same ones for devices that are described and not present.

Axes: D groups of slots, one for each shard of the batch axis; B sequences, C tokens of a prefill, R sampled tokens of a
prefill, P patches, F vision tokens, W pages of a sequence, V vocabulary, S slots of all groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jvlm.adapters import several
from jvlm.inference.requests import MAX_TOP_LOGPROBS
from jvlm.inference.sampling import (
    Logprobs,
    SamplingArrays,
    SamplingKind,
    SlotRules,
    adjust,
    counted,
    logprobs,
    sample,
)
from jvlm.models import device_ops
from jvlm.models.batch import CacheSizes, DecodeStep, PackedBatch, PrefillStep
from jvlm.models.contracts import DecoderInputs, VisionTokens
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.sharded_ops import ShardedOps

# Products of one input with several matrices stay apart: for GPUs, XLA makes one product of those below this size, and
# copies their matrices together for every token.
_DECODING = {"xla_gpu_dot_merger_threshold_mb": 0}
_PROMPT_BLOCK = 128  # tokens of a prompt whose scores are in memory together

# Columns of `DecodeRows` before those of the table.
TOKEN, SLOT, START, POSITION, VALID, ADAPTER, TABLE = range(7)


_NAMES = (
    "init_cache",
    "init_features",
    "encode",
    "prefill",
    "head",
    "decode",
    "sample",
    "logprobs",
    "sampled_logprobs",
    "prompt_logprobs",
    "set_rules",
    "copy_pages",
    "scrub_pages",
)


class DecodeRows(NamedTuple):
    """Rows of a decoding step, in one array: one transfer for each step.

    Attributes:
      rows: columns: token (-1: the one that the device drew last for the slot), slot, tokens that are cached already,
        rotary position, 1 for a sequence and 0 for padding, number of the adapter; then the pages of the sequence.
    """

    rows: Int[Any, "B _"]


class Chunks(NamedTuple):
    """Chunks of prompts, packed as `PrefillStep` says; fields without a comment are those of `PackedBatch`.

    Attributes:
      features: slots in the feature pool of the vision tokens that ``vision_index`` counts.
      feature_images: the image of each, from 1, ascending; 0 for none.
      pages, past_pages, past_segments, memory_index: of `PrefillStep`.
    """

    tokens: Int[Any, "D C"]
    segment_ids: Int[Any, "D C"]
    positions: Int[Any, "D C 3"]
    vision_index: Int[Any, "D C"]
    features: Int[Any, "D F"]
    feature_images: Int[Any, "D F"]
    pages: Int[Any, "D N"]
    past_pages: Int[Any, "D M"]
    past_segments: Int[Any, "D T"]
    memory_index: Int[Any, "D s G"]


@dataclasses.dataclass(frozen=True)
class ModuleDef:
    """A module without its arrays: what a compiled step is made for."""

    graph: nnx.GraphDef
    tree: Any

    @classmethod
    def of(cls, module: nnx.Module, state: nnx.State) -> tuple[ModuleDef, list[Any]]:
        """(structure, leaves) of a module with its state, or one that holds the same in another form."""
        leaves, tree = jax.tree.flatten(state)
        return cls(nnx.split(module)[0], tree), leaves

    def bind(self, leaves: Sequence[Any]) -> Any:
        """The module with these arrays."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


class Programs:
    """Compiled programs of a model; its parameters are arguments, as the leaves of two structures.

    Args:
      model, decoder: structures of the whole model, whose leaves `encode` takes, and of its decoder.
      sizes: of the cache, over all groups.
      features: abstract vision tokens [D, slots, width] as large as the feature pool; None without pictures.
      adapted: whether the model has several adapters, of which rows name one.

    Attributes:
      init_cache: ``(decoder leaves) -> cache``.
      init_features: ``() -> feature pool``: (tokens [D, slots, width], deepstack).
      encode: ``(model leaves, pool, batch, destinations, adapters) -> pool``, donated. ``batch`` has the patches of
        pictures, ``destinations`` [D, F] says where in the pool each goes; those beyond it are dropped.
      prefill: ``(decoder leaves, cache, pool, chunks, adapters) -> (hidden states [D, C, width], cache)``, donated.
      head: ``(decoder leaves, hidden states, last [D, R]) -> logits`` [D R, V] of some tokens.
      decode: ``(decoder leaves, cache, tokens, rows[, drafts [B, K]]) -> (logits [B (1 + K), V], cache)``, donated:
        of the last token of each sequence and of K drafted ones behind it.
      sample: ``(kind, logits, tokens, rules, arrays, banned, mask) -> (chosen [B], tokens [S + 1], rules)``, tokens and
        rules donated. The tokens are the last of each slot; the last place is for rows of padding.
      logprobs: ``(logits, chosen) -> Logprobs`` of the model's own distribution.
      sampled_logprobs: ``(kind, logits, chosen, arrays, banned, mask) -> Logprobs`` of the one that was drawn from.
      prompt_logprobs: ``(decoder leaves, hidden states, next tokens [D, C]) -> Logprobs`` of D C tokens.
      set_rules: ``(rules, slot, ...) -> rules``, donated: see `SlotRules.at_slot`.
      copy_pages: ``(cache, from, to) -> cache``, donated; [D, n] pages each.
      scrub_pages: ``(cache, pages) -> cache``, donated: with zeros for what is not finite in some pages.
    """

    def __init__(
        self,
        model: ModuleDef,
        decoder: ModuleDef,
        layout: MeshLayout | None,
        sizes: CacheSizes,
        features: VisionTokens | None,
        *,
        adapted: bool = False,
        top_logprobs: int = MAX_TOP_LOGPROBS,
    ):
        self.model, self.decoder, self.sizes, self.features = model, decoder, sizes, features
        self.adapted, self.top = adapted, top_logprobs
        self.ops = ShardedOps(layout) if layout is not None else None
        self.groups = 1 if layout is None else layout.num_shards(layout.mesh_axes("batch"))
        self.init_cache = jax.jit(self._init_cache)
        self.init_features = jax.jit(self._init_features)
        self.encode = jax.jit(self._encode, donate_argnums=1)
        self.prefill = jax.jit(self._prefill, donate_argnums=1)
        self.head = jax.jit(self._head)
        self.decode = jax.jit(self._decode, donate_argnums=1, compiler_options=_DECODING)
        self.sample = jax.jit(self._sample, static_argnums=0, donate_argnums=(2, 3))
        self.logprobs = jax.jit(self._logprobs)
        self.sampled_logprobs = jax.jit(self._sampled_logprobs, static_argnums=0)
        self.prompt_logprobs = jax.jit(self._prompt_logprobs)
        self.set_rules = jax.jit(SlotRules.at_slot, donate_argnums=0)
        self.copy_pages = jax.jit(self._copy_pages, donate_argnums=0)
        self.scrub_pages = jax.jit(self._scrub_pages, donate_argnums=0)

    @property
    def compiled(self) -> dict[str, int]:
        """How many times each program has been compiled."""
        return {name: getattr(self, name)._cache_size() for name in _NAMES}

    def _constrain(self, x, *axes: str | None):
        return device_ops.current().constrain(x, axes)

    def _init_cache(self, leaves):
        with device_ops.use(self.ops):
            return self.decoder.bind(leaves).init_cache(self.sizes)

    def _tokens(self, leaves, batch: PackedBatch, adapters):
        with device_ops.use(self.ops), several.choosing(adapters if self.adapted else None):
            return self.model.bind(leaves).encode(batch)

    def _init_features(self):
        with device_ops.use(self.ops):
            pool = self.features.tokens, self.features.deepstack
            return jax.tree.map(lambda x: self._constrain(jnp.zeros(x.shape, x.dtype), "batch", None, None), pool)

    def _encode(self, leaves, pool, batch: PackedBatch, destinations, adapters):
        vision = self._tokens(leaves, batch, adapters)
        with device_ops.use(self.ops):

            def put(slots, new):
                rows = jnp.arange(len(destinations))[:, None]
                return self._constrain(slots.at[rows, destinations].set(new, mode="drop"), "batch", None, None)

            return jax.tree.map(put, pool, (vision.tokens, vision.deepstack))

    def _prefill(self, leaves, cache, pool, chunks: Chunks, adapters):
        with device_ops.use(self.ops), several.choosing(adapters if self.adapted else None):
            decoder, ops = self.decoder.bind(leaves), device_ops.current()
            rows = chunks.tokens.shape[0]
            nothing = {
                "loss_weights": jnp.zeros(chunks.tokens.shape, jnp.float32),
                "patches": jnp.zeros((rows, 0, 1), jnp.uint8),
                "patch_segment_ids": jnp.zeros((rows, 0), jnp.int32),
                "patch_window_ids": jnp.zeros((rows, 0), jnp.int32),
                "patch_positions": jnp.zeros((rows, 0, 2), jnp.int32),
            }
            batch = PackedBatch(
                tokens=chunks.tokens,
                segment_ids=chunks.segment_ids,
                positions=chunks.positions,
                vision_index=chunks.vision_index,
                **nothing,
            )
            vision = None
            if pool is not None and chunks.features.shape[1]:
                tokens, deepstack = jax.tree.map(lambda slots: ops.gather_vision_tokens(slots, chunks.features), pool)
                vision = VisionTokens(tokens, jnp.asarray(chunks.feature_images), deepstack)
            step = PrefillStep(chunks.pages, chunks.past_pages, chunks.past_segments, chunks.memory_index)
            inputs = decoder.fuse(decoder.embed(chunks.tokens), vision, batch)
            hidden, cache, _ = decoder(inputs, cache=cache, step=step)
            return self._constrain(hidden, "batch", None, None), cache

    def _head(self, leaves, hidden: Float[Array, "D C width"], last: Int[Array, "D R"]) -> Float[Array, "B V"]:
        with device_ops.use(self.ops):
            found = device_ops.current().gather_vision_tokens(hidden, last)
            logits = self.decoder.bind(leaves).logits(found)
            return logits.reshape(-1, logits.shape[-1])

    def _decode(self, leaves, cache, tokens, rows: DecodeRows, drafts: Int[Array, "B K"] | None = None):
        rows = rows.rows
        token = jnp.where(rows[:, TOKEN] < 0, tokens[rows[:, SLOT]], rows[:, TOKEN])
        token = jnp.maximum(token, 0)  # after scores that were not finite there is none
        adapters = rows[:, ADAPTER] if self.adapted else None
        with device_ops.use(self.ops), several.choosing(adapters):
            decoder = self.decoder.bind(leaves)
            new = token[:, None] if drafts is None else jnp.concatenate([token[:, None], drafts], axis=1)
            positions = rows[:, POSITION, None] + jnp.arange(new.shape[1])
            positions = jnp.broadcast_to(positions[..., None], (*new.shape, 3))
            valid = jnp.broadcast_to(rows[:, VALID, None], new.shape)
            inputs = DecoderInputs(decoder.embed(new), positions, valid)
            step = DecodeStep(rows[:, START], rows[:, TABLE:], rows[:, SLOT])
            hidden, cache, _ = decoder(inputs, cache=cache, step=step)
            return decoder.logits(hidden.reshape(-1, hidden.shape[-1])), cache

    def _sample(
        self,
        kind: SamplingKind,
        logits: Float[Array, "B V"],
        tokens: Int[Array, " slots"],
        rules: SlotRules | None,
        arrays: SamplingArrays,
        banned: Bool[Array, "2 V"],
        mask: Int[Array, "B words"] | None,
    ):
        with device_ops.use(self.ops):
            chosen = sample(logits, kind, arrays, banned=banned, rules=rules, mask=mask)
            rules = counted(rules, arrays, chosen) if kind.rules else rules
            tokens = tokens.at[arrays.slot].set(chosen)
            return self._constrain(chosen, None), self._constrain(tokens, None), rules

    def _logprobs(self, logits: Float[Array, "B V"], chosen: Int[Array, " B"]) -> Logprobs:
        return logprobs(logits, chosen, self.top)

    def _sampled_logprobs(
        self,
        kind: SamplingKind,
        logits: Float[Array, "B V"],
        chosen: Int[Array, " B"],
        arrays: SamplingArrays,
        banned: Bool[Array, "2 V"],
        mask: Int[Array, "B words"] | None,
    ) -> Logprobs:
        with device_ops.use(self.ops):
            drawn_from = adjust(logits, kind, arrays, banned=banned, mask=mask)
            return logprobs(drawn_from, chosen, self.top)

    def _prompt_logprobs(self, leaves, hidden: Float[Array, "D C width"], following: Int[Array, "D C"]) -> Logprobs:
        with device_ops.use(self.ops):
            decoder = self.decoder.bind(leaves)
            block = min(_PROMPT_BLOCK, hidden.shape[1])

            def of_block(inputs):
                x, tokens = inputs
                return logprobs(decoder.logits(x), tokens, self.top)

            blocks = hidden.reshape(-1, block, hidden.shape[-1]), following.reshape(-1, block)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(of_block, blocks))

    def _copy_pages(self, cache, source: Int[Array, "D n"], target: Int[Array, "D n"]):
        at, to = self._numbered(source), self._numbered(target)
        return self._of_pages(cache, lambda part: part.at[to].set(part[at]))

    def _scrub_pages(self, cache, pages: Int[Array, "D n"]):
        at = self._numbered(pages)
        return self._of_pages(cache, lambda part: part.at[at].set(jnp.where(jnp.isfinite(part[at]), part[at], 0)))

    def _numbered(self, pages: Int[Array, "D n"]):
        """Return the pages of groups by their numbers among those of all groups."""
        return (pages + jnp.arange(self.groups)[:, None] * (self.sizes.pages // self.groups)).reshape(-1)

    def _of_pages(self, cache, change):
        with device_ops.use(self.ops):  # what has another first axis belongs to slots
            return jax.tree.map(lambda part: change(part) if part.shape[0] == self.sizes.pages else part, cache)

    def put(self, value: Any, *axes: str | None) -> Any:
        """Return an array of the host where the programs want it."""
        if self.ops is None:
            return value
        return jax.device_put(value, self.ops.layout.sharding(axes, np.shape(value)))

    def committed(self, state: Any, leaves: Sequence[Any]) -> Any:
        """Return what a program is first given as it will return it, else that would be compiled for anew.

        Args:
          leaves: parameters, on whose device it stays where there is one device.
        """
        if self.ops is not None:
            return state
        return jax.device_put(state, next(iter(leaves[0].devices())))
