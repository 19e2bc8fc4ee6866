"""Attention of one or a few new tokens to a cache of keys and values.

Shapes: B sequences, S new tokens each, H query heads, K key/value heads (H a multiple of K), D head size. A cache has R
rows of T places: a row for each sequence, or, paged, a row for each page, of which a sequence has at most N. It holds
keys as [R, K, D, T] and values as [R, K, T, D]: what the two matrix products read, so that no step transposes it.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jvlm_kernels.platforms import Operation

Cache = tuple[Float[Array, "R K D T"], Float[Array, "R K T D"]]


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The static part of a call.

    Attributes:
      window: a token sees places fewer than ``window`` behind it, itself included; None is no limit.
      paged: whether a sequence's places are spread over pages.
      interpret: run a Pallas kernel in the interpreter, on any device.
    """

    scale: float
    window: int | None
    paged: bool
    interpret: bool


@dataclasses.dataclass(frozen=True)
class WriteSpec:
    """The static part of writing keys; fields as in `DecodeSpec`."""

    paged: bool
    interpret: bool


# Each offers ``attend(spec, q, keys, values, lengths, tables) -> (out,)``; tables are zeros for a cache without pages.
_OPERATION = Operation(
    "decode_attention",
    {
        "pallas_tpu": "jvlm_kernels.decode.tpu",
        "pallas_gpu": "jvlm_kernels.decode.gpu",
        "xla": "jvlm_kernels.decode.xla",
    },
    rows=False,
)
# Each offers ``write(spec, keys, k, row, at) -> (keys,)``. Values need no kernel: they are scattered in place.
_WRITING = Operation(
    "extend_cache",
    {"pallas_tpu": "jvlm_kernels.decode.write_tpu", "xla": "jvlm_kernels.decode.write_xla"},
    rows=False,
)


def decode_implementations() -> tuple[str, ...]:
    """Names accepted by ``implementation=`` here, in order of preference."""
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
    """Attention of the last S tokens of each sequence to its whole past, which the cache holds, theirs included.

    Scores and softmax are float32. Cost follows the lengths, not the places of the cache. A token before the
    beginning of its sequence (``lengths`` < S) gives zeros.

    Args:
      lengths: tokens of each sequence, the S new ones among them.
      block_tables: the pages of each sequence in order; entries behind its length may hold any page's number.
      scale: defaults to D ** -0.5.
      implementation, interpret: as in `segment_attention`.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      Unavailable: the implementation asked for (or every one) cannot run this call; says why for each.
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


def open_cache(k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], places: int) -> Cache:
    """A cache of ``places`` >= S places that begins with the keys and values of a prompt."""
    empty = places - k.shape[1]
    k_BKDS, v_BKSD = jnp.transpose(k, (0, 2, 3, 1)), jnp.transpose(v, (0, 2, 1, 3))
    return (
        jnp.pad(k_BKDS, ((0, 0), (0, 0), (0, 0), (0, empty))),
        jnp.pad(v_BKSD, ((0, 0), (0, 0), (0, empty), (0, 0))),
    )


def extend_cache(
    cache: Cache,
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    place: Int[Array, " B"],
    *,
    block_tables: Int[Array, "B N"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Cache:
    """Write the keys and values of S new tokens at ``place`` and behind it; in place, if the cache is donated.

    Places outside the cache (or the table) are not written.

    Args:
      implementation, interpret: of the keys' writing, "pallas_tpu" or "xla"; as in `segment_attention`.
    """
    keys, values = cache
    at = place[:, None] + jnp.arange(k.shape[1])
    if block_tables is None:
        row = jnp.broadcast_to(jnp.arange(len(k))[:, None], at.shape)
    else:
        size = keys.shape[3]
        page, at = jnp.divmod(at, size)
        row = jnp.take_along_axis(block_tables, page, axis=1, mode="fill", fill_value=keys.shape[0])
    spec = WriteSpec(block_tables is not None, interpret)
    names = _WRITING.runnable(implementation, interpret, spec, keys, k)
    (keys,) = _WRITING.run(spec, names, "write", keys, k, row, at)
    # one index for each head, as in write_xla
    values = values.at[row[..., None], jnp.arange(v.shape[2]), at[..., None]].set(v.astype(values.dtype), mode="drop")
    return keys, values


def cached_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    cache: Cache,
    place: Int[Array, " B"],
    *,
    block_tables: Int[Array, "B N"] | None = None,
    **options,
) -> tuple[Float[Array, "B S H D"], Cache]:
    """Put new tokens into the cache at ``place``, and let them attend to all up to themselves.

    Args:
      options: of `decode_attention`.
    """
    cache = extend_cache(cache, k, v, place, block_tables=block_tables)
    return decode_attention(q, cache, place + q.shape[1], block_tables=block_tables, **options), cache
