"""Attention of one or a few new tokens to a key/value cache, and writing to that cache.

Shapes: B sequences, S new tokens each, H query heads, K key/value heads (H a multiple of K), D head size. A cache has R
rows of T entries: one row for each sequence, or, paged, one row for each page, of which a sequence has at most N. Keys
are [R, K, D, T] and values [R, K, T, D]: the layouts that the two matrix products read, so no step transposes them.
The pages of L layers may lie in one array, with an axis L in front.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jvlm_kernels.attention.api import segment_attention
from jvlm_kernels.platforms import Operation

Cache = tuple[Float[Array, "*L R K D T"], Float[Array, "*L R K T D"]]
# The number of a layer, from 0.
Layer = int | np.integer | Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The static arguments of a call.

    Attributes:
      scale: multiplies the query-key products.
      window: a token attends to the last ``window`` tokens, itself included; None is no limit.
      paged: whether the entries of a sequence are spread over pages.
      interpret: run a Pallas kernel in the interpreter, on any device.
    """

    scale: float
    window: int | None
    paged: bool
    interpret: bool


@dataclasses.dataclass(frozen=True)
class WriteSpec:
    """The static arguments of writing keys; fields as in `DecodeSpec`."""

    paged: bool
    interpret: bool


# Each module has ``attend(spec, q, keys, values, lengths, tables) -> (out,)``; tables are zeros if not paged.
_OPERATION = Operation(
    "decode_attention",
    {
        "pallas_tpu": "jvlm_kernels.decode.tpu",
        "pallas_gpu": "jvlm_kernels.decode.gpu",
        "xla_pages": "jvlm_kernels.decode.cpu",
        "xla": "jvlm_kernels.decode.xla",
    },
    batched=False,
)
# Each module has ``write(spec, keys, k, row, index) -> (keys,)``. Values need no kernel: XLA scatters them in place.
_WRITING = Operation(
    "extend_cache",
    {"pallas_tpu": "jvlm_kernels.decode.write_tpu", "xla": "jvlm_kernels.decode.write_xla"},
    batched=False,
)


def decode_implementations() -> tuple[str, ...]:
    """Return the names that `decode_attention` accepts as ``implementation=``, in order of preference."""
    return tuple(_OPERATION.modules)


