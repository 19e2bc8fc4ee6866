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
from jvlm_kernels import CrossEntropySum, cached_attention, init_cache, linear_cross_entropy_sum

from jvlm.errors import UserError
from jvlm.models.device_ops import SequenceAxis, take_along_sequence
from jvlm.parallel import context
from jvlm.parallel.layout import Layout


@dataclasses.dataclass(frozen=True)
class ShardedOps:
    """`DeviceOps` over the mesh of a layout. Ops of equal layouts are equal."""

    layout: Layout

    def constrain(self, x, axes):
        return lax.with_sharding_constraint(x, self.layout.sharding(axes, x.shape))

    def is_split(self, axis):
        return not self._is_storage(axis) and self.layout.size(self.layout.splits(axis)) > 1

    def all_gather_param(self, value, axes):
        stored = self.layout.sharding(axes, value.shape)
        used = self.layout.sharding([None if self._is_storage(a) else a for a in axes], value.shape)
        return value if stored == used else _gathered(value, used, stored)

    def _is_storage(self, axis: str | None) -> bool:
        """Whether the mesh axes of a parameter's axis also split rows: then they only store it. Experts stay apart."""
        rows = {*self.layout.splits("batch"), *self.layout.splits("sequence")} - {*self.layout.splits("experts")}
        return bool(rows.intersection(self.layout.splits(axis)))

    def _map(self, function, in_specs, out_specs):
        return jax.shard_map(function, mesh=self.layout.mesh, in_specs=in_specs, out_specs=out_specs)

    def shard_map_local(self, function, arrays, axes):
        specs = tuple(self.layout.spec(names, x.shape) for names, x in zip(axes, arrays, strict=True))
        return self._map(function, specs, specs[0])(*arrays)

    def attention(self, q, k, v, q_segments, kv_segments, *, along: SequenceAxis, **options: Any):
        layout = self.layout
        rows, columns, heads = (layout.splits(axis) for axis in ("batch", along, "heads"))
        _check_divides(layout, "rows", q.shape[0], rows)
        same_row = q_segments is kv_segments
        # what is added belongs to segment 0: it sees nothing and nothing sees it
        S, parts = q.shape[1], layout.size(columns)
        q, q_segments = _padded(q, parts), _padded(q_segments, parts)
        k, v, kv_segments = (_padded(x, parts) for x in (k, v, kv_segments))
        k, v = (self._for_heads(x, q.shape[2]) for x in (k, v))
        part = functools.partial(context.attention, axes=columns, same_row=same_row, **options)
        wide, ids = P(rows, columns, heads), P(rows, columns)
        return self._map(part, (wide, wide, wide, ids, ids), wide)(q, k, v, q_segments, kv_segments)[:, :S]

    def _for_heads(self, x, count: int):
        """Keys or values [B, T, K, D] with a head for each part of ``count`` query heads: repeated where K is fewer."""
        axes, K = self.layout.splits("heads"), x.shape[2]
        parts = self.layout.size(axes)
        _check_divides(self.layout, "attention heads", count, axes)
        if K % parts == 0:
            return x
        if parts % K:
            raise UserError(f"{K} key heads and {' x '.join(axes)} = {parts} do not divide one another")
        return jnp.repeat(x, parts // K, axis=2)

    def expand_kv_heads(self, x, num_heads):
        spec = P(self.layout.splits("batch"), P.UNCONSTRAINED, self.layout.splits("heads"))
        return self._at(self._for_heads(x, num_heads), spec)

    def init_cache(self, k, v, length):
        spec = P(self.layout.splits("batch"), self.layout.splits("heads"))
        return tuple(self._at(x, spec) for x in init_cache(k, v, length))

    def _at(self, x, spec: P):
        return lax.with_sharding_constraint(x, NamedSharding(self.layout.mesh, spec))

    def cached_attention(self, q, k, v, cache, cache_index, **options: Any):
        rows, heads = (self.layout.splits(axis) for axis in ("batch", "heads"))
        _check_divides(self.layout, "rows", q.shape[0], rows)
        k, v = (self._for_heads(x, q.shape[2]) for x in (k, v))
        part = functools.partial(cached_attention, **options)
        wide, kept = P(rows, None, heads), P(rows, heads)
        return self._map(part, (wide, wide, wide, (kept, kept), P(rows)), (wide, (kept, kept)))(
            q, k, v, cache, cache_index
        )

    def embedding_lookup(self, table, index, dtype, *, axes=("vocab", "embed"), along: SequenceAxis = "sequence"):
        rows, columns = self.layout.splits("batch"), self.layout.splits(along)
        stored = self.layout.spec(axes, table.shape)
        words, width = _names(stored[0]), tuple(a for a in _names(stored[1]) if a in rows)
        apart = () if width else _names(stored[1])  # parts of the width with devices that want the same rows

        def part(table, index):
            if width:
                index = lax.all_gather(index, width, axis=0, tiled=True)
            if words:
                index = index - lax.axis_index(words) * table.shape[0]
                own = (index >= 0) & (index < table.shape[0])
                found = jnp.where(own[..., None], table[jnp.where(own, index, 0)], 0).astype(dtype)
                found = lax.psum(found, words)
            else:
                found = table[index].astype(dtype)
            # every device has a part of the width for the rows of all; it wants all of the width for its own
            return lax.all_to_all(found, width, split_axis=0, concat_axis=2, tiled=True) if width else found

        split, tokens = P(words or None, width or apart or None), P(rows, columns)
        found = self._map(part, (split, tokens), P(rows, columns, apart or None))(table, index)
        return self._at(found, tokens) if apart else found

    def gather_vision_tokens(self, values, index):
        rows, columns, parts = (self.layout.splits(axis) for axis in ("batch", "sequence", "vision_tokens"))
        values = _padded(values, self.layout.size(parts))

        def part(values, index):
            if parts:
                values = context.gathered(values, parts)
            return take_along_sequence(values, index)

        return self._map(part, (P(rows, parts), P(rows, columns)), P(rows, columns))(values, index)

    def apply_experts(self, function, x, expert, gate, weights, axes):
        rows, columns = self.layout.splits("batch"), self.layout.splits("sequence")
        weights = tuple(self.all_gather_param(w, a) for w, a in zip(weights, axes, strict=True))
        kept = [[None if a == "embed" or self._is_storage(a) else a for a in names] for names in axes]
        specs = [self.layout.spec(names, w.shape) for names, w in zip(kept, weights, strict=True)]
        owners = _names(specs[0][0])  # each has experts of its own
        hidden = tuple({name for spec in specs for part in spec[1:] for name in _names(part)})
        shared = tuple(a for a in owners if a in rows)  # they have rows of their own too: they exchange tokens
        apart = tuple(a for a in owners if a not in rows)
        same = (*apart, *hidden)  # devices that see the same tokens and add up what they find

        def part(x, expert, gate, *weights):
            if same:  # said here, not left to where they first meet: a gather forgets it in its gradient
                x, gate = (lax.pcast(a, same, to="varying") for a in (x, gate))
            if shared:
                x, expert, gate = (lax.all_gather(a, shared, axis=0, tiled=True) for a in (x, expert, gate))
            if owners:
                expert = expert - lax.axis_index(owners) * weights[0].shape[0]
            y, taken = function(x, expert, gate, *weights)
            y = lax.psum(y, same) if same else y
            taken = lax.psum(taken, apart) if apart else taken
            if shared:
                y, taken = (lax.psum_scatter(a, shared, scatter_dimension=0, tiled=True) for a in (y, taken))
            return y, taken

        tokens = P(rows, columns)
        return self._map(part, (tokens, tokens, tokens, *specs), (tokens, tokens))(x, expert, gate, *weights)

    def cross_entropy_sum(self, hidden, kernel, targets, weights, *, vocabulary_first=False, **options: Any):
        axes = ("vocab", "embed") if vocabulary_first else ("embed", "vocab")
        kernel = kernel.astype(hidden.dtype)
        rows, columns = self.layout.splits("batch"), self.layout.splits("sequence")
        vocabulary, width = (0, 1) if vocabulary_first else (1, 0)
        stored = self.layout.spec(axes, kernel.shape)
        words = _names(stored[vocabulary])
        parts = _names(stored[width]) if self._is_storage("embed") else ()
        if self.layout.splits("vocab") and not words:
            # a vocabulary that does not divide: the tokens are split over its devices instead
            more = self.layout.splits("vocab")
            if hidden.shape[1] % self.layout.size((*columns, *more)) == 0:
                columns = (*columns, *more)

        def part(hidden, kernel, targets, weights):
            # gathered here and not before: its gradient is then scattered as it is summed, and then summed over the
            # other devices, each of its part
            others = tuple(a for a in (*rows, *columns) if a not in parts)
            kernel = lax.pcast(kernel, others, to="varying") if others else kernel
            kernel = lax.all_gather(kernel, parts, axis=width, tiled=True) if parts else kernel
            flat = hidden.reshape(-1, hidden.shape[-1])
            found = linear_cross_entropy_sum(
                flat,
                kernel,
                targets.reshape(-1),
                weights.reshape(-1),
                vocabulary_first=vocabulary_first,
                axis_name=words or None,
                **options,
            )
            return CrossEntropySum(*lax.psum(found, (*rows, *columns))) if (*rows, *columns) else found

        tokens = P(rows, columns)
        split = tokens, P(*stored), tokens, tokens
        return self._map(part, split, CrossEntropySum(P(), P()))(hidden, kernel, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(value, used, stored):
    """``value`` laid out as ``used``; its gradient goes back as ``stored``, so that it is scattered, not gathered."""
    return lax.with_sharding_constraint(value, used)


def _gathered_forward(value, used, stored):
    return _gathered(value, used, stored), None


def _gathered_backward(used, stored, _, cotangent):
    return (lax.with_sharding_constraint(cotangent, stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _padded(x: jax.Array, parts: int) -> jax.Array:
    """Zeros behind the second dimension, so that it divides into parts."""
    lacking = -x.shape[1] % parts
    return jnp.pad(x, [(0, 0), (0, lacking)] + [(0, 0)] * (x.ndim - 2)) if lacking else x


def _check_divides(layout: Layout, what: str, length: int, axes: tuple[str, ...]) -> None:
    if length % layout.size(axes):
        by = f"{' x '.join(axes)} = {layout.size(axes)}"
        raise UserError(f"{length} {what} do not divide by {by}; choose another mesh")
