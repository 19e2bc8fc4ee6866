"""`segment_attention`: checks of a call, choice of the implementation, gradient rule.

Shapes: B batch rows, S queries, T keys, H query heads, K key/value heads (H a multiple of K), D head size.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jvlm_kernels.attention.tuning import BlockSizes
from jvlm_kernels.platforms import Operation

# Residuals of the forward pass, by the names that `jax.checkpoint` policies know.
RESIDUAL_NAMES = OUT_NAME, LOGSUMEXP_NAME = "segment_attention_out", "segment_attention_logsumexp"


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static arguments of a call.

    Attributes:
      causal: a query attends to keys of its own index or lower.
      window: a query attends to keys less than ``window`` positions away (behind it, when causal); None is no limit.
      scale: multiplies the query-key products.
      max_segment_length: promise that no segment is longer and that equal ids are contiguous. It needs
        ``q_segments`` and ``kv_segments`` to be the same ids; implementations use it to skip keys out of reach.
      has_offset: whether the first query is not key 0 (``q_offset``).
      interpret: run a Pallas kernel in the interpreter, on any device.
      block_sizes: of a Pallas kernel; None takes the measured ones, or a rule.
    """

    causal: bool
    window: int | None
    scale: float
    max_segment_length: int | None
    has_offset: bool = False
    interpret: bool = False
    block_sizes: BlockSizes | None = None


# Each module has ``forward(spec, q, k, v, q_segments, kv_segments, offsets) -> (out, logsumexp)`` and
# ``backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp) -> (dq, dk, dv)``;
# offsets are int32 [B].
_OPERATION = Operation(
    "segment_attention",
    {
        "pallas_tpu": "jvlm_kernels.attention.tpu",
        "mosaic_gpu": "jvlm_kernels.attention.hopper",
        "pallas_gpu": "jvlm_kernels.attention.gpu",
        "xla": "jvlm_kernels.attention.xla",
        "reference": "jvlm_kernels.attention.reference",
    },
)


def implementations() -> tuple[str, ...]:
    """Return the names accepted by ``implementation=``, in order of preference."""
    return tuple(_OPERATION.modules)


def segment_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    max_segment_length: int | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    return_logsumexp: bool = False,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B S H D"] | tuple[Float[Array, "B S H D"], Float[Array, "B S H"]]:
    """Return softmax attention in which a query attends only to keys of its own segment.

    Segment 0 is padding: its queries attend to nothing, and nothing attends to its keys. A query without any key gives
    zeros, a logsumexp of -inf and zero gradients. Scores and softmax are float32 whatever the dtype of the inputs. Time
    follows the blocks of scores that segments touch, if ids ascend along the sequence; the result is right for ids in
    any order.

    Under `jax.checkpoint`, the policy ``save_only_these_names(*RESIDUAL_NAMES)`` saves what the backward pass needs, so
    that no second forward pass is computed.

    Args:
      q, k, v: H is a multiple of K (grouped-query attention).
      q_segments, kv_segments: segment ids; 0 is padding.
      causal, window: see `AttentionSpec`.
      scale: defaults to D ** -0.5.
      max_segment_length: see `AttentionSpec`; a hint for speed that never changes the result while it is true.
      q_offset: index of the first query among the keys, for causal and window, where the queries are a slice of a
        longer sequence (context parallelism); one number, or one for each batch row. None is 0 and, when causal, needs
        S == T.
      implementation: a name from `implementations()`; None takes the first that supports dtype, shape and the device
        that the program is compiled for, also when that is not a device of this machine.
      interpret: run the named Pallas implementation in the interpreter, for tests.
      return_logsumexp: also return the float32 logsumexp of the scaled scores.
      block_sizes: of a Pallas kernel, instead of the measured ones (`jvlm_kernels.attention.tuning`).

    Returns:
      The output in the dtype of ``q``; with ``return_logsumexp``, (output, logsumexp).

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      Unavailable: the requested implementation, or every one, cannot run this call; the message says why for each.
    """
    if max_segment_length is not None and max_segment_length < 1:
        raise ValueError(f"max_segment_length must be positive, got {max_segment_length}")
    if max_segment_length is not None and (q.shape[1] != k.shape[1] or q_offset is not None):
        raise ValueError("max_segment_length needs queries and keys of the same sequence, without q_offset")
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    spec = AttentionSpec(causal, window, scale, max_segment_length, q_offset is not None, interpret, block_sizes)
    names, arrays = _checked(spec, implementation, q, k, v, q_segments, kv_segments, q_offset)
    out, logsumexp = _attend(spec, names, *arrays)
    return (out, logsumexp) if return_logsumexp else out


