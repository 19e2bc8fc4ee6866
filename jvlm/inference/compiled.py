"""The compiled steps of generation, and the shape and sharding of their arguments.

The engine runs them; a planner compiles the same ones for devices that are described and not present.

Axes: B sequences, S tokens of the longest prompt (rounded up), P patches, T positions of the cache, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from jvlm.adapters import several
from jvlm.data.packing import assemble
from jvlm.inference import sharding
from jvlm.inference.sampling import SamplingArrays, SamplingConfig, SamplingFlags, sample
from jvlm.inference.weights import decoding_state
from jvlm.models import device_ops, vlm
from jvlm.models.batch import DecodeStep, PackedBatch
from jvlm.models.contracts import DecoderInputs
from jvlm.models.vlm import VLMConfig
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.sharded_ops import ShardedOps

# Products of one input with several matrices stay apart: for GPUs, XLA makes one product of those below this size, and
# copies their matrices together for every token.
_DECODING = {"xla_gpu_dot_merger_threshold_mb": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that changes from token to token; donated, so that the cache is updated in place.

    Attributes:
      cache: that of the decoder, for each layer arrays [B, ...] say.
      cache_index: index in the cache of the token that comes next.
      position: its rotary position, the same on all axes.
      step: number of tokens chosen so far.
      seen_tokens: tokens of prompt and answer, kept only when repetition is penalised.
    """

    cache: Any
    cache_index: Int[Array, " B"]
    position: Int[Array, " B"]
    step: Int[Array, ""]
    seen_tokens: Bool[Array, "B V"] | None

    def constrained(self) -> DecodeState:
        """Return the state with sequences over the batch axis. The cache is sharded already."""
        cache_index, position = (
            device_ops.current().constrain(x, ("batch",)) for x in (self.cache_index, self.position)
        )
        seen_tokens = (
            None if self.seen_tokens is None else device_ops.current().constrain(self.seen_tokens, ("batch", None))
        )
        return DecodeState(self.cache, cache_index, position, self.step, seen_tokens)


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


