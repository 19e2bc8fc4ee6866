"""Operations that depend on how a model is spread over devices.

Models call `current()` while they are traced and name the logical axes of their arrays. `LocalOps` here computes
everything on one device; `jvlm.parallel.sharded_ops.ShardedOps` splits the same operations over a mesh.

Axes: B rows, S queries, T keys, H query heads, K key/value heads, D width, V vocabulary, F vision tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num
from jvlm_kernels import (
    CrossEntropySum,
    cached_attention,
    chunk_attention,
    init_pages,
    linear_cross_entropy_sum,
    segment_attention,
)

# Logical axes that a mesh may split together with everything that is indexed by them.
SequenceAxis = Literal["sequence", "patches", "vision_tokens"]
# Keys [L, R, N, D, T] and values [L, R, N, T, D] of L layers, R pages and N heads, as `jvlm_kernels.cached_attention`
# takes them.
KVCache = tuple[Float[Array, "L R _ _ T"], Float[Array, "L R _ T _"]]
# The number of a layer, from 0: of numpy where layers are unrolled.
Layer = Int[Array, ""] | np.integer


@runtime_checkable
class DeviceOps(Protocol):
    """The operations that `LocalOps` and `ShardedOps` implement.

    An implementation is hashable, and equal to another that splits arrays in the same way: it is part of the key under
    which JAX caches compiled programs (see `use`).
    """

    def constrain(self, x: Num[Array, "..."], axes: tuple[str | None, ...]) -> Num[Array, "..."]:
        """Return an activation, split as its logical axes ("batch", "sequence", "patches", "embed", "mlp") ask."""

    def is_split(self, axis: str) -> bool:
        """Return whether different devices compute different parts of this logical axis of a parameter."""

    def all_gather_param(self, value: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
        """Return a parameter ready for use: gathered over the mesh axes that only store it (FSDP)."""

    def shard_map_local(
        self, function: Callable[..., Array], arrays: Sequence[Array], axes: Sequence[tuple[str | None, ...]]
    ) -> Array:
        """Call a function on each device's shards of arrays with these logical axes; the result has the first's axes.

        For functions that need no other device's shard and that XLA does not split well.
        """

    def attention(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        q_segments: Int[Array, "B S"],
        kv_segments: Int[Array, "B T"],
        *,
        along: SequenceAxis,
        **options: Any,
    ) -> Float[Array, "B S H D"]:
        """`jvlm_kernels.segment_attention` with its ``options``; ``along`` is the logical axis of S and T.

        For self-attention, pass the same array as ``q_segments`` and ``kv_segments``.
        """

    def init_pages(
        self,
        layers: int,
        num_pages: int,
        page_size: int,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
    ) -> KVCache:
        """Return an empty cache of pages of each layer, for the keys and values that ``num_heads`` query heads read.

        It has ``kv_heads`` heads, or as many as there are devices that split the heads where that is larger. Devices
        that split sequences have pages of their own, numbered from 0 on each.
        """

    def cached_attention(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        cache: KVCache,
        layer: Layer,
        cache_index: Int[Array, " B"],
        block_tables: Int[Array, "B W"],
        **options: Any,
    ) -> tuple[Float[Array, "B S H D"], KVCache]:
        """`jvlm_kernels.cached_attention` of a layer with its ``options``: write k and v, then attend."""

    def chunk_attention(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        segments: Int[Array, "B S"],
        cache: KVCache,
        layer: Layer,
        pages: Int[Array, "B N"],
        past_pages: Int[Array, "B M"],
        past_segments: Int[Array, "B P"],
        **options: Any,
    ) -> tuple[Float[Array, "B S H D"], KVCache]:
        """`jvlm_kernels.chunk_attention` of a layer with its ``options``; each device that splits rows has one."""

    def embedding_lookup(
        self,
        table: Float[Array, "V D"],
        index: Int[Array, "B S"],
        dtype: DTypeLike,
        *,
        axes: tuple[str, str] = ("vocab", "embed"),
        along: SequenceAxis = "sequence",
    ) -> Float[Array, "B S D"]:
        """Return ``table[index]`` in ``dtype``. ``axes`` are the logical axes of the table."""

    def gather_vision_tokens(self, values: Num[Array, "B F D"], index: Int[Array, "B S"]) -> Num[Array, "B S D"]:
        """Return ``values[b, index[b, s]]``. Results for negative indices are unspecified: callers mask them."""

    def apply_experts(
        self,
        function: Callable[..., tuple[Array, Array]],
        x: Float[Array, "B S D"],
        expert: Int[Array, "B S k"],
        gate: Float[Array, "B S k"],
        weights: tuple[Float[Array, "E _ _"], ...],
        axes: tuple[tuple[str, ...], ...],
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S k"]]:
        """Call ``function(x, expert, gate, *weights)`` where tokens meet the weights of their experts.

        Args:
          function: returns (sum of the experts' outputs, 1 for each choice that an expert took). Both are sums over
            experts, so each device adds its own; choices of other devices' experts have numbers outside 0..E.
          axes: logical axes of each of the weights, "experts" first.
        """

    def cross_entropy_sum(
        self,
        hidden: Float[Array, "B S D"],
        kernel: Float[Array, "V D"] | Float[Array, "D V"],
        targets: Int[Array, "B S"],
        weights: Float[Array, "B S"],
        *,
        vocabulary_first: bool = False,
        groups: Int[Array, "B S"] | None = None,
        **options: Any,
    ) -> CrossEntropySum:
        """`jvlm_kernels.linear_cross_entropy_sum` with its ``options``, over the tokens of all devices."""


class LocalOps:
    """`DeviceOps` of one device. Instances are equal."""

    def __eq__(self, other: object) -> bool:
        return type(other) is LocalOps

    def __hash__(self) -> int:
        return hash(LocalOps)

    def constrain(self, x, axes):
        return x

    def is_split(self, axis):
        return False

    def all_gather_param(self, value, axes):
        return value

    def shard_map_local(self, function, arrays, axes):
        return function(*arrays)

    def attention(self, q, k, v, q_segments, kv_segments, *, along: SequenceAxis, **options: Any):
        return segment_attention(q, k, v, q_segments, kv_segments, **options)

    def init_pages(self, layers, num_pages, page_size, num_heads, kv_heads, head_dim, dtype):
        return init_pages(num_pages, page_size, kv_heads, head_dim, dtype, layers=layers)

    def cached_attention(self, q, k, v, cache, layer, cache_index, block_tables, **options: Any):
        return cached_attention(q, k, v, cache, cache_index, block_tables=block_tables, layer=layer, **options)

    def chunk_attention(self, q, k, v, segments, cache, layer, pages, past_pages, past_segments, **options: Any):
        return chunk_attention(q, k, v, segments, cache, pages, past_pages, past_segments, layer=layer, **options)

    def embedding_lookup(self, table, index, dtype, *, axes=("vocab", "embed"), along: SequenceAxis = "sequence"):
        return table[index].astype(dtype)

    def gather_vision_tokens(self, values, index):
        return take_along_sequence(values, index)

    def apply_experts(self, function, x, expert, gate, weights, axes):
        return function(x, expert, gate, *weights)

    def cross_entropy_sum(
        self, hidden, kernel, targets, weights, *, vocabulary_first=False, groups=None, **options: Any
    ):
        return linear_cross_entropy_sum(
            hidden.reshape(-1, hidden.shape[-1]),
            kernel,
            targets.reshape(-1),
            weights.reshape(-1),
            vocabulary_first=vocabulary_first,
            groups=None if groups is None else groups.reshape(-1),
            **options,
        )


def take_along_sequence(values: Num[Array, "B F D"], index: Int[Array, "B S"]) -> Num[Array, "B S D"]:
    """Return ``values[b, index[b, s]]``; negative indices give element 0."""
    return jnp.take_along_axis(values, jnp.maximum(index, 0)[..., None], axis=1)


_LOCAL = LocalOps()
# Part of the key of every cache of traced and compiled functions: none is used with other ops than it was traced for.
_OPS = jax.make_user_context(None)


def current() -> DeviceOps:
    """Return the operations of the model that is being traced."""
    return _LOCAL if _OPS.value is None else _OPS.value


@contextlib.contextmanager
def use(ops: DeviceOps | None) -> Iterator[None]:
    """Trace and call models with these operations; None is `LocalOps`.

    Works around a call of a compiled function as well as inside the function that is compiled: other operations are
    another key in JAX's caches, so the function is traced anew, and equal ones find what was compiled before.
    """
    with _OPS(None if ops == _LOCAL else ops):
        yield
