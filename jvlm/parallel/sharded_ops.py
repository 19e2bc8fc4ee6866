"""The operations of `jvlm.models.device_ops.DeviceOps` on a mesh.

Matrix products are left to XLA's partitioner. What it cannot split well, or not at all (Pallas kernels), runs in
`jax.shard_map` here. Shapes as in `DeviceOps`; inside a shard_map they are those of one device's shard.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jvlm_kernels import (
    CrossEntropySum,
    cached_attention,
    chunk_attention,
    init_pages,
    linear_cross_entropy_sum,
)

from jvlm.errors import UserError
from jvlm.models.device_ops import SequenceAxis, take_along_sequence
from jvlm.parallel import context
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.ring_attention import Ring, reach, ring_attention


@dataclasses.dataclass(frozen=True)
class ShardedOps:
    """`DeviceOps` over the mesh of a layout. Ops of equal layouts are equal."""

    layout: MeshLayout

    def constrain(self, x, axes):
        return lax.with_sharding_constraint(x, self.layout.sharding(axes, x.shape))

    def is_split(self, axis):
        return not self._is_storage(axis) and self.layout.num_shards(self.layout.mesh_axes(axis)) > 1

    def all_gather_param(self, value, axes):
        stored = self.layout.sharding(axes, value.shape)
        used = self.layout.sharding([None if self._is_storage(a) else a for a in axes], value.shape)
        return value if stored == used else _resharded(value, used, stored)

    def _is_storage(self, axis: str | None) -> bool:
        """Return whether a parameter's axis is split over mesh axes that also split the batch or its sequences.

        They then only store it. Experts are never gathered.
        """
        data_axes = {*self.layout.mesh_axes("batch"), *self.layout.mesh_axes("sequence")}
        return bool((data_axes - {*self.layout.mesh_axes("experts")}).intersection(self.layout.mesh_axes(axis)))

    def _shard_map(self, function, in_specs, out_specs):
        return jax.shard_map(function, mesh=self.layout.mesh, in_specs=in_specs, out_specs=out_specs)

    def shard_map_local(self, function, arrays, axes):
        specs = tuple(self.layout.spec(names, x.shape) for names, x in zip(axes, arrays, strict=True))
        return self._shard_map(function, specs, specs[0])(*arrays)

    def attention(self, q, k, v, q_segments, kv_segments, *, along: SequenceAxis, **options: Any):
        layout = self.layout
        batch, sequence, heads = (layout.mesh_axes(axis) for axis in ("batch", along, "heads"))
        _check_divides(layout, "sequences", q.shape[0], batch)
        is_self_attention = q_segments is kv_segments
        # padding belongs to segment 0, which attends to nothing and which nothing attends to
        S, shards = q.shape[1], layout.num_shards(sequence)
        q, q_segments = _padded(q, shards), _padded(q_segments, shards)
        k, v, kv_segments = (_padded(x, shards) for x in (k, v, kv_segments))
        k, v = (self._repeat_kv_heads(x, q.shape[2]) for x in (k, v))
        qkv, ids = P(batch, sequence, heads), P(batch, sequence)
        length = q.shape[1] // shards
        bound = context.reach(options.get("window"), options.get("max_segment_length")) if is_self_attention else None
        if layout.ring_attention and sequence and is_self_attention and (bound is None or bound > length):
            options.pop("max_segment_length", None)
            causal, window = options.pop("causal", False), options.pop("window", None)
            limit = shards - 1 if bound is None else min(shards - 1, -(-bound // length))
            ring = Ring(sequence, causal, window, limit, tuple(sorted(options.items())))

            def around(q, k, v, segments):
                reached = jnp.minimum(reach(segments, sequence, batch), limit)
                return ring_attention(ring, q, k, v, segments, reached)

            return self._shard_map(around, (qkv, qkv, qkv, ids), qkv)(q, k, v, q_segments)[:, :S]
        local = functools.partial(context.attention, axes=sequence, is_self_attention=is_self_attention, **options)
        return self._shard_map(local, (qkv, qkv, qkv, ids, ids), qkv)(q, k, v, q_segments, kv_segments)[:, :S]

    def _repeat_kv_heads(self, x, num_heads: int):
        """Return keys or values [B, T, K, D], repeated where there are fewer than shards of ``num_heads`` heads."""
        axes, K = self.layout.mesh_axes("heads"), x.shape[2]
        shards = self.layout.num_shards(axes)
        _check_divides(self.layout, "attention heads", num_heads, axes)
        if K % shards == 0:
            return x
        if shards % K:
            raise UserError(f"{K} key heads and {' x '.join(axes)} = {shards} do not divide one another")
        return jnp.repeat(x, shards // K, axis=2)

    def init_pages(self, layers, num_pages, page_size, num_heads, kv_heads, head_dim, dtype):
        batch, heads = (self.layout.mesh_axes(axis) for axis in ("batch", "heads"))
        _check_divides(self.layout, "pages", num_pages, batch)
        stored = kv_heads if kv_heads % self.layout.num_shards(heads) == 0 else self.layout.num_shards(heads)
        cache = init_pages(num_pages, page_size, stored, head_dim, dtype, layers=layers)
        return tuple(self._constrain_to(x, P(None, batch, heads)) for x in cache)

    def _constrain_to(self, x, spec: P):
        return lax.with_sharding_constraint(x, NamedSharding(self.layout.mesh, spec))

    def cached_attention(self, q, k, v, cache, layer, cache_index, block_tables, **options: Any):
        batch, heads = (self.layout.mesh_axes(axis) for axis in ("batch", "heads"))
        _check_divides(self.layout, "sequences", q.shape[0], batch)
        k, v = (self._repeat_kv_heads(x, q.shape[2]) for x in (k, v))

        def local(q, k, v, cache, layer, cache_index, block_tables):
            return cached_attention(q, k, v, cache, cache_index, block_tables=block_tables, layer=layer, **options)

        new, cached = P(batch, None, heads), (P(None, batch, heads),) * 2
        mapped = self._shard_map(local, (new, new, new, cached, P(), P(batch), P(batch)), (new, cached))
        return mapped(q, k, v, cache, layer, cache_index, block_tables)

    def chunk_attention(self, q, k, v, segments, cache, layer, pages, past_pages, past_segments, **options: Any):
        batch, heads = (self.layout.mesh_axes(axis) for axis in ("batch", "heads"))
        _check_divides(self.layout, "rows", q.shape[0], batch)
        k, v = (self._repeat_kv_heads(x, q.shape[2]) for x in (k, v))

        def local(q, k, v, segments, cache, layer, *pages):
            return chunk_attention(q, k, v, segments, cache, *pages, layer=layer, **options)

        new, cached = P(batch, None, heads), (P(None, batch, heads),) * 2
        specs = (new, new, new, P(batch), cached, P(), P(batch), P(batch), P(batch))
        mapped = self._shard_map(local, specs, (new, cached))
        return mapped(q, k, v, segments, cache, layer, pages, past_pages, past_segments)

    def embedding_lookup(self, table, index, dtype, *, axes=("vocab", "embed"), along: SequenceAxis = "sequence"):
        batch, sequence = self.layout.mesh_axes("batch"), self.layout.mesh_axes(along)
        stored = self.layout.spec(axes, table.shape)
        vocab = _names(stored[0])
        # mesh axes that split the width: devices along them look up different sequences, or else the same ones
        exchanged = tuple(a for a in _names(stored[1]) if a in batch)
        split = () if exchanged else _names(stored[1])

        def local(table, index):
            if exchanged:
                index = lax.all_gather(index, exchanged, axis=0, tiled=True)
            if vocab:
                index = index - lax.axis_index(vocab) * table.shape[0]
                is_local = (index >= 0) & (index < table.shape[0])
                vectors = jnp.where(is_local[..., None], table[jnp.where(is_local, index, 0)], 0).astype(dtype)
                vectors = lax.psum(vectors, vocab)
            else:
                vectors = table[index].astype(dtype)
            # each device has a slice of the width for the sequences of all; it needs all of it for its own
            return lax.all_to_all(vectors, exchanged, split_axis=0, concat_axis=2, tiled=True) if exchanged else vectors

        table_spec, tokens = P(vocab or None, exchanged or split or None), P(batch, sequence)
        vectors = self._shard_map(local, (table_spec, tokens), P(batch, sequence, split or None))(table, index)
        return self._constrain_to(vectors, tokens) if split else vectors

    def gather_vision_tokens(self, values, index):
        logical = ("batch", "sequence", "vision_tokens")
        batch, sequence, vision_tokens = (self.layout.mesh_axes(axis) for axis in logical)
        values = _padded(values, self.layout.num_shards(vision_tokens))

        def local(values, index):
            if vision_tokens:
                values = context.all_gather_sequence(values, vision_tokens)
            return take_along_sequence(values, index)

        specs = P(batch, vision_tokens), P(batch, sequence)
        return self._shard_map(local, specs, P(batch, sequence))(values, index)

    def apply_experts(self, function, x, expert, gate, weights, axes):
        batch, sequence = self.layout.mesh_axes("batch"), self.layout.mesh_axes("sequence")
        weights = tuple(self.all_gather_param(w, a) for w, a in zip(weights, axes, strict=True))
        used = [[None if a == "embed" or self._is_storage(a) else a for a in names] for names in axes]
        specs = [self.layout.spec(names, w.shape) for names, w in zip(used, weights, strict=True)]
        expert_axes = _names(specs[0][0])  # devices along them have different experts
        hidden_axes = tuple(sorted({name for spec in specs for entry in spec[1:] for name in _names(entry)}))
        # devices with different experts have different sequences too, and exchange tokens; or else the same tokens
        exchanged = tuple(a for a in expert_axes if a in batch)
        split_experts = tuple(a for a in expert_axes if a not in batch)
        summed = (*split_experts, *hidden_axes)  # devices with the same tokens, which add up their outputs

        def local(x, expert, gate, *weights):
            if summed:  # here, not where they first meet a weight: a gather drops it in its gradient
                x, gate = (lax.pcast(a, summed, to="varying") for a in (x, gate))
            if exchanged:
                x, expert, gate = (lax.all_gather(a, exchanged, axis=0, tiled=True) for a in (x, expert, gate))
            if expert_axes:
                expert = expert - lax.axis_index(expert_axes) * weights[0].shape[0]
            y, taken = function(x, expert, gate, *weights)
            y = lax.psum(y, summed) if summed else y
            taken = lax.psum(taken, split_experts) if split_experts else taken
            if exchanged:
                y, taken = (lax.psum_scatter(a, exchanged, scatter_dimension=0, tiled=True) for a in (y, taken))
            return y, taken

        tokens = P(batch, sequence)
        return self._shard_map(local, (tokens, tokens, tokens, *specs), (tokens, tokens))(x, expert, gate, *weights)

    def cross_entropy_sum(
        self, hidden, kernel, targets, weights, *, vocabulary_first=False, groups=None, **options: Any
    ):
        axes = ("vocab", "embed") if vocabulary_first else ("embed", "vocab")
        kernel = kernel.astype(hidden.dtype)
        batch, sequence = self.layout.mesh_axes("batch"), self.layout.mesh_axes("sequence")
        vocab_dim, width_dim = (0, 1) if vocabulary_first else (1, 0)
        stored = self.layout.spec(axes, kernel.shape)
        vocab = _names(stored[vocab_dim])
        storage = _names(stored[width_dim]) if self._is_storage("embed") else ()
        if self.layout.mesh_axes("vocab") and not vocab:
            # a vocabulary that does not divide: the tokens are split over its devices instead
            more = self.layout.mesh_axes("vocab")
            if hidden.shape[1] % self.layout.num_shards((*sequence, *more)) == 0:
                sequence = (*sequence, *more)

        def local(hidden, kernel, targets, weights, groups):
            # gathered here and not before: its gradient is then scattered as it is summed over the devices that store
            # it, and only its shards are summed over the others
            others = tuple(a for a in (*batch, *sequence) if a not in storage)
            kernel = lax.pcast(kernel, others, to="varying") if others else kernel
            kernel = lax.all_gather(kernel, storage, axis=width_dim, tiled=True) if storage else kernel
            sums = linear_cross_entropy_sum(
                hidden.reshape(-1, hidden.shape[-1]),
                kernel,
                targets.reshape(-1),
                weights.reshape(-1),
                vocabulary_first=vocabulary_first,
                axis_name=vocab or None,
                groups=None if groups is None else groups.reshape(-1),
                **options,
            )
            return CrossEntropySum(*lax.psum(sums, (*batch, *sequence))) if (*batch, *sequence) else sums

        tokens = P(batch, sequence)
        specs = tokens, P(*stored), tokens, tokens, None if groups is None else tokens
        sums = CrossEntropySum(P(), P(), None if groups is None else P())
        return self._shard_map(local, specs, sums)(hidden, kernel, targets, weights, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _resharded(value, used, stored):
    """Return ``value`` sharded as ``used``; its gradient is sharded as ``stored``, so it is reduce-scattered."""
    return lax.with_sharding_constraint(value, used)


def _resharded_forward(value, used, stored):
    return _resharded(value, used, stored), None


def _resharded_backward(used, stored, _, cotangent):
    return (lax.with_sharding_constraint(cotangent, stored),)


_resharded.defvjp(_resharded_forward, _resharded_backward)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _padded(x: jax.Array, shards: int) -> jax.Array:
    """Return ``x`` with zeros behind its second dimension, so that it divides into shards."""
    lacking = -x.shape[1] % shards
    return jnp.pad(x, [(0, 0), (0, lacking)] + [(0, 0)] * (x.ndim - 2)) if lacking else x


def _check_divides(layout: MeshLayout, what: str, length: int, axes: tuple[str, ...]) -> None:
    if length % layout.num_shards(axes):
        by = f"{' x '.join(axes)} = {layout.num_shards(axes)}"
        raise UserError(f"{length} {what} do not divide by {by}; choose another mesh")