class CompiledSteps:
    """Compiled steps of a model; its parameters are arguments, as the leaves of two structures.

    Args:
      banned: tokens [V] that are never given; ``banned_first``: as the first of an answer (None: the same).

    Attributes:
      prefill: ``(model leaves, batch, lengths[, adapters]) -> (logits after each prompt's last token, cache)``, the
        cache of the prompt as [layers, B, S, ...].
      first_token: ``(flags, cache_len, decoder leaves, logits, cache, batch, lengths, arrays) -> (first token,
        state)``.
      decode: ``(flags, decoder leaves, state, token, arrays[, adapters]) -> (next token, state)``. The state is
        donated. ``adapters`` [B] are the numbers of the sequences' adapters, in a model that has several.
    """

    def __init__(
        self,
        model: ModuleDef,
        decoder: ModuleDef,
        banned: np.ndarray,
        layout: MeshLayout | None,
        banned_first: np.ndarray | None = None,
    ):
        self.model, self.decoder, self.banned = model, decoder, banned
        self.banned_first = banned if banned_first is None else banned_first
        self._ops = ShardedOps(layout) if layout is not None else None
        self.prefill = jax.jit(self._prefill)
        self.first_token = jax.jit(self._first_token, static_argnums=(0, 1))
        self.decode = jax.jit(self._decode, static_argnums=0, donate_argnums=2, compiler_options=_DECODING)

    def _prefill(self, leaves, batch: PackedBatch, lengths, adapters=None):
        with device_ops.use(self._ops), several.choosing(adapters):
            model = self.model.bind(leaves)
            hidden, cache, _ = model.hidden(batch)
            last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
            return model.decoder.logits(last), cache

    def _first_token(
        self,
        flags: SamplingFlags,
        cache_len: int,
        leaves,
        logits,
        cache,
        batch: PackedBatch,
        lengths,
        arrays: SamplingArrays,
    ):
        seen_tokens = None
        if flags.penalised:
            tokens = jnp.where(batch.segment_ids > 0, batch.tokens, logits.shape[1])
            slots = jnp.arange(len(tokens))[:, None]
            seen_tokens = jnp.zeros(logits.shape, bool).at[slots, tokens].set(True, mode="drop")
        token = sample(logits, flags, arrays, jnp.int32(0), banned=self.banned_first, seen_tokens=seen_tokens)
        with device_ops.use(self._ops):
            cache = self.decoder.bind(leaves).init_cache(cache, cache_len)
            state = DecodeState(cache, lengths, batch.positions.max((1, 2)) + 1, jnp.int32(1), seen_tokens)
            return device_ops.current().constrain(token, ("batch",)), state.constrained()

    def _decode(self, flags: SamplingFlags, leaves, state: DecodeState, token, arrays: SamplingArrays, adapters=None):
        B = len(token)
        with device_ops.use(self._ops), several.choosing(adapters):
            decoder = self.decoder.bind(leaves)
            positions = jnp.broadcast_to(state.position[:, None, None], (B, 1, 3))
            inputs = DecoderInputs(decoder.embed(token[:, None]), positions, jnp.ones((B, 1), jnp.int32))
            hidden, cache, _ = decoder(inputs, cache=state.cache, step=DecodeStep(state.cache_index))
            seen_tokens = None if state.seen_tokens is None else state.seen_tokens.at[jnp.arange(B), token].set(True)
            logits = decoder.logits(hidden[:, 0])
            chosen = sample(logits, flags, arrays, state.step, banned=self.banned, seen_tokens=seen_tokens)
            after = DecodeState(cache, state.cache_index + 1, state.position + 1, state.step + 1, seen_tokens)
            return device_ops.current().constrain(chosen, ("batch",)), after.constrained()


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Shapes of one compilation: sequences, tokens of a prompt, patches of a prompt, positions of the cache."""

    batch_size: int
    prompt_len: int
    max_patches: int
    cache_len: int


@dataclasses.dataclass(frozen=True)
class AbstractSteps:
    """The steps for one bucket, and abstract values with shardings for their arguments.

    Attributes:
      leaves, decoder_leaves: parameters as `prefill`, and as `first_token` and `decode`, take them.
      logits, prompt_cache: what `prefill` gives: scores, and the cache of the prompt.
    """

    config: VLMConfig
    layout: MeshLayout
    steps: CompiledSteps
    sizes: BatchShape
    flags: SamplingFlags
    leaves: list[jax.ShapeDtypeStruct]
    decoder_leaves: list[jax.ShapeDtypeStruct]
    batch: PackedBatch
    lengths: jax.ShapeDtypeStruct
    arrays: SamplingArrays
    logits: jax.ShapeDtypeStruct
    prompt_cache: Any

    def lower_prefill(self) -> jax.stages.Lowered:
        """The pass over the prompts, lowered from shapes."""
        return self.steps.prefill.lower(self.leaves, self.batch, self.lengths)

    def lower_first_token(self) -> jax.stages.Lowered:
        """Return the step that samples the first token and makes the cache of all positions, lowered from shapes."""
        return self.steps.first_token.lower(self.flags, self.sizes.cache_len, *self._after_prefill)

    @property
    def _after_prefill(self) -> tuple:
        return self.decoder_leaves, self.logits, self.prompt_cache, self.batch, self.lengths, self.arrays

    def decode_arguments(self) -> tuple[DecodeState, jax.ShapeDtypeStruct]:
        """(state, token) before a step, where the compiled `first_token` leaves them."""
        lowered = self.lower_first_token()
        token, state = jax.tree.map(_at, lowered.out_info, lowered.compile().output_shardings)
        return state, token

    def lower_decode(self, state: DecodeState, token: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """A step of decoding, lowered from shapes."""
        return self.steps.decode.lower(self.flags, self.decoder_leaves, state, token, self.arrays)


def abstract_steps(
    config: VLMConfig, layout: MeshLayout, sizes: BatchShape, sampling: SamplingConfig = SamplingConfig()
) -> AbstractSteps:
    """The program of a model on a layout, whose devices may be described and not present.

    Raises:
      ValueError: a layout that cannot generate, or sequences or parameters that it does not divide.
    """
    template = vlm.abstract(config)
    placed = {p: _at(v.get_value(), layout.parameter(p, v)) for p, v in vlm.parameters(template).items()}
    model = vlm.bind(template, placed)
    whole, leaves = ModuleDef.of(model, nnx.state(model))
    decoder, decoder_leaves = ModuleDef.of(model.decoder, decoding_state(model.decoder))
    banned = np.zeros(config.decoder.vocab_size, bool)  # which ones changes nothing that is compiled
    steps = CompiledSteps(whole, decoder, banned, sharding.check_layout(layout, config))
    widths = {"patch_values": config.encoder.patch_values, "position_values": config.encoder.position_values}
    empty = assemble([[]], sizes.prompt_len, sizes.max_patches, **widths)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((sizes.batch_size, *x.shape[1:]), x.dtype), empty)
    batch = jax.tree.map(_at, batch, layout.batch(batch))
    arrays = jax.eval_shape(lambda: SamplingArrays.of(sampling, np.zeros(sizes.batch_size, np.int32)))
    shardings = sharding.sampling_shardings(layout, arrays)
    lengths = _at(jax.ShapeDtypeStruct((sizes.batch_size,), jnp.int32), shardings.request_ids)
    logits, prompt_cache = jax.eval_shape(steps.prefill, leaves, batch, lengths)
    batch_axes, heads = layout.mesh_axes("batch"), layout.mesh_axes("heads")
    specs = {
        5: PartitionSpec(None, batch_axes, None, heads),
        3: PartitionSpec(None, batch_axes),
    }  # as `ShardedOps.expand_kv_heads` leaves them
    return AbstractSteps(
        config=config,
        layout=layout,
        steps=steps,
        sizes=sizes,
        flags=sampling.flags,
        leaves=leaves,
        decoder_leaves=decoder_leaves,
        batch=batch,
        lengths=lengths,
        arrays=jax.tree.map(_at, arrays, shardings),
        logits=_at(logits, layout.sharding(("batch", "vocab"), logits.shape)),
        prompt_cache=jax.tree.map(lambda x: _at(x, NamedSharding(layout.mesh, specs[x.ndim])), prompt_cache),
    )


def _at(value: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
