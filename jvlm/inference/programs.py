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
from jaxtyping import Array, Float, Int

from jvlm.adapters import several
from jvlm.inference import sampling
from jvlm.inference.requests import MAX_TOP_LOGPROBS
from jvlm.inference.sampling import (
    Logprobs,
    SamplingArrays,
    SlotRules,
    adjust,
    asked_logprobs,
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

# Columns of `DecodeRows`: those of `SamplingArrays`, these, and the table.
TOKEN, START, POSITION, STEPS, ADAPTER, TABLE = range(sampling.COLUMNS, sampling.COLUMNS + 6)


_NAMES = (
    "init_cache",
    "init_features",
    "encode",
    "prefill",
    "last",
    "first",
    "decode",
    "verify",
    "prompt_logprobs",
    "set_rules",
    "copy_pages",
    "scrub_pages",
)


class DecodeRows(NamedTuple):
    """Rows of decoding, in one array: one transfer for each call.

    Attributes:
      rows: the columns of `SamplingArrays.packed`, of the first token that is drawn; then token (-1: the one that the
        device drew last for the slot), tokens that are cached already, rotary position, number of tokens to draw (0 for
        padding), number of the adapter; then the pages of the sequence.
    """

    rows: Int[Any, "B _"]


class Drawn(NamedTuple):
    """Tokens that were drawn, K for each sequence; those that a sequence did not ask for are 0.

    Attributes:
      tokens: as `jvlm.inference.sampling.sample` gives them.
      logprobs: of each, with another axis K in front; zeros where nobody asks.
    """

    tokens: Int[Array, "K B"]
    logprobs: Logprobs


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
      steps: most tokens that a call of ``decode`` draws for a sequence.
      sampled: give log-probabilities in the distribution that is drawn from, and not in the model's own.

    Attributes:
      init_cache: ``(decoder leaves) -> cache``.
      init_features: ``() -> feature pool``: (tokens [D, slots, width], deepstack).
      encode: ``(model leaves, pool, batch, destinations, adapters) -> (pool, number)``, donated. ``batch`` has the
        patches of pictures, ``destinations`` [D, F] says where in the pool each goes; those beyond it are dropped. The
        number is there for who waits for the end.
      prefill: ``(decoder leaves, cache, pool, chunks, adapters) -> (hidden states [D, C, width], cache)``, donated.
      last: ``(hidden states, indices [D, R]) -> hidden states [D, R, width]`` of some tokens.
      first: ``(decoder leaves, tokens, rules, hidden states [D, R, width], rows [D R, columns of SamplingArrays],
        banned, mask) -> (Drawn, tokens, rules)``: one token after each hidden state. ``tokens`` [S + 1] are the last of
        each slot, the last entry is for padding; ``rules`` are a `SlotRules`; both are donated.
      decode: ``(decoder leaves, cache, tokens, rules, rows, banned, mask) -> (Drawn, tokens, rules, cache)``, donated:
        up to ``steps`` tokens of each sequence, one after the other.
      verify: ``(decoder leaves, cache, tokens, rules, rows, banned, mask, drafts [B, K]) -> (Drawn, tokens, rules,
        cache)``, donated: a token behind the last one of each sequence, and behind each of its drafted ones.
      step: ``(decoder leaves, cache, tokens, rows) -> (logits [B, V], cache)``: a step of ``decode`` without drawing.
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
        steps: int = 1,
        sampled: bool = False,
    ):
        self.model, self.decoder, self.sizes, self.features = model, decoder, sizes, features
        self.adapted, self.top, self.steps, self.sampled = adapted, top_logprobs, steps, sampled
        self.ops = ShardedOps(layout) if layout is not None else None
        self.groups = 1 if layout is None else layout.num_shards(layout.mesh_axes("batch"))
        self.init_cache = jax.jit(self._init_cache)
        self.init_features = jax.jit(self._init_features)
        self.encode = jax.jit(self._encode, donate_argnums=1)
        self.prefill = jax.jit(self._prefill, donate_argnums=1)
        self.last = jax.jit(self._last)
        self.first = jax.jit(self._first, donate_argnums=(1, 2))
        self.decode = jax.jit(self._decode, donate_argnums=(1, 2, 3), compiler_options=_DECODING)
        self.verify = jax.jit(self._verify, donate_argnums=(1, 2, 3), compiler_options=_DECODING)
        self.step = jax.jit(self._step, donate_argnums=1, compiler_options=_DECODING)
        self.prompt_logprobs = jax.jit(self._prompt_logprobs)
        self.set_rules = jax.jit(self._set_rules, donate_argnums=0)
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

            return jax.tree.map(put, pool, (vision.tokens, vision.deepstack)), vision.tokens[0, 0, 0]

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

    def _last(self, hidden: Float[Array, "D C width"], last: Int[Array, "D R"]) -> Float[Array, "D R width"]:
        with device_ops.use(self.ops):
            return device_ops.current().gather_vision_tokens(hidden, last)

    def _first(self, leaves, tokens, rules: SlotRules, hidden: Float[Array, "D R width"], rows, banned, mask):
        with device_ops.use(self.ops):
            logits = self.decoder.bind(leaves).logits(hidden).reshape(len(rows), -1)
            arrays = SamplingArrays.unpacked(rows)
            chosen, found, rules = self._draw(logits, arrays, rules, banned, mask)
            tokens = self._constrain(tokens.at[arrays.slot].set(chosen), None)
            return Drawn(chosen[None], jax.tree.map(lambda x: x[None], found)), tokens, rules

    def _decode(self, leaves, cache, tokens, rules: SlotRules, rows: DecodeRows, banned, mask):
        rows = rows.rows
        arrays, steps = SamplingArrays.unpacked(rows[:, : sampling.COLUMNS]), rows[:, STEPS]
        B, token = len(rows), _first_tokens(rows, tokens)

        def one(i, carry):
            cache, token, rules, drawn = carry
            logits, cache = self._logits(leaves, cache, token[:, None], _at_step(rows, i))
            chosen, found, rules = self._draw(logits, arrays.at_step(arrays.step + i), rules, banned, mask, i < steps)
            drawn = jax.tree.map(lambda all_of_them, new: all_of_them.at[i].set(new), drawn, Drawn(chosen, found))
            return cache, jnp.where(i < steps, chosen, token), rules, drawn

        with device_ops.use(self.ops):
            shapes = jax.eval_shape(lambda: asked_logprobs(jnp.zeros((B, rules.bias.shape[1])), token, self.top, steps))
            drawn = Drawn(token, shapes)
            drawn = jax.tree.map(lambda x: jnp.zeros((self.steps, *x.shape), x.dtype), drawn)
            carry = cache, token, rules, drawn
            cache, token, rules, drawn = jax.lax.fori_loop(0, steps.max(), one, carry)
            tokens = self._constrain(tokens.at[arrays.slot].set(token), None)
            # behind the loop too, whose results the compiler may lay out otherwise: the next call would compile again
            drawn, rules = jax.tree.map(lambda x: self._constrain(x, *[None] * x.ndim), (drawn, rules))
            return drawn, tokens, rules, cache

    def _verify(self, leaves, cache, tokens, rules: SlotRules, rows: DecodeRows, banned, mask, drafts):
        rows, width = rows.rows, 1 + drafts.shape[1]
        with device_ops.use(self.ops):
            arrays = SamplingArrays.unpacked(jnp.repeat(rows[:, : sampling.COLUMNS], width, axis=0))
            number = jnp.tile(jnp.arange(width), len(rows))
            wanted = number < jnp.repeat(rows[:, STEPS], width)
            new = jnp.concatenate([_first_tokens(rows, tokens)[:, None], drafts], axis=1)
            logits, cache = self._logits(leaves, cache, new, rows)
            chosen, found, rules = self._draw(logits, arrays.at_step(arrays.step + number), rules, banned, mask, wanted)
            # where tokens are drafted, the host says what comes next
            last = self._constrain(tokens.at[rows[:, sampling.SLOT]].set(chosen[::width]), None)
            drawn = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, width, *x.shape[1:]), 0, 1), Drawn(chosen, found))
            return jax.tree.map(lambda x: self._constrain(x, *[None] * x.ndim), drawn), last, rules, cache

    def _step(self, leaves, cache, tokens, rows: DecodeRows):
        with device_ops.use(self.ops):
            return self._logits(leaves, cache, _first_tokens(rows.rows, tokens)[:, None], rows.rows)

    def _logits(self, leaves, cache, new: Int[Array, "B K"], rows: Int[Array, "B _"]):
        """Return the logits [B K, V] behind new tokens of each sequence, and the cache."""
        with several.choosing(rows[:, ADAPTER] if self.adapted else None):
            decoder = self.decoder.bind(leaves)
            new = jnp.maximum(new, 0)  # after scores that were not finite there is no token
            positions = rows[:, POSITION, None] + jnp.arange(new.shape[1])
            positions = jnp.broadcast_to(positions[..., None], (*new.shape, 3))
            valid = jnp.broadcast_to((rows[:, STEPS, None] > 0).astype(jnp.int32), new.shape)
            inputs = DecoderInputs(decoder.embed(new), positions, valid)
            step = DecodeStep(rows[:, START], rows[:, TABLE:], rows[:, sampling.SLOT])
            hidden, cache, _ = decoder(inputs, cache=cache, step=step)
            return decoder.logits(hidden.reshape(-1, hidden.shape[-1])), cache

    def _draw(self, logits, arrays: SamplingArrays, rules: SlotRules, banned, mask, wanted=True):
        """Return a token for each row of logits, its log-probabilities, and the rules, which count it."""
        chosen = sample(logits, arrays, banned=banned, rules=rules, mask=mask)

        def scores(logits):  # the engine refuses requests that want these of tokens with rules
            return adjust(logits, arrays, banned=banned, mask=mask) if self.sampled else logits

        found = asked_logprobs(logits, chosen, self.top, jnp.where(wanted, arrays.scored, 0), scores)
        rules = counted(rules, arrays, chosen, wanted)
        return chosen, found, jax.tree.map(lambda x: self._constrain(x, None, None), rules)

    def _set_rules(self, rules: SlotRules, slot, *values) -> SlotRules:
        with device_ops.use(self.ops):
            return jax.tree.map(lambda x: self._constrain(x, *[None] * x.ndim), rules.at_slot(slot, *values))

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
        return self._of_pages(cache, lambda part: part.at[:, to].set(part[:, at]))

    def _scrub_pages(self, cache, pages: Int[Array, "D n"]):
        at = self._numbered(pages)

        def scrubbed(part):
            held = part[:, at]
            return part.at[:, at].set(jnp.where(jnp.isfinite(held), held, 0))

        return self._of_pages(cache, scrubbed)

    def _numbered(self, pages: Int[Array, "D n"]):
        """Return the pages of groups by their numbers among those of all groups."""
        return (pages + jnp.arange(self.groups)[:, None] * (self.sizes.pages // self.groups)).reshape(-1)

    def _of_pages(self, cache, change):
        with device_ops.use(self.ops):  # what has another second axis belongs to slots
            return jax.tree.map(lambda part: change(part) if part.shape[1] == self.sizes.pages else part, cache)

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


def _first_tokens(rows: Int[Array, "B _"], tokens: Int[Array, " slots"]) -> Int[Array, " B"]:
    """Return the last token of each sequence: the host's, or the one that was drawn last."""
    return jnp.where(rows[:, TOKEN] < 0, tokens[rows[:, sampling.SLOT]], rows[:, TOKEN])


def _at_step(rows: Int[Array, "B _"], i: Int[Array, ""]) -> Int[Array, "B _"]:
    """Return the rows ``i`` tokens later: a sequence that asks for fewer is padding from then on."""
    left = rows[:, STEPS] - i
    later = rows.at[:, START].add(i).at[:, POSITION].add(i).at[:, STEPS].set(jnp.maximum(left, 0))
    padding = jnp.zeros_like(rows).at[:, sampling.SLOT].set(rows[:, sampling.SLOT])
    return jnp.where((left > 0)[:, None], later, padding)