def segment_attention_gradients(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    out: Float[Array, "B S H D"],
    logsumexp: Float[Array, "B S H"],
    d_out: Float[Array, "B S H D"],
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Return what these keys and values add to the gradients, where queries attend to others too.

    With ``out`` and ``logsumexp`` of attention to all keys, in whatever parts it was computed, the gradients by the
    queries are the sum over the parts, and those by keys and values are each part's own. For ring attention.

    Args:
      out, logsumexp: of attention to all keys.
      d_out: gradient by ``out``.
      The others are those of `segment_attention`, for these keys.

    Returns:
      The gradients by q, k and v, in their dtypes.

    Raises:
      ValueError, Unavailable: as `segment_attention`.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    spec = AttentionSpec(causal, window, scale, None, q_offset is not None, interpret, block_sizes)
    names, arrays = _checked(spec, implementation, q, k, v, q_segments, kv_segments, q_offset)
    return _OPERATION.run(spec, names, "backward", *arrays, out, logsumexp, d_out, jnp.zeros_like(logsumexp))


def _checked(spec: AttentionSpec, implementation, q, k, v, q_segments, kv_segments, q_offset):
    """Return (names of the implementations to compile, their arrays)."""
    _check_shapes(q, k, v, q_segments, kv_segments, spec.causal, spec.window, q_offset)
    names = _OPERATION.runnable(implementation, spec.interpret, spec, q, k, v)
    offsets = jnp.broadcast_to(jnp.asarray(0 if q_offset is None else q_offset, jnp.int32), q.shape[:1])
    return names, (q, k, v, q_segments, kv_segments, offsets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec, names, q, k, v, q_segments, kv_segments, offsets):
    return _OPERATION.run(spec, names, "forward", q, k, v, q_segments, kv_segments, offsets)


def _attend_forward(spec, names, *inputs):
    out, logsumexp = _attend(spec, names, *inputs)
    out, logsumexp = checkpoint_name(out, OUT_NAME), checkpoint_name(logsumexp, LOGSUMEXP_NAME)
    return (out, logsumexp), (*inputs, out, logsumexp)


def _attend_backward(spec, names, saved, cotangents):
    return (*_OPERATION.run(spec, names, "backward", *saved, *cotangents), None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _check_shapes(q, k, v, q_segments, kv_segments, causal, window, q_offset) -> None:
    B, S, H, D = q.shape
    T, K = k.shape[1:3]
    if k.shape != (B, T, K, D) or v.shape != k.shape:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if H % K:
        raise ValueError(f"{H} query heads are not a multiple of {K} key/value heads")
    if q_segments.shape != (B, S) or kv_segments.shape != (B, T):
        raise ValueError(f"segment ids {q_segments.shape}, {kv_segments.shape} do not fit q {q.shape}, k {k.shape}")
    if causal and S != T and q_offset is None:
        raise ValueError(f"causal attention needs equal lengths or a q_offset, got S={S} and T={T}")
    if q_offset is not None and jnp.shape(q_offset) not in ((), (B,)):
        raise ValueError(f"q_offset is one number, or one for each of {B} batch rows; got shape {jnp.shape(q_offset)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be positive, got {window}")