def decode_attention(
    q: Float[Array, "B S H D"],
    cache: Cache,
    lengths: Int[Array, " B"],
    *,
    block_tables: Int[Array, "B N"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B S H D"]:
    """Return the attention of the last S tokens of each sequence to all its tokens up to themselves.

    The cache already holds the S new tokens. Scores and softmax are float32. Time follows the lengths, not the length
    of the cache. A token before the start of its sequence (``lengths`` < S) gives zeros.

    Args:
      cache: keys and values; see `init_cache`.
      lengths: tokens of each sequence, including the S new ones.
      block_tables: page numbers of each sequence in order; entries behind its length may be the number of any page.
      scale: defaults to D ** -0.5.
      window: see `DecodeSpec`.
      implementation, interpret: as in `segment_attention`.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      Unavailable: the requested implementation, or every one, cannot run this call; the message says why for each.
    """
    keys, values = cache
    B, _, H, D = q.shape
    K = keys.shape[1]
    if keys.shape[2] != D or values.shape != (*keys.shape[:2], keys.shape[3], D):
        raise ValueError(f"q {q.shape}, keys {keys.shape} and values {values.shape} do not fit together")
    if H % K:
        raise ValueError(f"{H} query heads are not a multiple of {K} key/value heads")
    if lengths.shape != (B,):
        raise ValueError(f"lengths {lengths.shape} do not fit {B} sequences")
    if block_tables is None and keys.shape[0] != B:
        raise ValueError(f"a cache of {keys.shape[0]} rows does not fit {B} sequences; pages need block_tables")
    if block_tables is not None and (block_tables.ndim != 2 or block_tables.shape[0] != B):
        raise ValueError(f"block_tables {block_tables.shape} do not fit {B} sequences")
    if window is not None and window < 1:
        raise ValueError(f"window must be positive, got {window}")
    spec = DecodeSpec(float(D**-0.5 if scale is None else scale), window, block_tables is not None, interpret)
    names = _OPERATION.runnable(implementation, interpret, spec, q, keys, values)
    tables = jnp.zeros((B, 1), jnp.int32) if block_tables is None else block_tables.astype(jnp.int32)
    (out,) = _OPERATION.run(spec, names, "attend", q, keys, values, lengths.astype(jnp.int32), tables)
    return out


def init_cache(k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], max_length: int) -> Cache:
    """Return a cache of ``max_length`` >= S entries that starts with the keys and values of a prompt."""
    empty = max_length - k.shape[1]
    k_BKDS, v_BKSD = jnp.transpose(k, (0, 2, 3, 1)), jnp.transpose(v, (0, 2, 1, 3))
    return (
        jnp.pad(k_BKDS, ((0, 0), (0, 0), (0, 0), (0, empty))),
        jnp.pad(v_BKSD, ((0, 0), (0, 0), (0, empty), (0, 0))),
    )


def extend_cache(
    cache: Cache,
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    cache_index: Int[Array, " B"],
    *,
    block_tables: Int[Array, "B N"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Cache:
    """Return the cache with the keys and values of S new tokens written from ``cache_index`` on.

    The update is in place if the cache is donated. Entries behind the end of the cache or block table are dropped.

    Args:
      cache_index: entry of each sequence's first new token, which is the number of tokens already cached.
      implementation, interpret: for writing keys, "pallas_tpu" or "xla"; as in `segment_attention`.
    """
    keys, values = cache
    index = cache_index[:, None] + jnp.arange(k.shape[1])
    if block_tables is None:
        row = jnp.broadcast_to(jnp.arange(len(k))[:, None], index.shape)
    else:
        size = keys.shape[3]
        page, index = jnp.divmod(index, size)
        row = jnp.take_along_axis(block_tables, page, axis=1, mode="fill", fill_value=keys.shape[0])
    spec = WriteSpec(block_tables is not None, interpret)
    names = _WRITING.runnable(implementation, interpret, spec, keys, k)
    (keys,) = _WRITING.run(spec, names, "write", keys, k, row, index)
    # one scatter index for each head, as in write_xla
    at = row[..., None], jnp.arange(v.shape[2]), index[..., None]
    values = values.at[at].set(v.astype(values.dtype), mode="drop")
    return keys, values


def init_pages(
    num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike, *, layers: int | None = None
) -> Cache:
    """Return an empty cache of pages: zeros, so that what an empty row attends to is a finite number.

    Args:
      layers: of an axis in front; None has none.
    """
    shape = *(() if layers is None else (layers,)), num_pages, kv_heads
    return jnp.zeros((*shape, head_dim, page_size), dtype), jnp.zeros((*shape, page_size, head_dim), dtype)


def _of_all_layers(cache: Cache, layer: Layer | None) -> tuple[tuple[Array, Array], Layer]:
    """Return the pages of all layers one behind the other, which moves nothing, and the number of the layer's first."""
    if layer is None:
        return cache, 0
    return tuple(x.reshape(-1, *x.shape[2:]) for x in cache), layer * cache[0].shape[1]


def _shaped_like(pages: tuple[Array, Array], cache: Cache) -> tuple[Array, Array]:
    return tuple(new.reshape(old.shape) for new, old in zip(pages, cache, strict=True))


def write_pages(
    cache: Cache, k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], pages: Int[Array, "B N"]
) -> Cache:
    """Return the cache with whole pages replaced by the keys and values of S = N * T tokens, in order.

    A page is one block of the arrays, so that on every device this is a copy in place, if the cache is donated.
    """
    keys, values = cache
    T = keys.shape[3]

    def blocks(x):
        return x.reshape(-1, T, *x.shape[2:])

    at = pages.reshape(-1)
    k_RKDT, v_RKTD = jnp.transpose(blocks(k), (0, 2, 3, 1)), jnp.transpose(blocks(v), (0, 2, 1, 3))
    return keys.at[at].set(k_RKDT.astype(keys.dtype)), values.at[at].set(v_RKTD.astype(values.dtype))


def read_pages(cache: Cache, pages: Int[Array, "B N"]) -> tuple[Float[Array, "B P K D"], Float[Array, "B P K D"]]:
    """Return the keys and values in pages, P = N * T of them in order."""
    keys, values = (x[pages] for x in cache)  # [B, N, K, D, T], [B, N, K, T, D]
    k, v = jnp.transpose(keys, (0, 1, 4, 2, 3)), jnp.transpose(values, (0, 1, 3, 2, 4))
    return tuple(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))


def chunk_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segments: Int[Array, "B S"],
    cache: Cache,
    pages: Int[Array, "B N"],
    past_pages: Int[Array, "B M"],
    past_segments: Int[Array, "B P"],
    *,
    layer: Layer | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S H D"], Cache]:
    """Write chunks of several sequences into pages, and return their attention to themselves and to earlier pages.

    A sequence's tokens are a segment that begins at a whole page of S; what fills its last page is segment 0. A key or
    value that is not finite makes the outputs of its segment NaN, and leaves those of others as they are.

    Args:
      segments: of the new tokens; 0 is padding.
      pages: where the new tokens go, a page for each T of them; page 0 takes padding.
      past_pages: pages of earlier tokens of these sequences, in any order; with M = 0 there are none.
      past_segments: the segment whose past each of their entries is; 0 for entries that nothing attends to.
      layer: whose pages these are, of a cache with an axis of layers.
      window: as in `segment_attention`; only without past pages.
      implementation: of `segment_attention`.

    Raises:
      ValueError: a window and past pages.
    """
    stored, first = _of_all_layers(cache, layer)
    stored = write_pages(stored, k, v, pages + first)
    cache = _shaped_like(stored, cache)
    options = {"implementation": implementation, "return_logsumexp": True}
    k, v, broken = _without_broken(k, v, segments, segments)
    out, logsumexp = segment_attention(q, k, v, segments, segments, causal=True, window=window, **options)
    if not past_pages.shape[1]:
        return jnp.where(broken[..., None, None], jnp.nan, out), cache
    if window is not None:
        raise ValueError("a chunk with a past has no window: compute windowed sequences whole")
    read = (
        x.astype(q.dtype) for x in read_pages(stored, past_pages + first)
    )  # a cache may be narrower than the queries
    *past, broken_before = _without_broken(*read, past_segments, segments)
    before, logsumexp_before = segment_attention(q, *past, segments, past_segments, **options)
    top = jnp.maximum(logsumexp, logsumexp_before)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    own, earlier = (jnp.exp(x - top)[..., None] for x in (logsumexp, logsumexp_before))
    total = jnp.where(own + earlier > 0, own + earlier, 1.0)
    joined = (out.astype(jnp.float32) * own + before.astype(jnp.float32) * earlier) / total
    return jnp.where((broken | broken_before)[..., None, None], jnp.nan, joined).astype(q.dtype), cache


def _without_broken(k, v, key_segments, segments):
    """Return keys and values with zeros for those that are not finite, and whether each query's segment has such ones.

    Attention multiplies what is masked with 0, and 0 times NaN would be NaN for the queries of all segments.
    """
    finite = (jnp.isfinite(k) & jnp.isfinite(v)).all((2, 3))
    bad = ~finite & (key_segments > 0)
    broken = (bad[:, None] & (key_segments[:, None] == segments[:, :, None])).any(2)
    return *(jnp.where(finite[..., None, None], x, 0) for x in (k, v)), broken


def cached_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    cache: Cache,
    cache_index: Int[Array, " B"],
    *,
    block_tables: Int[Array, "B N"] | None = None,
    layer: Layer | None = None,
    **options,
) -> tuple[Float[Array, "B S H D"], Cache]:
    """Write new tokens into the cache from ``cache_index`` on, and return their attention and the new cache.

    Args:
      layer: whose pages ``block_tables`` names, of a cache with an axis of layers.
      options: of `decode_attention`.
    """
    stored, first = _of_all_layers(cache, layer)
    tables = block_tables if layer is None else block_tables + first
    stored = extend_cache(stored, k, v, cache_index, block_tables=tables)
    # a planner reads the name: where a kernel cannot say what it reads, the cache of all layers would count
    layers = 1 if layer is None else len(cache[0])
    with jax.named_scope(f"one_of_{layers}_layers"):
        out = decode_attention(q, stored, cache_index + q.shape[1], block_tables=tables, **options)
    return out, _shaped_like(stored, cache)
